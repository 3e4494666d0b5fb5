"""The pool as TensorRT's allocator: what engines, contexts and builders hold comes out of the pool.

    runtime = tensorrt.Runtime(logger)
    runtime.gpu_allocator = TensorRTAllocator(pool)

TensorRT asks at deserialization (all weights of an engine in one block), for each context (what it keeps, and its scratch
memory unless that is USER_MANAGED), and for outputs whose size depends on the data. It does not ask during an inference.

Source of the interface: IGpuAsyncAllocator in NvInferRuntime.h, and its Python form in `tensorrt` and `tensorrt_rtx`.
Nothing here imports either before an allocator is made.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

from .errors import (
    DriverError,
    ForkedProcessError,
    GlakeError,
    InvalidPointerError,
    MissingDependencyError,
    PoolClosedError,
)

if TYPE_CHECKING:
    from . import _native
    from .pool import Pool

__all__ = ["BlockSource", "EngineTag", "TensorRTAllocator"]

EngineTag = Literal["weights", "context", "scratch", "outputs"]

MODULES = ("tensorrt_rtx", "tensorrt")
"""The libraries that an allocator can be for; they have the same Python API."""

GROWTH = 64
LEAST_GROWTH = 1 << 30
"""A growing allocation reserves addresses, and no memory, for so many times its first size, and for so many bytes."""

_log = logging.getLogger("glake_infer.tensorrt")


class BlockSource(Protocol):
    """Who gives blocks in the pool's place, and takes them back (glake_infer/engine_weights.py: of weights)."""

    def allocate(self, size: int, alignment: int) -> int:
        """Return the address of a block, aligned to at most a granule; raises what `Pool.allocate` does."""

    def deallocate(self, address: int, stream: int) -> None:
        """Take a block back, whose work may still be queued on `stream`."""


@dataclass
class _Growing:
    """A range of reserved addresses with memory behind its first part. Each chunk has a user of its own, which is awake."""

    region: int
    sizes: list[int]
    chunks: list[int]
    users: list[int]
    used: int = 0  # how many chunks have memory

    @property
    def capacity(self) -> int:
        return sum(self.sizes[: self.used])


@dataclass
class _Live:
    """What is behind an address that TensorRT has."""

    size: int
    tag: EngineTag
    base: int
    """What the pool returned; the address is above it where a larger alignment was asked for."""
    growing: _Growing | None = None
    source: BlockSource | None = None


class _Thread(threading.local):
    tag: EngineTag = "context"
    source: BlockSource | None = None
    error: GlakeError | None = None
    interrupt: BaseException | None = None
    """Ctrl-C inside a request, which nobody above TensorRT has seen yet."""


@dataclass
class _State:
    native: _native.Pool
    device: str
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Of `live`. A collection in a thread that has it may end an engine."""
    live: dict[int, _Live] = field(default_factory=dict)
    here: _Thread = field(default_factory=_Thread)


_kept: list[TensorRTAllocator] = []
"""For ever: runtimes and engines have plain pointers to them. They do not hold the pool's handle."""


class TensorRTAllocator:
    """An IGpuAsyncAllocator over the pool, for `runtime.gpu_allocator` and `builder.gpu_allocator`.

    What it makes is an instance of this class and of the library's own `IGpuAsyncAllocator`. One may serve any number of
    runtimes, engines and threads. It lives until the process ends, since TensorRT has plain pointers to it, and does not
    keep the pool's handle open: once that is closed requests are refused, and what is live can still be given back.

    TensorRT's requests are stream-ordered: memory given back on a stream is reused on that stream at once, and on others
    after what was queued. A request that the pool refuses returns 0, which TensorRT reports in its own words;
    `take_error` has ours.

    Args:
        pool: whose memory it is. Its device is the one that is current where the runtime is used.
        module: `tensorrt` or `tensorrt_rtx`; None: the one that is imported already, or else installed.

    Raises:
        MissingDependencyError: neither library is installed.
        PoolClosedError: the pool is closed.
    """

    def __new__(cls, pool: Pool, module: ModuleType | None = None) -> TensorRTAllocator:
        """Make an instance of a class that has the library's interface too."""
        if cls is not TensorRTAllocator:
            return super().__new__(cls)  # the library's
        library = module or _installed()
        made = type("TensorRTAllocator", (TensorRTAllocator, library.IGpuAsyncAllocator), {})
        return made.__new__(made, pool, module)  # type: ignore[call-overload, no-any-return]

    def __init__(self, pool: Pool, module: ModuleType | None = None) -> None:
        del module
        interface = type(self).__mro__[2]  # the library's; pybind11 wants it initialized by name
        interface.__init__(self)  # type: ignore[misc]
        self._state = _State(pool._open(), pool.device)
        _kept.append(self)

    @property
    def device(self) -> str:
        """The device of its pool."""
        return self._state.device

    @contextlib.contextmanager
    def tagged(self, tag: EngineTag) -> Iterator[None]:
        """Name what this thread's requests inside the block are for; outside they count as "context"."""
        with self._here("tag", tag):
            yield

    @contextlib.contextmanager
    def blocks_from(self, source: BlockSource) -> Iterator[None]:
        """Let `source` serve this thread's requests inside the block, but for those that are to be resized."""
        with self._here("source", source):
            yield

    def take_error(self) -> GlakeError | None:
        """Return why this thread's last refused request was refused, and forget it; None if there is none."""
        error, self._state.here.error = self._state.here.error, None
        return error

    def held(self, tag: EngineTag | None = None) -> int:
        """Bytes, as asked for, that TensorRT holds now: all, or of one tag."""
        with self._state.lock:
            lives = list(self._state.live.values())
        return sum(live.size for live in lives if tag in (None, live.tag))

    # What TensorRT calls. Nothing may be raised there: Ctrl-C comes when a block of `tagged` or `blocks_from` ends.

    def allocate_async(self, size: int, alignment: int, flags: int, stream: int) -> int:
        """Return the address of `size` bytes, aligned to `alignment` (0: any), or 0 where there is no room, or no size."""
        try:
            if size <= 0:
                return 0
            return self._allocate(int(size), int(alignment), bool(flags & 1), int(stream))
        except BaseException as error:
            self._refused(error, f"{size} bytes")
            return 0

    def deallocate_async(self, memory: int, stream: int) -> bool:
        """Take back what `allocate_async` or `reallocate` returned; work on `stream` may still use it."""
        try:
            if not memory:
                return True
            with self._state.lock:
                live = self._state.live.pop(int(memory), None)
            if live is None:
                raise InvalidPointerError(
                    f"TensorRT gave back {int(memory):#x}, which this allocator did not hand out, or has back already."
                )
            self._give_back(int(memory), live, int(stream))
        except BaseException as error:
            self._refused(error, "giving memory back")
            return False
        return True

    def reallocate(self, address: int, alignment: int, new_size: int) -> int:
        """Make an allocation that was asked for as resizable larger or smaller where it is; 0 if that cannot be done."""
        del alignment  # it stays where it is
        try:
            with self._state.lock:
                live = self._state.live.get(int(address))
            if live is None or live.growing is None:
                return 0  # TensorRT goes on with what it has, and copies
            self._grow(live.growing, int(new_size))  # without the lock: it may wait for what others give back
            live.size = int(new_size)
        except BaseException as error:
            self._refused(error, f"growing to {new_size} bytes")
            return 0
        return int(address)

    def allocate(self, size: int, alignment: int, flags: int) -> int:
        """As `allocate_async`, on the legacy default stream: the older form of the interface."""
        return self.allocate_async(size, alignment, flags, 0)

    def deallocate(self, memory: int) -> bool:
        """As `deallocate_async`, on the legacy default stream."""
        return self.deallocate_async(memory, 0)

    # How.

    @contextlib.contextmanager
    def _here(self, name: str, value: object) -> Iterator[None]:
        """Set what this thread's requests go by, for a `with` block."""
        here = self._state.here
        before = getattr(here, name)
        setattr(here, name, value)
        try:
            yield
        finally:
            setattr(here, name, before)
            self._interrupt()

    def _interrupt(self) -> None:
        """Raise what interrupted a request of this thread's: it could not go through TensorRT."""
        interrupt, self._state.here.interrupt = self._state.here.interrupt, None
        if interrupt is not None:
            raise interrupt

    def _refused(self, error: BaseException, what: str) -> None:
        if not isinstance(error, Exception):
            self._state.here.interrupt = error.with_traceback(None)
        known = (
            error
            if isinstance(error, GlakeError)
            else DriverError(f"{what}: {error or type(error).__name__}")
        )
        # Its traceback, in a log's record too, would keep the frames that called TensorRT, and with them engines.
        self._state.here.error = known.with_traceback(None)
        _log.error("refused TensorRT's request (%s): %s", what, str(error))

    def _allocate(self, size: int, alignment: int, resizable: bool, stream: int) -> int:
        state, here = self._state, self._state.here
        from .pool import Pool

        if Pool.current(state.device) is None:
            raise PoolClosedError
        if alignment & (alignment - 1):
            raise DriverError(f"TensorRT asked for an alignment of {alignment}, which is no power of two.")
        if here.source and not resizable and alignment <= state.native.granularity:
            address = base = here.source.allocate(size, max(alignment, 1))
            live = _Live(size, "weights", base, source=here.source)
        elif resizable:
            growing, address = self._reserve(size)
            live = _Live(size, "outputs", address, growing)
        else:
            base = address = state.native.allocate(size, here.tag, stream)
            if alignment and address % alignment:  # the pool's is 256, and less for what is smaller
                state.native.deallocate(base, stream)
                base = state.native.allocate(size + alignment, here.tag, stream)
                address = -(-base // alignment) * alignment
            live = _Live(size, here.tag, base)
        with state.lock:
            state.live[address] = live
        return address

    def _give_back(self, address: int, live: _Live, stream: int) -> None:
        with contextlib.suppress(ForkedProcessError):  # the parent's memory
            if live.source:
                live.source.deallocate(address, stream)
            elif live.growing:
                self._release(live.growing)
            else:
                self._state.native.deallocate(live.base, stream)

    def _reserve(self, size: int) -> tuple[_Growing, int]:
        """Reserve addresses for GROWTH times a size, in chunks that double what there is, and fill the first."""
        native = self._state.native
        first = -(-size // native.granularity) * native.granularity
        sizes = [first]
        while sum(sizes) < max(first * GROWTH, LEAST_GROWTH):
            sizes.append(sum(sizes))
        pieces = [(each, each, 0, False) for each in sizes]
        region, address, chunks = native.place_weights(pieces, "memory", tag="outputs")
        growing = _Growing(region, sizes, chunks, [])
        try:
            growing.users += [native.add_user([chunk]) for chunk in chunks]
            self._grow(growing, size)
        except BaseException:
            self._release(growing)
            raise
        return growing, address

    def _grow(self, growing: _Growing, size: int) -> None:
        """Have memory for `size` bytes at least. Raises what a use of weights does; what was there stays."""
        native = self._state.native
        if size > sum(growing.sizes):
            raise DriverError(
                f"an allocation of first {growing.sizes[0]} bytes can grow to {sum(growing.sizes)} where it is; {size} were "
                "asked for."
            )
        while growing.capacity < size:
            user = growing.users[growing.used]
            native.loaded(user, native.begin_use(user), writable=True)
            native.end_use(user)
            growing.used += 1

    def _release(self, growing: _Growing) -> None:
        """Once the device has done what is queued now."""
        native = self._state.native
        for user in growing.users[: growing.used]:
            native.begin_use(user)
            native.end_use(user)
        for user in growing.users:
            native.remove_user(user)
        native.remove_region(growing.region)


def _installed() -> ModuleType:
    """The library that is imported already, or else one that is installed."""
    for name in MODULES:
        if sys.modules.get(name):
            return sys.modules[name]
    for name in MODULES:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise MissingDependencyError(
        "neither TensorRT-RTX nor TensorRT is installed. `glake-infer doctor` says which of them this GPU needs: pip "
        "install 'glake-infer[tensorrt-rtx]' for A10, L4, 3090, 4090 and other RTX cards, "
        "pip install 'glake-infer[tensorrt]' for data-center GPUs."
    )
