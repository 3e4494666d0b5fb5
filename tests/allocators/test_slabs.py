"""Small requests: size classes and slabs (size_classes.hpp, slabs.cpp)."""

from __future__ import annotations

import itertools

import pytest
from conformance import KiB, MiB

from glake_infer.allocators import OutOfMemoryError, _native

GRANULE = 64 * KiB


@pytest.fixture
def pool():
    pool = _native.Pool(256 * MiB)
    yield pool
    pool.check_invariants()


def test_small_objects_share_a_granule(pool):
    addresses = [pool.allocate(64) for _ in range(1024)]
    assert pool.stats()["active"] == GRANULE
    assert pool.stats()["slabs"] == 1
    assert sorted(addresses) == list(range(min(addresses), min(addresses) + GRANULE, 64))
    addresses.append(pool.allocate(64))
    assert pool.stats()["slabs"] == 2
    for address in addresses:
        pool.deallocate(address)
    assert pool.stats()["slabs"] == 0


def test_the_classes_waste_less_than_a_third_and_keep_alignment(pool):
    # The distance of two objects of one slab is the size of its class.
    for size in [*range(1, 3000, 7), *range(3000, 16_000, 333)]:
        addresses = sorted(pool.allocate(size) for _ in range(3))
        gaps = {b - a for a, b in itertools.pairwise(addresses)}
        object_bytes = min(gaps)
        assert object_bytes >= size
        assert object_bytes - size < max(64, 256 if size > 256 else 0, size / 4 + 1)
        assert all(address % (256 if size >= 256 else 64) == 0 for address in addresses)
        for address in addresses:
            pool.deallocate(address)


def test_a_single_object_takes_no_more_than_a_granule(pool):
    for size in (1, 1000, 9000, 20_000, 32 * KiB - 1):
        address = pool.allocate(size)
        assert pool.stats()["active"] == GRANULE
        assert pool.stats()["slabs"] == 1
        pool.deallocate(address)


def test_from_32_kib_on_a_request_is_no_slab(pool):
    for size in (32 * KiB, 65_000, 200_000, 900_000):
        address = pool.allocate(size)
        assert pool.stats()["active"] == (size + 511) // 512 * 512
        assert pool.stats()["slabs"] == 0
        pool.deallocate(address)


def test_a_class_in_demand_gets_larger_slabs(pool):
    addresses = [pool.allocate(20_000) for _ in range(64)]
    assert pool.stats()["slabs"] <= 16
    assert pool.stats()["active"] < 64 * 20_000 * 1.2
    for address in addresses:
        pool.deallocate(address)


def test_the_last_room_below_the_limit_serves_single_objects():
    pool = _native.Pool(3 * GRANULE)
    # Objects of 20 KiB, three to a granule. Slabs for 1 and 3 take two granules; the next would be for 6.
    addresses = [pool.allocate(20_000) for _ in range(9)]
    stats = pool.stats()
    assert (stats["slabs"], stats["reserved"]) == (3, 3 * GRANULE)
    with pytest.raises(OutOfMemoryError):
        pool.allocate(20_000)
    for address in addresses:
        pool.deallocate(address)
    pool.check_invariants()


def test_an_empty_slab_is_idle_and_serves_other_sizes(pool):
    pool.deallocate(pool.allocate(100))
    stats = pool.stats()
    assert (stats["active"], stats["idle"], stats["slabs"]) == (0, GRANULE, 0)
    pool.allocate(5000)
    assert pool.stats()["reserved"] == GRANULE
    assert pool.trim() == 0


def test_weights_and_activations_do_not_share_slabs(pool):
    weight, activation = pool.allocate(100, "weights"), pool.allocate(100)
    stats = pool.stats()
    assert stats["slabs"] == 2
    assert stats["weights"] == 100
    assert stats["active"] == 2 * GRANULE
    pool.deallocate(activation)
    assert (pool.stats()["active"], pool.stats()["weights"]) == (GRANULE, 100)
    pool.deallocate(weight)


def test_a_slab_that_serves_again_forgets_the_old_class(pool):
    small = pool.allocate(64)
    pool.deallocate(small)
    larger = pool.allocate(4096)
    assert larger == small  # the same block, cut otherwise
    other = pool.allocate(4096)
    assert other == larger + 4096
    pool.deallocate(larger)
    pool.deallocate(other)
