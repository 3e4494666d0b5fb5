"""glake-infer: one pool of memory and one copy of every weight for ONNX Runtime sessions and TensorRT engines.

The public names of all parts, imported when they are first used (PEP 562): `import glake_infer as gi`
loads no ONNX Runtime, TensorRT or CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from glake_infer.version import __version__

_HOMES = {
    "BrokerError": "allocators.errors",
    "ConvertReport": "models.convert",
    "DeviceArray": "models.device_array",
    "DeviceNotFoundError": "allocators.errors",
    "DigestMismatchError": "allocators.errors",
    "DriverError": "allocators.errors",
    "EngineModel": "models.tensorrt.engine",
    "EngineOptions": "models.tensorrt.options",
    "EngineWeights": "engine_weights",
    "ForkedProcessError": "allocators.errors",
    "GlakeError": "allocators.errors",
    "InputError": "allocators.errors",
    "InvalidPointerError": "allocators.errors",
    "MemoryCorruptionError": "allocators.errors",
    "MissingDependencyError": "allocators.errors",
    "Model": "models.model",
    "ModelError": "allocators.errors",
    "ModelMemory": "models.model",
    "OutOfMemoryError": "allocators.errors",
    "Package": "models.package",
    "PackageError": "allocators.errors",
    "Pool": "pool",
    "PoolClosedError": "allocators.errors",
    "PoolExistsError": "allocators.errors",
    "PoolInUseError": "allocators.errors",
    "PoolStats": "allocators.pool",
    "StorageFullError": "allocators.errors",
    "Runtime": "models.runtime",
    "Store": "store",
    "StoreError": "allocators.errors",
    "TensorRTAllocator": "allocators.tensorrt_face",
    "TransferSettings": "transfers.settings",
    "UnsupportedVersionError": "allocators.errors",
    "Value": "models.manifest",
    "configure_transfers": "transfers.settings",
    "convert": "models.convert",
    "export": "models.export",
    "export_archive": "models.archive",
    "import_archive": "models.archive",
    "inspect": "models.inspect",
    "load": "models.load",
    "monitor": "models.status",
    "transfer_settings": "transfers.settings",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from glake_infer.allocators.errors import (
        BrokerError,
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
    from glake_infer.allocators.pool import PoolStats
    from glake_infer.allocators.tensorrt_face import TensorRTAllocator
    from glake_infer.engine_weights import EngineWeights
    from glake_infer.models.archive import export_archive, import_archive
    from glake_infer.models.convert import ConvertReport, convert
    from glake_infer.models.device_array import DeviceArray
    from glake_infer.models.export import export
    from glake_infer.models.inspect import inspect
    from glake_infer.models.load import load
    from glake_infer.models.manifest import Value
    from glake_infer.models.model import Model, ModelMemory
    from glake_infer.models.package import Package
    from glake_infer.models.runtime import Runtime
    from glake_infer.models.status import monitor
    from glake_infer.models.tensorrt.engine import EngineModel
    from glake_infer.models.tensorrt.options import EngineOptions
    from glake_infer.pool import Pool
    from glake_infer.store import Store
    from glake_infer.transfers.settings import TransferSettings, configure_transfers, transfer_settings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glake_infer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"glake_infer.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
