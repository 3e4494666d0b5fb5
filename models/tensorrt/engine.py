"""A package that a TensorRT engine runs."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes
from glake_infer.engine_weights import SharingReport
from glake_infer.holding import HostCopy
from glake_infer.models.model import Model, Place, _by_number
from glake_infer.models.package import Package
from glake_infer.models.tensorrt.contexts import Contexts
from glake_infer.models.tensorrt.execution import Execution
from glake_infer.models.tensorrt.jit_cache import JitCache
from glake_infer.models.tensorrt.library import Kind
from glake_infer.models.tensorrt.runtimes import EngineRuntime
from glake_infer.models.values import check_feeds


class EngineModel(Model):
    """A loaded package that a TensorRT engine runs.

    Runs are queued on streams of the model's own, `concurrency` at a time, and have their inputs, outputs and scratch
    memory from the pool; they wait, on the host, for what makes the inputs, and return when the results are complete.
    Besides what `Model.run` says, it raises InputError for shapes outside every optimization profile.
    """

    engine: Any
    """The ICudaEngine. Whoever keeps a reference beyond `close()` keeps the weights. Code that runs contexts of its own must
    not do so while the model sleeps."""

    def __init__(self, package: Package, pool: Pool, host_copy: HostCopy, kind: Kind) -> None:
        """Use `load`; this only makes the empty shell."""
        super().__init__(package, pool, host_copy)
        self.kind: Kind = kind
        self.report: SharingReport | None = None
        """What the weights share with those of other engines; None where they are in no block of the pool."""

    def _private_bytes(self) -> int:
        """What contexts and CUDA graphs hold between runs."""
        return 0 if self._closed else self._contexts.held

    def _offload_notes(self) -> Iterator[str]:
        memory = self.memory
        if not memory.offloaded:
            return
        rate = self._residency.rate
        cost = (
            f", at least {memory.offloaded / rate * 1e3:.3g} ms at the last load's {rate / 1e9:.2g} GB/s"
            if rate
            else ""
        )
        yield (
            f"{format_bytes(memory.offloaded)} of weights stay in host memory, and TensorRT keeps a copy of the others "
            f"there too: each run streams them over PCIe{cost}"
        )

    def _run_once(self, names: list[str], checked: Mapping[str, Any], to: Place) -> dict[str, Any]:
        feeds = {name: _array_of(fed) for name, fed in checked.items()}
        if any(feeds[name] is not checked[name] for name in feeds):
            feeds = check_feeds(self._inputs, (), feeds, self.pool.device)
        with self.pool.label(self._label):
            results = self._execution.run(names, feeds, to)
        if self._runs <= FIRST_RUNS:
            self._keep_compiled()
        return results

    def _keep_compiled(self) -> None:
        if self._jit is not None:
            self._jit.save()

    def _fallen_asleep(self) -> None:
        with self._runtime.device.current():
            self._keep_compiled()
            self._contexts.sleep()

    def _end_session(self) -> None:
        with self._runtime.device.current():
            self._keep_compiled()
            self._contexts.close()
            self.__dict__.pop("engine", None)  # TensorRT gives the block of weights back with it
        if self._holding is not None:
            self._holding.close()

    # Filled by load.
    _runtime: EngineRuntime
    _contexts: Contexts
    _execution: Execution
    _jit: JitCache | None


FIRST_RUNS = 3
"""Runs after each of which what TensorRT-RTX has compiled is kept; later it is when the model sleeps, or is closed."""


@atexit.register
def _close_all() -> None:
    """End engines at exit, while Python is there: TensorRT gives their memory back through it. Those that run are let be."""
    for model in list(_by_number.values()):
        with contextlib.suppress(Exception):
            if isinstance(model, EngineModel) and not model.closed and not model.busy:
                model.close()


def _array_of(fed: Any) -> Any:
    """ONNX Runtime's values are copied out; everything else stays as it is."""
    return fed.numpy() if type(fed).__name__ == "OrtValue" else fed
