"""Weights in memory that processes share, and the quota that others leave to a pool (native)."""

import ctypes
import fcntl
import gc
import mmap
import os
import threading
import weakref
from pathlib import Path

import pytest

from glake_infer.allocators import DriverError, InvalidPointerError, OutOfMemoryError, _native

KiB, MiB = 1 << 10, 1 << 20
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture
def pool():
    pool = _native.Pool(64 * MiB)
    yield pool
    pool.check_invariants()


def open_files():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def place(pool, count=2, **policy):
    region, address, chunks = pool.place_weights([(MiB, MiB - 10, 0, False)] * count, "shared")
    return region, address, chunks, pool.add_user(chunks, **policy)


def make(pool, user, value=7):
    """Begin a use, and make all that is missing; returns descriptors."""
    chunks = pool.begin_use(user)
    for chunk in chunks:
        pool.make([chunk])
        ctypes.memset(pool.address_of(chunk), value, MiB)
        pool.freeze([chunk])
    pool.loaded(user, chunks)
    return [pool.descriptor(chunk) for chunk in chunks]


def adopt(pool, user, descriptors):
    chunks = pool.begin_use(user)
    for chunk, descriptor in zip(chunks, descriptors, strict=True):
        pool.adopt(chunk, descriptor)
    pool.loaded(user, chunks)


def close(descriptors):
    for descriptor in descriptors:
        os.close(descriptor)


class TestHostMemory:
    def test_frozen_memory_can_be_read_by_all_and_written_by_nobody(self):
        memory = _native.host_memory()
        before = len(open_files())
        handle, descriptor = memory.create_shared(MiB)
        address = memory.reserve(2 * MiB)
        memory.map(address, handle, MiB, descriptor)
        memory.fill(address, MiB, 9)
        memory.freeze(handle, MiB, descriptor, [address])
        assert memory.read(address, 4) == b"\x09" * 4
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
        for attempt in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 10)):
            with pytest.raises(PermissionError):
                attempt()
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, MiB, mmap.MAP_SHARED, mmap.PROT_WRITE)
        other = _native.host_memory()
        copy = os.dup(descriptor)
        again = other.adopt(copy, MiB)
        there = other.reserve(MiB)
        other.map(there, again, MiB, copy, "read_only")
        memory.unmap(address, MiB)
        memory.destroy(handle, MiB, descriptor)
        assert other.read(there, MiB) == b"\x09" * MiB
        other.unmap(there, MiB)
        other.destroy(again, MiB, copy)
        other.release(there, MiB)
        memory.release(address, 2 * MiB)
        del memory, other
        gc.collect()
        assert len(open_files()) < before  # the two pools' own files are gone too

    @pytest.mark.parametrize("what", ["size", "seals", "kind"])
    def test_what_could_change_under_us_is_not_adopted(self, what, tmp_path):
        memory = _native.host_memory()
        if what == "kind":
            descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        else:
            descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
            if what == "size":
                os.ftruncate(descriptor, MiB - 4096)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        if what != "size":
            os.ftruncate(descriptor, MiB)
            if what == "seals":
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(DriverError, match="nobody can change"):
            memory.adopt(descriptor, MiB)
        os.close(descriptor)  # still ours

    def test_no_descriptor_left_says_what_to_do(self):
        memory = _native.host_memory()
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(DriverError, match="ulimit -n"):
                memory.create_shared(MiB)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestChunks:
    def test_one_pool_makes_and_another_adopts(self, pool):
        other = _native.Pool(64 * MiB)
        _, address, chunks, user = place(pool)
        descriptors = make(pool, user)
        _, there, _, reader = place(other)
        adopt(other, reader, descriptors)
        close(descriptors)
        assert ctypes.string_at(there, 2 * MiB) == ctypes.string_at(address, 2 * MiB) == b"\x07" * 2 * MiB
        assert other.stats()["shared"] == other.stats()["reserved"] == other.stats()["active"] == 2 * MiB
        pool.end_use(user)
        assert pool.suspend(user) == 2 * MiB
        assert sorted(pool.take_gone()) == [(chunk, True) for chunk in sorted(chunks)]
        assert pool.take_gone() == []
        assert pool.stats()["shared"] == 0
        assert ctypes.string_at(there, 10) == b"\x07" * 10
        other.end_use(reader)
        other.check_invariants()

    def test_a_chunk_is_made_anew_after_it_was_gone(self, pool):
        _, address, chunks, user = place(pool)
        for value in (1, 2):
            close(make(pool, user, value))
            assert ctypes.string_at(address + MiB, 10) == bytes([value]) * 10
            pool.end_use(user)
            pool.suspend(user)
        pool.take_gone()
        assert pool.begin_use(user) == chunks
        pool.make([chunks[0]])
        pool.unmake(chunks[0])
        pool.make([chunks[0]])
        with pytest.raises(InvalidPointerError):
            pool.make([chunks[0]])
        pool.load_failed(user, chunks)
        assert pool.take_gone() == [(chunks[0], False)]
        assert pool.stats()["reserved"] == 0

    def test_a_failed_map_leaves_the_chunk_loading_and_nothing_open(self, pool):
        _, _, chunks, user = place(pool, 1)
        pool.begin_use(user)
        before = open_files()
        for calls in range(2):  # create_shared, map
            pool.inject_failure(calls)
            with pytest.raises(DriverError, match="injected"):
                pool.make([chunks[0]])
            pool.inject_failure(-1)
        assert open_files() == before
        pool.make([chunks[0]])
        pool.loaded(user, chunks)  # freezes
        with pytest.raises(PermissionError):
            os.pwrite(descriptor := pool.descriptor(chunks[0]), b"x", 0)
        os.close(descriptor)
        pool.end_use(user)

    def test_offers_and_giving_up(self, pool):
        _, _, chunks, user = place(pool, 2, evictable=True, priority=3)
        close(make(pool, user))
        assert pool.offers() == []
        assert pool.shared_busy() == 2 * MiB
        assert pool.running() == 1
        assert pool.give_up(chunks) == []
        pool.end_use(user)
        assert pool.running() == 0
        offers = pool.offers()
        assert [offer[:3] for offer in offers] == [(chunk, True, 3) for chunk in chunks]
        assert all(0 <= offer[3] < 60 for offer in offers)
        assert pool.give_up([chunks[1], 999]) == [chunks[1]]
        assert pool.take_gone() == []
        assert pool.user(user)["missing"] == MiB
        pool.set_policy(user, False, 0)
        assert pool.offers() == []
        assert pool.give_up(chunks) == []
        pool.remove_user(user)
        assert [offer[:2] for offer in pool.offers()] == [(chunks[0], False)]
        assert pool.trim() == MiB
        assert pool.take_gone() == [(chunks[0], True)]

    def test_what_goes_is_told_by_an_event(self, pool):
        event = os.eventfd(0, os.EFD_NONBLOCK)
        pool.share(lambda quota, full: "", event)
        _, _, _, user = place(pool)
        close(make(pool, user))
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)
        pool.end_use(user)
        pool.suspend(user)
        assert os.eventfd_read(event) == 1
        pool.unshare(event)
        os.close(event)

    def test_two_regions_show_the_same_chunk(self, pool):
        _, first, chunks, one = place(pool)
        region, second, _ = pool.place_weights([(MiB, MiB, chunks[1], False)], "shared")
        close(make(pool, one, 5))
        assert ctypes.string_at(second, MiB) == b"\x05" * MiB
        _, third, _ = pool.place_weights([(MiB, MiB, chunks[1], False)], "shared")  # it is there, and frozen
        assert ctypes.string_at(third, 10) == b"\x05" * 10
        pool.remove_region(region)
        pool.end_use(one)
        with pytest.raises(InvalidPointerError):
            pool.place_weights([(MiB, MiB, chunks[1], False)], "memory")
        assert ctypes.string_at(first, 10) == b"\x05" * 10


class TestQuota:
    def test_the_pool_asks_for_more_and_keeps_within_it(self, pool):
        asked = []

        def grow(quota, full):
            asked.append((quota, full))
            pool.set_quota(quota)
            return ""

        pool.share(grow, -1)
        address = pool.allocate(3 * MiB)
        assert asked
        assert all(not full for _, full in asked)
        assert pool.stats()["reserved"] <= asked[-1][0]
        count = len(asked)
        pool.deallocate(address)
        pool.deallocate(pool.allocate(3 * MiB))
        assert len(asked) == count
        pool.deallocate(pool.allocate(9 * MiB))
        assert len(asked) > count
        assert pool.set_quota(0) == 0
        assert pool.stats()["reserved"] == 0
        pool.unshare(-1)
        pool.deallocate(pool.allocate(9 * MiB))

    def test_a_refusal_is_the_errors_remedy(self, pool):
        pool.share(lambda quota, full: "The broker has no room.", -1)
        with pytest.raises(OutOfMemoryError, match=r"The broker has no room\.$") as caught:
            pool.allocate(MiB)
        assert caught.value.refusal == "The broker has no room."
        assert caught.value.limit == 64 * MiB
        pool.unshare(-1)

    def test_a_grower_that_fails_is_a_refusal(self, pool):
        pool.share(lambda quota, full: 1 / 0, -1)
        with pytest.raises(OutOfMemoryError, match="ZeroDivisionError"):
            pool.allocate(MiB)
        pool.unshare(-1)

    def test_beyond_the_pools_own_limit_nobody_is_asked(self, pool):
        asked = []
        pool.share(lambda quota, full: asked.append(quota) or "", -1)
        with pytest.raises(OutOfMemoryError, match=r"raise pool\.limit"):
            pool.allocate(65 * MiB)
        assert asked == []
        pool.unshare(-1)

    def test_a_grant_that_others_take_is_asked_for_again_and_not_for_ever(self, pool):
        asked = []
        pool.share(lambda quota, full: asked.append(quota) or "", -1)  # says yes, and gives nothing
        with pytest.raises(OutOfMemoryError):
            pool.allocate(MiB)
        assert 1 < len(asked) < 20
        pool.unshare(-1)

    def test_shared_weights_take_none_of_it_and_count_against_the_limit(self):
        pool = _native.Pool(4 * MiB)
        pool.share(lambda quota, full: pool.set_quota(quota) and "", -1)
        _, _, chunks, user = place(pool, 3, evictable=True)
        close(make(pool, user))
        assert pool.set_quota(0) == 0
        assert pool.stats()["shared"] == 3 * MiB
        with pytest.raises(OutOfMemoryError):
            pool.allocate(2 * MiB)
        pool.end_use(user)
        address = pool.allocate(2 * MiB)  # the limit binds: weights go
        assert pool.take_gone() == [(chunks[0], False)]
        pool.deallocate(address)
        pool.check_invariants()
        pool.unshare(-1)

    def test_where_the_quota_binds_no_shared_weight_goes(self, pool):
        pool.share(lambda quota, full: "no.", -1)
        _, _, _, user = place(pool, 3, evictable=True)
        close(make(pool, user))
        pool.end_use(user)
        with pytest.raises(OutOfMemoryError):
            pool.allocate(MiB)
        assert pool.take_gone() == []
        assert pool.user(user)["missing"] == 0
        pool.unshare(-1)

    def test_private_weights_need_quota_too(self, pool):
        granted = []
        pool.share(lambda quota, full: granted.append(pool.set_quota(quota)) or "", -1)
        _, _, chunks = pool.place_weights([(MiB, MiB, 0, False)] * 3, "memory")
        user = pool.add_user(chunks)
        pool.loaded(user, pool.begin_use(user))
        assert granted == [3 * MiB]
        pool.end_use(user)
        pool.suspend(user)
        pool.unshare(-1)

    def test_the_grower_is_let_go(self, pool):
        class Grower:
            def __call__(self, quota, full):
                return ""

        grower = Grower()
        gone = weakref.ref(grower)
        pool.share(grower, -1)
        del grower
        assert gone() is not None
        pool.unshare(-1)
        gc.collect()
        assert gone() is None

    def test_not_in_debug_mode(self, pool):
        from glake_infer.allocators import PoolInUseError

        pool.configure("on")
        with pytest.raises(PoolInUseError):
            pool.share(lambda quota, full: "", -1)

    def test_many_threads_grow_and_shrink(self, pool):
        pool.share(lambda quota, full: pool.set_quota(quota + MiB) and "", -1)
        _, _, _, user = place(pool, 4, evictable=True)
        close(make(pool, user))
        pool.end_use(user)
        failures = []

        def work(seed):
            try:
                for turn in range(100):
                    address = pool.allocate((1 + (seed + turn) % 4) * MiB)
                    ctypes.memset(address, seed, MiB)
                    pool.deallocate(address)
                    if turn % 10 == seed:
                        pool.set_quota(0)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Eight attempts may all lose against five others that shrink it: that is a refusal, and the only one.
        assert all(isinstance(error, OutOfMemoryError) for error in failures)
        assert len(failures) <= 1
        pool.check_invariants()
        pool.unshare(-1)
