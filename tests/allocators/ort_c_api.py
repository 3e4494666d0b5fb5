"""ONNX Runtime's C API through ctypes, as far as the tests call it. Needs session options that were attached.

The indices into OrtApi were counted in the published header, as those of allocators/ort_api.hpp were.
"""

from __future__ import annotations

import ctypes

from glake_infer.allocators import _native

Pointer, Text, Size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t


class Struct(ctypes.Structure):
    """OrtAllocator as ONNX Runtime publishes it in version 25."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("Alloc", ctypes.CFUNCTYPE(Pointer, Pointer, Size)),
        ("Free", ctypes.CFUNCTYPE(None, Pointer, Pointer)),
        ("Info", ctypes.CFUNCTYPE(Pointer, Pointer)),
        ("Reserve", ctypes.CFUNCTYPE(Pointer, Pointer, Size)),
        ("GetStats", ctypes.CFUNCTYPE(Pointer, Pointer, ctypes.POINTER(Pointer))),
        ("AllocOnStream", ctypes.CFUNCTYPE(Pointer, Pointer, Size, Pointer)),
        ("Shrink", ctypes.CFUNCTYPE(Pointer, Pointer)),
    )


class Stream(ctypes.Structure):
    """The head of what an OrtSyncStream points at: a C++ object whose first member is the device's handle."""

    _fields_ = (("virtual_functions", Pointer), ("handle", Pointer), ("rest", ctypes.c_byte * 256))


class Api:
    def __init__(self, device: str = "cpu") -> None:
        self._table = (Pointer * 391).from_address(_native.ort_api(device))

    def call(self, index: int, result: object, *arguments: tuple[object, object]) -> object:
        types, values = zip(*arguments, strict=True)
        return ctypes.CFUNCTYPE(result, *types)(self._table[index])(*values)

    def message(self, status: int) -> str:
        """The text of an OrtStatus, which is released; empty for none."""
        if not status:
            return ""
        text = self.call(2, Text, (Pointer, status)).decode()
        self.call(93, None, (Pointer, status))
        return text

    def pairs(self, pairs: int) -> dict[str, str]:
        """What OrtKeyValuePairs hold; releases them."""
        keys, values = ctypes.POINTER(Text)(), ctypes.POINTER(Text)()
        count = Size()
        self.call(
            298,
            None,
            (Pointer, pairs),
            (Pointer, ctypes.addressof(keys)),
            (Pointer, ctypes.addressof(values)),
            (Pointer, ctypes.addressof(count)),
        )
        found = {keys[i].decode(): values[i].decode() for i in range(count.value)}
        self.call(300, None, (Pointer, pairs))
        return found

    def allocator_stats(self, allocator: int) -> dict[str, str]:
        """OrtApi::AllocatorGetStats, which calls OrtAllocator::GetStats where the version allows."""
        out = Pointer()
        status = self.call(319, Pointer, (Pointer, allocator), (Pointer, ctypes.addressof(out)))
        assert not status, self.message(status)
        return self.pairs(out.value)

    def memory_info(self, info: int) -> tuple[str, int]:
        """The name and the device id of an OrtMemoryInfo."""
        name, index = Text(), ctypes.c_int()
        assert not self.call(71, Pointer, (Pointer, info), (Pointer, ctypes.addressof(name)))
        assert not self.call(72, Pointer, (Pointer, info), (Pointer, ctypes.addressof(index)))
        return name.value.decode(), index.value

    def shared_allocator(self, info: int) -> int:
        """The allocator that the process's environment has for a memory info."""
        env, found = Pointer(), Pointer()
        assert not self.call(3, Pointer, (ctypes.c_int, 2), (Text, b"test"), (Pointer, ctypes.addressof(env)))
        status = self.call(376, Pointer, (Pointer, env), (Pointer, info), (Pointer, ctypes.addressof(found)))
        self.call(92, None, (Pointer, env))
        assert not status, self.message(status)
        return found.value
