"""Byte ranges: how they are cut, reused, merged and found again (heap.cpp)."""

from __future__ import annotations

import random

import pytest
from conformance import KiB, MiB, fill, holds, random_size

from glake_infer.allocators import _native

GRANULE = 64 * KiB
STEP = 512


@pytest.fixture
def pool():
    pool = _native.Pool(1024 * MiB)
    yield pool
    pool.check_invariants()


def calls(pool) -> int:
    return pool.stats()["driver_calls"]


def test_an_exact_size_is_reused_without_a_driver_call(pool):
    address = pool.allocate(5 * MiB)
    pool.deallocate(address)
    before = calls(pool)
    assert pool.allocate(5 * MiB - 511) == address
    assert calls(pool) == before
    pool.deallocate(address)


def test_of_equal_ranges_the_one_freed_last_is_reused_first(pool):
    addresses = [pool.allocate(MiB) for _ in range(5)]
    order = [3, 0, 4, 1, 2]
    for index in order:
        pool.deallocate(addresses[index])
    assert [pool.allocate(MiB) for _ in order] == [addresses[index] for index in reversed(order)]


@pytest.mark.parametrize(
    ("size", "active"), [(MiB + 1, MiB + STEP), (32 * KiB, 32 * KiB), (50_000, 50_176), (3 * MiB, 3 * MiB)]
)
@pytest.mark.parametrize("tag", ["activations", "weights", "workspace"])
def test_a_request_is_rounded_up_to_512_bytes(pool, size, active, tag):
    address = pool.allocate(size, tag)
    stats = pool.stats()
    assert (stats["active"], stats["requested"]) == (active, size)
    assert stats["reserved"] == -(-size // GRANULE) * GRANULE
    pool.deallocate(address)


@pytest.mark.parametrize("size", [2 * MiB + 256 * KiB, MiB + 1, 100_000, 33_333])
def test_neighbours_share_granules(pool, size):
    """What rounding each of them to a granule would waste: 11 to 49 %."""
    count = 64 * MiB // size
    addresses = [pool.allocate(size, "weights") for _ in range(count)]
    stats = pool.stats()
    # The quantum that a heap grows by (a 32nd of what it has) is open at its end.
    assert stats["reserved"] <= count * size * 1.02 + 2 * MiB
    assert stats["active"] <= count * (size + STEP)
    distance = -(-size // STEP) * STEP
    assert addresses == [addresses[0] + index * distance for index in range(count)]
    for value, address in enumerate(addresses):
        fill(address, size, value % 255 + 1)
    for value, address in enumerate(addresses):
        assert holds(address, size, value % 255 + 1)
        pool.deallocate(address)


def test_many_weights_of_two_and_a_quarter_mib_waste_less_than_two_percent(pool):
    for _ in range(300):
        pool.allocate(2 * MiB + 256 * KiB, "weights")
    stats = pool.stats()
    assert stats["peak_reserved"] < stats["peak_requested"] * 1.02


def test_the_smallest_free_range_that_holds_a_request_is_cut(pool):
    sizes = [8, 1, 5, 1, 6, 1, 30, 1]
    addresses = [pool.allocate(size * MiB) for size in sizes]
    for address, size in zip(addresses, sizes, strict=True):
        if size != 1:
            pool.deallocate(address)
    before = pool.stats()
    assert pool.allocate(5 * MiB + 3) == addresses[4]
    assert pool.allocate(4 * MiB) == addresses[2]
    assert pool.allocate(7 * MiB) == addresses[0]
    assert pool.allocate(20 * MiB) == addresses[6]
    assert pool.allocate(10 * MiB) == addresses[6] + 20 * MiB  # the rest of it
    after = pool.stats()
    assert (after["driver_calls"], after["reserved"]) == (before["driver_calls"], before["reserved"])


def test_free_neighbours_merge(pool):
    addresses = [pool.allocate(3 * MiB) for _ in range(8)]
    assert addresses == [addresses[0] + index * 3 * MiB for index in range(8)]
    random.Random(4).shuffle(addresses)
    for address in addresses:
        pool.deallocate(address)
    before = calls(pool)
    assert pool.allocate(24 * MiB) == min(addresses)
    assert calls(pool) == before
    assert pool.stats()["ranges"] == 1


def test_a_merged_range_serves_pieces_again(pool):
    whole = pool.allocate(24 * MiB)
    pool.deallocate(whole)
    before = calls(pool)
    assert [pool.allocate(6 * MiB) for _ in range(4)] == [whole + index * 6 * MiB for index in range(4)]
    assert calls(pool) == before


def test_the_end_of_what_is_mapped_is_made_longer(pool):
    first = pool.allocate(10 * MiB)
    last = pool.allocate(6 * MiB)
    pool.deallocate(last)
    assert pool.allocate(9 * MiB) == last == first + 10 * MiB  # 6 MiB that were there, and 3 new
    assert pool.stats()["reserved"] == 19 * MiB


def test_what_lives_long_does_not_lie_between_large_ranges(pool):
    """Small, medium, large and weights have address space of their own."""
    kinds = [(1000, "activations"), (100_000, "activations"), (2 * MiB, "activations"), (100_000, "weights")]
    for _ in range(20):
        for size, tag in kinds:
            pool.allocate(size, tag)
    seen = {}
    for segment in pool.snapshot()["segments"]:
        for part in segment["ranges"]:
            if part["state"] == "active":
                seen.setdefault((part["requested"], part["tag"]), set()).add(segment["kind"])
    assert [seen[kind] for kind in kinds] == [{"small"}, {"medium"}, {"large"}, {"weights"}]


def test_a_request_that_grows_each_time_strands_no_memory(pool):
    for kept in (0, 1):
        live = []
        pool.trim()
        pool.reset_peaks()
        for step in range(500):
            live.append(pool.allocate(MiB + step * GRANULE))
            fill(live[-1], MiB, step % 255 + 1)
            if kept and step:
                assert holds(live[0], MiB, (step - 1) % 255 + 1)
            while len(live) > kept:
                pool.deallocate(live.pop(0))
        stats = pool.stats()
        assert stats["peak_reserved"] <= stats["peak_requested"] * 1.04 + 2 * MiB
        for address in live:
            pool.deallocate(address)


@pytest.mark.parametrize("seed", range(4))
def test_a_repeated_pattern_makes_no_driver_call_after_warm_up(pool, seed):
    """Random sizes over two kinds of memory: the mappings that were made serve from then on."""
    rng = random.Random(seed)
    pattern: list[tuple[int, int, str]] = []  # (number, size or 0 to free it, tag)
    live: list[int] = []
    for number in range(200):
        if live and rng.random() < 0.5:
            pattern.append((live.pop(rng.randrange(len(live))), 0, ""))
        else:
            live.append(number)
            pattern.append((number, random_size(rng, 32 * MiB), rng.choice(["weights", "activations"])))
    pattern += [(number, 0, "") for number in live]

    def turn() -> None:
        addresses = {}
        for number, size, tag in pattern:
            if size:
                addresses[number] = pool.allocate(size, tag)
            else:
                pool.deallocate(addresses.pop(number))

    for _ in range(60):
        turn()
    before = calls(pool)
    for _ in range(20):
        turn()
    assert calls(pool) == before


def test_large_then_small_then_large_settles(pool):
    def phases() -> None:
        for address in [pool.allocate(size * MiB) for size in (8, 24, 3)]:
            pool.deallocate(address)
        small = [pool.allocate(40_000) for _ in range(600)]
        for address in small:
            pool.deallocate(address)
        pool.deallocate(pool.allocate(30 * MiB))

    for _ in range(5):
        phases()
    before = calls(pool)
    for _ in range(30):
        phases()
    assert calls(pool) == before
