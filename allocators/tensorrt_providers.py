"""ONNX Runtime's own TensorRT providers on a pool: `Pool.providers_with`."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .attach import require_cuda_provider
from .errors import DeviceNotFoundError, GlakeError, InputError, MissingDependencyError

__all__ = ["providers_with"]

PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}
PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx"
OLDEST_PLUGIN = (0, 4)
"""The first that can take the memory of an execution context from the session's allocator."""
DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "tensorrt": {},
    "tensorrt-rtx": {"nv_use_sync_gpu_allocator": "1"},
}
"""What makes a provider take from the session's allocator, and so from the pool, what it else takes elsewhere."""
LIBRARIES = ("nvinfer", "nvonnxparser")


def providers_with(kind: str, device: str, options: Mapping[str, Any] | None) -> list[Any]:
    """Return the providers for a pool on `device` ("cuda:0") with a TensorRT one in front; see `Pool.providers_with`."""
    if kind not in PROVIDERS:
        raise InputError(f"providers_with({kind!r}): expected {' or '.join(map(repr, PROVIDERS))}")
    if device == "cpu":
        raise InputError(
            "TensorRT runs on a GPU, and this pool is on 'cpu': make one with Pool('cuda:0'), or use pool.providers"
        )
    given = _checked(kind, options or {})
    runtime = require_cuda_provider()
    index = int(device.partition(":")[2])
    if kind == "tensorrt":
        _load_tensorrt(runtime)
    else:
        _register_plugin(runtime, index)
    return [
        (PROVIDERS[kind], {"device_id": str(index), **DEFAULTS[kind], **given}),
        ("CUDAExecutionProvider", {"device_id": index}),
        "CPUExecutionProvider",
    ]


def _checked(kind: str, options: Mapping[str, Any]) -> dict[str, str]:
    """The options as ONNX Runtime takes them: text."""
    given = {name: str(int(value) if isinstance(value, bool) else value) for name, value in options.items()}
    if "device_id" in given:
        raise InputError(
            "the options have 'device_id', which the pool decides: make the Pool on the device you want"
        )
    if given.get("trt_context_memory_sharing_enable", "0").lower() not in ("0", "false"):
        # tensorrt_execution_provider.cc (1.17): setDeviceMemory(MakeUniquePtrFromOrtAllocator(...).get()), then the enqueue.
        raise InputError(
            "trt_context_memory_sharing_enable cannot be used on a pool: ONNX Runtime gives the contexts' memory back to "
            "the allocator before it queues the work that uses it, so another session could get it meanwhile. Leave "
            "the option out; engines of glake-infer share their scratch memory (gi.load)"
        )
    if kind == "tensorrt-rtx" and (foreign := sorted(name for name in given if name.startswith("trt_"))):
        raise InputError(
            f"{foreign[0]!r} is an option of TensorrtExecutionProvider; {PROVIDERS[kind]}'s begin with 'nv_'"
        )
    return given


def _load_tensorrt(runtime: ModuleType) -> None:
    """Load the libraries of the `tensorrt` package that ONNX Runtime's provider is linked with, as pip installed them."""
    name = PROVIDERS["tensorrt"]
    if name not in (available := runtime.get_available_providers()):
        raise MissingDependencyError(
            f"the installed ONNX Runtime {runtime.__version__} has no {name} (it has {', '.join(available)}). Install the "
            "package that has it: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'glake-infer[cuda]'"
        )
    major = _linked_with(runtime)
    try:
        for library in LIBRARIES:
            _load(f"lib{library}.so.{major}")
    except OSError as error:
        raise MissingDependencyError(
            f"{name} of ONNX Runtime {runtime.__version__} is built for TensorRT {major}, which cannot be loaded ({error}). "
            f"Install it with: pip install 'tensorrt-cu13>={major},<{major + 1}'"
        ) from error


def _linked_with(runtime: ModuleType) -> int:
    """The major version of TensorRT that the provider's file names: another one is not taken."""
    file = Path(str(runtime.__file__)).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    try:
        found = re.search(rb"libnvinfer\.so\.(\d+)", file.read_bytes())
    except OSError as error:
        raise MissingDependencyError(
            f"the file of {PROVIDERS['tensorrt']} cannot be read ({error}). Install ONNX Runtime again: pip install "
            "--force-reinstall 'glake-infer[cuda]'"
        ) from error
    return int(found[1]) if found else 10


def _load(name: str) -> None:
    """Load a library from the folder of the `tensorrt` package, or from where the system has it. Raises OSError."""
    package = importlib.util.find_spec("tensorrt_libs")
    folders = package.submodule_search_locations if package and package.submodule_search_locations else []
    for folder in folders:
        if (file := Path(folder) / name).exists():
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
            return
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def _register_plugin(runtime: ModuleType, index: int) -> None:
    """Make ONNX Runtime know the provider of TensorRT-RTX, a package of its own, if it does not yet.

    It must stay registered: ONNX Runtime forgets the pool's allocator together with the library's devices.
    """
    needed = ".".join(map(str, OLDEST_PLUGIN))
    try:
        version = next(found for name in (f"{PLUGIN}-cu13", PLUGIN) if (found := _version(name)))
        plugin = importlib.import_module(PLUGIN.replace("-", "_"))
    except (StopIteration, ImportError) as error:
        raise MissingDependencyError(
            f"the provider of TensorRT-RTX is a package of its own, {PLUGIN}, and is not installed. Install it with: pip "
            f"install '{PLUGIN}>={needed}'"
        ) from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_PLUGIN:
        raise MissingDependencyError(
            f"{PLUGIN} {version} is installed, and {needed} or newer is needed: older ones keep the memory of contexts to "
            f"themselves. Install it with: pip install -U '{PLUGIN}>={needed}'"
        )
    if not _devices(runtime):
        try:
            runtime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        except Exception as error:  # ONNX Runtime's own exception types, all direct children of Exception
            raise GlakeError(f"ONNX Runtime could not load {PLUGIN} {version}: {error}") from error
    if not _devices(runtime):
        raise DeviceNotFoundError(
            f"{PLUGIN} {version} serves no GPU of this machine: it takes compute capabilities 8.6, 8.9, and 12.0 and newer. "
            f"For cuda:{index} use pool.providers_with('tensorrt'), or pool.providers"
        )


def _devices(runtime: ModuleType) -> list[Any]:
    return [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDERS["tensorrt-rtx"]]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
