"""The handle of a device's pool (pool.py)."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import threading

import pytest
from conformance import MiB, fill
from memory import file_of_bytes

from glake_infer.allocators import (
    DeviceNotFoundError,
    GlakeError,
    InputError,
    InvalidPointerError,
    OutOfMemoryError,
    Pool,
    PoolClosedError,
    PoolExistsError,
    PoolInUseError,
    PoolStats,
    _native,
    cpu_memory,
)


def test_the_default_limit_is_the_memory_there_is():
    with Pool() as pool:
        assert pool.limit == cpu_memory() > 0
        assert pool.device == "cpu"
        assert pool.providers == ["CPUExecutionProvider"]


@pytest.mark.parametrize(("limit", "size"), [("64MiB", 64 * MiB), (10**8, 10**8), ("0.5GB", 5 * 10**8)])
def test_a_limit_can_be_text_or_bytes(limit, size):
    with Pool(limit=limit) as pool:
        assert pool.limit == size


@pytest.mark.parametrize("limit", [0, "0B", -1, "-1MiB", "lots", "4G", 1.5, True, b"4GiB"])
def test_a_bad_limit_is_refused_and_leaves_no_pool(limit):
    with pytest.raises(InputError):
        Pool(limit=limit)
    assert Pool.current() is None


def test_stats_are_a_frozen_snapshot_of_all_the_core_counts(pool):
    stats = pool.stats()
    assert isinstance(stats, PoolStats)
    assert set(dataclasses.asdict(stats)) == set(_native.host_pool().stats())
    assert stats.reserved == stats.active + stats.idle == 0
    assert stats.limit == 2**30
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.active = 1


def test_allocate_and_deallocate(pool):
    address = pool.allocate("3MiB", tag="weights")
    fill(address, 3 * MiB, 1)
    assert pool.stats().weights == pool.stats().active == 3 * MiB
    pool.deallocate(address)
    with pytest.raises(InvalidPointerError):
        pool.deallocate(address)
    assert pool.trim() == 3 * MiB
    assert "0 B active, 0 B idle, limit 1.0 GiB" in repr(pool)


def test_the_limit_can_be_changed(pool):
    kept = pool.allocate(8 * MiB)
    pool.deallocate(pool.allocate(20 * MiB))
    pool.limit = "10MiB"
    assert pool.limit == 10 * MiB
    assert pool.stats().reserved == 8 * MiB
    with pytest.raises(OutOfMemoryError):
        pool.allocate(3 * MiB)
    with pytest.raises(PoolInUseError):
        pool.limit = 1
    assert pool.limit == 10 * MiB
    pool.limit = None
    assert pool.limit == cpu_memory()
    pool.deallocate(kept)


def test_map_file_takes_the_whole_file_unless_told(pool, tmp_path):
    with file_of_bytes(tmp_path / "weights", 5000).open("rb") as file:
        whole, part = pool.map_file(file.fileno()), pool.map_file(file.fileno(), 4096)
    assert pool.stats().mapped_files == 3 * 4096
    pool.unmap_file(whole)
    pool.unmap_file(part)


def test_trim_takes_a_target(pool):
    pool.deallocate(pool.allocate(8 * MiB))
    assert pool.trim("8MiB") == 0
    assert pool.trim(0) == 8 * MiB
    with pytest.raises(InputError):
        pool.trim("some")


class TestOnePerDevice:
    def test_a_second_handle_is_refused(self, pool):
        with pytest.raises(PoolExistsError, match=r"Pool.current\('cpu'\) gives it; close\(\) it first"):
            Pool(device="cpu")
        assert Pool.current("cpu") is pool
        assert pool.limit == 2**30

    def test_current_is_none_without_an_open_handle(self):
        assert Pool.current() is None
        pool = Pool(limit="1GiB")
        assert Pool.current() is pool
        pool.close()
        assert Pool.current() is None
        with Pool(limit="2GiB") as other:
            assert Pool.current() is other
            assert other.limit == 2**31

    def test_a_dropped_handle_gives_idle_memory_back(self):
        pool = Pool(limit="1GiB")
        pool.deallocate(pool.allocate(5 * MiB))
        native = _native.host_pool()
        assert native.stats()["idle"] == 5 * MiB
        del pool
        gc.collect()
        assert native.stats()["reserved"] == 0
        assert Pool.current() is None

    def test_the_next_handle_takes_over_what_is_still_active(self):
        pool = Pool(limit="1GiB")
        address = pool.allocate(5 * MiB)
        del pool
        gc.collect()
        with pytest.raises(PoolInUseError, match=r"5\.0 MiB"):
            Pool(limit="4MiB")
        assert Pool.current() is None
        with Pool(limit="6MiB") as pool:
            assert pool.stats().active == pool.stats().peak_active == 5 * MiB
            pool.deallocate(address)

    def test_threads_that_race_make_one(self):
        made, refused = [], []
        barrier = threading.Barrier(8)

        def make() -> None:
            barrier.wait()
            try:
                made.append(Pool(limit="1GiB"))
            except PoolExistsError as error:
                refused.append(error)

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(made), len(refused)) == (1, 7)
        made[0].close()


class TestClose:
    def test_a_pool_in_use_stays_open(self, pool):
        address = pool.allocate(2 * MiB, "weights")
        with pytest.raises(
            PoolInUseError, match=r"2\.0 MiB \(2097152 bytes\) are active, 2\.0 MiB of them weights"
        ):
            pool.close()
        pool.deallocate(address)
        pool.close()

    def test_a_closed_pool_says_so(self):
        pool = Pool(limit="1GiB")
        pool.deallocate(pool.allocate(MiB))
        pool.close()
        pool.close()
        assert _native.host_pool().stats()["reserved"] == 0
        for use in (
            pool.stats,
            pool.trim,
            pool.check_invariants,
            lambda: pool.allocate(1),
            lambda: pool.limit,
        ):
            with pytest.raises(PoolClosedError, match="make another"):
                use()
        with pytest.raises(PoolClosedError):
            pool.attach(object())
        assert repr(pool) == "<Pool on 'cpu', closed>"

    def test_leaving_the_block_does_not_hide_another_error(self):
        address = 0
        with pytest.raises(KeyError), Pool(limit="1GiB") as pool:  # noqa: PT012
            address = pool.allocate(MiB)
            raise KeyError
        pool.deallocate(address)
        pool.close()

    def test_leaving_the_block_with_memory_in_use_is_an_error(self):
        with pytest.raises(PoolInUseError), Pool(limit="1GiB") as pool:
            address = pool.allocate(MiB)
        pool.deallocate(address)
        pool.close()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:999999999", "cuda:999999999"),
        ("banana", "Valid names: 'cpu'"),
        ("CPU", "Valid names: 'cpu'"),
        ("cuda:x", "Valid names: 'cpu'"),
        ("", "Valid names: 'cpu'"),
        (None, "Valid names: 'cpu'"),
    ],
)
def test_a_device_that_is_not_there(device, message):
    with pytest.raises(DeviceNotFoundError) as caught:
        Pool(device=device)
    assert message in str(caught.value)
    with pytest.raises(GlakeError):
        Pool.current(device)


def test_a_child_of_fork_is_told(pool):
    child = os.fork()
    if child == 0:
        code = 0
        for use in (pool.trim, lambda: Pool(limit="1GiB"), lambda: pool.allocate(10)):
            try:
                use()
                code = 1
            except GlakeError as error:
                if "spawn" not in str(error):
                    code = 2
        pool.close()  # nothing to do, and no error
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pool.deallocate(pool.allocate(10))


def test_an_exit_with_live_memory_is_clean():
    code = """
from glake_infer.allocators import Pool
pool = Pool(limit="1GiB")
addresses = [pool.allocate(size) for size in (10, 100_000, 10_000_000)]
pool.deallocate(addresses.pop())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
