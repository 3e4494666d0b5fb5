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

import pytest

KiB, MiB = 1024, 1024 * 1024
LIMIT = 256 * MiB


class Allocator(ABC):
    """The face of an allocator, as the suite uses it."""

    out_of_memory: type[BaseException] = MemoryError

    @abstractmethod
    def allocate(self, size: int) -> int: ...

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
            fill(address, size, value + 1)
        for value, address in enumerate(addresses):
            assert holds(address, size, value + 1)
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
        after = allocator.stats()
        assert {**before, "driver_calls": 0} == {**after, "driver_calls": 0}
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
        fill(whole, LIMIT, 5)
        assert holds(whole, LIMIT, 5)
        allocator.check_invariants()
        allocator.deallocate(whole)

    def test_idle_memory_of_other_sizes_never_makes_a_request_fail(self, allocator):
        small = [allocator.allocate(size) for size in (1, 5000, 70_000, 900_000) for _ in range(20)]
        large = [allocator.allocate(size * MiB) for size in (1, 2, 3, 5, 7, 11, 13, 17, 19)]
        for address in small + large:
            allocator.deallocate(address)
        assert allocator.stats()["idle"] > LIMIT // 4
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
        idle = allocator.stats()["idle"]
        assert idle > 10 * MiB
        assert allocator.trim() == idle
        assert allocator.stats()["idle"] == 0
        fill(kept, 3 * MiB, 9)
        assert holds(kept, 3 * MiB, 9)
        allocator.deallocate(kept)
        assert allocator.trim() == 3 * MiB
        assert allocator.stats()["reserved"] == 0
        allocator.check_invariants()

    @pytest.mark.parametrize("size", [1, 100, 5000, 100_000, MiB, 20 * MiB])
    def test_freeing_twice_is_refused(self, allocator, size):
        first, second = allocator.allocate(size), allocator.allocate(size)
        fill(second, size, 7)
        allocator.deallocate(first)
        before = allocator.stats()
        assert allocator.refuses(first)
        assert allocator.stats() == before
        assert holds(second, size, 7)
        allocator.check_invariants()
        allocator.deallocate(second)
        assert allocator.refuses(second)

    @pytest.mark.parametrize("size", [1, 300, 5000, 100_000, MiB, 20 * MiB])
    def test_freeing_what_was_never_handed_out_is_refused(self, allocator, size):
        address = allocator.allocate(size)
        fill(address, size, 3)
        for foreign in (1, 64, 0x10000, id(self), address + 1, address + 64, address + size, 2**64 - 1):
            assert allocator.refuses(foreign)
        assert holds(address, size, 3)
        allocator.check_invariants()
        allocator.deallocate(address)

    def test_contents_survive_a_random_mix(self, allocator):
        self._mix(allocator, random.Random(1), steps=3000, largest=16 * MiB, budget=LIMIT // 2)
        allocator.check_invariants()
        assert allocator.stats()["active"] == 0

    def test_contents_survive_a_random_mix_at_the_limit(self, allocator):
        refused = self._mix(allocator, random.Random(2), steps=1500, largest=LIMIT, budget=2 * LIMIT)
        assert refused > 20  # it really was at the limit
        allocator.check_invariants()
        assert allocator.stats()["active"] == 0

    def test_contents_survive_four_threads(self, allocator):
        errors: list[BaseException] = []
        stop = threading.Event()

        def work(seed: int) -> None:
            try:
                self._mix(allocator, random.Random(seed), steps=800, largest=8 * MiB, budget=LIMIT // 8)
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

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
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

    def _mix(self, allocator: Allocator, rng: random.Random, *, steps: int, largest: int, budget: int) -> int:
        """Allocate and free at random, verifying contents; returns how many requests were refused."""
        live: list[tuple[int, int, int]] = []
        held = refused = 0
        for step in range(steps):
            if live and (held > budget or rng.random() < 0.45):
                address, size, value = live.pop(rng.randrange(len(live)))
                assert holds(address, size, value)
                allocator.deallocate(address)
                held -= size
                continue
            size, value = random_size(rng, largest), step % 255 + 1
            try:
                address = allocator.allocate(size)
            except allocator.out_of_memory:
                refused += 1
                continue
            fill(address, size, value)
            live.append((address, size, value))
            held += size
        for address, size, value in live:
            assert holds(address, size, value)
            allocator.deallocate(address)
        return refused
