"""One run of an engine: what TensorRT is told, in which order, and whose memory is where."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from glake_infer.allocators.errors import GlakeError, InputError, ModelError, OutOfMemoryError
from glake_infer.allocators.pool import Pool
from glake_infer.models.device_array import DeviceArray, PoolMemory
from glake_infer.models.interchange import Borrowed
from glake_infer.models.model import Place
from glake_infer.models.tensorrt.contexts import Contexts, Slot
from glake_infer.models.tensorrt.graphs import BEFORE, MOST_GRAPHS, Captured
from glake_infer.models.tensorrt.interface import Interface, Shape, Tensor
from glake_infer.models.tensorrt.scratch import ALIGNMENT, Scratch, needed

Array = np.ndarray[Any, Any]

OUTPUTS = "outputs"
INPUTS = "activations"
"""What the pool's figures say of copies of inputs, and of outputs."""

MOST_SEEN = 64
"""Sets of shapes of which a context remembers that it ran them."""


class Execution:
    """Runs an engine on a pool, in any number of threads; as many runs as there are contexts go on at the same time."""

    def __init__(
        self, contexts: Contexts, interface: Interface, pool: Pool, *, streaming: bool, graphs: bool
    ) -> None:
        """`streaming`: weights pass through scratch memory. `graphs`: runs of equal shapes go into CUDA graphs."""
        self.contexts = contexts
        self.interface = interface
        self.graphs = graphs
        self._runtime = contexts.runtime
        self._device = contexts.runtime.device
        self._pool = pool
        self._streaming = streaming
        self._scratch = Scratch.of(pool)

    def run(self, names: Sequence[str], feeds: Mapping[str, Any], to: Place) -> dict[str, Any]:
        """Run on what `check_feeds` passed; the results are complete when this returns.

        Raises InputError (shapes outside every profile), OutOfMemoryError, ModelError (TensorRT failed) or DriverError.
        Nothing of the run stays in the pool after an error.
        """
        with self._device.current():
            try:
                try:
                    return self._run(names, feeds, to)
                except OutOfMemoryError:
                    if not self.contexts.drop_graphs():
                        raise
                return self._run(names, feeds, to)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold a context, and that the engine
                raise

    def _run(self, names: Sequence[str], feeds: Mapping[str, Any], to: Place) -> dict[str, Any]:
        shapes = {
            tensor.name: tuple(map(int, np.shape(feeds[tensor.name]))) for tensor in self.interface.inputs
        }
        values = {t.name: self._on_host(feeds[t.name]) for t in self.interface.inputs if t.on_host}
        profile = self.interface.profile_for(shapes, values)
        for stream in {a.stream for a in feeds.values() if isinstance(a, Borrowed) and a.stream is not None}:
            self._device.synchronize(stream)
        with self.contexts.take() as slot, self._runtime.allocator.tagged("scratch"):
            self._runtime.take_errors()
            if self.graphs and (captured := self._graph(slot, profile, shapes)):
                try:
                    return self._replay(captured, names, feeds, to)
                except BaseException:
                    key = next(key for key, graph in slot.graphs.items() if graph is captured)
                    slot.graphs.pop(key).close()
                    raise
            run = _Run(self, slot.context, slot.stream, slot)
            try:
                return run.whole(profile, shapes, values, feeds, names, to)
            finally:
                run.end()

    def _on_host(self, fed: Any) -> Array:
        """A shape tensor, in memory of the host that is aligned as TensorRT wants it."""
        if isinstance(fed, Borrowed):
            source = np.empty(fed.shape, fed.dtype)
            if fed.stream is not None:
                self._device.synchronize(fed.stream)
            self._device.to_host(fed.address, source)
        else:
            source = np.asarray(fed)
        target = host_array(source.shape, source.dtype)
        target[...] = source
        return target

    # Graphs.

    def _graph(self, slot: Slot, profile: int, shapes: Mapping[str, Shape]) -> Captured | None:
        """The graph for these shapes; None where they run without: the first time, and where none can be made."""
        key = (profile, tuple(sorted(shapes.items())))
        if key in slot.graphs:
            slot.graphs[key] = found = slot.graphs.pop(key)
            return found
        runs = slot.seen.pop(key, 0) + 1
        slot.seen[key] = runs
        while len(slot.seen) > MOST_SEEN:
            del slot.seen[next(iter(slot.seen))]
        if runs != BEFORE:  # where it failed once it is not tried again
            return None
        while len(slot.graphs) >= MOST_GRAPHS:
            slot.graphs.pop(next(iter(slot.graphs))).close()
        try:
            made = self._prepare(slot.stream, profile, shapes)
        except GlakeError:  # no room, or TensorRT refuses: the run goes on without
            self._runtime.take_errors()
            return None
        if made is None:
            return None
        del slot.seen[key]
        slot.graphs[key] = made
        return made

    def _prepare(self, stream: int, profile: int, shapes: Mapping[str, Shape]) -> Captured | None:
        """A context with addresses of its own for these shapes, whose graph is captured after its first run."""
        context, held = self.contexts.make(graphs=True)
        run = _Run(self, context, stream)
        kept = False
        try:
            run.set_shapes(profile, shapes, {})
            inputs = {t.name: run.take(_bytes(t, shapes[t.name]), INPUTS) for t in self.interface.inputs}
            outputs = {}
            for tensor in self.interface.outputs:
                shape = run.shape_of(tensor)
                if min(shape, default=0) < 0:  # known only once it has run
                    return None
                outputs[tensor.name] = run.take(_bytes(tensor, shape), OUTPUTS), shape
            for name, address in (*inputs.items(), *((n, a) for n, (a, _) in outputs.items())):
                run.set_address(name, address)
            size = needed(self.contexts.engine, context, profile, streaming=False)
            scratch = run.take(size, "scratch") if size else 0
            context.set_device_memory(scratch, size)
            made = Captured(
                self._runtime, self._pool, context, inputs, outputs, scratch, held + run.taken(), stream
            )
            kept = True
            return made
        finally:
            if kept:
                run.blocks.clear()
            run.end()

    def _replay(
        self, captured: Captured, names: Sequence[str], feeds: Mapping[str, Any], to: Place
    ) -> dict[str, Any]:
        stream = captured.stream
        kept: list[Array] = []
        results: dict[str, Any] = {}
        known = {tensor.name: tensor for tensor in self.interface.outputs}
        run = _Run(self, captured.context, stream)
        try:
            for name, address in captured.inputs.items():
                run.copy_in(feeds[name], address, kept)
            run.queued()
            captured.queue()
            made = {}
            for name in dict.fromkeys(names):
                source, shape = captured.outputs[name]
                if to == "device":
                    made[name] = run.take(_bytes(known[name], shape), OUTPUTS)
                    self._device.queue_within(made[name], source, _bytes(known[name], shape), stream)
            self._device.synchronize(stream)
            for name in dict.fromkeys(names):
                source, shape = captured.outputs[name]
                results[name] = run.result(known[name], made.get(name, source), shape, to)
            if not captured.tried:
                captured.tried = True
                if not self._captures_by_itself:
                    captured.capture()
            return results
        finally:
            run.end()

    @property
    def _captures_by_itself(self) -> bool:
        return self.contexts.jit is not None


class _Run:
    """What one run has taken, until `end` gives it back."""

    def __init__(self, execution: Execution, context: Any, stream: int, slot: Slot | None = None) -> None:
        self._slot = slot
        self._execution = execution
        self._runtime = execution._runtime
        self._device = execution._device
        self._pool = execution._pool
        self._interface = execution.interface
        self._context = context
        self._stream = stream
        self._queued = False
        self.blocks: dict[int, int] = {}  # address -> bytes

    def whole(
        self,
        profile: int,
        shapes: Mapping[str, Shape],
        values: Mapping[str, Array],
        feeds: Mapping[str, Any],
        names: Sequence[str],
        to: Place,
    ) -> dict[str, Any]:
        """From setting the shapes to the results."""
        context = self._context
        kept: list[Array] = []
        self.set_shapes(profile, shapes, values)
        aliased = {tensor.alias for tensor in self._interface.outputs if tensor.alias}
        inputs: dict[str, int] = {}
        for tensor in self._interface.inputs:
            if tensor.on_host:
                continue
            fed, size = feeds[tensor.name], _bytes(tensor, shapes[tensor.name])
            in_place = isinstance(fed, Borrowed) and size and fed.address % ALIGNMENT == 0
            if in_place and tensor.name not in aliased:
                inputs[tensor.name] = fed.address
            else:
                inputs[tensor.name] = self.take(size, INPUTS)
                self.copy_in(fed, inputs[tensor.name], kept)
            self.set_address(tensor.name, inputs[tensor.name])
        outputs: dict[str, Any] = {}
        for tensor in self._interface.outputs:
            shape = self.shape_of(tensor)
            if self._asks(tensor.name) or (min(shape, default=0) < 0 and not tensor.on_host):
                self._leave_open(tensor.name)
            elif tensor.on_host:
                limit = shape if min(shape, default=0) >= 0 else self._limit_of(tensor)
                outputs[tensor.name] = host_array(limit, tensor.dtype)
                self.set_address(tensor.name, outputs[tensor.name].ctypes.data)
            elif tensor.alias:
                outputs[tensor.name] = inputs[tensor.alias]
                self.set_address(tensor.name, outputs[tensor.name])
            else:
                outputs[tensor.name] = self.take(_bytes(tensor, shape), OUTPUTS)
                self.set_address(tensor.name, outputs[tensor.name])
        size = needed(self._execution.contexts.engine, context, profile, streaming=self._execution._streaming)
        with self._execution._scratch.lease(self._pool, size, self._stream) as scratch:
            context.set_device_memory(scratch, size)
            try:
                self.queued()
                if not context.execute_async_v3(self._stream):
                    raise self._failure("the engine could not be run")
            finally:
                self._device.synchronize(self._stream)
                self._queued = False
        results = {}
        for name in dict.fromkeys(names):
            tensor = next(t for t in self._interface.outputs if t.name == name)
            if self._asks(name):
                shape, address = self._allocator.made(name)
            else:
                shape, address = self.shape_of(tensor), outputs[name]
            results[name] = self.result(tensor, address, shape, to)
        return results

    def set_shapes(self, profile: int, shapes: Mapping[str, Shape], values: Mapping[str, Array]) -> None:
        """Choose the profile, and say the shapes of inputs and the values of shape tensors."""
        context = self._context
        if context.active_optimization_profile != profile:
            if not context.set_optimization_profile_async(profile, self._stream):
                raise self._failure(f"the engine's optimization profile {profile} could not be chosen")
            self._device.synchronize(self._stream)
        for tensor in self._interface.inputs:
            if tensor.dynamic and not context.set_input_shape(tensor.name, shapes[tensor.name]):
                raise self._failure(
                    f"the input {tensor.value} was fed the shape {list(shapes[tensor.name])}, which the engine refuses",
                    InputError,
                )
            if tensor.on_host:
                self.set_address(tensor.name, values[tensor.name].ctypes.data)
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            what = f"the shapes {_listed(shapes)} do not go together ({error})"
            raise self._failure(what, InputError) from error
        if missing:
            raise self._failure(f"the shapes of {', '.join(missing)} do not follow from {_listed(shapes)}")

    def shape_of(self, tensor: Tensor) -> Shape:
        """An output's, as far as it is known; -1 where it depends on the data."""
        return tuple(int(size) for size in self._context.get_tensor_shape(tensor.name))

    def set_address(self, name: str, address: int) -> None:
        """Tell TensorRT where a tensor lies."""
        if not self._context.set_tensor_address(name, address):
            raise self._failure(f"the memory of {name!r} was refused ({address:#x})")

    def take(self, size: int, tag: str) -> int:
        """Memory of the pool, also for nothing: TensorRT takes no null. It is this run's until it is handed on."""
        size = max(size, ALIGNMENT)  # smaller blocks are not aligned to it
        address = self._pool.allocate(size, tag, self._stream)
        self.blocks[address] = size
        return address

    def taken(self) -> int:
        """Bytes."""
        return sum(self.blocks.values())

    def drop(self, address: int) -> None:
        """Give a block back before the run ends."""
        if self.blocks.pop(address, None):
            self._pool.deallocate(address)

    def queued(self) -> None:
        """Note that there is work on the stream: `end` waits for it."""
        self._queued = True

    def copy_in(self, fed: Any, address: int, kept: list[Array]) -> None:
        """Queue a copy of an input to the device; `kept` keeps what has to stay until the stream has passed."""
        self.queued()
        if isinstance(fed, Borrowed):
            if size := int(np.prod(fed.shape, dtype=np.int64)) * fed.dtype.itemsize:
                self._device.queue_within(address, fed.address, size, self._stream)
            return
        array = np.ascontiguousarray(fed)
        kept.append(array)
        if array.nbytes:
            self._device.queue_to_device(address, array, self._stream)

    def result(self, tensor: Tensor, address: Any, shape: Shape, to: Place) -> Any:
        """An output, whose work is done, as the caller gets it."""
        if isinstance(address, np.ndarray):  # on the host already
            array = address.reshape(-1)[: int(np.prod(shape, dtype=np.int64))].reshape(shape).copy()
            if to == "host":
                return array
            address = self.take(array.nbytes, OUTPUTS)
            self.copy_in(array, address, [array])
            self._device.synchronize(self._stream)
        if to == "host":
            target = np.empty(shape, tensor.dtype)
            if target.nbytes:
                self._device.to_host(address, target)
            return target
        self.blocks.pop(address, None)
        return DeviceArray(PoolMemory(self._pool, address, shape), tensor.dtype, self._pool.device)

    def _limit_of(self, tensor: Tensor) -> Shape:
        """Of an output on the host whose shape depends on the data: all that it may have, flat."""
        most = int(self._context.get_max_output_size(tensor.name))
        return (max(most, 0) // tensor.dtype.itemsize,)

    def _leave_open(self, name: str) -> None:
        """Let TensorRT ask for an output's memory once it knows the size."""
        assert self._slot
        if self._slot.outputs is None:
            self._slot.outputs = _output_allocator(self._runtime.module)()
        self._allocator.begin(self, name)
        self.set_address(name, 0)
        # Once for each: the bindings keep a reference at every call.
        if name not in self._allocator.served and not self._context.set_output_allocator(
            name, self._allocator
        ):
            raise self._failure(
                f"memory for the output {name!r}, whose size depends on the data, was refused"
            )
        self._allocator.served.add(name)

    def _asks(self, name: str) -> bool:
        """Whether TensorRT asks for an output's memory by itself."""
        return self._allocator is not None and name in self._allocator.served

    @property
    def _allocator(self) -> Any:
        return self._slot.outputs if self._slot else None

    def _failure(self, what: str, kind: type[GlakeError] = ModelError) -> GlakeError:
        error = self._allocator.error if self._allocator is not None else None
        return error if isinstance(error, GlakeError) else self._runtime.failure(what, kind)

    def end(self) -> None:
        """Give everything back that was not handed on."""
        try:
            if self._queued:
                self._device.synchronize(self._stream)
        finally:
            if self._allocator is not None:
                self._allocator.end()
            blocks, self.blocks = self.blocks, {}
            for address in blocks:
                self._pool.deallocate(address)


@functools.cache
def _output_allocator(trt: ModuleType) -> Any:
    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined]
        """Memory for outputs whose sizes depend on the data. Called by TensorRT inside `execute_async_v3`."""

        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.served: set[str] = set()  # outputs of its context, once and for all
            self.run: _Run | None = None
            self.end()

        def begin(self, run: _Run, name: str) -> None:
            """Serve an output of a run."""
            self.run = run
            self.open[name] = (0, 0)

        def end(self) -> None:
            """The run is over."""
            self.run = None
            self.open: dict[str, tuple[int, int]] = {}  # name -> (address, bytes)
            self.shapes: dict[str, Shape] = {}
            self.error: BaseException | None = None

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            """The address of `size` bytes; 0 where there is no room."""
            del memory, alignment, stream  # the pool's alignment is enough, and the stream is the run's
            try:
                assert self.run is not None
                address, there = self.open[tensor_name]
                if there < size or not address:
                    self.open[tensor_name] = (0, 0)
                    self.run.drop(address)
                    self.open[tensor_name] = (self.run.take(int(size), OUTPUTS), max(int(size), 1))
                return self.open[tensor_name][0]
            except BaseException as error:  # nothing may be raised into TensorRT
                self.error = error.with_traceback(None)
                return 0

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            """As above, for versions that ask without a stream."""
            return self.reallocate_output_async(tensor_name, memory, size, alignment, 0)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            """The shape, before `execute_async_v3` returns."""
            self.shapes[tensor_name] = tuple(int(size) for size in shape)

        def made(self, name: str) -> tuple[Shape, int]:
            """An output's shape and address."""
            if name not in self.shapes or not self.open[name][0]:
                raise ModelError(
                    f"TensorRT did not say the shape of the output {name!r}, which depends on the data."
                )
            return self.shapes[name], self.open[name][0]

    return OutputAllocator


def host_array(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """An array in memory of the host at an address that TensorRT takes, also where it is empty."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 2 * ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _bytes(tensor: Tensor, shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64)) * tensor.dtype.itemsize


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name}{list(shape)}" for name, shape in shapes.items())
