"""CUDA for the tests: kernels that wait, write and compare on memory given by address, through CuPy.

Streams are `cupy.cuda.Stream` objects; `stream.ptr` is the handle that a pool takes.
"""

from __future__ import annotations

import functools
import os

import numpy as np

DEVICE = os.environ.get("GLAKE_TEST_DEVICE", "cuda:0")
INDEX = int(DEVICE.partition(":")[2] or 0)
SANITIZED = "GLAKE_SANITIZER" in os.environ  # under compute-sanitizer kernels are slow, and threads more so

SOURCE = r"""
typedef unsigned long long u64;
__device__ u64 now() { u64 time; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time)); return time; }
extern "C" __global__ void spin(u64 nanoseconds) {
  const u64 start = now();
  while (now() - start < nanoseconds) {}
}
extern "C" __global__ void fill(unsigned* words, u64 count, unsigned value) {
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (u64)blockDim.x) {
    words[i] = value;
  }
}
extern "C" __global__ void compare(const unsigned* words, u64 count, unsigned value, u64* wrong) {
  u64 found = 0;
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (u64)blockDim.x) {
    found += words[i] != value;
  }
  if (found) atomicAdd(wrong, found);
}
extern "C" __global__ void stamp(u64* where) { *where = now(); }
"""


def cupy():
    import cupy

    return cupy


@functools.cache
def _kernel(name):
    return cupy().RawModule(code=SOURCE).get_function(name)


def new_stream():
    """A stream of its own, which does not wait for the default one."""
    return cupy().cuda.Stream(non_blocking=True)


def synchronize():
    cupy().cuda.runtime.deviceSynchronize()


def spin(stream, seconds):
    """Keep the stream busy."""
    with stream:
        _kernel("spin")((1,), (1,), (np.uint64(seconds * 1e9),))


def fill(stream, address, size, value):
    """Write the 32-bit `value` to `size` bytes (a multiple of 4)."""
    with stream:
        _kernel("fill")((64,), (256,), (np.uint64(address), np.uint64(size // 4), np.uint32(value)))


def compare(stream, address, size, value, wrong):
    """Add to the counter `wrong` (see `counter`) how many words are not `value`."""
    with stream:
        arguments = (np.uint64(address), np.uint64(size // 4), np.uint32(value), np.uint64(wrong.data.ptr))
        _kernel("compare")((64,), (256,), arguments)


def stamp(stream, times, index):
    """Write the device's time in nanoseconds to `times[index]` (see `counter`)."""
    with stream:
        _kernel("stamp")((1,), (1,), (np.uint64(times.data.ptr + 8 * index),))


def counter(size=1):
    """Zeroed 64-bit integers on the device, in memory that is not the pool's."""
    zeros = cupy().zeros(size, dtype=np.uint64)
    synchronize()
    return zeros


def load():
    """Compile and load every kernel now: loading allocates on the device and waits for it."""
    stream, words = new_stream(), counter(4)
    spin(stream, 0)
    fill(stream, words.data.ptr, 8, 1)
    compare(stream, words.data.ptr, 8, 1, words[1:])
    stamp(stream, words, 2)
    synchronize()


def memset(address, value, size):
    """Set bytes and wait."""
    cupy().cuda.runtime.memset(address, value, size)
    synchronize()


def read(address, size):
    """Return bytes of the device's memory."""
    target = np.empty(size, np.uint8)
    cupy().cuda.runtime.memcpy(target.ctypes.data, address, size, cupy().cuda.runtime.memcpyDeviceToHost)
    return target.tobytes()


def free_memory():
    """Bytes that the device has free, of all processes (cuMemGetInfo)."""
    return cupy().cuda.runtime.memGetInfo()[0]


def total_memory():
    return cupy().cuda.runtime.memGetInfo()[1]
