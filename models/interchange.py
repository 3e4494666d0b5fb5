"""Arrays of other libraries, read in place: DLPack and the CUDA array interface.

    Borrowed = address, dtype, shape, strides and device of somebody's array, and a reference that keeps it alive

DLPack (https://dmlc.github.io/dlpack/latest/python_spec.html) is preferred; `__cuda_array_interface__` (version 2 and 3,
Numba's specification) serves what has nothing else.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from glake_infer import cuda
from glake_infer.allocators.errors import InputError

DLPACK_CPU, DLPACK_CUDA, DLPACK_CUDA_HOST, DLPACK_CUDA_MANAGED = 1, 2, 3, 13
BOOL = 6

_KINDS: dict[tuple[int, int], np.dtype[Any]] = {
    (code, bits): np.dtype(kind)
    for (code, bits), kind in {
        (0, 8): np.int8, (0, 16): np.int16, (0, 32): np.int32, (0, 64): np.int64,
        (1, 8): np.uint8, (1, 16): np.uint16, (1, 32): np.uint32, (1, 64): np.uint64,
        (2, 16): np.float16, (2, 32): np.float32, (2, 64): np.float64,
        (4, 16): ml_dtypes.bfloat16, (5, 64): np.complex64, (5, 128): np.complex128, (BOOL, 8): np.bool_,
        (10, 8): ml_dtypes.float8_e4m3fn, (11, 8): ml_dtypes.float8_e4m3fnuz,
        (12, 8): ml_dtypes.float8_e5m2, (13, 8): ml_dtypes.float8_e5m2fnuz,
    }.items()
}  # fmt: skip
"""numpy's types by DLPack's (code, bits)."""


class DLTensor(ctypes.Structure):
    """DLPack's DLTensor; a DLManagedTensor begins with one."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class DLManagedTensor(ctypes.Structure):
    """DLPack's DLManagedTensor, of the unversioned kind."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(DLManagedTensor))
DLManagedTensor._fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, _Destructor),
)
# For a capsule that is being destroyed: it must not be made a Python object again.
_dying_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


@dataclass(frozen=True)
class Borrowed:
    """An array of somebody else's. `strides` in elements."""

    device: str
    """"cpu" or "cuda:N"."""
    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    owner: Any
    """Keeps the memory alive."""
    stream: int | None = None
    """A CUDA stream to wait for before the memory is read."""

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one behind the other in C order."""
        return 0 in self.shape or all(
            size == 1 or stride == packed
            for size, stride, packed in zip(self.shape, self.strides, _packed(self.shape), strict=True)
        )

    def numpy(self) -> np.ndarray[Any, Any]:
        """A read-only numpy array over memory of the host, without a copy."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        carrier = np.dtype(f"V{self.dtype.itemsize}")  # numpy's own protocol knows no bfloat16
        return np.asarray(_View(self, carrier)).view(self.dtype)


class _View:
    def __init__(self, array: Borrowed, carrier: np.dtype[Any]) -> None:
        self._array = array
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": carrier.str,
            "data": (array.address, True),
            "strides": tuple(stride * carrier.itemsize for stride in array.strides),
        }


def is_foreign(given: Any) -> bool:
    """Whether `borrow` can read it: an array that is neither numpy's nor ONNX Runtime's own."""
    if isinstance(given, (np.ndarray, np.generic, type)) or type(given).__name__ == "OrtValue":
        return False
    return (hasattr(given, "__dlpack__") and hasattr(given, "__dlpack_device__")) or hasattr(
        given, "__cuda_array_interface__"
    )


def borrow(given: Any, what: str) -> Borrowed:
    """Read where the memory of an array is. `what` names it in errors.

    A producer on CUDA is asked to order the work that makes the data before the legacy default stream
    (`__dlpack__(stream=1)`), or says itself on which stream it is made; the result's `stream` says which one to wait
    for. Memory on the host, pinned or not, must be complete. Raises InputError: the producer refuses, or hands out
    what no tensor here can be.
    """
    if hasattr(given, "__dlpack__") and hasattr(given, "__dlpack_device__"):
        return _from_dlpack(given, what)
    return _from_cuda_array_interface(given, what)


def _from_dlpack(given: Any, what: str) -> Borrowed:
    try:
        kind, index = (int(part) for part in given.__dlpack_device__())
        if kind in (DLPACK_CPU, DLPACK_CUDA_HOST):
            device, stream = "cpu", None
            capsule = given.__dlpack__()
        elif kind in (DLPACK_CUDA, DLPACK_CUDA_MANAGED):
            device, stream = f"cuda:{index}", cuda.LEGACY_STREAM
            capsule = given.__dlpack__(stream=stream)
        else:
            raise InputError(
                f"{what} lies on a device that is neither the CPU nor an NVIDIA GPU (DLPack's type {kind}). Copy it first."
            )
    except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{what} cannot be read: {type(given).__module__}.{type(given).__name__} refuses to hand it out "
            f"through DLPack ({error})."
        ) from error
    tensor = DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    dtype = _KINDS.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise InputError(
            f"{what} has elements that no input can be: DLPack's type code {tensor.code}, {tensor.bits} bits, "
            f"{tensor.lanes} lanes."
        )
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    strides = tuple(tensor.strides[: tensor.ndim]) if shape and tensor.strides else _packed(shape)
    address = (tensor.data or 0) + tensor.byte_offset
    return Borrowed(device, address, dtype, shape, strides, capsule, stream)


def _from_cuda_array_interface(given: Any, what: str) -> Borrowed:
    interface = given.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise InputError(
            f"{what} has a mask; ONNX Runtime knows none. Feed the data and the mask on their own."
        )
    dtype = np.dtype(interface["typestr"])
    shape = tuple(int(size) for size in interface["shape"])
    address = int(interface["data"][0] or 0)
    strides = _packed(shape)
    if interface.get("strides") is not None:
        if any(stride % dtype.itemsize for stride in interface["strides"]):
            raise InputError(
                f"{what} has strides that are no multiples of its elements. Feed `.contiguous()` data."
            )
        strides = tuple(int(stride) // dtype.itemsize for stride in interface["strides"])
    # Version 3: the stream on which the data is made, None where it is ready. Version 2 did not say.
    stream = interface.get("stream", cuda.LEGACY_STREAM)
    index = cuda.device_of(address) if address else 0
    return Borrowed(f"cuda:{index}", address, dtype, shape, strides, given, stream)


def export(array: Borrowed) -> Any:
    """A DLPack capsule of contiguous memory; its consumer, or else the capsule itself, keeps `array.owner` alive.

    The consumer may let go of it in any thread.
    """
    code, bits = next(kind for kind, dtype in _KINDS.items() if dtype == array.dtype)
    kind, _, index = array.device.partition(":")
    shape = (ctypes.c_int64 * len(array.shape))(*array.shape)
    managed = DLManagedTensor(
        DLTensor(
            array.address or None,
            DLPACK_CPU if kind == "cpu" else DLPACK_CUDA,
            int(index or 0),
            len(array.shape),
            code,
            bits,
            1,
            ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
            None,  # contiguous
            0,
        ),
        None,
        _deleter,
    )
    place = ctypes.addressof(managed)
    _exported[place] = (managed, shape, array.owner)
    return _new_capsule(place, _NAME, _destructor)


_exported: dict[int, tuple[DLManagedTensor, Any, Any]] = {}
"""What consumers of `export` hold, by the address of the DLManagedTensor."""

_NAME = b"dltensor"


def _let_go(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


def _unconsumed(capsule: int) -> None:
    """A capsule dies. A consumer has renamed it, and calls the deleter by itself."""
    if _dying_is_valid(capsule, _NAME):
        _exported.pop(_dying_pointer(capsule, _NAME), None)


_deleter, _destructor = _Deleter(_let_go), _Destructor(_unconsumed)
for _callback in (
    _deleter,
    _destructor,
):  # consumers may call them at any time, at the end of the process too
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def correct_bool(capsule: Any) -> Any:
    """Mark a tensor of booleans as such: before 1.32 ONNX Runtime exports them as uint8. Returns the capsule."""
    tensor = DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    tensor.code, tensor.bits = BOOL, 8
    return capsule
