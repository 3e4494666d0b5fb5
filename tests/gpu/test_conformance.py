"""Every allocator and face on CUDA passes the one suite (tests/allocators/conformance.py)."""

from __future__ import annotations

import ctypes

import pytest

pytest.importorskip("cupy")
import kernels
from conformance import LIMIT, AllocatorConformance, KiB, MiB
from ort_c_api import Stream, Struct
from test_conformance_faces import OfPool, PythonPool, TensorRTFace, TorchFace
from test_ort_allocator import OrtFace

from glake_infer import Pool
from glake_infer.allocators import _native

pytestmark = pytest.mark.gpu


class OnDevice:
    """Memory of the GPU, written and read with everything else at rest."""

    slowness = 3

    def fill(self, address, size, value):
        kernels.memset(address, value, size)

    def holds(self, address, size, value):
        kernels.synchronize()
        head = min(size, 64 * KiB)
        tail = size % 4 + 4 if size > head else 0
        if kernels.read(address, head) != bytes([value]) * head:
            return False
        if not tail:
            return True
        wrong = kernels.counter()
        stream = kernels.cupy().cuda.Stream.null
        kernels.compare(stream, address, size // 4 * 4, value * 0x01010101, wrong)
        stream.synchronize()
        return int(wrong.get()[0]) == 0 and kernels.read(address + size - tail, tail) == bytes([value]) * tail

    def finish(self):
        kernels.synchronize()


@pytest.fixture
def streams():
    return [kernels.new_stream() for _ in range(3)]


class CudaPool(OnDevice, PythonPool):
    def __init__(self, pool, streams):
        super().__init__(pool)
        self._alive, self.streams = streams, [stream.ptr for stream in streams]

    def allocate_on(self, size, stream):
        return self.pool.allocate(size, stream=stream)


class CudaNativePool(CudaPool):
    """The binding below Pool."""

    def __init__(self, pool, streams):
        super().__init__(pool, streams)
        native = pool._open()
        self.allocate, self.deallocate = native.allocate, native.deallocate

    def allocate_on(self, size, stream):
        return self.pool._open().allocate(size, "activations", stream)


class CudaTorchFace(OnDevice, TorchFace):
    def __init__(self, pool, capture, streams):
        self._alive, self.streams = streams, [stream.ptr for stream in streams]
        super().__init__(pool, capture, int(pool.device.partition(":")[2]), self.streams[0])


class CudaTensorRTFace(OnDevice, TensorRTFace):
    def __init__(self, pool, streams):
        self._alive, self.streams = streams, [stream.ptr for stream in streams]
        super().__init__(pool)


class CudaOrtFace(OnDevice, OfPool, OrtFace):
    """Alloc, Reserve, AllocOnStream and Free as ONNX Runtime calls them."""

    def __init__(self, pool, capture, way, streams):
        self.pool, self._capture, self._way = pool, capture, way
        self.address = _native.ort_allocator(pool.device)
        self.struct = Struct.from_address(self.address)
        if way == "AllocOnStream":
            self._alive = streams, [Stream(handle=stream.ptr) for stream in streams]
            self.streams = [ctypes.addressof(stream) for stream in self._alive[1]]

    def allocate(self, size):
        if self._way == "AllocOnStream":
            return self.allocate_on(size, self.streams[0])
        return _native.ort_allocate(size, self._way == "Reserve", self.pool.device)

    def allocate_on(self, size, stream):
        return _native.ort_allocate(size, False, self.pool.device, stream)


class TestCudaPool(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, streams):
        pool.limit = LIMIT
        return CudaPool(pool, streams)


class TestCudaNativePool(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, streams):
        pool.limit = LIMIT
        return CudaNativePool(pool, streams)


class TestCudaTorch(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, streams, capfd):
        pool.limit = LIMIT
        return CudaTorchFace(pool, capfd, streams)


class TestCudaTensorRT(AllocatorConformance):
    @pytest.fixture
    def allocator(self, pool, streams):
        pool.limit = LIMIT
        return CudaTensorRTFace(pool, streams)


class TestCudaOrt(AllocatorConformance):
    @pytest.fixture(params=["Alloc", "Reserve", "AllocOnStream"])
    def allocator(self, request, pool, streams, capfd):
        pool.limit = LIMIT
        return CudaOrtFace(pool, capfd, request.param, streams)


class TestCudaDebugPool(AllocatorConformance):
    @pytest.fixture
    def allocator(self, device, streams):
        with Pool(device, LIMIT, debug=True) as pool:
            allocator = CudaPool(pool, streams)
            allocator.keeps_idle = False  # what is freed is unmapped
            yield allocator
            kernels.synchronize()


def test_a_size_of_every_kind_is_on_the_device(pool):
    for size in (1, 3, 1000, MiB + 1):
        address = pool.allocate(size)
        attributes = kernels.cupy().cuda.runtime.pointerGetAttributes(address)
        assert attributes.device == int(pool.device.partition(":")[2])
        pool.deallocate(address)
