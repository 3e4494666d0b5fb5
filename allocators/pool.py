"""Pool: the handle of a device's pool of memory."""

from __future__ import annotations

import contextlib
import operator
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from . import tensorrt_providers, torch_face
from .attach import Initializer, Initializers, InitializerTuple, attach, require_cuda_provider
from .devices import cpu_memory, parse_device
from .errors import (
    DriverError,
    ForkedProcessError,
    InputError,
    OutOfMemoryError,
    PoolClosedError,
    PoolExistsError,
    PoolInUseError,
)
from .recording import MOST_EVENTS, Recording
from .sizes import format_bytes, parse_bytes
from .snapshot import Snapshot

if TYPE_CHECKING:
    import onnxruntime

    from . import _native
    from .debugging import DebugReport

__all__ = ["Holder", "Pool", "PoolStats"]


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A snapshot of a pool; in bytes where not said otherwise.

    Attributes:
        active: handed out: the ranges in use (slabs of small objects count whole while they hold a live
            object) and the mapped files.
        idle: reserved - active: kept for reuse. `Pool.trim` gives back what no chunk in use shares.
        reserved: the physical memory that the pool holds. On the CPU, pages that were never touched cost
            nothing yet.
        peak_active: the largest `active` since the pool was made.
        peak_reserved: the largest `reserved` since the pool was made.
        requested: what is live, as asked for: `active - requested` is lost to rounding.
        peak_requested: the largest `requested` since the pool was made.
        limit: the bound on `reserved`.
        weights: bytes of weights, as asked for, and the mapped files.
        mapped_files: the part of `weights` that is mapped from files.
        unused_weights: the part of `idle` that is weights which no model has any more: the first to go where room is
            needed.
        shared: the part of `reserved` that other processes may have too, and that is there once for all of them:
            weights in a broker's memory, and mapped files.
        offloaded: weights in memory of the host that the device reads over its link (`gi.load(..., offload=)`): beside
            `reserved`, and not bounded by `limit`.
        allocations: count of successful allocations.
        deallocations: count of successful deallocations.
        chunks: count of pieces of physical memory.
        mappings: count of places where chunks are mapped; a chunk may be mapped at several.
        ranges: count of address ranges: in use, kept for the same size, and free.
        slabs: count of ranges that hold small objects.
        arenas: count of the streams and graphs that have ranges of their own, and two more.
        stitches: count of idle chunks that were mapped at a further address, ever.
        driver_calls: count of calls to the operating system or the driver for memory, ever.
    """

    active: int
    idle: int
    reserved: int
    peak_active: int
    peak_reserved: int
    requested: int
    peak_requested: int
    limit: int
    weights: int
    mapped_files: int
    unused_weights: int
    shared: int
    offloaded: int
    allocations: int
    deallocations: int
    chunks: int
    mappings: int
    ranges: int
    slabs: int
    arenas: int
    stitches: int
    driver_calls: int


class Holder(NamedTuple):
    """Who holds memory: bytes as asked for, under a label (`Pool.label`, "" for none) and a tag."""

    label: str
    tag: str
    bytes: int


_lock = threading.RLock()  # a finalizer may run while its own thread holds it
_handles: weakref.WeakValueDictionary[str, Pool] = weakref.WeakValueDictionary()
_devices: set[str] = {"cpu"}  # that ever had a handle: where a failure of ONNX Runtime's may be recorded
_labels = threading.local()


_inherited: set[str] = set()  # devices of the parent's pools, in a child of fork()


def _forget_handles() -> None:
    global _lock
    _lock = threading.RLock()
    _handles.clear()
    _inherited.update(_devices - {"cpu"})


os.register_at_fork(after_in_child=_forget_handles)


class Pool:
    """One device's memory for every session of this process that is attached to it.

    A process has one pool per device. This object is its handle: it sets the limit, and when it is
    closed or dropped the idle memory goes back to the system. Sessions that are still alive then keep
    their memory and go on working; the next handle on the device takes the same pool over.

    Thread-safe. A child of fork() cannot use it (`ForkedProcessError`), nor sessions that are on it.

    Args:
        device: "cpu", "cuda:N", or "cuda" for "cuda:0"; N as CUDA counts in this process (CUDA_VISIBLE_DEVICES).
        limit: a hard bound on the memory that the pool holds, idle memory and mapped weights
            included: bytes, or text such as "4GiB". None: all memory of the machine, or of its
            control group if that is less; on CUDA all memory of the device.
        debug: find wrong accesses, much slower (docs/debugging.md). True: large allocations lie between unmapped
            guards, small ones between canaries that are checked at every free. "guard": every allocation lies
            between guards.
        wipe: set memory to zero when it is freed, for tenants that must not see each other's data.

    Raises:
        PoolExistsError: the device has a pool with a live handle.
        PoolInUseError: sessions of an earlier handle hold more than `limit`, or hold anything and `debug` differs.
        DeviceNotFoundError: no such device.
        InputError: not a limit, or more than the memory of the CUDA device.
        DriverError: the device could not be opened.
        ForkedProcessError: the parent process has a pool.
    """

    def __init__(
        self,
        device: str = "cpu",
        limit: int | str | None = None,
        debug: bool | Literal["guard"] = False,
        wipe: bool = False,
        _ignore_streams: bool = False,  # for the test that has to show that it can fail
    ) -> None:
        if debug not in (False, True, "guard"):
            raise InputError(f"debug={debug!r}: expected False, True or 'guard'")
        if _inherited and str(device).startswith("cuda"):
            raise ForkedProcessError  # CUDA cannot even be asked which devices there are
        self._device = parse_device(device)
        asked = _parse_limit(limit)
        from . import _native

        with _lock:
            if self._device in _handles:
                raise PoolExistsError(self._device)
            pool = _native.device_pool(self._device)
            pool.reset_peaks()  # in a child of fork() this raises, before CUDA is asked for anything
            limit_here = _limit_on(self._device, asked)
            mode = "guard" if debug == "guard" else "on" if debug else "off"
            try:
                pool.configure(mode, wipe, _ignore_streams)
            except PoolInUseError as error:
                raise PoolInUseError(
                    "debug cannot be switched while memory of the pool is in use: drop the sessions of the earlier "
                    "handle first"
                ) from error
            pool.set_limit(limit_here)
            self._pool: _native.Pool | None = pool
            self._debug = bool(debug)
            self._finalizer = weakref.finalize(self, _give_back, pool)
            self._finalizer.atexit = False  # at exit memory is leaked, not pulled from under live sessions
            _handles[self._device] = self
            _devices.add(self._device)

    @classmethod
    def current(cls, device: str = "cpu") -> Pool | None:
        """Return the open handle on a device, or None."""
        with _lock:
            return _handles.get(parse_device(device))

    @property
    def device(self) -> str:
        """The device's name."""
        return self._device

    @property
    def providers(self) -> list[str | tuple[str, dict[str, Any]]]:
        """The execution providers for `onnxruntime.InferenceSession(..., providers=pool.providers)`.

        On CUDA they are the CUDA provider on this device and the CPU's for what it cannot run. Other options of
        the provider (`user_compute_stream`, `use_tf32`, ...) can be added to its dictionary: it is a new one at
        every call. `gpu_mem_limit` and `arena_extend_strategy` do nothing: they are the arena's, and an attached
        session has none. Do not set `gpu_external_alloc`: it goes past the pool.

        Raises `MissingDependencyError`, with the commands to run, if ONNX Runtime is missing, too old or has no
        CUDA provider. Where the provider is there and its libraries are not, ONNX Runtime itself warns and goes
        on with the CPU: `session.get_providers()` tells.
        """
        if self._device == "cpu":
            return ["CPUExecutionProvider"]
        require_cuda_provider()
        index = int(self._device.partition(":")[2])
        return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]

    def providers_with(
        self, tensorrt: Literal["tensorrt", "tensorrt-rtx"], options: Mapping[str, Any] | None = None
    ) -> list[str | tuple[str, dict[str, Any]]]:
        """`providers`, with one of ONNX Runtime's own TensorRT providers in front; for sessions that are attached.

        What it does not take from the session's allocator, and so from this pool, is outside the limit and not shared: the
        weights of its engines above all. docs/tensorrt.md has the list, and says what was run. Libraries that pip
        installed are loaded, and TensorRT-RTX's provider stays registered with ONNX Runtime: do not unregister it.

        Args:
            tensorrt: "tensorrt": TensorrtExecutionProvider, which onnxruntime-gpu has. "tensorrt-rtx":
                NvTensorRTRTXExecutionProvider, of the package onnxruntime-ep-nv-tensorrt-rtx.
            options: its options (`trt_engine_cache_enable`, `nv_profile_min_shapes`, ...). With its CUDA graphs attach with
                `cuda_graph=True`. `trt_context_memory_sharing_enable` is refused: it uses memory that was given back.

        Raises `InputError` (a pool on "cpu", an option that a pool cannot have), `MissingDependencyError` with the command
        to run, `DeviceNotFoundError` where TensorRT-RTX's provider serves no GPU here, and `GlakeError` if ONNX Runtime
        could not load it. Nothing that sessions use has changed then.
        """
        return tensorrt_providers.providers_with(tensorrt, self._device, options)

    def attach(
        self,
        options: onnxruntime.SessionOptions,
        initializers: Iterable[Initializer | InitializerTuple] = (),
        *,
        cuda_graph: bool = False,
    ) -> Initializers:
        """Make the sessions that are created from these options allocate from this pool.

        Call it before the session is created. It sets `session.use_env_allocators` and
        `session.use_device_allocator_for_initializers`; the arena settings do not matter then. From the
        pool come activations, outputs and the prepacked copies of weights. Weights that ONNX Runtime reads
        from the model itself and does not prepack come from the pool too with version 1.24, and stay in
        memory of its own, outside the limit, with 1.32. Those of `initializers` stay where they are.

        On CUDA all of a session's device memory comes from the pool, weights included; what cuBLAS, cuDNN and the
        CUDA context take comes from the driver, outside the limit. Pinned memory stays ONNX Runtime's. So does the
        host memory of such a session, unless this process has attached sessions to a pool on "cpu" too: ONNX
        Runtime then takes it from there, since its allocators belong to the process. An output whose memory is on the
        device may be dropped once the work that was queued on its session's stream is done or ordered after.

        Args:
            options: the options of the sessions to come.
            initializers: weights in memory of ours to be used, without a copy, instead of the graph's
                initializers of the same names: `(name, address, bytes, ONNX element type, shape)`. It is
                memory of this pool's device, and must stay as it is until every session made from the options is gone.
            cuda_graph: say so where the sessions will have the provider option `enable_cuda_graph`. It switches
                their memory patterns off (`options.enable_mem_pattern`). Without it the run that captures may
                fail: ONNX Runtime says that the capture broke, and the pool says why on stderr.

        Returns:
            The owner of ONNX Runtime's values over the weights.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed, too old, or lacks the CUDA provider.
            GlakeError: ONNX Runtime refused, for example a weight that was injected twice. Throw the
                options away.
        """
        self._open().stats()
        return attach(options, initializers, self._device, cuda_graph=cuda_graph)

    def torch_allocator(self) -> Any:
        """Return PyTorch's `CUDAPluggableAllocator` over this process's pools, for a `torch.cuda.MemPool`.

        Raises `MissingDependencyError`, `InputError`; see `torch_mem_pool`.
        """
        self._open()
        torch_face.check(self._device)
        return torch_face.allocator()

    def torch_mem_pool(self) -> Any:
        """Return a new `torch.cuda.MemPool` that takes its memory from this pool.

            with torch.cuda.use_mem_pool(pool.torch_mem_pool()):
                x = torch.empty(1000, device="cuda")

        PyTorch's caching allocator stays in front of it: memory comes in segments of 2 or 20 MiB and more, which
        count as active here until the MemPool is deleted (`del`) or emptied.

        Raises:
            MissingDependencyError: PyTorch is not installed, older than 2.5, or without CUDA.
            InputError: this pool is not on a CUDA device.
        """
        self._open()
        return torch_face.mem_pool(self._device)

    def use_in_torch(self) -> None:
        """Make this process's pools PyTorch's only CUDA allocator, on every device, until the process ends.

        Call it before anything uses torch.cuda. Every tensor is then one allocation of the pool, and a request that
        fails raises a RuntimeError that `explain` understands. `Tensor.record_stream` has no effect: keep a tensor
        that another stream uses until that stream is done with it.

        Raises as `torch_mem_pool` does, and `GlakeError`, with nothing changed, where it is too late.
        """
        self._open()
        torch_face.use(self._device)

    def stats(self) -> PoolStats:
        """Return what the pool holds now."""
        return PoolStats(**self._open().stats())

    def holders(self) -> list[Holder]:
        """Return who holds memory, largest first. The bytes add up to `stats().requested`."""
        return [Holder(*holder) for holder in self._open().holders()]

    def leaks(self) -> DebugReport:
        """Return every live allocation with the Python stack that made it; needs `debug`.

        Printed, it is a report with the largest ones. Raises `InputError` without `debug`.
        """
        self._need_debug("leaks")
        from . import debugging

        return debugging.allocations(self._open().live())

    def check(self) -> DebugReport:
        """Look for overwritten memory around live allocations and in freed ones; needs `debug`.

        Returns what was found since the last call, false if nothing was. Waits for the device. Raises `InputError`
        without `debug`, `DriverError` if the device failed.
        """
        self._need_debug("check")
        from . import debugging

        return debugging.corruptions(self._open().check())

    def _need_debug(self, name: str) -> None:
        self._open()
        if not self._debug:
            raise InputError(f"{name}() needs a pool in debug mode: Pool({self._device!r}, debug=True)")

    @contextlib.contextmanager
    def foreign_capture(self) -> Iterator[None]:
        """Say that other code captures a CUDA graph inside the `with` block, on a stream that the pool does not serve.

        The pool notices captures on streams that it serves. Of others it cannot know, and waiting for the device in
        its usual way would break them: inside the block it does so in another way, on the host.
        """
        pool = self._open()
        pool.expect_captures(True)
        try:
            yield
        finally:
            pool.expect_captures(False)

    def captures_ended(self) -> None:
        """Say that no stream that this thread allocated on is being captured into a CUDA graph any more.

        The pool finds that out by itself when the stream is used again without a capture. A session with
        `enable_cuda_graph` only replays from then on and asks for nothing: until the pool knows, it waits for the device
        on the host where an event would do. Call it in the thread of the run that captured, once that has returned.
        Models of `gi.load` do.
        """
        self._open().captures_ended()

    def trim(self, target: int | str = 0) -> int:
        """Give idle memory back to the system, until at most `target` bytes are reserved or none is idle.

        Returns the bytes given back. Memory that is active is never touched.
        """
        return self._open().trim(parse_bytes(target))

    def record(self, most_events: int = MOST_EVENTS) -> Recording:
        """Begin to record what this pool is asked for; end it with `stop()` or as a `with`.

        The pool has one recording at a time. Every allocation costs a little more meanwhile (a clock is read).

        Raises `InputError` if `most_events` is no positive number.
        """
        return Recording(self._open(), most_events)

    def snapshot(self, recording: Recording | None = None) -> Snapshot:
        """Return a picture of the address space; `save("x.pickle")` writes it for pytorch.org/memory_viz.

        recording: one that ended right before, whose events go into the file. Raises `InputError` if it goes on.
        """
        events = () if recording is None else recording.events
        return Snapshot(self._open().snapshot(), events, self._device)

    @property
    def limit(self) -> int:
        """The hard bound, in bytes, on the memory that the pool holds.

        Setting it (bytes, or text such as "4GiB") gives idle memory back as needed, and raises
        `PoolInUseError`, with the old limit in force, when more than that is active.
        """
        return self.stats().limit

    @limit.setter
    def limit(self, limit: int | str | None) -> None:
        self._open().set_limit(_limit_on(self._device, _parse_limit(limit)))

    def allocate(self, bytes: int | str, tag: str = "activations", stream: object = None) -> int:  # noqa: A002
        """Return the address of memory for `bytes` bytes, aligned to 256 (64 below 256 bytes); 0 for 0 bytes.

        Give it back with `deallocate`. On CUDA the memory may be that of earlier work, still queued on `stream`:
        use it on that stream, or on others after it.

        Args:
            bytes: bytes, or text such as "4MiB".
            tag: "activations" or "weights": what errors and statistics say it is held for.
            stream: on CUDA the stream that uses the memory: a handle (CUstream as int; 0 is the legacy default
                stream), a `torch.cuda.Stream`, a CuPy stream, or anything with `__cuda_stream__`. It is also where
                the memory's last use is taken to be when it is freed. None: any stream may use it. Ignored on "cpu".

        Raises:
            OutOfMemoryError: the limit has no room. Nothing changed.
            DriverError: the system or the driver refused. Nothing is left allocated.
            InputError: not a stream.
        """
        return self._open().allocate(parse_bytes(bytes), tag, _stream_handle(stream))

    @contextlib.contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Name what this thread allocates inside the `with` block, on any device, after `name`.

        Errors, statistics and traces say under that name who holds memory. Blocks nest; each thread has its own.

        Raises `InputError` if the name is not a text, or is empty.
        """
        if not isinstance(name, str) or not name:
            raise InputError(
                f"a label is a text that is not empty; received {name!r}. Pass a session's or model's name"
            )
        self._open()
        from . import _native

        previous = getattr(_labels, "current", "")
        _native.set_label(name)
        _labels.current = name
        try:
            yield
        finally:
            _native.set_label(previous)
            _labels.current = previous

    def deallocate(self, address: int, stream: object = None) -> None:
        """Take back what `allocate` returned. Work that uses the memory may still be queued.

        `stream`, one that is alive, is needed in one case only: it is being captured into a CUDA graph, the memory
        was allocated before, and nothing was allocated on the stream since the capture began. The pool then learns
        of the capture by it, and keeps the memory for the graph.

        Raises `InvalidPointerError`, with nothing changed, for any other address.
        """
        self._open().deallocate(address, _stream_handle(stream))

    def map_file(self, descriptor: int, bytes: int | None = None) -> int:  # noqa: A002
        """Map an open file, read-only, and return its address.

        The memory is shared with whoever else maps the file, counts as active weights, rounded up to
        pages, and is given back by `unmap_file`. The descriptor may be closed; the file must not be
        shortened.

        Args:
            descriptor: a file descriptor, open for reading.
            bytes: how much from the file's beginning; None: all of it.

        Raises:
            OutOfMemoryError: the limit has no room. Nothing is left mapped.
            DriverError: the system refused, or the file is shorter or empty. Nothing is left mapped.
        """
        size = os.fstat(descriptor).st_size if bytes is None else bytes
        return self._open().map_file(descriptor, size)

    def unmap_file(self, address: int) -> None:
        """Unmap what `map_file` returned. No session may use it any more.

        Raises `InvalidPointerError`, with nothing changed, for any other address.
        """
        self._open().unmap_file(address)

    def failures(self, since: int = 0) -> list[OutOfMemoryError | DriverError]:
        """Return why requests of ONNX Runtime's on this device failed: the last 32 above `since`, oldest first."""
        self._open()
        from . import _native

        return _native.failures(since, self._device)

    @property
    def failure_count(self) -> int:
        """How many requests of ONNX Runtime's failed in this process, on any device: the last one's `sequence`."""
        self._open()
        from . import _native

        return _native.failure_count()

    def explain(self, error: BaseException) -> OutOfMemoryError | DriverError | ForkedProcessError | None:
        """Return the pool's own error behind an error of ONNX Runtime's or PyTorch's, or None if there is none.

        A session whose request fails raises an error of ONNX Runtime's that quotes ours. A session on CUDA may
        have failed on the host's pool: that is found as well. For example:

            try:
                session.run(None, feeds)
            except Exception as error:
                raise pool.explain(error) or error

        A `torch.OutOfMemoryError` of a MemPool cannot quote ours: the last failure of this thread explains it.
        """
        if (type(error).__module__, type(error).__name__) == ("torch", "OutOfMemoryError"):
            mine = [found for found in self.failures() if found.thread == threading.get_native_id()]
            return mine[-1] if mine else None
        match = re.search(r"\[glake-infer failure (\d+)\]", str(error))
        if match is None:
            return None
        from . import _native

        number = int(match[1])
        if number == 0:  # a child of fork() keeps no records
            return ForkedProcessError()
        for device in sorted(_devices):
            for found in _native.failures(number - 1, device):
                if found.sequence == number:
                    return found
        return None

    def check_invariants(self) -> None:
        """Verify the pool's bookkeeping; RuntimeError names what does not hold. For tests."""
        self._open().check_invariants()

    def close(self) -> None:
        """Give idle memory back and end this handle, so that another can be made. Closing twice is fine.

        Raises `PoolInUseError`, with the handle still open, while memory is handed out.
        """
        with _lock:
            if self._pool is None:
                return
            try:
                stats = self.stats()
                if used := stats.active + stats.offloaded:
                    error = PoolInUseError.close(used, stats.weights + stats.offloaded)
                    if self._debug:
                        from . import debugging

                        error = PoolInUseError(f"{error}\n{debugging.leak_report(self)}")
                    raise error
                self._pool.trim(0)
            except ForkedProcessError:
                pass  # the parent's pool is not ours to trim
            self._finalizer.detach()
            self._pool = None
            if _handles.get(self._device) is self:
                del _handles[self._device]

    def __enter__(self) -> Pool:
        """Return the pool; leaving the `with` block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the pool. When an error is on its way, a pool in use stays open rather than hide it."""
        try:
            self.close()
        except PoolInUseError:
            if error is None:
                raise

    def __repr__(self) -> str:
        if self._pool is None:
            return f"<Pool on {self._device!r}, closed>"
        stats = self.stats()
        return (
            f"<Pool on {self._device!r}: {format_bytes(stats.active)} active, {format_bytes(stats.idle)} "
            f"idle, limit {format_bytes(stats.limit)}>"
        )

    def _open(self) -> _native.Pool:
        if self._pool is None:
            raise PoolClosedError
        return self._pool


def _parse_limit(limit: int | str | None) -> int | None:
    size = None if limit is None else parse_bytes(limit)
    if size == 0:
        raise InputError(
            "a pool's limit must be more than 0 bytes; None means all memory of the machine or the device"
        )
    return size


def _limit_on(device: str, size: int | None) -> int:
    """Return the limit for a device; None stands for all its memory."""
    if device == "cpu":
        return cpu_memory() if size is None else min(size, 2**63)  # addresses end long before
    from . import _native

    total = _native.device_memory(device)
    if size is not None and size > total:
        raise InputError(
            f"the limit cannot be {format_bytes(size)} ({size} bytes): device {device!r} has {format_bytes(total)} "
            f"({total} bytes) of memory. Choose a limit of at most that, or None for all of it"
        )
    return total if size is None else size


def _stream_handle(stream: object) -> int:
    """Return the handle of a CUDA stream, -1 for none."""
    if stream is None:
        return -1
    handle: object = stream
    if hasattr(stream, "__cuda_stream__"):  # a pair: the protocol's version, the handle
        pair = stream.__cuda_stream__
        pair = pair() if callable(pair) else pair
        handle = pair[1] if isinstance(pair, tuple) and len(pair) == 2 else None
    elif hasattr(stream, "cuda_stream"):  # PyTorch
        handle = stream.cuda_stream
    elif hasattr(stream, "ptr"):  # CuPy
        handle = stream.ptr
    if hasattr(handle, "__index__") and not isinstance(handle, bool):
        number = operator.index(handle)
        if 0 <= number < 2**63:
            return number
    raise InputError(
        f"{stream!r} is no CUDA stream: expected its handle as an int, a torch.cuda.Stream, a CuPy stream, an object "
        "with __cuda_stream__, or None"
    )


def _give_back(pool: _native.Pool) -> None:
    with contextlib.suppress(ForkedProcessError):  # a child dropped its copy of the handle
        pool.trim(0)
