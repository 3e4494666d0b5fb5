"""Settings of transfers, the figures of links that are kept, peers' links without any GPU, and timelines."""

import json
import os
import threading

import pytest

import glake_infer as gi
from glake_infer.allocators import _native
from glake_infer.allocators.errors import InputError
from glake_infer.allocators.pool import Pool
from glake_infer.transfers import paths, relays, settings, timeline
from glake_infer.transfers.host_cache import HostCache
from glake_infer.transfers.paths import STAGING
from glake_infer.transfers.relays import Relays
from glake_infer.transfers.settings import TransferSettings, configure_transfers, transfer_settings

MiB = 1 << 20


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """No settings yet, as in a new process."""
    for variable in settings._VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(settings, "_settings", None)


class TestSettings:
    def test_as_they_are_at_first(self):
        assert transfer_settings() == TransferSettings()
        assert transfer_settings().host_cache is None
        assert 1 <= transfer_settings().reader_count <= settings.READERS

    def test_of_the_environment(self, monkeypatch):
        given = {
            "GLAKE_IN_FLIGHT": "64MiB",
            "GLAKE_READERS": "3",
            "GLAKE_PATHS": "own",
            "GLAKE_HOST_CACHE": "1.5GiB",
            "GLAKE_DIRECT_IO": "always",
            "GLAKE_DIRECT_STORAGE": "never",
        }
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        expected = TransferSettings(64 * MiB, 3, "own", 1536 * MiB, "always", "never")
        assert transfer_settings() == expected
        assert transfer_settings().reader_count == 3
        monkeypatch.setenv("GLAKE_READERS", "5")  # it is read once
        assert transfer_settings() == expected

    def test_an_empty_variable_is_none(self, monkeypatch):
        monkeypatch.setenv("GLAKE_READERS", "")
        monkeypatch.setenv("GLAKE_HOST_CACHE", "none")
        assert transfer_settings() == TransferSettings()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("GLAKE_IN_FLIGHT", "much"),
            ("GLAKE_IN_FLIGHT", "1MiB"),
            ("GLAKE_IN_FLIGHT", "-1"),
            ("GLAKE_READERS", "257"),
            ("GLAKE_READERS", "-1"),
            ("GLAKE_READERS", "a few"),
            ("GLAKE_PATHS", "AUTO"),
            ("GLAKE_HOST_CACHE", "0x10"),
            ("GLAKE_DIRECT_IO", "yes"),
            ("GLAKE_DIRECT_STORAGE", "1"),
        ],
    )
    def test_a_variable_that_says_nothing_valid_is_named(self, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        for _ in range(2):
            with pytest.raises(InputError) as caught:
                transfer_settings()
            assert f"{name}={value!r}" in str(caught.value)

    def test_are_changed_in_part(self):
        assert configure_transfers(readers=4) == TransferSettings(readers=4)
        assert configure_transfers(host_cache="1GiB", paths="all").host_cache == 1024 * MiB
        assert transfer_settings() == TransferSettings(readers=4, host_cache=1024 * MiB, paths="all")
        assert configure_transfers(host_cache=None, readers=0, paths="auto") == TransferSettings()
        assert configure_transfers() == TransferSettings()

    @pytest.mark.parametrize(
        "bad",
        [
            {"in_flight": None},
            {"in_flight": 1},
            {"in_flight": -1},
            {"readers": None},
            {"readers": 1000},
            {"paths": None},
            {"paths": "both"},
            {"host_cache": "all"},
            {"host_cache": -1},
            {"direct_io": True},
            {"threads": 3},
        ],
    )
    def test_nothing_changes_where_something_is_wrong(self, bad):
        configure_transfers(readers=4)
        with pytest.raises(InputError) as caught:
            configure_transfers(**{"host_cache": "1GiB", **bad})
        assert next(iter(bad)) in str(caught.value)
        assert transfer_settings() == TransferSettings(readers=4)

    def test_changes_of_several_threads_are_all_there(self):
        barrier = threading.Barrier(3)
        changes = [{"readers": 7}, {"paths": "own"}, {"host_cache": 5}]

        def change(given):
            barrier.wait(10)
            configure_transfers(**given)

        for _ in range(50):
            configure_transfers(readers=0, paths="auto", host_cache=None)
            threads = [threading.Thread(target=change, args=(each,)) for each in changes]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert transfer_settings() == TransferSettings(readers=7, paths="own", host_cache=5)


class TestBudget:
    def test_has_no_bound_at_first(self):
        cache = HostCache()
        assert cache.reserve(1 << 50)
        assert (cache.bytes, cache.excess(1)) == (1 << 50, 0)

    def test_is_never_exceeded(self):
        configure_transfers(host_cache=100)
        cache, got = HostCache(), []

        def take():
            got.extend(size for size in [7] * 20 if cache.reserve(size))

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(got) == cache.bytes == 98
        assert cache.excess(3) == 1
        assert not cache.reserve(3)
        cache.give_back(98)
        assert cache.reserve(100)
        configure_transfers(host_cache=40)
        assert cache.excess(0) == 60


@pytest.fixture
def links(monkeypatch, tmp_path):
    """Measured rates that are made up: own, by a peer, together; counts measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(paths.cuda, "uuid", lambda index: f"uuid-{index}")
    monkeypatch.setattr(_native, "cuda_driver_version", lambda: 13000)

    class Links:
        def __init__(self):
            self.rates = [(50e9, 50e9), (40e9, 40e9), (85e9, 80e9)]
            self.measured = []

        def measure(self, index, given, repeats, size):
            self.measured.append((index, tuple(given)))
            return self.rates[2 if len(given) == 2 else given[0] is not None]

    made = Links()
    monkeypatch.setattr(paths, "measure", made.measure)
    return made


def ask():
    return paths.figures(0, 1, 4096, STAGING)


class TestFigures:
    def test_are_measured_once(self, links):
        found = ask()
        assert (found.own, found.by_peer, found.together) == tuple(links.rates)
        assert found.gain == pytest.approx(1.6)
        assert len(links.measured) == 3
        assert ask() == found
        assert len(links.measured) == 3

    def test_of_other_gpus_and_drivers_are_others(self, links, monkeypatch):
        ask()
        paths.figures(1, 0, 4096, STAGING)
        assert len(links.measured) == 6
        monkeypatch.setattr(_native, "cuda_driver_version", lambda: 13010)
        links.rates[2] = (60e9, 60e9)
        assert ask().gain == pytest.approx(1.2)
        assert len(links.measured) == 9
        monkeypatch.setattr(_native, "cuda_driver_version", lambda: 13000)
        assert ask().gain == pytest.approx(1.6)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"13000 uuid-0 by uuid-1": 5}', "other", "words"]
    )
    def test_a_file_that_is_something_else_is_replaced(self, links, content):
        ask()
        file = paths.figures_file()
        if content == "other":
            content = json.dumps({key: {"own": [1, 2]} for key in json.loads(file.read_text())}).encode()
        if content == "words":
            words = {"own": ["a", "b"], "by_peer": [1, 1], "together": [1, 1]}
            content = json.dumps(dict.fromkeys(json.loads(file.read_text()), words)).encode()
        file.write_bytes(content)
        assert ask().own == links.rates[0]
        assert len(links.measured) == 6
        ask()
        assert len(links.measured) == 6

    @pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0, -1])
    def test_rates_that_are_none_are_measured_again(self, links, rate):
        ask()
        file = paths.figures_file()
        kept = json.loads(file.read_text())
        for value in kept.values():
            value["by_peer"] = [rate, 1e9]
        file.write_text(json.dumps(kept))
        assert ask().by_peer == links.rates[1]

    @pytest.mark.parametrize("obstacle", ["a file above", "a folder in its place"])
    def test_where_nothing_can_be_kept_they_are_measured_again_and_nothing_is_left(self, links, obstacle):
        file = paths.figures_file()
        if obstacle == "a file above":
            file.parent.parent.mkdir()
            file.parent.write_text("")
        else:
            file.mkdir(parents=True)
        for count in (3, 6):
            assert ask().own == links.rates[0]
            assert len(links.measured) == count
        if obstacle == "a folder in its place":
            assert [path.name for path in file.parent.iterdir()] == [file.name]

    def test_others_stay_and_no_other_file_is_left(self, links):
        ask()
        paths.figures(0, 2, 4096, STAGING)
        file = paths.figures_file()
        assert len(json.loads(file.read_text())) == 2
        assert os.listdir(file.parent) == [file.name]  # noqa: PTH208

    def test_no_gain_without_a_rate(self):
        assert paths.PathFigures((0, 0), (1, 1), (1, 1)).gain == 0


def test_an_interrupted_measurement_leaves_no_copy_queued(monkeypatch):
    events = []

    class Transfer:
        def wait(self, seconds):
            events.append("wait")
            if len(events) == 1:
                raise KeyboardInterrupt
            return True

        def cancel(self):
            events.append("cancel")

    class Engine:
        def add_cuda_path(self, index): ...

        def copy(self, *arguments):
            return Transfer()

        def take_buffer(self, size):
            return 4096, True

        def give_buffer(self, address):
            events.append("give")

    class Pool:
        def allocate(self, size, tag, stream):
            return 8192

        def deallocate(self, address):
            events.append("deallocate")

    monkeypatch.setattr(_native.TransferEngine, "on_cuda", lambda *arguments: Engine())
    monkeypatch.setattr(_native, "device_pool", lambda name: Pool())
    with pytest.raises(KeyboardInterrupt):
        paths.measure(0, [None], 0, 100)
    assert events == ["wait", "cancel", "wait", "give", "deallocate"]


class Peers:
    """GPUs whose pools are counters: `used` is what is allocated in each."""

    def __init__(self, count):
        self.count = count
        self.used = dict.fromkeys(range(count), 0)
        self.full, self.without_access, self.pools = set(), set(), set()
        self.figures = paths.PathFigures((50e9, 50e9), (40e9, 40e9), (85e9, 85e9))
        self.paths = []  # of the engine
        self.fails = None

    def device_pool(self, name):
        peers, index = self, int(name.removeprefix("cuda:"))

        class Native:
            def allocate(self, size, tag, stream):
                if index in peers.full:
                    raise gi.DriverError("no memory")
                peers.used[index] += size
                return 4096

            def deallocate(self, address):
                peers.used[index] -= STAGING

        return Native()

    def add_cuda_relay(self, index, peer, staging, size, known):
        if self.fails:
            raise self.fails
        self.paths.append(peer)

    def remove_further_paths(self, index):
        assert all(self.used[peer] for peer in self.paths)  # memory stays as long as paths use it
        self.paths.clear()


@pytest.fixture
def peers(monkeypatch):
    made = Peers(4)
    monkeypatch.setattr(paths, "gpu_count", lambda: made.count)
    monkeypatch.setattr(paths, "figures", lambda *arguments: made.figures)
    monkeypatch.setattr(_native, "cuda_peers", lambda own, peer: peer not in made.without_access)
    monkeypatch.setattr(_native, "device_pool", made.device_pool)
    monkeypatch.setattr(
        Pool, "current", lambda name: made if int(name.removeprefix("cuda:")) in made.pools else None
    )
    made.relays = Relays(made, 0)
    return made


class TestRelays:
    def test_all_peers(self, peers):
        configure_transfers(paths="all")
        assert peers.relays.ready() == peers.relays.ready() == 3
        assert peers.paths == [1, 2, 3]
        assert peers.used == {0: 0, 1: STAGING, 2: STAGING, 3: STAGING}

    def test_only_its_own(self, peers):
        configure_transfers(paths="own")
        peers.pools = {1, 2}
        assert peers.relays.ready() == 0
        assert peers.paths == []

    def test_those_with_a_pool(self, peers):
        assert peers.relays.ready() == 0
        peers.pools = {0, 2}
        assert peers.relays.ready() == 1
        assert peers.paths == [2]
        peers.pools = {0, 2, 3}
        assert peers.relays.ready() == 2
        assert peers.paths == [2, 3]

    @pytest.mark.parametrize("count", [0, 1])
    def test_without_peers(self, peers, count):
        configure_transfers(paths="all")
        peers.count = count
        assert peers.relays.ready() == 0

    def test_a_peer_without_access_takes_nothing(self, peers, caplog):
        configure_transfers(paths="all")
        peers.without_access = {2}
        assert peers.relays.ready() == 2
        assert peers.paths == [1, 3]
        assert peers.used[2] == 0
        assert caplog.text == ""

    def test_a_full_peer_is_told_of_and_left_out(self, peers, caplog):
        configure_transfers(paths="all")
        peers.full = {1}
        assert peers.relays.ready() == peers.relays.ready() == 2
        assert caplog.text.count("cuda:0 gets no path by cuda:1: no memory") == 1

    @pytest.mark.parametrize("error", [gi.DriverError("lost"), KeyboardInterrupt()])
    def test_a_path_that_cannot_be_made_keeps_no_memory(self, peers, error):
        configure_transfers(paths="all")
        peers.fails = error
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                peers.relays.ready()
        else:
            assert peers.relays.ready() == 0
        assert set(peers.used.values()) == {0}

    def test_a_link_that_adds_nothing_keeps_no_memory(self, peers):
        configure_transfers(paths="all")
        peers.figures = paths.PathFigures((50e9, 50e9), (50e9, 50e9), (54e9, 90e9))
        assert peers.figures.gain < relays.WORTH
        assert peers.relays.ready() == 0
        assert set(peers.used.values()) == {0}

    def test_a_pool_that_closes_gets_its_memory_back(self, peers):
        configure_transfers(paths="all")
        peers.relays.ready()
        peers.relays.leave("cuda:2")
        assert set(peers.used.values()) == {0}
        assert peers.paths == []
        assert peers.relays.ready() == 3

    def test_a_pool_that_has_none_leaves_the_others_alone(self, peers):
        peers.pools = {1}
        peers.relays.ready()
        for device in ("cpu", "cuda:0", "cuda:3"):
            peers.relays.leave(device)
        assert peers.paths == [1]

    def test_one_that_was_full_is_tried_again_after_its_pool_was_closed(self, peers):
        peers.pools, peers.full = {1}, {1}
        assert peers.relays.ready() == 0
        peers.full = set()
        assert peers.relays.ready() == 0
        peers.relays.leave("cuda:1")
        assert peers.relays.ready() == 1


class TestTimeline:
    def test_is_a_trace(self, tmp_path):
        with timeline.record() as made, timeline.span("session", "build", 1000):
            pass
        made.add(
            timeline.Span("reader 1", "transfer 5", made.spans[0].start + 2000, made.spans[0].end + 9000, 64)
        )
        path = tmp_path / "trace.json"
        made.save(path)
        trace = json.loads(path.read_text())
        events = trace["traceEvents"]
        names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
        assert sorted(names.values()) == ["reader 1", "session"]
        first, second = (e for e in events if e["ph"] == "X")
        assert (names[first["tid"]], first["name"], first["ts"]) == ("session", "build", 0)
        assert (names[second["tid"]], second["ts"]) == ("reader 1", 2.0)
        assert second["args"]["bytes"] == 64
        assert all(event["dur"] >= 0 and event["pid"] == 1 for event in (first, second))

    def test_of_nothing_is_a_trace(self, tmp_path):
        timeline.Timeline().save(tmp_path / "trace.json")
        assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []

    def test_nothing_is_recorded_outside(self):
        with timeline.span("row", "name"):
            pass
        with timeline.record() as made:
            pass
        assert [span for span in made.spans if span.row == "row"] == []

    def test_a_block_that_raises_is_recorded_and_ends_the_recording(self):
        with pytest.raises(ZeroDivisionError), timeline.record() as made, timeline.span("row", "name"):
            raise ZeroDivisionError
        assert [span.row for span in made.spans] == ["row"]
        assert timeline._current is None

    def test_an_inner_recording_records_nothing(self):
        with timeline.record() as outer:
            with timeline.record() as inner, timeline.span("row", "name"):
                pass
            with timeline.span("row", "later"):
                pass
        assert inner.spans == []
        assert [span.name for span in outer.spans] == ["name", "later"]

    def test_sources_are_switched_on_and_off(self, monkeypatch):
        monkeypatch.setattr(timeline, "_sources", [])
        seen = []
        timeline.add_source(seen.append, lambda: [("row", "name", 1, 2, 3)])
        with timeline.record() as made:
            timeline.add_source(lambda on: seen.append((on, "late")), list)
        assert seen == [True, (True, "late"), False, (False, "late")]
        assert made.spans == [timeline.Span("row", "name", 1, 2, 3)]
