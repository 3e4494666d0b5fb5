"""Calls an allocator of TensorRT's as TensorRT does: the virtual methods of the C++ object behind the Python one.

The layout is that of IGpuAsyncAllocator in NvInferRuntime.h, by the Itanium C++ ABI: IVersionedInterface has
getAPILanguage, getInterfaceInfo and its destructor (two entries), IGpuAllocator adds allocate, reallocate, deallocate,
allocateAsync and deallocateAsync.
"""

from __future__ import annotations

import ctypes

ALLOCATE, REALLOCATE, DEALLOCATE, ALLOCATE_ASYNC, DEALLOCATE_ASYNC = range(4, 9)

_pointer, _number, _flags = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
_signatures = {
    ALLOCATE: ctypes.CFUNCTYPE(_pointer, _pointer, _number, _number, _flags),
    REALLOCATE: ctypes.CFUNCTYPE(_pointer, _pointer, _pointer, _number, _number),
    DEALLOCATE: ctypes.CFUNCTYPE(ctypes.c_bool, _pointer, _pointer),
    ALLOCATE_ASYNC: ctypes.CFUNCTYPE(_pointer, _pointer, _number, _number, _flags, _pointer),
    DEALLOCATE_ASYNC: ctypes.CFUNCTYPE(ctypes.c_bool, _pointer, _pointer, _pointer),
}


class _Instance(ctypes.Structure):
    """pybind11's `instance` for a class with one C++ base: what follows PyObject_HEAD is the pointer to the C++ object."""

    _fields_ = (("references", ctypes.c_ssize_t), ("kind", ctypes.c_void_p), ("value", ctypes.c_void_p))


class Trampoline:
    """The C++ object of an allocator. Any thread may call it, as TensorRT's do."""

    def __init__(self, allocator: object) -> None:
        self._keep = allocator
        self.this = _Instance.from_address(id(allocator)).value
        table = ctypes.cast(ctypes.cast(self.this, ctypes.POINTER(_pointer))[0], ctypes.POINTER(_pointer))
        self._methods = {number: kind(table[number]) for number, kind in _signatures.items()}

    def allocate_async(self, size: int, alignment: int = 256, flags: int = 0, stream: int = 0) -> int:
        return self._methods[ALLOCATE_ASYNC](self.this, size, alignment, flags, stream) or 0

    def deallocate_async(self, address: int, stream: int = 0) -> bool:
        return self._methods[DEALLOCATE_ASYNC](self.this, address, stream)

    def allocate(self, size: int, alignment: int = 256, flags: int = 0) -> int:
        return self._methods[ALLOCATE](self.this, size, alignment, flags) or 0

    def deallocate(self, address: int) -> bool:
        return self._methods[DEALLOCATE](self.this, address)

    def reallocate(self, address: int, alignment: int, size: int) -> int:
        return self._methods[REALLOCATE](self.this, address, alignment, size) or 0
