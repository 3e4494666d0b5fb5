"""What every allocator of ours must do: one suite, which each of them takes over in a few lines.

class TestMine(AllocatorConformance):
    @pytest.fixture
    def allocator(self): ...   # an Allocator with a limit of LIMIT
"""

from __future__ import annotations

import ctypes
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest

from glake_infer.allocators import PoolInUseError

KiB, MiB = 1024, 1024 * 1024
LIMIT = 256 * MiB


class Allocator(ABC):
    """The face of an allocator, as the suite uses it. Memory is the host's unless `fill` and `holds` say otherwise."""

    out_of_memory: type[BaseException] = MemoryError
    # Handles of streams that `allocate` takes; empty where the face has none.
    streams: Sequence[int] = ()
    # How much more than what was asked for may stay reserved beside a live block after trim(): a piece of physical
    # memory comes and goes as a whole.
    largest_chunk = 32 * MiB
    # Whether freed memory is kept for reuse.
    keeps_idle = True
    # Steps of the random mixes are divided by this.
    slowness = 1

    @abstractmethod
    def allocate(self, size: int) -> int: ...

    def allocate_on(self, size: int, stream: int) -> int:
        """Allocate for a stream, one of `streams`."""
        raise NotImplementedError

    def set_limit(self, limit: int) -> None:
        """Change the limit. Raises PoolInUseError, with the old one in force, where more than that is active."""
        raise NotImplementedError

    def fill(self, address: int, size: int, value: int) -> None:
        """Write `value`, a byte, wherever `holds` looks."""
        fill(address, size, value)

    def holds(self, address: int, size: int, value: int) -> bool:
        """Whether what `fill` wrote is still there."""
        return holds(address, size, value)

    def finish(self) -> None:  # noqa: B027
        """Wait for what is queued on the device."""

    @abstractmethod
    def deallocate(self, address: int) -> None: ...

    @abstractmethod
    def refuses(self, address: int) -> bool:
        """Try to free an address that is not in use; whether that was reported as an error."""

    @abstractmethod
    def stats(self) -> dict[str, int]: ...

    @abstractmethod
    def trim(self) -> int: ...

    @abstractmethod
    def check_invariants(self) -> None: ...


def fill(address: int, size: int, value: int) -> None:
    """Write `value` to all bytes, or to both ends of every page where there are many."""
    if size <= 64 * KiB:
        ctypes.memset(address, value, size)
        return
    for offset in [*range(0, size - 8, 4096), size - 8]:
        ctypes.memset(address + offset, value, 8)


def holds(address: int, size: int, value: int) -> bool:
    if size <= 64 * KiB:
        return ctypes.string_at(address, size) == bytes([value]) * size
    return all(
        ctypes.string_at(address + offset, 8) == bytes([value]) * 8
        for offset in [*range(0, size - 8, 4096), size - 8]
    )


def what_is_live(stats: dict[str, int]) -> dict[str, int]:
    """What a call that is refused must not change. (It may have given idle memory back.)"""
    return {name: stats[name] for name in ("active", "requested", "allocations", "deallocations", "limit")}


def random_size(rng: random.Random, largest: int) -> int:
    """Sizes over all magnitudes, some of them round."""
    size = int(2 ** rng.uniform(0, largest.bit_length() - 1))
    return max(1, 1 << size.bit_length() >> 1) if rng.random() < 0.3 else size


class AllocatorConformance:
    @pytest.fixture
    def allocator(self) -> Allocator:
        raise NotImplementedError

    def test_nothing_asked_nothing_given(self, allocator):
        before = allocator.stats()
        assert allocator.allocate(0) == 0
        allocator.deallocate(0)
        assert allocator.stats() == before

    @pytest.mark.parametrize(
        "size",
        [
            *(1, 2, 63, 64, 65, 255, 256, 257, 1000, 1024, 1025, 4095, 4097, 65535, 65537),
            *(MiB - 1, MiB, MiB + 1, 3 * MiB + 7, 10_000_019, 64 * MiB, 100 * MiB + 1),
        ],
    )
    def test_all_bytes_can_be_used_and_are_aligned(self, allocator, size):
        addresses = [allocator.allocate(size) for _ in range(2)]
        for value, address in enumerate(addresses):
            assert address % (256 if size >= 256 else 64) == 0
            allocator.fill(address, size, value + 1)
        for value, address in enumerate(addresses):
            assert allocator.holds(address, size, value + 1)
        stats = allocator.stats()
        assert stats["requested"] == 2 * size
        assert stats["active"] >= 2 * size
        allocator.check_invariants()
        for address in addresses:
            allocator.deallocate(address)
        assert allocator.stats()["active"] == 0
        assert allocator.stats()["requested"] == 0

    @pytest.mark.parametrize("size", [LIMIT + 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 65536, 2**64 - 1])
    def test_more_than_the_limit_is_refused_and_changes_nothing(self, allocator, size):
        kept = allocator.allocate(MiB)
        idle = allocator.allocate(2 * MiB)
        allocator.deallocate(idle)
        before = allocator.stats()
        with pytest.raises(allocator.out_of_memory):
            allocator.allocate(size)
        assert what_is_live(allocator.stats()) == what_is_live(before)
        allocator.check_invariants()
        allocator.deallocate(kept)

    def test_out_of_memory_is_recovered_from(self, allocator):
        blocks = []
        with pytest.raises(allocator.out_of_memory):  # noqa: PT012
            while True:
                blocks.append(allocator.allocate(16 * MiB))
        assert len(blocks) == LIMIT // (16 * MiB)
        assert allocator.stats()["reserved"] <= LIMIT
        with pytest.raises(allocator.out_of_memory):
            allocator.allocate(1)
        allocator.deallocate(blocks.pop())
        blocks.append(allocator.allocate(16 * MiB))
        for block in blocks:
            allocator.deallocate(block)
        whole = allocator.allocate(LIMIT)  # what was idle in pieces serves as one
        allocator.fill(whole, LIMIT, 5)
        assert allocator.holds(whole, LIMIT, 5)
        allocator.check_invariants()
        allocator.deallocate(whole)

    def test_idle_memory_of_other_sizes_never_makes_a_request_fail(self, allocator):
        small = [allocator.allocate(size) for size in (1, 5000, 70_000, 900_000) for _ in range(20)]
        large = [allocator.allocate(size * MiB) for size in (1, 2, 3, 5, 7, 11, 13, 17, 19)]
        for address in small + large:
            allocator.deallocate(address)
        assert allocator.stats()["idle"] > LIMIT // 4 or not allocator.keeps_idle
        whole = allocator.allocate(LIMIT)
        assert allocator.stats()["reserved"] <= LIMIT
        allocator.check_invariants()
        allocator.deallocate(whole)
        tiny = [allocator.allocate(100) for _ in range(1000)]
        for address in tiny:
            allocator.deallocate(address)

    def test_trim_gives_everything_idle_back(self, allocator):
        kept = allocator.allocate(3 * MiB)
        for address in [allocator.allocate(size) for size in (10, 10_000, 10 * MiB)]:
            allocator.deallocate(address)
        before = allocator.stats()
        assert before["idle"] > 10 * MiB or not allocator.keeps_idle
        given_back = allocator.trim()
        after = allocator.stats()
        assert given_back == before["reserved"] - after["reserved"]
        assert after["reserved"] < 3 * MiB + allocator.largest_chunk
        allocator.fill(kept, 3 * MiB, 9)
        assert allocator.holds(kept, 3 * MiB, 9)
        allocator.deallocate(kept)
        given_back = allocator.trim()
        assert given_back == after["reserved"] or not allocator.keeps_idle
        assert allocator.stats()["reserved"] == 0
        allocator.check_invariants()

    @pytest.mark.parametrize("size", [1, 100, 5000, 100_000, MiB, 20 * MiB])
    def test_freeing_twice_is_refused(self, allocator, size):
        first, second = allocator.allocate(size), allocator.allocate(size)
        allocator.fill(second, size, 7)
        allocator.deallocate(first)
        before = allocator.stats()
        assert allocator.refuses(first)
        assert what_is_live(allocator.stats()) == what_is_live(before)
        assert allocator.holds(second, size, 7)
        allocator.check_invariants()
        allocator.deallocate(second)
        assert allocator.refuses(second)

    @pytest.mark.parametrize("size", [1, 300, 5000, 100_000, MiB, 20 * MiB])
    def test_freeing_what_was_never_handed_out_is_refused(self, allocator, size):
        address = allocator.allocate(size)
        allocator.fill(address, size, 3)
        for foreign in (1, 64, 0x10000, id(self), address + 1, address + 64, address + size, 2**64 - 1):
            assert allocator.refuses(foreign)
        assert allocator.holds(address, size, 3)
        allocator.check_invariants()
        allocator.deallocate(address)

    def test_the_limit_can_be_lowered_to_what_is_active_and_no_further(self, allocator):
        kept = allocator.allocate(20 * MiB)
        allocator.deallocate(allocator.allocate(50 * MiB))
        with pytest.raises(PoolInUseError):
            allocator.set_limit(20 * MiB - 1)
        assert allocator.stats()["limit"] == LIMIT
        allocator.set_limit(30 * MiB)
        assert allocator.stats()["reserved"] <= 30 * MiB
        with pytest.raises(allocator.out_of_memory):
            allocator.allocate(10 * MiB + 1)
        allocator.set_limit(LIMIT)
        allocator.deallocate(allocator.allocate(100 * MiB))
        allocator.deallocate(kept)
        allocator.check_invariants()

    def test_the_same_sizes_again_make_no_driver_calls(self, allocator):
        if not allocator.keeps_idle:
            pytest.skip("this allocator keeps nothing")
        sizes = [700, 40_000, 3 * MiB, 17 * MiB + 5, 33 * MiB, 900_000]
        for turn in range(4):
            addresses = [allocator.allocate(size) for size in sizes]
            for address in addresses:
                allocator.deallocate(address)
            allocator.finish()
            if turn == 1:
                warm = allocator.stats()["driver_calls"]
        assert allocator.stats()["driver_calls"] == warm

    def test_a_stream_gets_its_own_memory_back_at_once(self, allocator):
        if not allocator.streams or not allocator.keeps_idle:
            pytest.skip("this face has no streams, or keeps nothing")
        first, second = allocator.streams[:2]
        for size in (500, 100_000, 5 * MiB):
            address = allocator.allocate_on(size, first)
            other = allocator.allocate_on(size, second)
            allocator.deallocate(address)
            assert allocator.allocate_on(size, first) == address
            allocator.deallocate(address)
            allocator.deallocate(other)
        allocator.check_invariants()

    def test_idle_memory_of_one_stream_serves_the_others(self, allocator):
        if not allocator.streams:
            pytest.skip("this face has no streams")
        for stream in [*allocator.streams, *allocator.streams]:
            blocks = [allocator.allocate_on(LIMIT // 4, stream) for _ in range(4)]
            for value, block in enumerate(blocks):
                allocator.fill(block, LIMIT // 4, value + 1)
            for value, block in enumerate(blocks):
                assert allocator.holds(block, LIMIT // 4, value + 1)
                allocator.deallocate(block)
            assert allocator.stats()["reserved"] <= LIMIT
        whole = allocator.allocate(LIMIT)  # without a stream
        allocator.deallocate(whole)
        allocator.check_invariants()

    def test_contents_survive_streams_and_threads(self, allocator):
        if not allocator.streams:
            pytest.skip("this face has no streams")
        self._threads(
            allocator,
            [(seed, (*allocator.streams, None)[seed % (len(allocator.streams) + 1)]) for seed in range(6)],
        )

    def test_contents_survive_a_random_mix(self, allocator):
        self._mix(
            allocator, random.Random(1), steps=3000 // allocator.slowness, largest=16 * MiB, budget=LIMIT // 2
        )
        allocator.check_invariants()
        assert allocator.stats()["active"] == 0

    def test_contents_survive_a_random_mix_at_the_limit(self, allocator):
        refused = self._mix(
            allocator,
            random.Random(2),
            steps=1500 // allocator.slowness,
            largest=LIMIT,
            budget=4 * LIMIT,
            frees=0.3,
        )
        assert refused > 60 // allocator.slowness  # it really was at the limit
        allocator.check_invariants()
        assert allocator.stats()["active"] == 0

    def test_contents_survive_four_threads(self, allocator):
        self._threads(allocator, [(seed, None) for seed in range(4)])

    def _threads(self, allocator: Allocator, workers: list[tuple[int, int | None]]) -> None:
        """A random mix per worker, (seed, stream), while another thread looks on and trims."""
        errors: list[BaseException] = []
        stop = threading.Event()

        def work(seed: int, stream: int | None) -> None:
            try:
                rng, steps = random.Random(seed), 800 // allocator.slowness
                self._mix(
                    allocator,
                    rng,
                    steps=steps,
                    largest=8 * MiB,
                    budget=LIMIT // 2 // len(workers),
                    stream=stream,
                )
            except BaseException as error:
                errors.append(error)

        def watch() -> None:
            try:
                while not stop.is_set():
                    allocator.check_invariants()
                    stats = allocator.stats()
                    assert stats["reserved"] == stats["active"] + stats["idle"] <= stats["limit"]
                    allocator.trim()
                    stop.wait(0.02)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=worker) for worker in workers]
        watcher = threading.Thread(target=watch)
        for thread in [*threads, watcher]:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        watcher.join()
        if errors:
            raise errors[0]
        allocator.check_invariants()
        assert allocator.stats()["active"] == 0

    def _mix(
        self,
        allocator: Allocator,
        rng: random.Random,
        *,
        steps: int,
        largest: int,
        budget: int,
        stream: int | None = None,
        frees: float = 0.45,
    ) -> int:
        """Allocate and free at random, verifying contents; returns how many requests were refused."""
        live: list[tuple[int, int, int]] = []
        held = refused = 0
        for step in range(steps):
            if live and (held > budget or rng.random() < frees):
                address, size, value = live.pop(rng.randrange(len(live)))
                assert allocator.holds(address, size, value)
                allocator.deallocate(address)
                held -= size
                continue
            size, value = random_size(rng, largest), step % 255 + 1
            try:
                address = allocator.allocate(size) if stream is None else allocator.allocate_on(size, stream)
            except allocator.out_of_memory:
                refused += 1
                continue
            allocator.fill(address, size, value)
            live.append((address, size, value))
            held += size
        for address, size, value in live:
            assert allocator.holds(address, size, value)
            allocator.deallocate(address)
        return refused
