"""Attach ONNX Runtime's session options to the pool, and inject weights into them."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import GlakeError, InputError, MissingDependencyError

if TYPE_CHECKING:
    import onnxruntime

    from . import _native

__all__ = ["Initializer", "Initializers", "attach", "import_onnxruntime", "require_cuda_provider"]

OLDEST_ONNXRUNTIME = (1, 24)
OLDEST_ONNXRUNTIME_CUDA = (1, 27)


class Initializer(NamedTuple):
    """A weight that lies in memory of ours, for the graph's initializer of that name."""

    name: str
    address: int
    bytes: int
    element_type: int  # ONNX's TensorProto.DataType
    shape: Sequence[int]


InitializerTuple = tuple[str, int, int, int, Sequence[int]]


class Initializers:
    """Holds ONNX Runtime's values over the weights that `attach` injected.

    Session options point at these values, so they live as long as the options object, and as long as
    this object. What they point at (the weights) must outlive every session made from the options.
    """

    def __init__(self, values: _native.InitializerValues) -> None:
        self._values: _native.InitializerValues | None = values
        self._count = len(values)

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Release the values now: the options must not make another session. Closing twice is fine."""
        if self._values is not None:
            self._values.release()
            self._values = None


# The values that live options point at: a caller who drops `Initializers` early must not crash.
_held: weakref.WeakKeyDictionary[Any, list[_native.InitializerValues]] = weakref.WeakKeyDictionary()


def import_onnxruntime() -> ModuleType:
    """Return the module `onnxruntime`.

    Raises `MissingDependencyError`, with the command to run, if it is not installed or too old.
    """
    extra = "cuda" if Path("/dev/nvidia0").exists() else "cpu"
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime is needed and cannot be imported ({error}). "
            f"Install it with: pip install 'glake-infer[{extra}]'"
        ) from error
    version = getattr(onnxruntime, "__version__", "")
    if _numbers(version) < OLDEST_ONNXRUNTIME:
        needed = ".".join(map(str, OLDEST_ONNXRUNTIME))
        raise MissingDependencyError(
            f"ONNX Runtime {version or 'of an unknown version'} is installed, and {needed} or newer is "
            f"needed. Install it with: pip install -U 'glake-infer[{extra}]'"
        )
    return onnxruntime


def _numbers(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


_preloaded = False


def require_cuda_provider() -> ModuleType:
    """Return the module `onnxruntime`, with its CUDA provider ready to be loaded.

    The CUDA libraries that pip installed beside ONNX Runtime are loaded at the first call, with its own
    `preload_dlls`: without them, or libraries of the system, ONNX Runtime goes on with the CPU alone.

    Raises `MissingDependencyError`, with the commands to run, if ONNX Runtime is not installed, is too old for
    pools on CUDA, or was built without CUDA.
    """
    global _preloaded
    runtime = import_onnxruntime()
    version = runtime.__version__
    if _numbers(version) < OLDEST_ONNXRUNTIME_CUDA:
        needed = ".".join(map(str, OLDEST_ONNXRUNTIME_CUDA))
        raise MissingDependencyError(
            f"ONNX Runtime {version} is installed, and a pool on a CUDA device needs {needed} or newer: "
            "the packages of older versions are built for CUDA 12, and ours for CUDA 13. Install it with: "
            "pip install -U 'glake-infer[cuda]'"
        )
    available = runtime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise MissingDependencyError(
            f"the installed ONNX Runtime {version} has no CUDA provider (it has {', '.join(available)}), and a "
            "pool on a CUDA device needs it. The packages onnxruntime and onnxruntime-gpu overwrite each other: "
            "uninstall both, then install the one for CUDA: pip uninstall -y onnxruntime onnxruntime-gpu && "
            "pip install 'glake-infer[cuda]'"
        )
    if not _preloaded and "torch" not in sys.modules:  # torch brought the libraries already
        with contextlib.redirect_stdout(io.StringIO()):  # what it does not find may be the system's
            runtime.preload_dlls()
        _preloaded = True
    return runtime


def attach(
    options: onnxruntime.SessionOptions,
    initializers: Iterable[Initializer | InitializerTuple],
    device: str = "cpu",
    *,
    cuda_graph: bool = False,
) -> Initializers:
    """Make the sessions of these options allocate from the device's pool, and use these weights.

    `device` is a canonical name ("cpu", "cuda:0"), and the weights lie in its memory. See `Pool.attach`.
    """
    runtime = import_onnxruntime() if device == "cpu" else require_cuda_provider()
    if not isinstance(options, runtime.SessionOptions):
        raise InputError(
            f"attach() takes an onnxruntime.SessionOptions, and received {type(options).__name__}. "
            "A session that exists already cannot be moved to a pool: attach its options before making it."
        )
    from . import _native

    # The environment's allocator takes the arena's place whatever enable_cpu_mem_arena says. The second
    # entry makes sessions ask for initializers through Reserve. On the CPU that depends on the version:
    # 1.24 asks for all of them, 1.32 only for prepacked copies. On CUDA all come through Reserve.
    options.add_session_config_entry("session.use_env_allocators", "1")
    if cuda_graph:
        # A pattern is one block for a whole run, allocated without a stream. In a run that is captured nothing would
        # tell the pool that the graph goes on using it.
        options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    _native.begin_attach(
        [(name, address, size, kind, list(shape)) for name, address, size, kind, shape in initializers],
        device,
    )
    try:
        options.register_custom_ops_library(_native.__file__)
    except Exception as error:  # ONNX Runtime's own exception types, all direct children of Exception
        _native.finish_attach()
        raise GlakeError(f"the session options could not be attached to the pool: {error}") from error
    values = _native.finish_attach()
    if values is None:
        raise GlakeError(
            f"the session options could not be attached to the pool: ONNX Runtime {runtime.__version__} did "
            f"not call back into {_native.__file__}"
        )
    if len(values):
        _held.setdefault(options, []).append(values)
    return Initializers(values)
