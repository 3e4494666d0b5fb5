"""Every allocator and face of the host passes the one suite (conformance.py); test_conformance.py in tests/gpu: CUDA's."""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from collections.abc import Sequence

import pytest
from conformance import LIMIT, Allocator, AllocatorConformance
from ort_c_api import Stream
from test_ort_allocator import VERSION, OrtFace
from trampoline import Trampoline

from glake_infer.allocators import (
    InvalidPointerError,
    MissingDependencyError,
    OutOfMemoryError,
    Pool,
    TensorRTAllocator,
    _native,
    torch_face,
)
from glake_infer.allocators import pool as pool_module


class PythonPool(Allocator):
    """glake_infer.Pool."""

    out_of_memory = OutOfMemoryError
    slowness = 4  # the native pool is tested at length
    streams = (0x100000, 0x200000, 0x300000)  # the host has none: any handle will do

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.allocate = pool.allocate
        self.deallocate = pool.deallocate
        self.trim = pool.trim
        self.check_invariants = pool.check_invariants

    def allocate(self, size): ...
    def deallocate(self, address): ...
    def trim(self): ...
    def check_invariants(self): ...

    def allocate_on(self, size, stream):
        return self.pool.allocate(size, stream=stream)

    def stats(self):
        return self.pool._open().stats()

    def set_limit(self, limit):
        self.pool.limit = limit

    def refuses(self, address):
        try:
            self.pool.deallocate(address)
        except InvalidPointerError:
            return True
        return False


class OrtReserveFace(OrtFace):
    """ONNX Runtime's way to weights."""

    slowness = 4

    def allocate(self, size):
        return _native.ort_allocate(size, reserve=True)


class OrtStreamFace(OrtFace):
    """ONNX Runtime's way to activations: AllocOnStream, with a stream object of its own making."""

    slowness = 4

    def __init__(
        self, capture: pytest.CaptureFixture[str], handles: Sequence[int] = (0x100000, 0x200000)
    ) -> None:
        super().__init__(capture)
        self._objects = [Stream(handle=handle) for handle in handles]
        self.streams = [ctypes.addressof(stream) for stream in self._objects]

    def allocate(self, size):
        return self.allocate_on(size, self.streams[0])

    def allocate_on(self, size, stream):
        return _native.ort_allocate(size, stream=stream)


class OfPool(Allocator):
    """What the suite asks of the pool behind a face."""

    pool: Pool

    def stats(self):
        return self.pool._open().stats()

    def set_limit(self, limit):
        self.pool.limit = limit

    def trim(self):
        return self.pool.trim()

    def check_invariants(self):
        self.pool.check_invariants()


class TorchFace(OfPool):
    """The C functions that PyTorch calls (torch_face.hpp); null is how the one for a MemPool refuses."""

    streams = (0x100000, 0x200000, 0x300000)

    def __init__(
        self, pool: Pool, capture: pytest.CaptureFixture[str], device: int = -1, stream: int = 0
    ) -> None:
        library = ctypes.CDLL(_native.__file__)
        self._allocate, self._free = library.glake_torch_try_allocate, library.glake_torch_free
        self._allocate.restype, self._free.restype = ctypes.c_void_p, None
        self._allocate.argtypes = (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
        self._free.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
        self.pool, self._capture, self._device, self._stream = pool, capture, device, stream

    def allocate(self, size):
        return self.allocate_on(size, self._stream)

    def allocate_on(self, size, stream):
        # PyTorch's sizes are signed, like ssize_t
        address = self._allocate(ctypes.c_ssize_t(size).value, self._device, stream)
        if address is None and size:
            raise MemoryError
        return address or 0

    def deallocate(self, address):
        self._free(address, 0, self._device, self._stream)

    def refuses(self, address):
        self._capture.readouterr()
        self.deallocate(address)
        return "PyTorch freed memory that the pool did not take back" in self._capture.readouterr().err


class TensorRTFace(OfPool):
    """The virtual methods that TensorRT calls (tests/trampoline.py); 0 is how they refuse."""

    streams = (0x100000, 0x200000, 0x300000)
    slowness = 8  # each call goes through Python

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.allocator = TensorRTAllocator(pool, pytest.importorskip("tensorrt_rtx"))
        self._caller = Trampoline(self.allocator)

    def allocate(self, size):
        return self.allocate_on(size, self.streams[0])

    def allocate_on(self, size, stream):
        address = self._caller.allocate_async(size, 256 if size >= 256 else 64, 0, stream)
        if size and not address:
            raise self.allocator.take_error()
        return address

    def deallocate(self, address):
        self._caller.deallocate_async(address, self.streams[0])

    def refuses(self, address):
        return not self._caller.deallocate_async(address, self.streams[0])


class TestPythonPool(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool):
        pool.limit = LIMIT
        return PythonPool(pool)


class TestOrtReserve(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, capfd):
        pool.limit = LIMIT
        return OrtReserveFace(capfd)


@pytest.mark.skipif(VERSION < 23, reason="this ONNX Runtime has no AllocOnStream")
class TestOrtAllocOnStream(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, capfd):
        pool.limit = LIMIT
        return OrtStreamFace(capfd)


class TestTorch(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, capfd):
        pool.limit = LIMIT
        return TorchFace(pool, capfd)


class TestTensorRT(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool):
        pool.limit = LIMIT
        return TensorRTFace(pool)


class TestDebugPool(AllocatorConformance):
    @pytest.fixture
    def allocator(self):
        pool_module._handles.clear()
        with Pool(limit=LIMIT, debug=True) as pool:
            allocator = PythonPool(pool)
            allocator.keeps_idle = False
            yield allocator


class TestTorchFace:
    @pytest.fixture
    def face(self, pool, capfd):
        pool.limit = LIMIT
        return TorchFace(pool, capfd)

    def test_a_failure_is_recorded(self, face, pool):
        before = pool.failure_count
        with pytest.raises(MemoryError):
            face.allocate(LIMIT + 1)
        (failure,) = pool.failures(before)
        assert isinstance(failure, OutOfMemoryError)
        assert failure.requested == LIMIT + 1

    def test_pytorchs_own_error_is_explained_by_this_threads_last_failure(self, face, pool):
        error = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("CUDA out of memory.")

        def fail_too():
            with pytest.raises(MemoryError):
                face.allocate(LIMIT + 2)

        other = threading.Thread(target=fail_too)
        with pytest.raises(MemoryError):
            face.allocate(LIMIT + 1)
        other.start()
        other.join()
        assert pool.explain(error).requested == LIMIT + 1

    def test_a_pool_of_the_host_is_none_for_pytorch(self, pool):
        for call in (pool.torch_allocator, pool.torch_mem_pool, pool.use_in_torch):
            with pytest.raises(ValueError, match="'cpu'"):
                call()

    @pytest.mark.parametrize(
        "module", [None, types.SimpleNamespace(__version__="2.4", _C=object(), cuda=object())]
    )
    def test_pytorch_is_missing_or_has_no_cuda(self, monkeypatch, module):
        monkeypatch.setitem(sys.modules, "torch", module)
        for call in (torch_face.mem_pool, torch_face.use):
            with pytest.raises(MissingDependencyError, match="pip install torch"):
                call("cuda:0")
