"""An engine's execution contexts: as many as may run at the same time, each with a stream of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from glake_infer.allocators.errors import GlakeError
from glake_infer.allocators.pool import Pool
from glake_infer.models.tensorrt.graphs import Captured
from glake_infer.models.tensorrt.jit_cache import JitCache
from glake_infer.models.tensorrt.runtimes import EngineRuntime


@dataclass(eq=False)
class Slot:
    """Room for one run at a time."""

    stream: int
    context: Any = None
    """Made by the first run; none holds scratch memory of its own."""
    outputs: Any = None
    """The context's allocator of outputs whose sizes depend on the data, once there is such a run."""
    held: int = 0
    """Bytes that TensorRT asked for when it was made."""
    seen: dict[Any, int] = field(default_factory=dict)
    """How many runs there were of each set of shapes that no graph serves yet; the newest last."""
    graphs: dict[Any, Captured] = field(default_factory=dict)
    """By set of shapes; the one that was used last is last."""


class Contexts:
    """The contexts of an engine. Thread-safe."""

    def __init__(
        self, runtime: EngineRuntime, engine: Any, pool: Pool, concurrency: int, jit: JitCache | None
    ) -> None:
        """Make none yet. `jit`: what TensorRT-RTX compiles, for libraries that compile at run time."""
        self.runtime = runtime
        self.engine = engine
        self.pool = pool
        self.jit = jit
        self._most = concurrency
        self._condition = threading.Condition()
        self._making = threading.Lock()
        self._free: list[Slot] = []
        self._slots: list[Slot] = []
        self._closed = False

    @property
    def held(self) -> int:
        """Bytes of the pool that contexts and graphs hold between runs."""
        with self._condition:
            return sum(s.held + sum(g.bytes for g in list(s.graphs.values())) for s in self._slots)

    @contextlib.contextmanager
    def take(self) -> Iterator[Slot]:
        """A slot for one run; waits while `concurrency` runs are in progress. The one that ran last comes first."""
        with self._condition:
            self._condition.wait_for(lambda: self._free or len(self._slots) < self._most or self._closed)
            if self._closed:
                raise GlakeError("the engine is closed. Load it again.")
            if self._free:
                slot = self._free.pop()
            else:
                slot = Slot(self.runtime.device.take_stream())
                self._slots.append(slot)
        try:
            if slot.context is None:
                slot.context, slot.held = self.make()
            yield slot
        finally:
            with self._condition:
                self._free.append(slot)
                self._condition.notify()

    def make(self, *, graphs: bool = False) -> tuple[Any, int]:
        """A new context, and the bytes that TensorRT asked the pool for. `graphs`: it captures by itself, if it can.

        Raises OutOfMemoryError (the pool's), or ModelError with what TensorRT says.
        """
        trt, allocator = self.runtime.module, self.runtime.allocator
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._making, allocator.tagged("context"):
            self.runtime.take_errors()
            before = allocator.held("context")
            if self.jit is None:
                context = self.engine.create_execution_context(user_managed)
            else:
                config = self.engine.create_runtime_config()
                config.set_execution_context_allocation_strategy(user_managed)
                strategies = trt.CudaGraphStrategy
                config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
                self.jit.give_to(config)
                context = self.engine.create_execution_context(config)
            if context is None:
                raise self.runtime.failure("an execution context of the engine could not be made")
            return context, max(0, allocator.held("context") - before)

    def drop_graphs(self) -> bool:
        """Give back what graphs hold that no run uses; whether there were any."""
        with self._condition:
            graphs = [graph for slot in self._free for graph in slot.graphs.values()]
            for slot in self._free:
                slot.graphs.clear()
                slot.seen.clear()
        for graph in graphs:
            graph.close()
        return bool(graphs)

    def sleep(self, *, everything: bool = False) -> None:
        """Give back what contexts hold that no run uses: those go that hold memory, or all of them, and all graphs.

        What TensorRT asked for in a run and kept may be any context's: then all go.
        """
        self.drop_graphs()
        everything = everything or bool(self.runtime.allocator.held("scratch"))
        with self._condition:
            gone = [slot for slot in self._free if slot.held or everything]
            contexts = [(slot.context, slot.outputs) for slot in gone]
            for slot in gone:
                slot.context, slot.outputs, slot.held = None, None, 0
        contexts.clear()  # outside the lock: TensorRT gives memory back

    def close(self) -> None:
        """End all contexts; no run is in progress."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self.sleep(everything=True)
        with self._condition:
            slots, self._slots, self._free = self._slots, [], []
        for slot in slots:
            self.runtime.device.give_stream_back(slot.stream)
        self.engine = None
