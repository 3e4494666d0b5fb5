"""CUDA graphs: runs of equal shapes are queued with one call, with inputs, outputs and scratch at fixed addresses.

TensorRT-RTX captures by itself (CudaGraphStrategy.WHOLE_GRAPH_CAPTURE); fixed addresses keep it from capturing anew. For
the full TensorRT the capture is made here. Each graph has a context of its own, as TensorRT's guide recommends: what
other shapes do to a context is not in its way. Weights keep their addresses while a model sleeps, so a graph could
outlast that; but it holds memory, and is dropped then.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from glake_infer.allocators.errors import GlakeError
from glake_infer.allocators.pool import Pool
from glake_infer.models.tensorrt.device import Device
from glake_infer.models.tensorrt.interface import Interface, Shape

if TYPE_CHECKING:
    from glake_infer.models.tensorrt.runtimes import EngineRuntime

CudaGraph = Literal["auto"] | bool

MOST_GRAPHS = 4
"""Of each context; of more sets of shapes those that were used last have one."""

WORTHWHILE = 64 << 20
"""Bytes of scratch up to which "auto" takes graphs. They help where launching kernels takes as long as running them, in
small models, and each holds its scratch."""

BEFORE = 2
"""The run of equal shapes, counted from 1, in which a graph is made."""


def wanted(choice: CudaGraph, interface: Interface, engine: Any, device: Device, *, streaming: bool) -> str:
    """Return why runs do not go into graphs, nothing where they do."""
    if choice is False:
        return "cuda_graph=False"
    if not device.captures:
        return f"{device.title} has no graphs"
    if streaming:
        return "its weights are streamed while it runs"
    if any(tensor.on_host for tensor in (*interface.inputs, *interface.outputs)):
        return "it reads shapes from memory of the host"
    if any(tensor.alias for tensor in interface.outputs):
        return "an output lies in an input's memory"
    scratch = int(getattr(engine, "device_memory_size_v2", 0))
    if choice == "auto" and scratch > WORTHWHILE:
        return (
            "it takes more scratch memory than a graph should keep; cuda_graph=True has graphs all the same"
        )
    return ""


@dataclass(eq=False)
class Captured:
    """A context whose shapes and addresses are set for good, and the graph of a run."""

    runtime: EngineRuntime
    pool: Pool
    context: Any
    inputs: dict[str, int]
    outputs: dict[str, tuple[int, Shape]]
    scratch: int
    """Address; 0 where none is needed."""
    bytes: int
    """All that it holds, with what TensorRT asked for when the context was made."""
    stream: int
    tried: bool = False
    """Whether a run was captured, or could not be."""
    graph: list[int] = field(default_factory=list)
    """The graph that was captured here; TensorRT-RTX has one of its own."""

    def __post_init__(self) -> None:
        """See that what it holds goes back, whether it is closed or dropped."""
        addresses = [*self.inputs.values(), *(address for address, _ in self.outputs.values()), self.scratch]
        self._release = weakref.finalize(
            self, _release, self.runtime.device, self.graph, self.pool, [a for a in addresses if a]
        )
        self._release.atexit = False

    def queue(self) -> None:
        """Queue a run. The inputs are at their addresses, or are queued to be."""
        if self.graph:
            self.runtime.device.launch(self.graph[0], self.stream)
        elif not self.context.execute_async_v3(self.stream):
            raise self.runtime.failure("the engine could not be run")

    def capture(self) -> bool:
        """Capture a run, which was queued once before and is done. Whether it could be."""
        device, context = self.runtime.device, self.context
        capturable = getattr(context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self.stream):
            return False
        with self.pool.foreign_capture():
            device.begin_capture(self.stream)
            queued = False
            try:
                queued = bool(context.execute_async_v3(self.stream))
            finally:
                if graph := device.end_capture(self.stream, keep=queued):
                    self.graph.append(graph)
        if not self.graph:
            self.runtime.take_errors()  # they were about this attempt
        return bool(self.graph)

    def close(self) -> None:
        """Give everything back; no run uses it."""
        self.context = None
        self._release()


def _release(device: Device, graph: list[int], pool: Pool, addresses: list[int]) -> None:
    for handle in graph:
        device.destroy(handle)
    for address in addresses:
        with contextlib.suppress(GlakeError):  # the parent's, in a child of fork()
            pool.deallocate(address)
