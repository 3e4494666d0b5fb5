"""The engine of transfers between host memories, over links of any rate, that fail and that end early.

tests/gpu has the links of GPUs.
"""

import ctypes
import errno
import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

import glake_infer as gi
from glake_infer.allocators import _native
from glake_infer.transfers import ending, timeline
from glake_infer.transfers.device import (
    GAP,
    CancelledError,
    EngineTransfers,
    HostTransfers,
    Part,
    Step,
    device_for,
    record_engine,
)
from glake_infer.transfers.settings import transfer_settings

KiB, MiB = 1 << 10, 1 << 20
DIRTY = 0xA5
SMALL = 64 * KiB
"""A slot, in tests of many pieces."""
BLOCK = 4096


class Memory:
    """Memory of a device, dirty at first."""

    def __init__(self, size):
        self._memory = ctypes.create_string_buffer(bytes([DIRTY]) * size, size)
        self.address = ctypes.addressof(self._memory)

    def __bytes__(self):
        return self._memory.raw


class Layout:
    """Parts of random files, and what memory is to hold after they are loaded: `gaps` are the bytes between them."""

    def __init__(self, folder, seed, sizes, gaps, files=5, offsets=True):
        rng = random.Random(seed)
        self.memory = Memory(sum(sizes) + sum(gaps) + 2 * GAP)
        self.parts, self.spans = [], []
        data = [bytearray() for _ in range(files)]
        expected, position = bytearray([DIRTY]) * len(bytes(self.memory)), GAP
        for number, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
            file = data[number % files]
            file += rng.randbytes(rng.randrange(5000) if offsets else 0)
            content = rng.randbytes(size)
            path = folder / f"{seed}-{number % files}"
            self.parts.append(Part(path, len(file), size, self.memory.address + position))
            self.spans.append((position, position + size))
            file += content
            expected[position : position + size] = content
            position += size + gap
        self.expected = bytes(expected)
        for number, content in enumerate(data):
            (folder / f"{seed}-{number}").write_bytes(content + b"behind")
        rng.shuffle(self.parts)

    def check(self):
        """All bytes of parts arrived; between near ones are zeros or what was there, elsewhere what was there."""
        got = bytes(self.memory)
        for start, end in self.spans:
            assert got[start:end] == self.expected[start:end]
        bounds = [0, *itertools.chain.from_iterable(self.spans), len(got)]
        for index, (start, end) in enumerate(zip(bounds[::2], bounds[1::2], strict=True)):
            outside = index in (0, len(self.spans)) or end - start > GAP
            allowed = {DIRTY} if outside else {DIRTY, 0}
            assert set(got[start:end]) <= allowed


def sizes_around(piece):
    return [1, 255, 4096, piece - 1, piece, piece + 1, 2 * piece, 2 * piece + 3]


def random_layout(folder, seed, piece=SMALL, most=40):
    rng = random.Random(seed)
    count = rng.randrange(1, most)
    sizes = [rng.choice([rng.randrange(1, 3000), rng.choice(sizes_around(piece))]) for _ in range(count)]
    gaps = [rng.choice([0, 0, 1, 200, GAP, GAP + 1, 3 * GAP]) for _ in range(count)]
    return Layout(folder, seed, sizes, gaps)


def make(*links, readers=4, slot=SMALL, in_flight=64 * SMALL, gap=GAP):
    """An engine whose device 0 has these links: the arguments of `add_host_path`."""
    engine = _native.TransferEngine.on_host(readers, slot, in_flight, gap)
    for number, link in enumerate(links or [{}]):
        engine.add_host_path(0, f"link {number}", **link)
    return engine


def load(engine, parts, target=0, **options):
    numbers = {}
    named = [
        (numbers.setdefault(p.path, len(numbers)), p.offset, p.size, p.address, p.rows, p.pitch)
        for p in parts
    ]
    return engine.load(target, [os.fspath(path) for path in numbers], named, **options)


def ended(transfer, seconds=30):
    assert transfer.wait(seconds)
    return transfer.view()


def check_idle(engine):
    assert engine.memory()["in_use"] == 0


def copy(engine, size, down=True, **options):
    """Start a copy of random bytes; returns the transfer, and what checks them, and keeps the memory."""
    source, target = Memory(size), Memory(size)
    data = random.Random(size).randbytes(size)
    ctypes.memmove(source.address if down else target.address, data, size)
    span = (source.address, target.address, size)
    transfer = engine.copy(0, down, [span], **options)

    def check():
        assert bytes(target if down else source) == data

    return transfer, check


def seconds_of(engine, size, **options):
    transfer, check = copy(engine, size, **options)
    start = time.perf_counter()
    view = ended(transfer)
    seconds = time.perf_counter() - start
    assert (view["done"], view["link_error"], view["lost_links"]) == (size, "", [])
    check()
    return seconds


class Device(EngineTransfers):
    """Device 0 of an engine, over some of its paths; the process's settings do not matter."""

    def __init__(self, engine, used=1, in_place=False):
        super().__init__(engine, 0, in_place=in_place)
        self._used = used

    def load(self, parts, **options):
        self.bring([Step(parts=parts)], sum(part.size for part in parts), **options)

    def restore(self, copies, **options):
        self.bring([Step(copies=copies)], sum(size for _, _, size in copies), **options)

    def _paths(self, size):
        return self._used

    def _configure(self):
        return transfer_settings()


def test_the_host_is_a_device_of_the_process():
    assert isinstance(device_for("cpu"), HostTransfers)
    assert device_for("cpu") is device_for("cpu") is HostTransfers.of_host()


class TestLoads:
    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("slot", [BLOCK, SMALL])
    def test_any_parts(self, tmp_path, seed, slot):
        made, engine = random_layout(tmp_path, seed), make({}, {}, slot=slot)
        view = ended(load(engine, made.parts, paths=2))
        assert (view["read_error"], view["link_error"], view["lost_links"]) == (None, "", [])
        assert view["done"] == view["bytes"] >= sum(part.size for part in made.parts)
        made.check()
        check_idle(engine)

    @pytest.mark.parametrize("seed", range(6))
    def test_any_parts_in_place_touch_no_gap(self, tmp_path, seed):
        made, engine = random_layout(tmp_path, seed), make()
        view = ended(load(engine, made.parts, in_place=True))
        assert view["done"] == view["bytes"] == sum(part.size for part in made.parts)
        assert bytes(made.memory) == made.expected
        assert engine.memory()["allocated"] == 0

    def test_of_the_process_as_large_as_they_are(self, tmp_path):
        sizes = [2 * MiB + 1, *sizes_around(SMALL)]
        made = Layout(tmp_path, 0, sizes, [0, 1, GAP, GAP + 1, 0, 5, 0, 9, 0])
        HostTransfers().bring([Step(parts=made.parts)], sum(sizes))
        assert bytes(made.memory) == made.expected

    def test_near_parts_are_one_copy_with_zeros_between(self, tmp_path):
        made, engine = Layout(tmp_path, 0, [100, 1000, 10], [GAP, GAP + 1, 0]), make()
        engine.record(True)
        assert ended(load(engine, made.parts))["bytes"] == 1110 + GAP
        made.check()
        got = bytes(made.memory)
        assert got[GAP + 100 : 2 * GAP + 100] == bytes(GAP)
        assert sorted(e[6] for e in engine.take_events() if not e[0]) == [10, 1100 + GAP]
        ended(load(engine, made.parts))  # what was in a slot before does not come along
        assert bytes(made.memory) == got

    def test_many_small_parts_are_few_copies(self, tmp_path):
        made, engine = Layout(tmp_path, 0, [1000] * 200, [24] * 200), make()
        engine.record(True)
        ended(load(engine, made.parts))
        made.check()
        copies = [event for event in engine.take_events() if not event[0]]
        assert len(copies) == -(-200 * 1024 // SMALL)

    def test_nothing(self):
        engine = make()
        assert ended(engine.load(0, [], []))["bytes"] == 0
        assert ended(engine.copy(0, True, []))["bytes"] == 0
        assert ended(engine.load(0, ["/nowhere"], [(0, 0, 0, 0, 1, 0)]))["read_error"] is None
        Device(engine).load([])
        Device(engine).restore([])
        assert engine.memory()["allocated"] == 0

    def test_what_cannot_be_is_refused(self):
        engine = make()
        with pytest.raises(ValueError, match="not named"):
            engine.load(0, ["a"], [(1, 0, 1, 0, 1, 0)])
        with pytest.raises(ValueError, match="no path to device 7"):
            engine.load(7, ["a"], [(0, 0, 1, 0, 1, 0)])
        with pytest.raises(ValueError, match="one path at least"):
            copy(engine, 1, paths=0)
        for readers, slot, in_flight in [(0, SMALL, SMALL), (1, 5000, SMALL), (1, 0, SMALL), (1, SMALL, 1)]:
            with pytest.raises(ValueError, match="expected at least one reader"):
                _native.TransferEngine.on_host(readers, slot, in_flight, 0)

    def test_a_piece_is_no_larger_than_every_link_can_do(self, tmp_path):
        made, engine = Layout(tmp_path, 0, [3 * SMALL] * 4, [0] * 4), make({}, {"most": 5000})
        assert ended(load(engine, made.parts, paths=2))["lost_links"] == []
        made.check()
        seconds_of(engine, MiB, paths=2)

    def test_many_at_once(self, tmp_path):
        engine = make({}, {"rate": 64 * MiB}, in_flight=8 * SMALL)
        made = [random_layout(tmp_path, seed) for seed in range(24)]
        running = [load(engine, each.parts, paths=1 + i % 2, priority=i % 3) for i, each in enumerate(made)]
        for transfer, each in zip(running, made, strict=True):
            view = ended(transfer)
            assert view["done"] == view["bytes"]
            each.check()
        check_idle(engine)
        assert engine.memory()["peak"] <= engine.memory()["allocated"] <= 8 * SMALL

    def test_of_many_threads(self, tmp_path):
        device, problems = Device(make({}, {}, in_flight=6 * SMALL), 2), []

        def work(seed):
            try:
                made = random_layout(tmp_path, seed)
                for _ in range(5):
                    device.load(made.parts, priority=seed)
                    made.check()
            except BaseException as error:
                problems.append(error)

        in_threads(work, range(6))
        assert not problems, problems[0]


def in_threads(work, arguments):
    threads = [threading.Thread(target=work, args=(each,)) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("in_place", [False, True])
class TestFilesThatCannotBeRead:
    @pytest.mark.parametrize("bad", ["missing", "short", "empty", "folder"])
    def test_are_named_and_the_next_load_works(self, tmp_path, in_place, bad):
        made = Layout(tmp_path, 0, [3 * SMALL] * 8, [0] * 8, files=8, offsets=False)
        device = Device(make(), in_place=in_place)
        part = next(part for part in made.parts if part.path.name == "0-5")
        content = part.path.read_bytes()
        part.path.unlink()
        if bad == "folder":
            part.path.mkdir()
        elif bad != "missing":
            part.path.write_bytes(content[: 2 * SMALL + 100] if bad == "short" else b"")
        with pytest.raises(OSError, match="early" if bad in ("short", "empty") else None) as caught:
            device.load(made.parts)
        assert str(caught.value.filename) == str(part.path)
        check_idle(device._engine)
        if bad in ("missing", "folder"):
            assert caught.value.errno == (errno.ENOENT if bad == "missing" else errno.EISDIR)
            part.path.rmdir() if bad == "folder" else None
        if bad == "short":
            assert f"ends {SMALL - 100} bytes early" in caught.value.strerror
        part.path.write_bytes(content)
        device.load(made.parts)
        made.check()

    @pytest.mark.parametrize("what", ["shrinks", "vanishes"])
    def test_because_something_happens_while_they_are_read(self, tmp_path, in_place, what):
        """The file is open: one that vanishes is read to its end."""
        made = Layout(tmp_path, 0, [200 * SMALL], [0], files=1, offsets=False)
        engine, path = make({"rate": 64 * MiB}, readers=1, in_flight=2 * SMALL), tmp_path / "0-0"
        transfer = load(engine, made.parts, in_place=in_place)
        if what == "shrinks":
            os.truncate(path, 1)
        else:
            path.unlink()
        view = ended(transfer)
        check_idle(engine)
        if what == "shrinks" and view["read_error"]:
            code, name, missing = view["read_error"]
            assert (code, name) == (0, str(path))
            assert 0 < missing <= 200 * SMALL
            assert view["done"] < view["bytes"]
        elif what == "shrinks":
            assert in_place  # it was faster
        elif not view["read_error"]:
            made.check()


@pytest.fixture
def on_disk():
    """A folder of a filesystem that has O_DIRECT."""
    for root in (Path.cwd(), Path("/var/tmp")):
        path = root / f".direct-{os.getpid()}"
        try:
            path.write_bytes(b"x")
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
            return root
        except OSError:
            continue
        finally:
            path.unlink(missing_ok=True)
    pytest.skip("no filesystem with O_DIRECT")


class TestAroundTheCache:
    @pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7, SMALL, 5 * SMALL + 123])
    @pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 77])
    @pytest.mark.parametrize("behind", [0, 10_000])
    def test_any_part_of_a_file(self, on_disk, tmp_path_factory, size, offset, behind):
        path = on_disk / f".around-{os.getpid()}-{size}-{offset}-{behind}"
        content = random.Random(size + offset).randbytes(offset + size + behind)
        try:
            self.write_uncached(path, content)
            engine, memory = make(), Memory(size)
            view = ended(load(engine, [Part(path, offset, size, memory.address)], around_cache=True))
            assert view["read_error"] is None
            assert bytes(memory) == content[offset : offset + size]
            os.truncate(path, offset + size - 1)
            view = ended(load(engine, [Part(path, offset, size, memory.address)], around_cache=True))
            assert view["read_error"] == (0, str(path), 1)
        finally:
            path.unlink(missing_ok=True)

    @staticmethod
    def write_uncached(path, content):
        path.write_bytes(content)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def test_where_the_filesystem_cannot_do_it(self):
        path, memory = Path("/proc/version"), Memory(20)
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(path, os.O_RDONLY | os.O_DIRECT)
        ended(load(make(), [Part(path, 0, 20, memory.address)], around_cache=True))
        assert bytes(memory) == path.read_bytes()[:20]

    @pytest.mark.parametrize("seed", range(4))
    def test_any_parts(self, tmp_path, seed):
        made, engine = random_layout(tmp_path, seed), make()
        ended(load(engine, made.parts, around_cache=True))
        made.check()


class TestPriorities:
    @pytest.mark.parametrize("files", [False, True])
    def test_a_later_transfer_of_a_higher_one_overtakes(self, tmp_path, files):
        engine = make({"rate": 16 * MiB}, in_flight=8 * SMALL)
        made = [Layout(tmp_path, seed, [SMALL] * 32, [0] * 32) for seed in (0, 1)]
        if files:
            low, high = (load(engine, each.parts, priority=i) for i, each in enumerate(made))
        else:
            (low, one), (high, two) = (copy(engine, 2 * MiB, priority=i, piece=SMALL) for i in (0, 1))
        assert ended(high)["done"] == 2 * MiB
        view = low.view()
        assert not view["ended"]
        assert view["done"] <= 12 * SMALL  # what was under way, or in memory
        ended(low)
        if files:
            made[0].check()
            made[1].check()
        else:
            one()
            two()

    def test_of_equal_ones_the_oldest_is_first(self):
        engine = make({"rate": 32 * MiB})
        engine.record(True)
        running = [copy(engine, 16 * SMALL, piece=SMALL) for _ in range(4)]
        for transfer, check in running:
            ended(transfer)
            check()
        order = [event[3] for event in engine.take_events()]
        assert order == sorted(order)
        assert len(order) == 64

    def test_a_device_does_not_wait_for_another_one(self):
        engine = make({"rate": MiB})
        engine.add_host_path(1, "fast")
        slow, _ = copy(engine, 4 * SMALL, priority=1, piece=SMALL)
        source, target = Memory(SMALL), Memory(SMALL)
        fast = engine.copy(1, True, [(source.address, target.address, SMALL)])
        ended(fast)
        assert not slow.view()["ended"]
        ended(slow)

    @pytest.mark.parametrize("slots", [4, 24])
    def test_a_device_gets_slots_although_another_one_is_slow(self, tmp_path, slots):
        engine = make({"rate": 4 * MiB}, in_flight=slots * SMALL)
        engine.add_host_path(1, "fast")
        first, second = (Layout(tmp_path, seed, [SMALL] * 32, [0] * 32) for seed in (0, 1))
        slow = load(engine, first.parts)
        time.sleep(0.05)
        ended(load(engine, second.parts, target=1))
        second.check()
        assert slow.view()["done"] < 20 * SMALL
        ended(slow)
        first.check()
        check_idle(engine)


class TestEnding:
    def test_cancelled_gives_everything_back(self, tmp_path):
        made, engine = Layout(tmp_path, 0, [SMALL] * 100, [0] * 100), make({"rate": 8 * MiB})
        for wait in (0, 0.02, 0.05):
            transfer = load(engine, made.parts)
            time.sleep(wait)
            transfer.cancel()
            view = ended(transfer, 5)
            assert view["cancelled"]
            assert view["done"] < view["bytes"]
            check_idle(engine)
            transfer.cancel()
        ended(load(engine, made.parts[:4]))
        engine.trim()
        assert engine.memory()["allocated"] == 0

    def test_what_has_ended_is_not_cancelled(self):
        transfer, check = copy(make(), 1000)
        ended(transfer)
        transfer.cancel()
        assert not transfer.view()["cancelled"]
        check()

    def test_nothing_is_written_after_the_end(self):
        engine, size = make({"rate": 8 * MiB}, {"rate": 8 * MiB}), 40 * SMALL
        source, target = Memory(size), Memory(size)
        ctypes.memset(source.address, 1, size)
        transfer = engine.copy(0, True, [(source.address, target.address, size)], paths=2, piece=SMALL)
        transfer.wait(0.03)
        transfer.cancel()
        ended(transfer)
        ctypes.memset(target.address, 2, size)
        time.sleep(0.05)
        assert set(bytes(target)) == {2}

    def test_the_caller_asks_for_it(self, tmp_path):
        made, device = Layout(tmp_path, 0, [SMALL] * 100, [0] * 100), Device(make({"rate": 8 * MiB}))
        with pytest.raises(CancelledError):
            device.load(made.parts, cancelled=lambda: True)
        check_idle(device._engine)

    @pytest.mark.parametrize("what", ["progress", "cancelled"])
    def test_what_the_caller_gave_raises(self, tmp_path, what):
        made, device = Layout(tmp_path, 0, [SMALL] * 100, [0] * 100), Device(make({"rate": 8 * MiB}))

        def fail(*_):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            device.load(made.parts, **{what: fail})
        check_idle(device._engine)

    @pytest.mark.parametrize("times", [1, 3])
    def test_ctrl_c(self, tmp_path, times):
        made, device = Layout(tmp_path, 0, [SMALL] * 100, [0] * 100), Device(make({"rate": 8 * MiB}))

        def press():
            time.sleep(0.02)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=press)
        try:
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                device.load(made.parts)
            check_idle(device._engine)
        finally:
            thread.join()
        device.load(made.parts[:4])

    def test_whatever_a_signal_raises_meanwhile(self):
        class Transfer:
            def __init__(self):
                self.raised = [SystemExit(), KeyboardInterrupt(), TimeoutError()]
                self.cancelled = self.waited = 0

            def cancel(self):
                self.cancelled += 1

            def wait(self, seconds):
                if self.raised:
                    raise self.raised.pop()
                self.waited += 1
                return self.waited == 2

        transfer = Transfer()
        ending.end_transfers([transfer])
        assert (transfer.waited, transfer.cancelled) == (2, 4)

    def test_the_engine_while_transfers_go_on(self, tmp_path):
        made = Layout(tmp_path, 0, [SMALL] * 100, [0] * 100)
        for wait in (0, 0.01, 0.03):
            engine = make({"rate": 8 * MiB}, {"rate": 8 * MiB})
            load(engine, made.parts, paths=2)
            address, _ = engine.take_buffer(40 * SMALL)
            target = Memory(40 * SMALL)
            engine.copy(0, True, [(address, target.address, 40 * SMALL)], paths=2, piece=SMALL)
            time.sleep(wait)
            start = time.perf_counter()
            del engine
            assert time.perf_counter() - start < 5
            before = bytes(target)
            time.sleep(0.02)
            assert bytes(target) == before

    def test_threads_and_files_are_as_many_as_before(self, tmp_path):
        made = random_layout(tmp_path, 0)
        ended(load(make({}, {}), made.parts, paths=2))
        threads, files = count("task"), count("fd")
        for _ in range(5):
            engine = make({}, {}, readers=7)
            for _ in range(3):
                ended(load(engine, made.parts, paths=2, around_cache=True))
                ended(load(engine, [Part(tmp_path / "no", 0, 1, made.memory.address)]))
            assert count("fd") == files
            del engine
        end = time.monotonic() + 10
        while (
            count("task") > threads and time.monotonic() < end
        ):  # one that was joined is seen a moment longer
            time.sleep(0.01)
        assert count("task") <= threads  # those of earlier tests may end meanwhile

    @pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e30, float("inf"), float("nan")])
    def test_any_number_of_seconds_can_be_waited(self, seconds):
        transfer, _ = copy(make(), 1000)
        ended(transfer)
        assert transfer.wait(seconds)


def count(what):
    return len(list(Path(f"/proc/self/{what}").iterdir()))


def test_progress_grows_to_the_total(tmp_path):
    made, seen = Layout(tmp_path, 0, [SMALL] * 64, [0] * 64), []
    Device(make({"rate": 16 * MiB})).load(made.parts, progress=lambda *two: seen.append(two))
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {64 * SMALL}
    assert seen[-1] == (64 * SMALL, 64 * SMALL)
    assert seen[0][0] < 64 * SMALL


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.clock
class TestUnequalLinks:
    """The best of some tries: the machine does other things too."""

    def rate(self, links, down, size, used, best=3, piece=SMALL * 4, warm=True):
        engine = make(*links)
        if warm:
            seconds_of(engine, 4 * MiB, down=down, paths=used, piece=piece)
        return size / min(seconds_of(engine, size, down=down, paths=used, piece=piece) for _ in range(best))

    def test_two_equal_ones_are_nearly_twice_as_fast(self, down):
        links = [{"rate": 128 * MiB}] * 2
        assert self.rate(links, down, 12 * MiB, 2) >= 1.85 * self.rate(links, down, 12 * MiB, 1)

    def test_four_to_one_are_as_fast_as_both(self, down):
        for links in ([160 * MiB, 40 * MiB], [40 * MiB, 160 * MiB]):
            assert self.rate([{"rate": r} for r in links], down, 16 * MiB, 2) >= 0.9 * 200 * MiB

    @pytest.mark.parametrize("size", [MiB, 2 * MiB, 5 * MiB, 9 * MiB])
    def test_a_slow_one_makes_nothing_slower(self, down, size):
        fast, slow = {"rate": 128 * MiB}, {"rate": 5 * MiB}
        alone = self.rate([fast], down, size, 1, piece=0)
        assert self.rate([fast, slow], down, size, 2, piece=0) >= 0.93 * alone
        known = [{**link, "known": (link["rate"],) * 2} for link in (fast, slow)]
        assert self.rate(known, down, size, 2, piece=0, warm=False) >= 0.93 * alone

    def test_what_is_not_known_does_not_get_the_only_piece(self, down):
        for _ in range(5):
            engine = make({"rate": 128 * MiB}, {"rate": MiB})
            assert seconds_of(engine, MiB, down=down, paths=2) < 0.5
            assert [path["bytes"][not down] for path in engine.paths(0)] == [MiB, 0]

    def test_each_tells_what_it_reached(self, down):
        engine = make({"rate": 64 * MiB}, {"rate": 16 * MiB})
        seconds_of(engine, 16 * MiB, down=down, paths=2, piece=SMALL * 4)
        fast, slow = engine.paths(0)
        assert (fast["name"], slow["name"]) == ("link 0", "link 1")
        assert fast["bytes"][not down] + slow["bytes"][not down] == 16 * MiB
        assert fast["rates"][not down] == pytest.approx(64 * MiB, rel=0.3)
        assert slow["rates"][not down] == pytest.approx(16 * MiB, rel=0.3)
        assert fast["rates"][down] == 0


class TestFailingLinks:
    @pytest.mark.parametrize("bad", [0, 1])
    @pytest.mark.parametrize("after", [0, 5 * SMALL])
    def test_the_others_finish(self, tmp_path, bad, after):
        links = [{"rate": 64 * MiB}, {"rate": 64 * MiB}]
        links[bad]["fails_after"] = after
        engine = make(*links)
        made = Layout(tmp_path, 0, [SMALL + 5] * 40, [0] * 40)
        for transfer in (load(engine, made.parts, paths=2), load(engine, made.parts, paths=2)):
            view = ended(transfer)
            assert (view["link_error"], view["done"]) == ("", view["bytes"])
        assert any(f"link {bad}" in lost for lost in view["lost_links"]) or engine.paths(0)[bad]["failed"]
        made.check()
        check_idle(engine)
        transfer, check = copy(engine, 10 * SMALL, paths=2, piece=SMALL)
        ended(transfer)
        check()

    def test_it_is_told_and_logged(self, tmp_path, caplog):
        made = Layout(tmp_path, 0, [SMALL] * 40, [0] * 40)
        device = Device(make({"rate": 16 * MiB}, {"rate": 16 * MiB, "fails_after": 0}), 2)
        device.load(made.parts)
        made.check()
        assert "link 1: copying" in caplog.text

    def test_all_of_them_is_an_error_and_the_next_transfer_tries_again(self, tmp_path):
        made = Layout(tmp_path, 0, [SMALL] * 40, [0] * 40)
        device = Device(make({"fails_after": 5 * SMALL}, {"fails_after": 3 * SMALL}), 2)
        for _ in range(3):
            with pytest.raises(gi.DriverError, match="made to fail"):
                device.load(made.parts)
            check_idle(device._engine)
        device._engine.add_host_path(0, "link 2")
        device._used = 3
        device.load(made.parts)
        made.check()

    def test_every_transfer_on_it_is_told(self, tmp_path):
        engine = make({"rate": 32 * MiB, "fails_after": 10 * SMALL})
        made = Layout(tmp_path, 0, [SMALL] * 20, [0] * 20)
        for transfer in [load(engine, made.parts, priority=i) for i in range(5)]:
            assert "made to fail" in ended(transfer)["link_error"]
        check_idle(engine)

    def test_one_direction_leaves_the_other_alone(self):
        engine = make({"rate": 16 * MiB, "fails_after": 10 * SMALL})
        up, check = copy(engine, 10 * SMALL, down=False, piece=SMALL)
        down, _ = copy(engine, 20 * SMALL, piece=SMALL)
        assert "made to fail" in ended(down)["link_error"]
        assert ended(up)["link_error"] == ""
        check()

    def test_a_transfer_that_has_no_other_tries_it_again(self):
        """Beside one that goes on over the others."""
        engine = make({"rate": 8 * MiB, "fails_after": 0}, {"rate": 8 * MiB})
        long, check = copy(engine, 2 * MiB, paths=2, piece=SMALL)
        while not engine.paths(0)[0]["failed"]:
            assert not long.wait(0.001)
        short, _ = copy(engine, SMALL, paths=1)
        assert "made to fail" in ended(short, 10)["link_error"]
        assert ended(long)["link_error"] == ""
        check()

    def test_one_that_is_added_meanwhile_is_for_later_transfers(self):
        engine = make({"rate": 16 * MiB, "fails_after": 8 * SMALL})
        transfer, _ = copy(engine, 2 * MiB, paths=2, piece=SMALL)
        engine.add_host_path(0, "new", known=(1e12, 1e12))
        assert "made to fail" in ended(transfer, 10)["link_error"]
        transfer, check = copy(engine, 2 * MiB, paths=2, piece=SMALL)
        assert ended(transfer, 10)["link_error"] == ""
        check()

    def test_three_that_nothing_is_known_of_without_the_first(self):
        engine = make({"rate": 8 * MiB, "fails_after": 0}, {}, {})
        for size in (SMALL, 3 * SMALL, 20 * SMALL):
            transfer, check = copy(engine, size, paths=3, piece=SMALL // 2)
            assert ended(transfer, 10)["link_error"] == ""
            check()


class TestFurtherPaths:
    def test_go_away_while_transfers_go_on(self, tmp_path):
        engine = make({"rate": 64 * MiB})
        made = Layout(tmp_path, 0, [SMALL] * 100, [0] * 100)
        for _ in range(10):
            engine.add_host_path(0, "one", rate=64 * MiB)
            engine.add_host_path(0, "two", rate=64 * MiB)
            transfer = load(engine, made.parts, paths=3)
            engine.remove_further_paths(0)
            assert [path["name"] for path in engine.paths(0)] == ["link 0"]
            view = ended(transfer)
            assert (view["link_error"], view["done"]) == ("", view["bytes"])
            made.check()
        threads = count("task")
        engine.remove_further_paths(0)
        assert count("task") <= threads

    def test_of_other_devices_stay(self):
        engine = make({}, {"rate": MiB})
        for name in ("a", "b"):
            engine.add_host_path(1, name)
        transfer, _ = copy(engine, 2 * SMALL, paths=2, piece=SMALL)
        engine.remove_further_paths(1)
        assert len(engine.paths(0)) == 2
        assert len(engine.paths(1)) == 1
        ended(transfer)

    def test_go_away_although_the_first_has_failed(self):
        engine = make({"fails_after": 0}, {"rate": 8 * MiB})
        transfer, _ = copy(engine, 4 * MiB, paths=2, piece=SMALL)
        while not engine.paths(0)[0]["failed"]:
            assert not transfer.wait(0.001)
        engine.remove_further_paths(0)
        assert "taken away" in ended(transfer, 10)["link_error"]

    def test_go_away_while_they_fail(self):
        for _ in range(10):
            engine = make({"rate": 64 * MiB}, {"rate": 16 * MiB, "fails_after": SMALL})
            transfer, check = copy(engine, MiB, paths=2, piece=SMALL)
            engine.remove_further_paths(0)
            assert ended(transfer, 10)["link_error"] == ""
            check()

    def test_with_rates_that_are_none(self):
        nan, inf = float("nan"), float("inf")
        for known in [(nan, nan), (-1.0, -1.0), (inf, inf)]:
            engine = make({"known": known}, {"known": known})
            assert all(path["rates"] == (0, 0) for path in engine.paths(0))
            seconds_of(engine, 4 * MiB, paths=2)


class TestMemory:
    @pytest.mark.parametrize("slots", [1, 2, 5])
    def test_in_flight_is_never_more_than_was_said(self, tmp_path, slots):
        engine = make({"rate": 64 * MiB}, {"rate": 64 * MiB}, readers=16, in_flight=slots * SMALL + 100)
        made = [Layout(tmp_path, seed, [SMALL] * 16, [0] * 16) for seed in range(3)]
        for transfer in [load(engine, each.parts, paths=2) for each in made]:
            ended(transfer)
        memory = engine.memory()
        assert memory["peak"] <= memory["allocated"] <= slots * SMALL
        assert memory["in_use"] == 0
        for each in made:
            each.check()

    def test_no_more_than_there_are_pieces(self, tmp_path):
        engine = make(readers=16)
        made = Layout(tmp_path, 0, [SMALL, SMALL], [0, 0])
        ended(load(engine, made.parts))
        assert engine.memory()["allocated"] == 2 * SMALL

    def test_options_are_for_what_begins_later(self, tmp_path):
        made = Layout(tmp_path, 0, [SMALL] * 64, [0] * 64)
        engine = make({"rate": 64 * MiB}, readers=8, in_flight=12 * SMALL)
        first = load(engine, made.parts)
        before = engine.memory()["allocated"]
        assert before > 2 * SMALL
        engine.set_options(2, 2 * SMALL, 2 * SMALL, 0)
        second = load(engine, made.parts)
        ended(first)
        ended(second)
        made.check()
        ended(load(engine, made.parts))
        memory = engine.memory()
        assert memory["allocated"] <= 2 * SMALL  # and slots are as large as they were
        with pytest.raises(ValueError, match="expected at least one reader"):
            engine.set_options(0, SMALL, SMALL, 0)

    def test_is_given_back_and_made_again(self, tmp_path):
        made, engine = random_layout(tmp_path, 0), make()
        for _ in range(3):
            ended(load(engine, made.parts))
            assert engine.memory()["allocated"] > 0
            engine.trim()
            assert engine.memory()["allocated"] == 0

    def test_is_given_back_at_any_time(self, tmp_path):
        """Also between its making and its first use, and between two pieces."""
        made, engine = Layout(tmp_path, 0, [SMALL] * 3, [0] * 3), make(readers=2, in_flight=SMALL)
        done = threading.Event()

        def trim():
            while not done.is_set():
                engine.trim()

        thread = threading.Thread(target=trim)
        thread.start()
        try:
            for _ in range(300):
                ended(load(engine, made.parts), 10)
        finally:
            done.set()
            thread.join()
        made.check()

    def test_buffers(self):
        engine = make()
        sizes = [0, 1, 4096, 3 * MiB, 33 * MiB]
        addresses = [engine.take_buffer(size)[0] for size in sizes]
        for address, size in zip(addresses, sizes, strict=True):
            assert address % BLOCK == 0
            assert ctypes.string_at(address, size) == bytes(size)
            ctypes.memset(address, 1, size)
        engine.give_buffer(addresses[0])
        with pytest.raises(ValueError, match="no host memory was taken there"):
            engine.give_buffer(addresses[0])
        for size in (1 << 62, (1 << 64) - 1, (1 << 64) - MiB):
            with pytest.raises(gi.DriverError, match=r"taking .* bytes of host memory"):
                engine.take_buffer(size)

    def test_kept_copies(self):
        device, memory = Device(make({}, {}), 2), Memory(3 * SMALL)
        data = random.Random(0).randbytes(3 * SMALL)
        ctypes.memmove(memory.address, data, len(data))
        first, last = device.keep([(memory.address, SMALL), (memory.address + 2 * SMALL, SMALL)])
        ctypes.memset(memory.address, 0, 3 * SMALL)
        device.restore([(memory.address + 2 * SMALL, last, SMALL), (memory.address, first, SMALL)])
        assert bytes(memory) == data[:SMALL] + bytes(SMALL) + data[2 * SMALL :]
        device.forget(first)
        device.forget(last)

    def test_a_copy_that_cannot_be_kept_leaves_none(self):
        device, memory = Device(make({"fails_after": SMALL})), Memory(3 * SMALL)
        mapped = Path("/proc/self/maps").read_text().count("\n")
        for _ in range(20):
            with pytest.raises(gi.DriverError, match="made to fail"):
                device.keep([(memory.address, 3 * SMALL)] * 3)
        assert Path("/proc/self/maps").read_text().count("\n") <= mapped + 8


class TestFork:
    CODE = """
        import os, signal
        from glake_infer.allocators import _native
        from glake_infer.allocators.errors import ForkedProcessError
        from glake_infer.transfers import timeline
        from glake_infer.transfers.device import HostTransfers, record_engine, Part, Step
        import pathlib, sys, ctypes

        path = pathlib.Path(sys.argv[1]); path.write_bytes(b"a" * 300_000)
        memory = ctypes.create_string_buffer(600_000)
        address = ctypes.addressof(memory)
        engine = _native.TransferEngine.on_host(4, 4096, 1 << 20, 0)
        engine.add_host_path(0, "memory", rate=1e6)
        record_engine(engine)
        def load(host): return engine.load(0, [str(path)], [(0, 0, 200_000, address, 1, 0)])
        transfer = load(engine)
        kept, _ = engine.take_buffer(5000)
        host = HostTransfers.of_host()
        host.bring([Step(parts=[Part(path, 0, 300_000, address + 300_000)])], 300_000)
        child = os.fork()
        if not child:
            signal.alarm(20)
            told = 0
            for call in (lambda: load(engine), transfer.view, transfer.cancel, lambda: transfer.wait(1), engine.memory,
                         engine.trim, lambda: engine.paths(0), lambda: engine.record(True), engine.take_events,
                         lambda: engine.give_buffer(kept), lambda: engine.take_buffer(1),
                         lambda: engine.set_options(1, 4096, 4096, 0), lambda: engine.remove_further_paths(0)):
                try:
                    call()
                except ForkedProcessError:
                    told += 1
            ctypes.memset(address + 300_000, 0, 300_000)
            with timeline.record():
                HostTransfers.of_host().bring([Step(parts=[Part(path, 0, 300_000, address + 300_000)])], 300_000)
            right = memory.raw[300_000:] == b"a" * 300_000 and HostTransfers.of_host() is not host
            del transfer, load, engine, host
            import gc; gc.collect()
            os._exit(0 if told == 13 and right else told + 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, status
        assert transfer.wait(20) and transfer.view()["done"] == 200_000
        engine.give_buffer(kept)
        with timeline.record() as made:
            assert load(engine).wait(20)
        assert made.spans
        print("fine")
    """

    @pytest.mark.skipif(
        "GLAKE_SANITIZED" in os.environ,
        reason="in a child, a lock of AddressSanitizer's malloc stays with the thread that had it",
    )
    def test_a_child_is_told_and_the_parent_goes_on(self, tmp_path, python):
        process = python(self.CODE, tmp_path / "file")
        out, errors = process.communicate(timeout=60)
        assert (out.strip(), process.returncode) == ("fine", 0), errors


class TestWithoutThreads:
    CODE = """
        import ctypes, pathlib, resource, sys
        from glake_infer.allocators import _native
        from glake_infer.allocators.errors import DriverError

        path = pathlib.Path(sys.argv[1]); path.write_bytes(b"a" * 300_000)
        memory = ctypes.create_string_buffer(300_000)
        engine = _native.TransferEngine.on_host(4, 4096, 1 << 20, 0)
        engine.add_host_path(0, "memory")
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), before[1]))  # less than a thread's stack
        for _ in range(2):
            try:
                engine.load(0, [str(path)], [(0, 0, 300_000, ctypes.addressof(memory), 1, 0)])
                print("nothing raised")
            except DriverError as error:
                assert "thread" in str(error), error
        resource.setrlimit(resource.RLIMIT_AS, before)
        assert engine.load(0, [str(path)], [(0, 0, 300_000, ctypes.addressof(memory), 1, 0)]).wait(20)
        assert memory.raw == b"a" * 300_000
        print("fine")
    """

    def test_it_is_said_and_the_next_transfer_works(self, tmp_path, python):
        process = python(self.CODE, tmp_path / "file")
        out, errors = process.communicate(timeout=60)
        assert (out.strip(), process.returncode) == ("fine", 0), errors


class TestTimeline:
    def test_tells_what_readers_and_links_did(self, tmp_path):
        made, engine = (
            Layout(tmp_path, 0, [SMALL] * 20, [0] * 20),
            make({"rate": 64 * MiB}, {"rate": 64 * MiB}),
        )
        ended(load(engine, made.parts))
        assert engine.take_events() == []
        engine.record(True)
        start = time.monotonic_ns()
        number = ended(load(engine, made.parts, paths=2))["number"]
        end = time.monotonic_ns()
        engine.record(False)
        events = engine.take_events()
        assert engine.take_events() == []
        for read in (True, False):
            assert sum(event[6] for event in events if event[0] is read) == 20 * SMALL
        assert all(event[2:4] == (0, number) for event in events)
        assert all(start <= event[4] <= event[5] <= end for event in events)
        assert {event[1] for event in events if event[0]} <= set(range(4))
        assert {event[1] for event in events if not event[0]} == {0, 2}  # twice the number of the path

    def test_of_the_process_has_it_by_name(self, tmp_path):
        made, engine = Layout(tmp_path, 0, [SMALL] * 20, [0] * 20), make()
        record_engine(engine)
        with timeline.record() as seen:
            ended(load(engine, made.parts))
        rows = {span.row for span in seen.spans}
        assert "link link 0 to the device" in rows
        assert any(row.startswith("reader ") for row in rows)
