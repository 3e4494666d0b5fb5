"""The native pool: the conformance suite, errors, accounting, recovery (pool.cpp)."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading

import pytest
from conformance import (
    LIMIT,
    Allocator,
    AllocatorConformance,
    KiB,
    MiB,
    fill,
    holds,
    random_size,
    what_is_live,
)

from glake_infer.allocators import DriverError, InvalidPointerError, OutOfMemoryError, PoolInUseError, _native

GRANULE = 64 * KiB


class NativePool(Allocator):
    out_of_memory = OutOfMemoryError

    def __init__(self, limit: int) -> None:
        self.pool = _native.Pool(limit)
        self.allocate = self.pool.allocate
        self.deallocate = self.pool.deallocate
        self.stats = self.pool.stats
        self.trim = self.pool.trim
        self.check_invariants = self.pool.check_invariants
        self.set_limit = self.pool.set_limit

    def allocate(self, size): ...
    def deallocate(self, address): ...
    def stats(self): ...
    def trim(self): ...
    def check_invariants(self): ...
    def set_limit(self, limit): ...

    def refuses(self, address):
        try:
            self.pool.deallocate(address)
        except InvalidPointerError:
            return True
        return False


class TestNativePool(AllocatorConformance):
    @pytest.fixture
    def allocator(self):
        return NativePool(LIMIT)


class TestNativePoolVerifyingItself(AllocatorConformance):
    """The same with every invariant checked after every operation."""

    @pytest.fixture
    def allocator(self, monkeypatch):
        monkeypatch.setenv("GLAKE_CHECK_INVARIANTS", "1")
        return NativePool(LIMIT)


@pytest.fixture
def pool():
    pool = _native.Pool(LIMIT)
    yield pool
    pool.check_invariants()


@pytest.fixture
def labelled():
    """Set this thread's label; none afterwards."""
    yield _native.set_label
    _native.set_label("")


def calls(pool) -> int:
    return pool.stats()["driver_calls"]


class TestOutOfMemory:
    def test_the_error_names_the_smallest_limit_that_would_have_done(self):
        pool = _native.Pool(32 * MiB)
        kept = pool.allocate(20 * MiB, "weights")
        also = pool.allocate(5 * MiB)
        pool.deallocate(pool.allocate(3 * MiB))
        with pytest.raises(OutOfMemoryError) as caught:
            pool.allocate(10 * MiB + 1)
        error = caught.value
        assert isinstance(error, MemoryError)
        assert error.requested == 10 * MiB + 1
        assert error.active == 25 * MiB
        assert error.idle == 3 * MiB
        assert error.reserved == 28 * MiB
        assert error.limit == 32 * MiB
        assert error.holders == [("", "weights", 20 * MiB), ("", "activations", 5 * MiB)]
        assert error.device_free > 0
        assert not error.device_full
        assert error.needed_limit == 35 * MiB + GRANULE
        pool.set_limit(error.needed_limit - 1)
        with pytest.raises(OutOfMemoryError):
            pool.allocate(10 * MiB + 1)
        pool.set_limit(error.needed_limit)
        pool.deallocate(pool.allocate(10 * MiB + 1))
        pool.deallocate(kept)
        pool.deallocate(also)

    def test_needed_limit_is_exact_for_small_requests_too(self):
        pool = _native.Pool(MiB)
        kept = pool.allocate(MiB)
        for size in (1, 100, 5000, 30_000, 70_000, 300_000, 1_000_000):
            with pytest.raises(OutOfMemoryError) as caught:
                pool.allocate(size)
            pool.set_limit(caught.value.needed_limit)
            pool.deallocate(pool.allocate(size))
            pool.set_limit(caught.value.needed_limit - 1)
            with pytest.raises(OutOfMemoryError):
                pool.allocate(size)
            pool.set_limit(MiB)
        pool.deallocate(kept)

    @pytest.mark.parametrize("limit", [256 * KiB, MiB, 7 * MiB + GRANULE, 24 * MiB])
    def test_needed_limit_is_exact_in_any_state(self, limit):
        below = refused = 0
        for seed in range(25):
            rng = random.Random(seed)
            pool = _native.Pool(limit)
            live: list[int] = []
            for _ in range(120):
                if live and rng.random() < 0.35:
                    pool.deallocate(live.pop(rng.randrange(len(live))))
                    continue
                size, tag = random_size(rng, limit), rng.choice(["weights", "activations", "workspace"])
                try:
                    live.append(pool.allocate(size, tag))
                    continue
                except OutOfMemoryError as error:
                    needed = error.needed_limit
                refused += 1
                assert needed > limit
                pool.set_limit(needed - 1)
                with pytest.raises(OutOfMemoryError) as caught:
                    pool.allocate(size, tag)
                assert caught.value.needed_limit == needed
                below += 1
                pool.set_limit(needed)
                pool.deallocate(pool.allocate(size, tag))
                pool.set_limit(limit)
                pool.check_invariants()
        assert below == refused > 100

    def test_the_error_names_the_holders_largest_first(self, labelled):
        pool = _native.Pool(32 * MiB)
        for label, tag, size in (
            ("bert", "weights", 9 * MiB),
            ("gpt", "weights", 12 * MiB),
            ("bert", "activations", MiB),
            ("gpt", "activations", 3000),
            ("bert", "workspace", 200),
            ("", "workspace", 100),
        ):
            labelled(label)
            pool.allocate(size, tag)
        with pytest.raises(OutOfMemoryError) as caught:
            pool.allocate(11 * MiB)
        assert caught.value.holders == pool.holders()
        assert caught.value.holders == [
            ("gpt", "weights", 12 * MiB),
            ("bert", "weights", 9 * MiB),
            ("bert", "activations", MiB),
            ("gpt", "activations", 3000),
            ("bert", "workspace", 200),
            ("", "workspace", 100),
        ]
        text = str(caught.value)
        assert text.index("gpt") < text.index("bert")
        assert "12.0 MiB" in text

    @pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**64 - 511, 2**64 - 4096, 2**64 - 65535])
    @pytest.mark.parametrize("tag", ["activations", "weights"])
    def test_sizes_that_cannot_be_added_to_anything(self, pool, size, tag):
        with pytest.raises(OutOfMemoryError) as caught:
            pool.allocate(size, tag)
        assert caught.value.needed_limit >= size


class TestHolders:
    def test_they_add_up_to_what_was_asked_for(self, pool, labelled):
        rng = random.Random(2)
        live: list[tuple[int, tuple[str, str], int]] = []
        for _ in range(600):
            if live and rng.random() < 0.45:
                pool.deallocate(live.pop(rng.randrange(len(live)))[0])
                continue
            label, tag = rng.choice(["", "a", "b"]), rng.choice(["weights", "activations", "workspace"])
            labelled(label)
            size = random_size(rng, MiB)
            live.append((pool.allocate(size, tag), (label, tag), size))
        expected: dict[tuple[str, str], int] = {}
        for _, holder, size in live:
            expected[holder] = expected.get(holder, 0) + size
        holders = pool.holders()
        assert {(label, tag): size for label, tag, size in holders} == expected
        assert len(holders) == len(expected)
        assert [size for *_, size in holders] == sorted(expected.values(), reverse=True)
        stats = pool.stats()
        assert sum(expected.values()) == stats["requested"]
        assert stats["weights"] == sum(size for (_, tag), size in expected.items() if tag == "weights")
        for address, *_ in live:
            pool.deallocate(address)
        assert pool.holders() == []

    def test_each_thread_has_its_own_label(self, pool, labelled):
        labelled("mine")
        names = []

        def work(name: str) -> None:
            _native.set_label(name)
            names.append(pool.allocate(1000))

        threads = [threading.Thread(target=work, args=(name,)) for name in ("theirs", "others")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pool.allocate(500)
        pool.deallocate(names[0])  # whoever frees it
        held = {label: size for label, _, size in pool.holders()}
        assert held in ({"others": 1000, "mine": 500}, {"theirs": 1000, "mine": 500})

    def test_an_unknown_tag_is_refused(self, pool):
        with pytest.raises(ValueError, match="unknown tag 'gold': expected one of 'activations', 'weights'"):
            pool.allocate(5, "gold")


class TestPeaks:
    def test_they_are_kept_until_reset(self, pool):
        pool.deallocate(pool.allocate(10 * MiB - 5))
        pool.trim()
        stats = pool.stats()
        assert stats["peak_active"] == stats["peak_reserved"] == 10 * MiB
        assert stats["peak_requested"] == 10 * MiB - 5
        pool.reset_peaks()
        stats = pool.stats()
        assert stats["peak_active"] == stats["peak_reserved"] == stats["peak_requested"] == 0

    def test_they_start_again_from_what_is_held(self, pool):
        pool.allocate(3 * MiB + 1)
        pool.deallocate(pool.allocate(10 * MiB))
        pool.reset_peaks()
        stats = pool.stats()
        assert stats["peak_active"] == stats["active"] == 3 * MiB + 512
        assert stats["peak_requested"] == 3 * MiB + 1
        assert stats["peak_reserved"] == stats["reserved"] >= 13 * MiB


def test_the_limit_that_would_do_is_named_where_a_segment_has_no_room_left():
    pool = _native.Pool(2 * MiB)
    small = pool.allocate(MiB)
    with pytest.raises(OutOfMemoryError) as refused:
        pool.allocate(16 << 30)  # more than the rest of the segment
    needed = refused.value.needed_limit
    pool.set_limit(needed - 64 * 1024)
    with pytest.raises(OutOfMemoryError):
        pool.allocate(16 << 30)
    pool.set_limit(needed)
    pool.deallocate(pool.allocate(16 << 30))
    pool.deallocate(small)


class TestFailingDriver:
    """Every call that can fail does so in turn."""

    @pytest.mark.parametrize("size", [100, 5000, 50_000, 3 * MiB, 100 * MiB])
    @pytest.mark.parametrize("stitched", [False, True])
    def test_any_one_call_may_fail(self, size, stitched):
        """The pool tries again with nothing idle and no spare mapping, so one failure shows nowhere."""
        for n in range(50):
            pool = _native.Pool(LIMIT)
            if stitched:
                for address in [pool.allocate(2 * MiB, "weights"), pool.allocate(MiB, "weights")]:
                    pool.deallocate(address)
            before = calls(pool)
            pool.inject_failure(n)
            address = pool.allocate(size)
            fill(address, size, 8)
            pool.check_invariants()
            pool.inject_failure(-1)
            made = calls(pool) - before
            assert holds(address, size, 8)
            pool.deallocate(address)
            if made <= n:
                break
        assert 2 <= n < 49

    @pytest.mark.parametrize("size", [100, 5000, 50_000, 3 * MiB, 100 * MiB])
    @pytest.mark.parametrize("times", [2, 3, 1000])
    def test_a_driver_that_fails_again_and_again_leaves_nothing_handed_out(self, size, times):
        pool = _native.Pool(LIMIT)
        kept = pool.allocate(MiB)
        fill(kept, MiB, 6)
        before = pool.stats()
        failed = 0
        for n in range(20):
            pool.inject_failure(n, times)
            try:
                pool.deallocate(pool.allocate(size, "weights"))
            except DriverError as error:
                assert "injected" in str(error)  # noqa: PT017
                failed += 1
            pool.inject_failure(-1)
            pool.check_invariants()
            assert (
                what_is_live(pool.stats()).items()
                >= {
                    "active": before["active"],
                    "requested": before["requested"],
                }.items()
            )
            pool.trim()
            assert pool.stats()["reserved"] == MiB
        assert failed
        assert holds(kept, MiB, 6)

    def test_all_that_can_be_spared_is_given_back_first(self, pool):
        for half in [pool.allocate(8 * MiB, "weights") for _ in range(2)]:
            pool.deallocate(half)
        pool.deallocate(pool.allocate(16 * MiB))
        halves = [pool.allocate(8 * MiB, "weights") for _ in range(2)]  # the other mappings are spare
        pool.deallocate(pool.allocate(4 * MiB))
        stats = pool.stats()
        assert (stats["idle"], stats["chunks"], stats["mappings"]) == (4 * MiB, 3, 5)
        pool.inject_failure(0)
        address = pool.allocate(5 * MiB)
        stats = pool.stats()
        assert (stats["idle"], stats["active"], stats["reserved"]) == (0, 21 * MiB, 21 * MiB)
        assert stats["mappings"] == stats["chunks"]
        for block in (*halves, address):
            pool.deallocate(block)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_random_mix_with_failures_keeps_its_contents(self, seed, monkeypatch):
        monkeypatch.setenv("GLAKE_CHECK_INVARIANTS", "1")
        rng = random.Random(seed)
        pool = _native.Pool(96 * MiB)
        live: list[tuple[int, int, int]] = []
        failed = 0
        for step in range(1000):
            if live and rng.random() < 0.45:
                address, size, value = live.pop(rng.randrange(len(live)))
                assert holds(address, size, value)
                pool.deallocate(address)
                continue
            size, value = random_size(rng, 24 * MiB), step % 255 + 1
            pool.inject_failure(rng.choice([-1, 0, 0, 1, 2, 5]), rng.choice([1, 2, 2, 4, 50]))
            before = what_is_live(pool.stats())
            try:
                address = pool.allocate(size, rng.choice(["weights", "activations"]))
            except (DriverError, OutOfMemoryError):
                failed += 1
                assert what_is_live(pool.stats()) == before
            else:
                fill(address, size, value)
                live.append((address, size, value))
            finally:
                pool.inject_failure(-1)
        assert failed > 20
        for address, size, value in live:
            assert holds(address, size, value)
            pool.deallocate(address)
        pool.trim()
        assert pool.stats()["reserved"] == pool.stats()["active"] == 0


class TestConfigure:
    @pytest.mark.parametrize("mode", ["on", "guard"])
    def test_debug_changes_only_while_nothing_is_in_use(self, pool, mode):
        for size in (100, MiB):
            address = pool.allocate(size)
            with pytest.raises(PoolInUseError):
                pool.configure(debug=mode)
            assert pool.live() == []  # nothing changed
            pool.deallocate(address)
        pool.configure(debug=mode)
        stats = pool.stats()
        assert (stats["active"], stats["reserved"]) == (0, 0)
        address = pool.allocate(100)
        assert [record["address"] for record in pool.live()] == [address]
        with pytest.raises(PoolInUseError):
            pool.configure(debug="off")
        assert len(pool.live()) == 1
        pool.deallocate(address)
        pool.configure(debug="off")
        address = pool.allocate(100)
        assert pool.live() == []
        pool.deallocate(address)

    def test_an_unknown_mode_is_refused(self, pool):
        with pytest.raises(ValueError, match="unknown debug mode 'loud': expected 'off', 'on' or 'guard'"):
            pool.configure(debug="loud")

    @pytest.mark.parametrize("size", [100, 5000, 50_000, 3 * MiB])
    def test_wipe_can_be_switched_while_memory_is_in_use(self, pool, size):
        first, second, third = (pool.allocate(size) for _ in range(3))
        for value, address in enumerate((first, second, third)):
            fill(address, size, value + 1)
        pool.configure(wipe=True)
        pool.deallocate(second)
        assert ctypes.string_at(second, size) == bytes(size)
        assert holds(first, size, 1)
        assert holds(third, size, 3)
        pool.configure(wipe=False)
        pool.deallocate(third)
        assert holds(third, size, 3)
        pool.deallocate(first)

    @pytest.mark.parametrize("size", [100, 50_000, 3 * MiB])
    def test_what_cannot_be_wiped_is_not_taken_back(self, pool, size):
        address, other = pool.allocate(size), pool.allocate(size)
        fill(address, size, 5)
        pool.configure(wipe=True)
        before = what_is_live(pool.stats())
        pool.inject_failure(0)
        with pytest.raises(DriverError, match="injected"):
            pool.deallocate(address)
        assert what_is_live(pool.stats()) == before
        assert holds(address, size, 5)
        pool.check_invariants()
        pool.deallocate(address)
        assert ctypes.string_at(address, size) == bytes(size)
        pool.deallocate(other)

    def test_nobody_sees_what_another_held(self, pool):
        pool.configure(wipe=True)
        rng = random.Random(8)
        live: list[int] = []
        for _ in range(400):
            if live and rng.random() < 0.48:
                pool.deallocate(live.pop(rng.randrange(len(live))))
                continue
            size = random_size(rng, 2 * MiB)
            live.append(pool.allocate(size, rng.choice(["weights", "activations"])))
            assert ctypes.string_at(live[-1], size).count(0) == size
            ctypes.memset(live[-1], 255, size)
        for address in live:
            pool.deallocate(address)


class TestWatching:
    """What recordings and snapshots say is what happened."""

    def test_a_recording_can_be_added_up(self, pool, labelled):
        rng = random.Random(6)
        early = pool.allocate(5000)  # before the recording
        before = pool.stats()
        pool.start_recording(100_000)
        live: dict[int, tuple[int, str, str]] = {}
        for _ in range(800):
            if live and rng.random() < 0.45:
                pool.deallocate(live.popitem()[0])
                continue
            label, tag = rng.choice(["", "a", "b"]), rng.choice(["weights", "activations", "workspace"])
            labelled(label)
            size = random_size(rng, 8 * MiB)
            live[pool.allocate(size, tag)] = (size, tag, label)
        pool.deallocate(early)
        pool.trim(64 * MiB)
        after = pool.stats()
        events = pool.stop_recording()
        assert pool.stop_recording() == []

        known: dict[int, tuple[int, str, str]] = {}
        ids: dict[int, int] = {}
        mapped: dict[int, int] = {}
        counts = dict.fromkeys("arfmu", 0)
        times = [event[1] for event in events]
        assert times == sorted(times)
        for op, _, address, size, stream, tag, label, number in events:
            counts[op] += 1
            if op in "ar":
                assert (op == "r") == (tag == "weights")
                assert stream == -1
                assert number not in ids.values()
                known[address], ids[address] = (size, tag, label), number
            elif op == "f" and address in known:
                del known[address]
                assert number == ids[address]
            elif op == "m":
                assert not mapped.get(address)
                mapped[address] = size
            elif op == "u":
                mapped.pop(address, None)
        assert known == live
        assert counts["a"] + counts["r"] == after["allocations"] - before["allocations"]
        assert counts["f"] == after["deallocations"] - before["deallocations"] - 1  # `early` is not in it
        assert counts["m"] - counts["u"] == after["mappings"] - before["mappings"]
        edges = sorted(mapped.items())
        assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(edges))

    def test_a_recording_keeps_as_many_events_as_was_asked_for(self, pool):
        kept = pool.allocate(64)
        pool.start_recording(10)
        for size in range(1, 31):
            pool.deallocate(pool.allocate(size))
        events = pool.stop_recording()
        assert [(event[0], event[3]) for event in events] == [
            (op, size) for size in range(1, 6) for op in "af"
        ]
        pool.deallocate(kept)

    def test_a_snapshot_shows_every_byte_once(self, pool, labelled):
        rng = random.Random(7)
        live: dict[int, tuple[int, str, str]] = {}
        for _ in range(500):
            if live and rng.random() < 0.45:
                address = rng.choice(list(live))
                del live[address]
                pool.deallocate(address)
                continue
            label, tag = rng.choice(["", "a", "b"]), rng.choice(["weights", "activations", "workspace"])
            labelled(label)
            size = random_size(rng, 8 * MiB)
            live[pool.allocate(size, tag)] = (size, tag, label)
        stats = pool.stats()
        shown: dict[int, tuple[int, str, str]] = {}
        stretches = []
        blocks = 0
        for segment in pool.snapshot()["segments"]:
            stretches.append((segment["address"], segment["address"] + segment["bytes"]))
            end = segment["address"]
            for part in segment["ranges"]:
                assert part["address"] == end
                end += part["bytes"]
                assert part["state"] in ("active", "cached", "free")
                if part["state"] == "active":
                    assert part["requested"] <= part["bytes"]
                    shown[part["address"]] = (part["requested"], part["tag"], part["label"])
                    blocks += part["bytes"]
                else:
                    assert part["requested"] == 0
            assert end == segment["address"] + segment["bytes"]
        assert shown == live
        assert stats["requested"] <= blocks <= stats["active"]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(stretches)))
        for address in live:
            pool.deallocate(address)
        pool.trim()
        assert pool.snapshot() == {"segments": []}


def test_four_threads_at_the_limit_with_every_invariant_checked(monkeypatch):
    monkeypatch.setenv("GLAKE_CHECK_INVARIANTS", "1")
    pool = _native.Pool(48 * MiB)
    errors: list[BaseException] = []
    refused = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        live: list[int] = []
        try:
            for _ in range(1200):
                if live and rng.random() < 0.48:
                    pool.deallocate(live.pop(rng.randrange(len(live))))
                    continue
                try:
                    live.append(
                        pool.allocate(random_size(rng, 32 * MiB), rng.choice(["weights", "activations"]))
                    )
                except OutOfMemoryError as error:
                    refused.append(error)
                    if rng.random() < 0.3:
                        pool.trim(rng.randrange(48 * MiB))
            for address in live:
                pool.deallocate(address)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert refused
    assert pool.stats()["active"] == 0
    pool.trim()
    assert pool.stats()["reserved"] == 0
