"""The native pool: the conformance suite, and how large requests are served (block_pool.cpp, pool.cpp)."""

from __future__ import annotations

import ctypes
import random
import threading

import pytest
from conformance import LIMIT, Allocator, AllocatorConformance, KiB, MiB, fill, holds, random_size

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


def calls(pool) -> int:
    return pool.stats()["driver_calls"]


def test_an_exact_idle_block_is_reused_without_a_driver_call(pool):
    address = pool.allocate(5 * MiB)
    pool.deallocate(address)
    before = calls(pool)
    assert pool.allocate(5 * MiB - 1000) == address
    assert calls(pool) == before
    pool.deallocate(address)


def test_a_request_is_rounded_up_to_a_granule(pool):
    address = pool.allocate(MiB + 1)
    assert pool.stats()["active"] == MiB + GRANULE
    assert pool.stats()["requested"] == MiB + 1
    pool.deallocate(address)


def test_a_larger_idle_block_serves_if_it_wastes_at_most_an_eighth(pool):
    address = pool.allocate(9 * MiB)
    pool.deallocate(address)
    before = calls(pool)
    assert pool.allocate(8 * MiB) == address
    assert calls(pool) == before
    assert pool.stats()["active"] == 9 * MiB
    pool.deallocate(address)
    assert pool.allocate(8 * MiB - GRANULE) != address


def test_two_idle_blocks_are_stitched_into_one():
    pool = _native.Pool(16 * MiB)
    first, second = pool.allocate(8 * MiB), pool.allocate(8 * MiB)
    fill(first, 8 * MiB, 1)
    fill(second, 8 * MiB, 2)
    with pytest.raises(OutOfMemoryError):
        pool.allocate(16 * MiB)
    pool.deallocate(first)
    pool.deallocate(second)
    chunks = pool.stats()["chunks"]
    whole = pool.allocate(16 * MiB)
    stats = pool.stats()
    assert stats["reserved"] == stats["active"] == 16 * MiB
    assert stats["chunks"] == chunks  # the same physical memory
    assert stats["stitched_blocks"] == 1
    halves = {bytes([b]) for b in (1, 2)}
    assert {ctypes.string_at(whole, 1), ctypes.string_at(whole + 8 * MiB, 1)} == halves  # and what it held
    ctypes.memset(whole, 3, 16 * MiB)
    # The old addresses show the same bytes: one memory, several mappings.
    assert holds(first, 8 * MiB, 3)
    assert holds(second, 8 * MiB, 3)
    pool.check_invariants()
    pool.deallocate(whole)
    pool.check_invariants()


def test_a_steady_state_makes_no_driver_calls(pool):
    def phase() -> None:
        blocks = [pool.allocate(size * MiB) for size in (8, 24, 3)]
        for block in blocks:
            pool.deallocate(block)
        whole = pool.allocate(30 * MiB)
        pool.deallocate(whole)

    for _ in range(3):
        phase()
    before = calls(pool)
    for _ in range(100):
        phase()
    assert calls(pool) == before


def test_a_chunk_of_an_active_stitched_block_is_not_handed_out_again(pool):
    first, second = pool.allocate(8 * MiB), pool.allocate(8 * MiB)
    pool.deallocate(first)
    pool.deallocate(second)
    whole = pool.allocate(16 * MiB)
    fill(whole, 16 * MiB, 1)
    other = pool.allocate(8 * MiB)
    assert other not in (first, second)
    fill(other, 8 * MiB, 2)
    assert holds(whole, 16 * MiB, 1)
    pool.deallocate(whole)
    assert pool.allocate(8 * MiB) in (first, second)


def test_freeing_an_address_whose_chunks_serve_a_stitched_block_is_refused(pool):
    first, second = pool.allocate(8 * MiB), pool.allocate(8 * MiB)
    pool.deallocate(first)
    pool.deallocate(second)
    pool.allocate(16 * MiB)
    with pytest.raises(InvalidPointerError, match="freed already"):
        pool.deallocate(first)


def test_missing_chunks_are_created_and_stitched_with_the_idle_ones(pool):
    pool.deallocate(pool.allocate(8 * MiB))
    whole = pool.allocate(20 * MiB)
    stats = pool.stats()
    assert stats["reserved"] == 20 * MiB
    assert stats["stitched_blocks"] == 1
    fill(whole, 20 * MiB, 4)
    assert holds(whole, 20 * MiB, 4)


def test_chunks_that_do_not_fit_are_given_back_at_the_limit():
    pool = _native.Pool(64 * MiB)
    pool.deallocate(pool.allocate(64 * MiB))  # one chunk of 64 MiB, which cannot be split
    address = pool.allocate(20 * MiB)
    assert pool.stats()["reserved"] <= 64 * MiB
    assert pool.stats()["active"] == 20 * MiB
    pool.deallocate(address)


def test_the_cache_of_mappings_is_bounded():
    pool = _native.Pool(1024 * MiB)
    ladder = [pool.allocate(GRANULE << rung) for rung in range(4, 11)]
    ladder += [pool.allocate(MiB + GRANULE * 15) for _ in range(4)]  # and the small rungs
    for address in ladder:
        pool.deallocate(address)
    for step in range(1500):  # every size is a new block over the same chunks
        pool.deallocate(pool.allocate(16 * MiB + step * GRANULE))
    assert pool.stats()["blocks"] <= 1024
    pool.check_invariants()


@pytest.mark.parametrize("kept", [0, 1], ids=["alone", "old and new"])
def test_a_request_that_grows_each_time_strands_no_memory(pool, kept):
    live = []
    for step in range(1000):
        live.append(pool.allocate(MiB + step * GRANULE))
        while len(live) > kept:
            pool.deallocate(live.pop(0))
    stats = pool.stats()
    assert stats["peak_reserved"] <= stats["peak_active"] * 1.1
    for address in live:
        pool.deallocate(address)


def test_random_sizes_strand_little_memory(pool):
    rng = random.Random(3)
    live = []
    for _ in range(3000):
        if len(live) > 6:
            pool.deallocate(live.pop(rng.randrange(len(live))))
        live.append(pool.allocate(random_size(rng, 16 * MiB)))
    stats = pool.stats()
    assert stats["peak_reserved"] <= stats["peak_active"] * 1.15
    for address in live:
        pool.deallocate(address)


def test_many_small_chunks_are_not_stitched_one_by_one(pool):
    small = [pool.allocate(50_000) for _ in range(3000)]
    for address in small:
        pool.deallocate(address)
    assert pool.stats()["idle"] > 64 * MiB
    before = pool.stats()
    address = pool.allocate(60 * MiB)
    after = pool.stats()
    assert before["chunks"] - after["chunks"] > 400  # few large ones took their place
    assert after["reserved"] == before["reserved"]
    pool.deallocate(address)


def test_when_the_driver_fails_all_that_can_be_spared_is_given_back(pool):
    halves = [pool.allocate(8 * MiB) for _ in range(2)]
    for half in halves:
        pool.deallocate(half)
    pool.deallocate(pool.allocate(16 * MiB))
    halves = [pool.allocate(8 * MiB) for _ in range(2)]  # the stitched block stays mapped, unused
    pool.deallocate(pool.allocate(4 * MiB))
    assert (pool.stats()["idle"], pool.stats()["stitched_blocks"]) == (4 * MiB, 1)
    pool.inject_failure(0)
    address = pool.allocate(2 * MiB)
    stats = pool.stats()
    assert (stats["idle"], stats["stitched_blocks"], stats["active"]) == (0, 0, 18 * MiB)
    for block in (*halves, address):
        pool.deallocate(block)


def test_the_error_names_the_smallest_limit_that_would_have_done():
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
    assert error.holders == {"weights": 20 * MiB, "activations": 5 * MiB}
    assert error.device_free > 0
    assert error.needed_limit == 35 * MiB + GRANULE
    pool.set_limit(error.needed_limit - 1)
    with pytest.raises(OutOfMemoryError):
        pool.allocate(10 * MiB + 1)
    pool.set_limit(error.needed_limit)
    pool.deallocate(pool.allocate(10 * MiB + 1))
    pool.deallocate(kept)
    pool.deallocate(also)


def test_needed_limit_is_exact_for_small_requests_too():
    pool = _native.Pool(MiB)
    kept = pool.allocate(MiB)
    for size in (1, 100, 5000, 70_000, 300_000, 1_000_000):
        with pytest.raises(OutOfMemoryError) as caught:
            pool.allocate(size)
        pool.set_limit(caught.value.needed_limit)
        pool.deallocate(pool.allocate(size))
        pool.set_limit(caught.value.needed_limit - 1)
        with pytest.raises(OutOfMemoryError):
            pool.allocate(size)
        pool.set_limit(MiB)
    pool.deallocate(kept)


def test_the_limit_can_be_lowered_to_what_is_active(pool):
    kept = pool.allocate(10 * MiB)
    pool.deallocate(pool.allocate(20 * MiB))
    with pytest.raises(PoolInUseError, match=r"10\.0 MiB .* are active"):
        pool.set_limit(10 * MiB - 1)
    assert pool.stats()["limit"] == LIMIT
    pool.set_limit(10 * MiB)
    assert pool.stats()["reserved"] == 10 * MiB
    pool.deallocate(kept)


def test_trim_stops_at_its_target(pool):
    for address in [pool.allocate(size * MiB) for size in (32, 16, 8, 4)]:
        pool.deallocate(address)
    assert pool.trim(100 * MiB) == 0
    given = pool.trim(50 * MiB)
    assert pool.stats()["reserved"] == 60 * MiB - given
    assert 44 * MiB <= pool.stats()["reserved"] <= 50 * MiB
    assert pool.trim() == pool.stats()["reserved"] or pool.stats()["reserved"] == 0


def test_peaks_are_kept_until_reset(pool):
    pool.deallocate(pool.allocate(10 * MiB))
    pool.trim()
    assert pool.stats()["peak_active"] == pool.stats()["peak_reserved"] == 10 * MiB
    pool.reset_peaks()
    assert pool.stats()["peak_active"] == pool.stats()["peak_reserved"] == 0


def test_an_unknown_tag_is_refused(pool):
    with pytest.raises(ValueError, match="unknown tag 'gold': expected 'activations' or 'weights'"):
        pool.allocate(5, "gold")


@pytest.mark.parametrize("size", [100, 5000, 3 * MiB, 100 * MiB])
@pytest.mark.parametrize("stitched", [False, True])
def test_any_one_driver_call_may_fail(size, stitched):
    """The pool tries again with nothing idle and nothing cached, so one failure shows nowhere."""
    for n in range(50):
        pool = _native.Pool(LIMIT)
        if stitched:
            for address in [pool.allocate(2 * MiB), pool.allocate(MiB)]:
                pool.deallocate(address)
        pool.inject_failure(n)
        address = pool.allocate(size)
        fill(address, size, 8)
        pool.check_invariants()
        pool.inject_failure(-1)
        if calls(pool) < n:
            break
        pool.deallocate(address)


@pytest.mark.parametrize("size", [100, 5000, 3 * MiB, 100 * MiB])
def test_a_driver_that_fails_again_and_again_leaves_nothing_handed_out(size, monkeypatch):
    pool = _native.Pool(LIMIT)
    kept = pool.allocate(MiB)
    fill(kept, MiB, 6)
    before = pool.stats()
    for n in range(20):
        pool.inject_failure(n, 2)
        try:
            pool.deallocate(pool.allocate(size))
        except DriverError as error:
            assert "injected" in str(error)  # noqa: PT017
        pool.inject_failure(-1)
        pool.check_invariants()
        after = pool.stats()
        assert after["active"] == before["active"]
        assert after["requested"] == before["requested"]
        pool.trim()
        assert pool.stats()["reserved"] == MiB
    assert holds(kept, MiB, 6)


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
