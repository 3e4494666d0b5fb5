"""Physical memory: stitching, the budget, giving back (chunks.cpp)."""

from __future__ import annotations

import ctypes
import random

import pytest
from conformance import KiB, MiB, fill, holds, random_size

from glake_infer.allocators import InvalidPointerError, OutOfMemoryError, PoolInUseError, _native

GRANULE = 64 * KiB
MOST_MAPPINGS = 12  # Chunks::most_mappings_of_chunk


@pytest.fixture
def pool():
    pool = _native.Pool(1024 * MiB)
    yield pool
    pool.check_invariants()


def soft_limit(peak_requested: int) -> float:
    """What reserved may grow to while idle chunks that cannot serve are left (Pool::budget)."""
    return peak_requested * (1 + 1 / 33) + 16 * MiB


class TestStitching:
    """Memory of weights that are gone serves activations, which have another heap, and the other way round."""

    @pytest.fixture
    def pool(self):
        pool = _native.Pool(16 * MiB)
        yield pool
        pool.check_invariants()

    @pytest.fixture
    def halves(self, pool):
        first, second = pool.allocate(8 * MiB, "weights"), pool.allocate(8 * MiB, "weights")
        fill(first, 8 * MiB, 1)
        fill(second, 8 * MiB, 2)
        return first, second

    def test_idle_chunks_are_mapped_where_they_are_needed(self, pool, halves):
        first, second = halves
        with pytest.raises(OutOfMemoryError):
            pool.allocate(16 * MiB)
        pool.deallocate(first)
        pool.deallocate(second)
        chunks = pool.stats()["chunks"]
        whole = pool.allocate(16 * MiB)
        stats = pool.stats()
        assert stats["reserved"] == stats["active"] == 16 * MiB
        assert stats["chunks"] == stats["stitches"] == chunks  # the same physical memory
        assert stats["mappings"] == 2 * chunks
        contents = {ctypes.string_at(whole + offset, 1) for offset in (0, 8 * MiB)}
        assert contents == {b"\1", b"\2"}  # and what it held
        ctypes.memset(whole, 3, 16 * MiB)
        # The old addresses show the same bytes: one memory, several mappings.
        assert holds(first, 8 * MiB, 3)
        assert holds(second, 8 * MiB, 3)
        pool.deallocate(whole)

    def test_a_chunk_that_is_in_use_elsewhere_is_not_handed_out_again(self, halves, pool):
        for half in halves:
            pool.deallocate(half)
        whole = pool.allocate(16 * MiB)
        fill(whole, 16 * MiB, 7)
        pool.set_limit(24 * MiB)
        other = pool.allocate(8 * MiB, "weights")
        assert other not in halves
        fill(other, 8 * MiB, 8)
        assert holds(whole, 16 * MiB, 7)
        pool.deallocate(whole)
        before = pool.stats()["driver_calls"]
        assert {pool.allocate(8 * MiB, "weights"), pool.allocate(8 * MiB, "weights")} == set(halves)
        assert pool.stats()["driver_calls"] == before  # the old mappings were kept
        assert holds(other, 8 * MiB, 8)

    def test_freeing_an_address_whose_chunk_is_used_elsewhere_is_refused(self, pool, halves):
        for half in halves:
            pool.deallocate(half)
        whole = pool.allocate(16 * MiB)
        fill(whole, 16 * MiB, 4)
        for half in halves:
            with pytest.raises(InvalidPointerError, match="freed long ago"):
                pool.deallocate(half)
        assert holds(whole, 16 * MiB, 4)

    def test_missing_chunks_are_created_beside_the_idle_ones(self, pool, halves):
        pool.set_limit(64 * MiB)
        for half in halves:
            pool.deallocate(half)
        whole = pool.allocate(20 * MiB)
        stats = pool.stats()
        assert (stats["reserved"], stats["stitches"]) == (20 * MiB, 2)
        fill(whole, 20 * MiB, 4)
        assert holds(whole, 20 * MiB, 4)

    def test_back_and_forth_makes_no_driver_calls(self, pool, halves):
        for half in halves:
            pool.deallocate(half)
        pool.deallocate(pool.allocate(16 * MiB))
        before = pool.stats()["driver_calls"]
        for turn in range(50):
            halves = [pool.allocate(8 * MiB, "weights") for _ in range(2)]
            for half in halves:
                fill(half, 8 * MiB, turn + 1)
                pool.deallocate(half)
            whole = pool.allocate(16 * MiB)
            assert holds(whole, 16 * MiB, turn + 1)
            pool.deallocate(whole)
        assert pool.stats()["driver_calls"] == before


def test_a_chunk_stays_mapped_at_a_few_addresses_only(pool):
    """A request that grows beside the one before it maps the same chunks again and again."""
    live: list[tuple[range, int]] = []
    most = 0.0
    for step in range(500):
        size = MiB + step * GRANULE
        value = step % 255 + 1
        address = pool.allocate(size, ("weights", "activations")[step // 50 % 2])
        marks = range(address, address + size, GRANULE)
        for mark in marks:
            ctypes.memset(mark, value, 1)
        live.append((marks, value))
        if step:
            marks, value = live.pop(0)
            assert all(ctypes.string_at(mark, 1)[0] == value for mark in marks)
            pool.deallocate(marks[0])
        stats = pool.stats()
        assert stats["mappings"] <= MOST_MAPPINGS * stats["chunks"]
        most = max(most, stats["mappings"] / stats["chunks"])
    assert most > 2
    assert stats["stitches"] > 1000


def test_chunks_that_cannot_serve_are_given_back_at_the_limit():
    pool = _native.Pool(64 * MiB)
    pool.deallocate(pool.allocate(64 * MiB))  # two chunks of 32 MiB, which cannot be split
    address = pool.allocate(20 * MiB, "weights")
    stats = pool.stats()
    assert (stats["reserved"], stats["active"]) == (52 * MiB, 20 * MiB)
    pool.deallocate(address)
    pool.check_invariants()


def test_many_small_chunks_are_not_mapped_one_by_one():
    """More than 256 idle ones: new, larger chunks take the place of the rest, and no more is reserved."""
    pool = _native.Pool(100 * MiB)
    live = []
    for size, tag in (
        (20_000, "activations"),
        (40_000, "activations"),
        (40_000, "weights"),
        (20_000, "weights"),
    ):
        live += [pool.allocate(size, tag) for _ in range(20 * MiB // size)]
    for address in live:
        pool.deallocate(address)
    before = pool.stats()
    assert before["chunks"] > 400
    address = pool.allocate(78 * MiB)
    after = pool.stats()
    assert before["chunks"] - after["chunks"] > 100
    assert after["stitches"] - before["stitches"] <= 256
    assert after["reserved"] <= before["reserved"] + GRANULE
    pool.deallocate(address)
    pool.check_invariants()


class TestSoftLimit:
    """Reserved stays near the most that was ever asked for, with no limit in sight."""

    def test_up_to_three_percent_more_is_new_and_the_rest_is_stitched(self, pool):
        pool.deallocate(pool.allocate(64 * MiB))
        first = pool.allocate(MiB, "weights")
        stats = pool.stats()
        assert (stats["reserved"], stats["stitches"]) == (65 * MiB, 0)
        second = pool.allocate(16 * MiB, "weights")
        stats = pool.stats()
        assert (stats["reserved"], stats["stitches"]) == (65 * MiB, 1)
        pool.deallocate(first)
        pool.deallocate(second)

    def test_chunks_that_cannot_serve_are_given_back(self, pool):
        pool.deallocate(pool.allocate(256 * MiB))  # large chunks
        small = [pool.allocate(50_000) for _ in range(3000)]
        stats = pool.stats()
        assert stats["peak_reserved"] <= soft_limit(256 * MiB)
        assert stats["active"] > 140 * MiB
        for address in small:
            pool.deallocate(address)

    @pytest.mark.parametrize("seed", range(4))
    def test_random_traces(self, pool, seed):
        rng = random.Random(seed)
        live = []
        for _ in range(3000):
            if len(live) > 60:
                pool.deallocate(live.pop(rng.randrange(len(live))))
            live.append(pool.allocate(random_size(rng, 32 * MiB)))
        stats = pool.stats()
        assert stats["peak_requested"] > 128 * MiB
        # Free pieces in chunks that are in use cannot be given back: no promise, but it is little.
        assert stats["peak_reserved"] <= 1.1 * stats["peak_requested"] + 16 * MiB
        for address in live:
            pool.deallocate(address)

    def test_alternating_phases(self, pool):
        for turn in range(8):
            large = [pool.allocate((size + turn) * MiB) for size in (160, 96, 48, 33)]
            for address in large:
                pool.deallocate(address)
            small = [pool.allocate(size) for size in (100, 5000, 20_000, 40_000, 300_000) for _ in range(600)]
            for address in small:
                pool.deallocate(address)
        stats = pool.stats()
        assert stats["peak_requested"] > 320 * MiB
        assert stats["peak_reserved"] <= 1.1 * stats["peak_requested"]

    def test_weights_that_are_loaded_and_unloaded(self, pool):
        rng = random.Random(1)
        models: dict[int, list[int]] = {}
        for step in range(80):
            model = rng.randrange(5)
            if model in models:
                for address in models.pop(model):
                    pool.deallocate(address)
            else:
                sizes = random.Random(7 * model + step % 3)
                models[model] = [
                    pool.allocate(int(2 ** sizes.uniform(8, 23.5)), "weights") for _ in range(120)
                ]
            activations = [pool.allocate(int(2 ** rng.uniform(12, 24))) for _ in range(20)]
            rng.shuffle(activations)
            for address in activations:
                pool.deallocate(address)
        stats = pool.stats()
        assert stats["peak_requested"] > 320 * MiB
        assert stats["peak_reserved"] <= 1.1 * stats["peak_requested"]


class TestTrim:
    def test_it_stops_at_its_target(self, pool):
        for address in [pool.allocate(size * MiB) for size in (32, 16, 8, 4)]:
            pool.deallocate(address)
        assert pool.trim(100 * MiB) == 0
        assert pool.trim(50 * MiB) == 16 * MiB  # the smallest chunk that suffices
        assert pool.stats()["reserved"] == 44 * MiB
        assert pool.trim(44 * MiB) == 0
        assert pool.trim() == 44 * MiB
        assert pool.stats()["reserved"] == pool.stats()["mappings"] == 0

    @pytest.mark.parametrize("target", [0, 10 * MiB, 33 * MiB, 60 * MiB, 75 * MiB])
    def test_what_is_in_use_stays(self, pool, target):
        rng = random.Random(9)
        live = [(pool.allocate(size), size) for size in (random_size(rng, 4 * MiB) for _ in range(150))]
        for value, (address, size) in enumerate(live):
            fill(address, size, value + 1)
        for address, _ in live[1::2]:
            pool.deallocate(address)
        before = pool.stats()
        given = pool.trim(target)
        after = pool.stats()
        assert after["reserved"] == before["reserved"] - given
        assert after["reserved"] <= target or pool.trim(target) == 0
        for value, (address, size) in list(enumerate(live))[::2]:
            assert holds(address, size, value + 1)
            pool.deallocate(address)
        pool.trim()
        assert pool.stats()["reserved"] == 0

    def test_a_chunk_with_one_live_byte_stays(self, pool):
        addresses = [pool.allocate(8 * MiB) for _ in range(3)]
        corner = pool.allocate(32 * KiB, "weights")
        for address in addresses:
            pool.deallocate(address)
        assert pool.trim() == 24 * MiB
        assert pool.stats()["reserved"] == GRANULE
        pool.deallocate(corner)
        assert pool.trim() == GRANULE


class TestLimit:
    def test_it_can_be_lowered_to_the_chunks_in_use(self, pool):
        kept = pool.allocate(10 * MiB)
        pool.deallocate(pool.allocate(20 * MiB))
        with pytest.raises(PoolInUseError, match=r"10\.0 MiB .* are active"):
            pool.set_limit(10 * MiB - 1)
        assert pool.stats()["limit"] == 1024 * MiB
        pool.set_limit(10 * MiB)
        assert pool.stats()["reserved"] == 10 * MiB
        pool.deallocate(kept)

    def test_reserved_never_exceeds_it(self):
        rng = random.Random(5)
        pool = _native.Pool(48 * MiB)
        live: list[int] = []
        refused = 0
        for _ in range(2000):
            if live and rng.random() < 0.4:
                pool.deallocate(live.pop(rng.randrange(len(live))))
            elif rng.random() < 0.02:
                try:
                    pool.set_limit(rng.randrange(32, 64) * MiB)
                except PoolInUseError:
                    refused += 1
            else:
                try:
                    live.append(
                        pool.allocate(random_size(rng, 24 * MiB), rng.choice(["weights", "activations"]))
                    )
                except OutOfMemoryError:
                    refused += 1
            assert pool.stats()["reserved"] <= pool.stats()["limit"]
        assert refused > 100
        pool.check_invariants()
