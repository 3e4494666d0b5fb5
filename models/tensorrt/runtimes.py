"""One TensorRT runtime, and one allocator, for all engines of a kind on a pool."""

from __future__ import annotations

import threading
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from glake_infer.allocators.errors import GlakeError, ModelError
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.tensorrt_face import TensorRTAllocator
from glake_infer.models.tensorrt import library
from glake_infer.models.tensorrt.device import device_of
from glake_infer.models.tensorrt.library import Kind

QUOTED = 5
"""Most of TensorRT's errors that an exception quotes."""


class EngineRuntime:
    """TensorRT on a pool: the module, its runtime, the allocator that the runtime uses, and the log.

    It lives as long as the pool's handle or any engine of it: whoever has an engine holds this too, and drops it last. It
    does not keep the handle open. Thread-safe; loads take turns (`loading`), since a runtime keeps settings of the next one.
    """

    _lock = threading.Lock()
    _made: ClassVar[WeakKeyDictionary[Pool, dict[Kind, EngineRuntime]]] = WeakKeyDictionary()

    def __init__(self, pool: Pool, kind: Kind) -> None:
        """Use `EngineRuntime.of`."""
        self.kind = kind
        self.module = library.module(kind)
        self.version = library.version(kind)
        self.device = device_of(pool)
        self.logger = library.make_logger(self.module)
        self.allocator = TensorRTAllocator(pool, self.module)
        with self.device.current():
            self.runtime: Any = self.module.Runtime(self.logger)
            self.runtime.gpu_allocator = self.allocator
        self.loading = threading.Lock()

    @classmethod
    def of(cls, pool: Pool, kind: Kind) -> EngineRuntime:
        """The one of a pool. Raises MissingDependencyError (no TensorRT) or DriverError."""
        with cls._lock:
            kinds = cls._made.setdefault(pool, {})
            if kind not in kinds:
                kinds[kind] = cls(pool, kind)
            return kinds[kind]

    def take_errors(self) -> None:
        """Forget the errors of earlier calls."""
        self.logger.take_errors()
        self.allocator.take_error()

    def failure(self, what: str, kind: type[GlakeError] = ModelError) -> GlakeError:
        """The error to raise where TensorRT failed: the pool's refusal, or one of `kind` with what TensorRT has logged."""
        refusal = self.allocator.take_error()
        errors = self.logger.take_errors()
        if refusal is not None:
            return refusal
        said = "; ".join(message.strip() for message in errors[:QUOTED]) or "nothing"
        return kind(f"{what}. {self.kind} {self.version} says: {said}")
