"""The pool as ONNX Runtime sees it: a C struct of function pointers (ort_allocator.cpp)."""

from __future__ import annotations

import ctypes
import threading

import pytest
from conformance import LIMIT, Allocator, AllocatorConformance, MiB

from glake_infer.allocators import DriverError, OutOfMemoryError, _native


class Struct(ctypes.Structure):
    """OrtAllocator as ONNX Runtime publishes it, up to the fields after version 18."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("Alloc", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("Free", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)),
        ("Info", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)),
        ("Reserve", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        ("GetStats", ctypes.c_void_p),
        ("AllocOnStream", ctypes.c_void_p),
        ("Shrink", ctypes.c_void_p),
    )


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


def test_the_struct_declares_only_what_is_implemented(allocator):
    struct = allocator.struct
    assert struct.version == 18
    assert struct.Alloc
    assert struct.Free
    assert struct.Info
    assert struct.Reserve
    assert (struct.GetStats, struct.AllocOnStream, struct.Shrink) == (None, None, None)


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
