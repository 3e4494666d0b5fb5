"""The pool as ONNX Runtime sees it: a C struct of function pointers (ort_allocator.cpp)."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest
from conformance import LIMIT, Allocator, AllocatorConformance, KiB, MiB
from ort_c_api import Api, Pointer, Stream, Struct

from glake_infer.allocators import DriverError, ForkedProcessError, OutOfMemoryError, _native

ort = pytest.importorskip("onnxruntime")
VERSION = int(ort.__version__.split(".")[1])


class OrtFace(Allocator):
    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.address = _native.ort_allocator()
        self.struct = Struct.from_address(self.address)
        self._capture = capture

    def allocate(self, size):
        return _native.ort_allocate(size)  # through the struct; an exception must not pass through ctypes

    def deallocate(self, address):
        self.struct.Free(self.address, address)

    def refuses(self, address):
        self._capture.readouterr()
        self.deallocate(address)
        return (
            "glake-infer: ONNX Runtime freed memory that the pool did not take back"
            in self._capture.readouterr().err
        )

    def stats(self):
        return _native.host_pool().stats()

    def trim(self):
        return _native.host_pool().trim()

    def check_invariants(self):
        _native.host_pool().check_invariants()

    def set_limit(self, limit):
        _native.host_pool().set_limit(limit)


@pytest.fixture
def allocator(pool, capfd):
    pool.limit = LIMIT
    return OrtFace(capfd)


class TestOrtAllocator(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, capfd):
        pool.limit = LIMIT
        return OrtFace(capfd)


@pytest.fixture
def api(pool):
    """ONNX Runtime's functions, with the pool registered as its allocator."""
    pool.attach(ort.SessionOptions())
    return Api()


def test_the_struct_declares_what_this_version_of_onnxruntime_may_read(api, allocator):
    struct = allocator.struct
    assert struct.version == min(25, VERSION)
    for function in ("Alloc", "Free", "Info", "Reserve", "GetStats", "AllocOnStream", "Shrink"):
        assert getattr(struct, function), function


class TestOnnxRuntimesFunctions:
    """Each index that ort_api.hpp counts, called in the version that is installed."""

    def test_key_value_pairs(self, api):
        pairs = Pointer()
        api.call(295, None, (Pointer, ctypes.addressof(pairs)))
        api.call(296, None, (Pointer, pairs), (ctypes.c_char_p, b"InUse"), (ctypes.c_char_p, b"5"))
        assert api.call(297, ctypes.c_char_p, (Pointer, pairs), (ctypes.c_char_p, b"InUse")) == b"5"
        assert api.pairs(pairs.value) == {"InUse": "5"}

    def test_the_handle_of_a_stream(self, api):
        stream = Stream(handle=0x1234567)
        assert api.call(384, Pointer, (Pointer, ctypes.addressof(stream))) == 0x1234567
        # The fields on both sides, which need no device to say who they are.
        status = api.call(383, Pointer, (Pointer, None), (Pointer, None), (Pointer, None))
        assert api.message(status) == "ep_device and stream must be provided."
        nothing = [(Pointer, None)] * 4
        status = api.call(386, Pointer, *nothing, (ctypes.c_size_t, 0))
        assert "CopyTensors" in api.message(status)

    def test_the_memory_info_and_the_registration(self, api, allocator):
        info = allocator.struct.Info(allocator.address)
        assert api.memory_info(info) == ("Cpu", 0)
        assert api.shared_allocator(info) == allocator.address


class TestStats:
    def test_onnxruntime_reads_the_pools_figures(self, api, allocator, pool):
        before = api.allocator_stats(allocator.address)
        activation = allocator.struct.Alloc(allocator.address, 3 * MiB)
        weight = allocator.struct.Reserve(allocator.address, 5 * MiB)
        allocator.struct.Free(allocator.address, activation)
        now, stats = api.allocator_stats(allocator.address), pool.stats()
        assert set(now) == {
            "Limit", "InUse", "TotalAllocated", "MaxInUse", "NumAllocs", "NumReserves", "NumArenaShrinkages",
            "MaxAllocSize",
        }  # fmt: skip
        assert int(now["Limit"]) == LIMIT
        assert int(now["InUse"]) == stats.active >= 5 * MiB
        assert int(now["TotalAllocated"]) == stats.reserved
        assert int(now["MaxInUse"]) == stats.peak_active >= 8 * MiB
        assert int(now["NumAllocs"]) - int(before["NumAllocs"]) == 2
        assert int(now["NumReserves"]) - int(before["NumReserves"]) == 1
        assert int(now["MaxAllocSize"]) >= 5 * MiB
        allocator.struct.Free(allocator.address, weight)

    def test_the_largest_request_is_remembered_and_refused_ones_do_not_count(self, api, allocator, pool):
        pool.limit = "900MiB"
        allocator.deallocate(allocator.allocate(700 * MiB))  # more than any other test asks for
        with pytest.raises(MemoryError):
            _native.ort_allocate(2**40)
        reserves = api.allocator_stats(allocator.address)["NumReserves"]
        with pytest.raises(MemoryError):
            _native.ort_allocate(2**40, reserve=True)
        stats = api.allocator_stats(allocator.address)
        assert int(stats["MaxAllocSize"]) == 700 * MiB
        assert stats["NumReserves"] == reserves

    def test_no_limit_is_minus_one(self, api, allocator, pool):
        _native.host_pool().set_limit(2**64 - 1)
        assert api.allocator_stats(allocator.address)["Limit"] == "-1"
        pool.limit = 2**63
        assert api.allocator_stats(allocator.address)["Limit"] == str(2**63 - 1)


class TestShrink:
    def test_it_gives_idle_memory_back_and_is_counted(self, api, allocator):
        kept = allocator.allocate(2 * MiB)
        allocator.deallocate(allocator.allocate(20 * MiB))
        before = int(api.allocator_stats(allocator.address)["NumArenaShrinkages"])
        assert allocator.stats()["idle"] >= 20 * MiB
        assert allocator.struct.Shrink(allocator.address) is None  # no OrtStatus
        assert allocator.stats()["idle"] == 0
        assert allocator.stats()["active"] >= 2 * MiB
        assert int(api.allocator_stats(allocator.address)["NumArenaShrinkages"]) == before + 1
        allocator.deallocate(kept)

    def test_a_child_of_fork_does_nothing(self, api, allocator):
        allocator.deallocate(allocator.allocate(20 * MiB))
        child = os.fork()
        if child == 0:
            os._exit(0 if allocator.struct.Shrink(allocator.address) is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert allocator.stats()["idle"] >= 20 * MiB


class TestStream:
    @pytest.mark.parametrize("handle", [None, 0x1234567])
    def test_memory_on_a_stream_is_an_activation(self, api, allocator, handle):
        stream = Stream(handle=handle)
        address = _native.ort_allocate(3 * MiB, stream=ctypes.addressof(stream))
        stats = allocator.stats()
        assert stats["active"] >= 3 * MiB
        assert stats["weights"] == 0
        allocator.deallocate(address)

    def test_no_stream_at_all_is_allowed(self, api, allocator):
        address = allocator.struct.AllocOnStream(allocator.address, 10 * KiB, None)
        assert address
        allocator.deallocate(address)

    def test_a_failure_on_a_stream_is_recorded(self, api, allocator, pool):
        before = pool.failure_count
        stream = Stream(handle=0x1234567)
        with pytest.raises(MemoryError):
            _native.ort_allocate(LIMIT + 1, stream=ctypes.addressof(stream))
        (failure,) = pool.failures(before)
        assert failure.requested == LIMIT + 1


def test_the_struct_stays_at_its_address(allocator):
    assert _native.ort_allocator() == allocator.address


def test_the_c_functions_hand_out_and_take_back(allocator):
    activation = allocator.struct.Alloc(allocator.address, 3 * MiB)
    weight = allocator.struct.Reserve(allocator.address, 5 * MiB)
    stats = allocator.stats()
    assert (stats["active"], stats["weights"]) == (8 * MiB, 5 * MiB)
    allocator.struct.Free(allocator.address, activation)
    allocator.struct.Free(allocator.address, weight)
    assert allocator.stats()["active"] == 0


def test_a_failure_leaves_a_record_with_a_growing_number(allocator, pool):
    before = pool.failure_count
    for size in (LIMIT + 1, 2**63):
        with pytest.raises(MemoryError):
            _native.ort_allocate(size, reserve=True)
    assert pool.failure_count == before + 2
    first, second = pool.failures(before)
    assert isinstance(first, OutOfMemoryError)
    assert (first.requested, second.requested) == (LIMIT + 1, 2**63)
    assert (first.sequence, second.sequence) == (before + 1, before + 2)
    assert first.thread == threading.get_native_id()
    assert pool.failures(before + 1)[0].requested == 2**63
    assert pool.failures(before + 2) == []


def test_only_the_last_32_records_are_kept(allocator, pool):
    before = pool.failure_count
    for size in range(50):
        with pytest.raises(MemoryError):
            _native.ort_allocate(2**62 + size)
    kept = pool.failures()
    assert [failure.requested - 2**62 for failure in kept] == list(range(18, 50))
    assert kept[-1].sequence == before + 50


def test_a_failing_system_leaves_a_record_too(allocator, pool):
    before = pool.failure_count
    pool.trim()
    _native.host_pool().inject_failure(0, 1000)
    with pytest.raises(MemoryError):
        _native.ort_allocate(10 * MiB)
    _native.host_pool().inject_failure(-1)
    (failure,) = pool.failures(before)
    assert isinstance(failure, DriverError)
    assert "injected by a test" in str(failure)
    allocator.deallocate(allocator.allocate(10 * MiB))


def test_an_error_of_a_session_is_explained_by_its_number(allocator, pool):
    with pytest.raises(MemoryError):
        _native.ort_allocate(LIMIT + 5)
    number = pool.failure_count
    error = RuntimeError(f"Status Message: [glake-infer failure {number}] out of memory")
    assert pool.explain(error).requested == LIMIT + 5
    assert pool.explain(RuntimeError("[glake-infer failure 999999999] gone")) is None
    assert pool.explain(RuntimeError("something else")) is None
    assert isinstance(pool.explain(RuntimeError("[glake-infer failure 0] forked")), ForkedProcessError)


def test_an_unknown_device_is_refused():
    for name in ("cuda", "cuda:", "cuda:x", "cuda:-1", "cuda:1 ", "", "gpu", "cuda:99999999999999999999"):
        with pytest.raises(ValueError, match="unknown device"):
            _native.ort_allocator(name)
    with pytest.raises(DriverError, match=r"opening device cuda:64 failed"):
        _native.device_pool("cuda:64")


def test_each_device_has_one_pool():
    assert _native.device_pool("cpu") is _native.device_pool("cpu")
    assert _native.failures(device="cuda:5") == []  # asking makes no pool


def test_the_first_use_from_many_threads_makes_one_pool(python):
    process = python(
        """
        import threading
        from glake_infer.allocators import _native
        barrier, found = threading.Barrier(16), []
        def look():
            barrier.wait()
            found.append(_native.ort_allocator("cpu"))
        threads = [threading.Thread(target=look) for _ in range(16)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(len(found), len(set(found)))
        """
    )
    assert process.communicate(timeout=60)[0] == "16 1\n"
