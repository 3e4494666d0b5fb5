"""Attach ONNX Runtime's session options to the pool, and inject weights into them."""

from __future__ import annotations

import importlib
import re
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import GlakeError, InputError, MissingDependencyError

if TYPE_CHECKING:
    import onnxruntime

    from . import _native

__all__ = ["Initializer", "Initializers", "attach", "import_onnxruntime"]

OLDEST_ONNXRUNTIME = (1, 24)


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
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or (int(match[1]), int(match[2])) < OLDEST_ONNXRUNTIME:
        needed = ".".join(map(str, OLDEST_ONNXRUNTIME))
        raise MissingDependencyError(
            f"ONNX Runtime {version or 'of an unknown version'} is installed, and {needed} or newer is "
            f"needed. Install it with: pip install -U 'glake-infer[{extra}]'"
        )
    return onnxruntime


def attach(
    options: onnxruntime.SessionOptions, initializers: Iterable[Initializer | InitializerTuple]
) -> Initializers:
    """Make the sessions of these options allocate from the host pool, and use these weights."""
    runtime = import_onnxruntime()
    if not isinstance(options, runtime.SessionOptions):
        raise InputError(
            f"attach() takes an onnxruntime.SessionOptions, and received {type(options).__name__}. "
            "A session that exists already cannot be moved to a pool: attach its options before making it."
        )
    from . import _native

    # The environment's allocator takes the arena's place whatever enable_cpu_mem_arena says. The second
    # entry makes sessions ask for initializers through Reserve. On the CPU that depends on the version:
    # 1.24 asks for all of them, 1.32 only for prepacked copies.
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    _native.begin_attach(
        [(name, address, size, kind, list(shape)) for name, address, size, kind, shape in initializers]
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
