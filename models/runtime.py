"""Runtime: more models than fit, the most recently used ones in memory."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from types import TracebackType
from typing import Any

from glake_infer.allocators.attach import import_onnxruntime
from glake_infer.allocators.errors import GlakeError, InputError
from glake_infer.allocators.pool import Pool
from glake_infer.holding import HostCopy
from glake_infer.models.gate import Gate
from glake_infer.models.load import CUDA_PROVIDER, load
from glake_infer.models.model import Model, ModelClosedError
from glake_infer.pool import Pool as BrokeredPool
from glake_infer.store import Store


class Runtime:
    """Models that share one pool's memory, under one limit.

    All of them can be run at any time, from any thread. Where memory is needed, for a model's weights or for a run's
    activations, it comes from what no model has any more, then from models that are idle: those of the lowest priority
    first, and among them the one that was run longest ago; chunk by chunk, as much as is needed. A weight of several
    models counts as the most important and most recently run one of them. Models that are pinned, or running, keep
    theirs. A run whose model was put to sleep brings it back first; where there is room only once other runs have ended,
    it waits for them, in the order of asking.

    Args:
        limit: as for `Pool`: a hard bound on weights, activations and idle memory together.
        device: "cuda:N", "cuda" or "cpu"; None: the first GPU where ONNX Runtime can use one, else the CPU.
        pool: a pool to use instead of a new one; then none of the others is given, and `close` leaves it open.
        broker: as for `Pool`: keep weights where other processes share them. Models that are idle, here and in every other
            process that has them, then make room for others on the whole machine.
        host_copy: for `load`, unless that says otherwise: what sleeping models are brought back from.
        store: the store of the packages.

    Raises what `Pool` does.
    """

    def __init__(
        self,
        limit: int | str | None = None,
        *,
        device: str | None = None,
        pool: Pool | None = None,
        broker: str | os.PathLike[str] | None = None,
        host_copy: HostCopy = "store",
        store: Store | None = None,
    ) -> None:
        if pool is not None and (limit, device, broker) != (None, None, None):
            raise InputError(
                "a Runtime takes a pool, or limit, device and broker for one of its own, not both."
            )
        self._own = pool is None
        self.pool: Pool = pool or BrokeredPool(device or _default_device(), limit, broker=broker)
        self.host_copy: HostCopy = host_copy
        self._store = store
        self._gate = Gate()
        self._lock = threading.Lock()
        self._models: weakref.WeakSet[Model] = weakref.WeakSet()
        self._closed = False

    def load(
        self, path: str | os.PathLike[str], *, pin: bool = False, priority: int = 0, **options: Any
    ) -> Model:
        """Load a package, putting idle models to sleep where there is no room; see `gi.load` for the options.

        pin
            Never put this one to sleep. `model.pinned` changes it later.
        priority
            Those of lower priority go first. `model.priority` changes it later.

        Raises what `gi.load` does: OutOfMemoryError where the model does not fit beside what is pinned and running.
        """
        if self._closed:
            raise GlakeError("the Runtime is closed. Make another.")
        if taken := {"pool", "device"} & options.keys():
            raise InputError(f"Runtime.load takes no {sorted(taken)[0]!r}: its models run on its own pool.")
        options = {"host_copy": self.host_copy, "store": self._store, **options}
        model = load(path, self.pool, priority=priority, **options)
        model._join(self._gate, pin=pin, priority=priority)
        with self._lock:
            closed = self._closed
            if not closed:
                self._models.add(model)
        if closed:
            model.close()
            raise GlakeError("the Runtime was closed while the model was loaded. Make another.")
        return model

    @property
    def models(self) -> list[Model]:
        """Those that are loaded, the most recently used first."""
        with self._lock:
            models = list(self._models)
        idle = {}
        for model in models:
            with contextlib.suppress(ModelClosedError):
                idle[model] = model.idle_seconds
        return sorted(idle, key=lambda model: idle[model])

    def suspend_idle(self, older_than: float = 0.0) -> int:
        """Put every model to sleep that is not pinned and was not run for `older_than` seconds; return the bytes freed.

        Raises what `Model.suspend` does; models before the one that failed sleep then.
        """
        if older_than < 0:
            raise InputError(f"older_than={older_than}: expected seconds, 0 or more.")
        freed = 0
        for model in reversed(self.models):
            with contextlib.suppress(ModelClosedError):
                idle = not model.busy and model.idle_seconds >= older_than
                if idle and not model.pinned and not model.suspended:
                    freed += model.suspend()
        return freed

    def close(self) -> None:
        """Close all models, waiting for their runs, and the pool if it is the Runtime's own. Closing twice is fine.

        Raises PoolInUseError where results of runs, or sessions of others, still hold memory of the pool.
        """
        with self._lock:
            self._closed = True
            models = list(self._models)
        for model in models:
            model.close()
        if self._own:
            self.pool.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except GlakeError:
            if error is None:
                raise

    def __repr__(self) -> str:
        return f"<Runtime on {self.pool!r}, {len(self.models)} models>"


def _default_device() -> str:
    """The first GPU that works for ONNX Runtime, else the CPU."""
    from glake_infer.allocators import _native

    if CUDA_PROVIDER in import_onnxruntime().get_available_providers():
        try:
            if _native.cuda_device_count():
                return "cuda:0"
        except GlakeError:
            pass
    return "cpu"
