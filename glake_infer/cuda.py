"""What device arrays and models need of the CUDA driver: streams, copies, whose a pointer is.

Through cuda-python, on the device's primary context, which ONNX Runtime and PyTorch use too. The context is current on
the calling thread only inside these functions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import numpy as np

from glake_infer.allocators.errors import DriverError

LEGACY_STREAM = 1
"""The legacy default stream's handle, in the driver, in DLPack and in the CUDA array interface."""


def current(index: int) -> contextlib.AbstractContextManager[None]:
    """Make the primary context of GPU `index` this thread's inside the block, for libraries that use what is current."""
    return _context(index)


def synchronize(index: int, stream: int) -> None:
    """Wait on the host until all work queued so far on a stream of GPU `index` is done.

    Raises DriverError, also for an error that earlier work on the GPU left behind.
    """
    driver = _driver()
    with _context(index):
        _check("cuStreamSynchronize", driver.cuStreamSynchronize(stream), f"waiting for stream {stream:#x}")


def synchronize_all(index: int) -> None:
    """Wait on the host until all work queued so far on GPU `index`, on any stream, is done.

    Raises DriverError, as `synchronize` does. A capture that goes on meanwhile may break.
    """
    driver = _driver()
    with _context(index):
        _check("cuCtxSynchronize", driver.cuCtxSynchronize(), f"waiting for cuda:{index}")


def copy_to_host(index: int, address: int, target: np.ndarray[Any, Any]) -> None:
    """Fill the C-contiguous array `target` with the bytes at `address` on GPU `index`; waits for the copy."""
    if target.nbytes:
        driver = _driver()
        with _context(index):
            _check(
                "cuMemcpyDtoH",
                driver.cuMemcpyDtoH(target.ctypes.data, address, target.nbytes),
                f"copying {target.nbytes} bytes from cuda:{index} to the host",
            )


def device_of(address: int) -> int:
    """Return the index of the GPU whose memory `address` points into. Raises DriverError where it is none."""
    driver = _driver()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    result = driver.cuPointerGetAttribute(attribute, address)
    return int(_check("cuPointerGetAttribute", result, f"asking whose the address {address:#x} is"))


def new_stream(index: int) -> int:
    """Return the handle of a new stream on GPU `index` that waits for no other. Raises DriverError."""
    driver = _driver()
    with _context(index):
        flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(_check("cuStreamCreate", driver.cuStreamCreate(flag), f"making a stream on cuda:{index}"))


def queue_to_device(index: int, address: int, source: int, size: int, stream: int) -> None:
    """Queue a copy of `size` bytes from the host's address `source` to `address` on GPU `index`.

    The source stays as it is until the stream has passed the copy (where it is not pinned, until this returns).
    """
    driver = _driver()
    with _context(index):
        what = f"copying {size} bytes from the host to cuda:{index}"
        _check("cuMemcpyHtoDAsync", driver.cuMemcpyHtoDAsync(address, source, size, stream), what)


def queue_to_host(index: int, address: int, source: int, size: int, stream: int) -> None:
    """Queue a copy of `size` bytes from `source` on GPU `index` to the host's `address`, which is pinned.

    The bytes are there once the stream has passed the copy.
    """
    driver = _driver()
    with _context(index):
        what = f"copying {size} bytes from cuda:{index} to the host"
        _check("cuMemcpyDtoHAsync", driver.cuMemcpyDtoHAsync(address, source, size, stream), what)


def queue_within(index: int, address: int, source: int, size: int, stream: int) -> None:
    """Queue a copy of `size` bytes from `source` to `address`, both on GPU `index`."""
    driver = _driver()
    with _context(index):
        what = f"copying {size} bytes on cuda:{index}"
        _check("cuMemcpyDtoDAsync", driver.cuMemcpyDtoDAsync(address, source, size, stream), what)


def begin_capture(index: int, stream: int) -> None:
    """Begin to capture into a graph what this thread queues on a stream. Other threads go on as they are."""
    driver = _driver()
    with _context(index):
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _check("cuStreamBeginCapture", driver.cuStreamBeginCapture(stream, mode), "beginning a capture")


def end_capture(index: int, stream: int, *, keep: bool = True) -> int:
    """End a capture and return the handle of the executable graph; 0 where it was broken, or is not to be kept."""
    driver = _driver()
    with _context(index):
        code, graph = driver.cuStreamEndCapture(stream)
        if code.value or not graph:
            return 0
        try:
            if not keep:
                return 0
            result = driver.cuGraphInstantiate(graph, 0)
            return int(_check("cuGraphInstantiate", result, "making a captured graph ready"))
        finally:
            driver.cuGraphDestroy(graph)


def launch_graph(index: int, graph: int, stream: int) -> None:
    """Queue an executable graph on a stream."""
    driver = _driver()
    with _context(index):
        _check("cuGraphLaunch", driver.cuGraphLaunch(graph, stream), "launching a captured graph")


def destroy_graph(index: int, graph: int) -> None:
    """Destroy an executable graph; what is queued of it still runs."""
    driver = _driver()
    with _context(index):
        _check("cuGraphExecDestroy", driver.cuGraphExecDestroy(graph), "destroying a captured graph")


def allocate_pinned(index: int, size: int) -> int:
    """Return the address of `size` bytes of page-locked host memory (0.6 s for a GiB). Raises DriverError."""
    driver = _driver()
    with _context(index):
        what = f"page-locking {size} bytes of host memory (see `ulimit -l`, and what the machine has free)"
        return int(_check("cuMemHostAlloc", driver.cuMemHostAlloc(size, 0), what))


def free_memory(index: int) -> int:
    """Bytes of memory that GPU `index` has free, as its driver counts. Raises DriverError."""
    driver = _driver()
    with _context(index):
        result = driver.cuMemGetInfo()
        _check("cuMemGetInfo", (result[0],), f"asking how much memory cuda:{index} has free")
        return int(result[1])


def uuid(index: int) -> str:
    """The UUID of GPU `index`, or of the part of one that it is (MIG); the same in all processes. Raises DriverError."""
    driver = _driver()
    device, _ = _primary_context(index)
    ask = getattr(driver, "cuDeviceGetUuid_v2", driver.cuDeviceGetUuid)
    return str(
        UUID(bytes=bytes(_check("cuDeviceGetUuid", ask(device), f"asking what cuda:{index} is").bytes))
    )


def pci_address(index: int) -> str:
    """The address of GPU `index` on the PCI bus, as "0000:00:06.0". Raises DriverError."""
    driver = _driver()
    device, _ = _primary_context(index)
    size = 32
    text = _check(
        "cuDeviceGetPCIBusId", driver.cuDeviceGetPCIBusId(size, device), f"asking where cuda:{index} is"
    )
    return bytes(text).split(b"\0")[0].decode()


def compute_capability(index: int) -> tuple[int, int]:
    """Major and minor compute capability of GPU `index`. Raises DriverError."""
    driver = _driver()
    device, _ = _primary_context(index)
    found = []
    for part in ("MAJOR", "MINOR"):
        attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}")
        result = driver.cuDeviceGetAttribute(attribute, device)
        found.append(int(_check("cuDeviceGetAttribute", result, f"asking what cuda:{index} is")))
    return found[0], found[1]


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@functools.cache
def _primary_context(index: int) -> tuple[Any, Any]:
    """The device and its primary context, retained for good: whoever gets here has ORT's sessions on it."""
    driver = _driver()
    what = f"opening cuda:{index}"
    _check("cuInit", driver.cuInit(0), what)
    device = _check("cuDeviceGet", driver.cuDeviceGet(index), what)
    return device, _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device), what)


@contextlib.contextmanager
def _context(index: int) -> Iterator[None]:
    driver = _driver()
    _, context = _primary_context(index)
    _check("cuCtxPushCurrent", driver.cuCtxPushCurrent(context), f"using cuda:{index}")
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()


def _check(function: str, result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call's result; raises DriverError naming the call and the code."""
    code = result[0]
    if code.value:
        raise DriverError(
            f"{function} failed while {what}: {code.name} ({code.value}). An error of an earlier kernel is "
            "reported here too; `glake-infer doctor` shows what the driver can do."
        )
    return result[1] if len(result) > 1 else None
