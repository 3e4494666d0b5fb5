"""The three things that device arrays need of the CUDA driver: wait for a stream, copy to the host, ask whose a pointer is.

Through cuda-python, on the device's primary context, which ONNX Runtime and PyTorch use too. The context is current on
the calling thread only inside these functions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from glake_infer.allocators.errors import DriverError

LEGACY_STREAM = 1
"""The legacy default stream's handle, in the driver, in DLPack and in the CUDA array interface."""


def synchronize(index: int, stream: int) -> None:
    """Wait on the host until all work queued so far on a stream of GPU `index` is done.

    Raises DriverError, also for an error that earlier work on the GPU left behind.
    """
    driver = _driver()
    with _context(index):
        _check("cuStreamSynchronize", driver.cuStreamSynchronize(stream), f"waiting for stream {stream:#x}")


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
