"""Memory: the pool, and its face to ONNX Runtime.

Importing this package loads neither the native core nor ONNX Runtime; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attach import Initializer, Initializers, import_onnxruntime
    from .devices import cpu_memory, parse_device
    from .errors import (
        DeviceNotFoundError,
        DigestMismatchError,
        DriverError,
        ForkedProcessError,
        GlakeError,
        InputError,
        InvalidPointerError,
        MemoryCorruptionError,
        MissingDependencyError,
        ModelError,
        OutOfMemoryError,
        PackageError,
        PoolClosedError,
        PoolExistsError,
        PoolInUseError,
        StorageFullError,
        StoreError,
        UnsupportedVersionError,
    )
    from .pool import Pool, PoolStats
    from .sizes import format_bytes, parse_bytes
    from .tensorrt_face import TensorRTAllocator

_HOMES = {
    "DeviceNotFoundError": "errors",
    "DigestMismatchError": "errors",
    "DriverError": "errors",
    "ForkedProcessError": "errors",
    "GlakeError": "errors",
    "Initializer": "attach",
    "Initializers": "attach",
    "InputError": "errors",
    "InvalidPointerError": "errors",
    "MemoryCorruptionError": "errors",
    "MissingDependencyError": "errors",
    "ModelError": "errors",
    "OutOfMemoryError": "errors",
    "PackageError": "errors",
    "Pool": "pool",
    "PoolClosedError": "errors",
    "PoolExistsError": "errors",
    "PoolInUseError": "errors",
    "PoolStats": "pool",
    "StorageFullError": "errors",
    "StoreError": "errors",
    "UnsupportedVersionError": "errors",
    "TensorRTAllocator": "tensorrt_face",
    "cpu_memory": "devices",
    "format_bytes": "sizes",
    "import_onnxruntime": "attach",
    "parse_bytes": "sizes",
    "parse_device": "devices",
}

__all__ = [
    "DeviceNotFoundError",
    "DigestMismatchError",
    "DriverError",
    "ForkedProcessError",
    "GlakeError",
    "Initializer",
    "Initializers",
    "InputError",
    "InvalidPointerError",
    "MemoryCorruptionError",
    "MissingDependencyError",
    "ModelError",
    "OutOfMemoryError",
    "PackageError",
    "Pool",
    "PoolClosedError",
    "PoolExistsError",
    "PoolInUseError",
    "PoolStats",
    "StorageFullError",
    "StoreError",
    "TensorRTAllocator",
    "UnsupportedVersionError",
    "cpu_memory",
    "format_bytes",
    "import_onnxruntime",
    "parse_bytes",
    "parse_device",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
