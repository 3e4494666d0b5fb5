"""What a residency asks for: bytes of files to a device, copies of a device's memory on the host, and back."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypedDict, Unpack

from glake_infer.allocators.errors import DriverError
from glake_infer.process_memory import available_memory
from glake_infer.transfers import storage, timeline
from glake_infer.transfers.ending import end_transfers
from glake_infer.transfers.relays import Relays
from glake_infer.transfers.settings import SLOT, TransferSettings, transfer_settings

if TYPE_CHECKING:
    from glake_infer.allocators import _native

GAP = 4096
"""Weights that are at most so far apart are copied at once, with zeros between them."""

SEVERAL_PATHS = 16 << 20
"""Bytes from which a transfer takes all paths: smaller ones are not faster by two (H200)."""

MUCH = 1 << 30
"""Bytes of a load from which it may be too much for the page cache."""

LOOK = 0.05
"""Seconds between two looks of who waits: at signals, and how far it is."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are there, and all of them."""

_log = logging.getLogger("glake_infer")


@dataclass(frozen=True)
class Part:
    """`size` bytes of a file from `offset`, to be at `address` of the device.

    Or `rows` times so many, which lie one behind the other in the file and `pitch` bytes apart on the device.
    """

    path: Path
    offset: int
    size: int
    address: int
    rows: int = 1
    pitch: int = 0

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.size * self.rows


Copied = tuple[int, int, int]
"""Address of the device, address of a kept copy, bytes."""


@dataclass(frozen=True)
class Step:
    """What a transfer brings at once: parts of files, and copies that were kept.

    `in_place`: the addresses of the parts are memory that the process itself can write to.
    """

    parts: Sequence[Part] = ()
    copies: Sequence[Copied] = ()
    in_place: bool = False

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return sum(part.bytes for part in self.parts) + sum(size for _, _, size in self.copies)


class CancelledError(Exception):
    """A transfer was cancelled by the caller."""


class TransferOptions(TypedDict, total=False):
    """How something is brought."""

    priority: int
    """Transfers of higher ones come first."""
    progress: Progress | None
    """Called in the caller's thread."""
    cancelled: Callable[[], bool] | None
    """Asked now and then; once it is true the transfer ends, with CancelledError."""
    arrived: Callable[[int], None] | None
    """Called with the number of a step once that, and all before, are there."""


class Device(Protocol):
    """Where bytes go. Each method may be called from several threads.

    After any error, and Ctrl-C, nothing of the transfer is queued any more, and some of the bytes may be there.
    """

    def start(self, steps: Iterable[Step], total: int, *, priority: int = 0) -> Bringing:
        """Begin to bring `total` bytes in steps.

        Each step is on its way before the next is asked for, so that `steps` can make memory for one while others are
        filled. Raises DriverError, and what `steps` does.
        """

    def bring(self, steps: Iterable[Step], total: int, **options: Unpack[TransferOptions]) -> None:
        """Bring `total` bytes in steps; complete when this returns.

        Raises OSError (with the file's name), DriverError, CancelledError, and what `steps` and `arrived` do.
        """

    def keep(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Return the address of a new copy, fast to bring back, of each (device address, bytes).

        Nothing writes there meanwhile. Raises DriverError; then there are none.
        """

    def forget(self, copy: int) -> None:
        """Give back what `keep` returned."""


def device_for(name: str) -> Device:
    """The transfers of a device by its canonical name."""
    return HostTransfers.of_host() if name == "cpu" else CudaTransfers.of(int(name.removeprefix("cuda:")))


class Bringing:
    """What is on its way."""

    def __init__(self, total: int) -> None:
        """Use `Device.start`. `total`: bytes of all steps."""
        self.steps: list[list[_native.Transfer | storage.StorageTransfer]] = []
        self._total = total

    def finish(self, **options: Unpack[TransferOptions]) -> None:
        """Wait until all is there. As `Device.bring`."""
        done, arrived = 0, options.get("arrived")
        try:
            for number, started in enumerate(self.steps):
                for transfer in started:
                    done += self._wait(transfer, done, options)
                if arrived:
                    arrived(number)
        except BaseException:  # Ctrl-C too
            self.stop()
            raise
        if progress := options.get("progress"):
            progress(self._total, self._total)

    def stop(self) -> None:
        """Stop it. Nothing is queued any more when this returns."""
        end_transfers([transfer for started in self.steps for transfer in started])

    def _wait(
        self, transfer: _native.Transfer | storage.StorageTransfer, before: int, options: TransferOptions
    ) -> int:
        """Wait for one transfer; returns its bytes. `before`: those of others that are there."""
        progress, cancelled = options.get("progress"), options.get("cancelled")
        while not transfer.wait(LOOK):
            if progress:
                progress(before + int(transfer.view()["done"]), self._total)
            if cancelled and cancelled():
                transfer.cancel()
        view = transfer.view()
        for lost in view["lost_links"]:
            _log.warning("a path of transfers failed, and the others go on without it: %s", lost)
        if view["read_error"]:
            code, path, missing = view["read_error"]
            raise OSError(code, os.strerror(code) if code else f"the file ends {missing} bytes early", path)
        if view["link_error"]:
            raise DriverError(view["link_error"])
        if view["cancelled"] or (cancelled and cancelled()):
            raise CancelledError
        return int(view["bytes"])


class EngineTransfers:
    """One device of an engine."""

    def __init__(self, engine: _native.TransferEngine, target: int, *, in_place: bool = False) -> None:
        """`in_place`: the device's memory is the process's own, so that files are read straight to it."""
        self._engine = engine
        self._target = target
        self._in_place = in_place
        self._settings: TransferSettings | None = None

    def bring(self, steps: Iterable[Step], total: int, **options: Unpack[TransferOptions]) -> None:
        """Start, and wait."""
        self.start(steps, total, priority=options.get("priority", 0)).finish(**options)

    def start(self, steps: Iterable[Step], total: int, *, priority: int = 0) -> Bringing:
        """Read files with several threads into page-locked buffers, and copy over the links that are free."""
        settings, paths = self._configure(), self._paths(total)
        around_cache = _around_cache(settings, total)
        made = Bringing(total)
        try:
            for step in steps:
                started: list[_native.Transfer | storage.StorageTransfer] = []
                made.steps.append(started)
                if step.copies:
                    spans = [(copy, address, size) for address, copy, size in step.copies]
                    started.append(self._engine.copy(self._target, True, spans, priority, paths))
                in_place = self._in_place or step.in_place
                straight = [] if in_place else self._straight(step.parts, settings)
                if straight:
                    started.append(
                        storage.StorageTransfer([(p.path, p.offset, p.size, p.address) for p in straight])
                    )
                gone = {id(part) for part in straight}
                left = [part for part in step.parts if id(part) not in gone] if gone else step.parts
                if left:
                    files: dict[Path, int] = {}
                    parts = [
                        (files.setdefault(p.path, len(files)), p.offset, p.size, p.address, p.rows, p.pitch)
                        for p in left
                    ]
                    names = [os.fspath(path) for path in files]
                    started.append(
                        self._engine.load(self._target, names, parts, priority, paths, around_cache, in_place)
                    )
        except BaseException:
            made.stop()
            raise
        return made

    def _straight(self, parts: Sequence[Part], settings: TransferSettings) -> list[Part]:
        """Those parts that go from the disk to the device without the engine."""
        del parts, settings
        return []

    def keep(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Copy to page-locked memory."""
        made: list[int] = []
        try:
            for _, size in spans:
                made.append(self._engine.take_buffer(size)[0])
            todo = [(copy, address, size) for copy, (address, size) in zip(made, spans, strict=True)]
            size = sum(size for _, size in spans)
            bringing = Bringing(size)
            bringing.steps.append([self._engine.copy(self._target, False, todo, 0, self._paths(size))])
            bringing.finish()
        except BaseException:
            for copy in made:
                self._engine.give_buffer(copy)
            raise
        return made

    def forget(self, copy: int) -> None:
        """Give page-locked memory back."""
        self._engine.give_buffer(copy)

    def _paths(self, size: int) -> int:
        """How many paths a transfer of so many bytes takes."""
        del size
        return 1

    def _configure(self) -> TransferSettings:
        """Let the engine know of settings that have changed."""
        settings = transfer_settings()
        if settings is not self._settings:
            if self._settings is not None:
                self._engine.set_options(settings.reader_count, SLOT, settings.in_flight, GAP)
            self._settings = settings
        return settings


def _around_cache(settings: TransferSettings, size: int) -> bool:
    """Whether a load of so many bytes would only push itself out of the page cache."""
    if settings.direct_io == "auto":
        return size >= MUCH and size > available_memory() // 2
    return settings.direct_io == "always"


_ROWS = ("to the device", "to the host")


def record_engine(engine: _native.TransferEngine) -> None:
    """Let timelines show what an engine does."""
    names: dict[int, str] = {}

    def take() -> list[timeline.Named]:
        found = []
        events = engine.take_events()
        for target in {event[2] for event in events}:
            names.update({path["number"]: path["name"] for path in engine.paths(target)})
        for read, who, _, transfer, start, end, size in events:
            name = names.get(who // 2, f"path {who // 2}")
            row = f"reader {who}" if read else f"link {name} {_ROWS[who % 2]}"
            found.append((row, f"transfer {transfer}", start, end, size))
        return found

    timeline.add_source(engine.record, take)


class HostTransfers(EngineTransfers):
    """Memory of the process itself: for regions of copied weights on the host."""

    _made: ClassVar[HostTransfers | None] = None
    _making = threading.Lock()

    @classmethod
    def of_host(cls) -> HostTransfers:
        """The process's one."""
        with cls._making:
            if cls._made is None or cls._made._process != os.getpid():
                cls._made = cls()
            return cls._made

    def __init__(self) -> None:
        """Use `of_host`."""
        from glake_infer.allocators import _native

        settings = transfer_settings()
        engine = _native.TransferEngine.on_host(settings.reader_count, SLOT, settings.in_flight, GAP)
        engine.add_host_path(0, "memory")
        record_engine(engine)
        super().__init__(engine, 0, in_place=True)
        self._process = os.getpid()


class CudaTransfers(EngineTransfers):
    """Memory of one GPU. Buffers, threads and streams are kept for the next transfer."""

    _made: ClassVar[dict[int, CudaTransfers]] = {}
    _shared: ClassVar[_native.TransferEngine | None] = None
    _making = threading.Lock()

    def __init__(self, engine: _native.TransferEngine, index: int) -> None:
        """Use `of`."""
        super().__init__(engine, index)
        engine.add_cuda_path(index)
        self._relays = Relays(engine, index)
        self._prepared = False
        self._told_of_locks = False

    @classmethod
    def of(cls, index: int) -> CudaTransfers:
        """The one of GPU `index`. Raises DriverError."""
        from glake_infer.allocators import _native

        with cls._making:
            settings = transfer_settings()
            if cls._shared is None:
                cls._shared = _native.TransferEngine.on_cuda(
                    index, settings.reader_count, SLOT, settings.in_flight, GAP
                )
                record_engine(cls._shared)
            elif index not in cls._made:  # the others may not have transferred anything with these yet
                cls._shared.set_options(settings.reader_count, SLOT, settings.in_flight, GAP)
            if index not in cls._made:
                cls._made[index] = cls(cls._shared, index)
            return cls._made[index]

    @classmethod
    def engine(cls) -> _native.TransferEngine | None:
        """The engine of all GPUs, once there is one."""
        return cls._shared

    @classmethod
    def leave(cls, device: str) -> None:
        """Give the buffers back that other GPUs' transfers have in this one's pool, before that is closed."""
        for made in list(cls._made.values()):
            made._relays.leave(device)

    def start(self, steps: Iterable[Step], total: int, *, priority: int = 0) -> Bringing:
        """As `EngineTransfers.start`. The first load of a process also lets the buffers of large ones be made."""
        if not self._prepared:
            self._prepared = True
            with contextlib.suppress(RuntimeError):  # no more threads: a large load makes them
                threading.Thread(target=_prepare, args=(self._engine,), daemon=True).start()
        started = super().start(steps, total, priority=priority)
        if not self._told_of_locks and not self._engine.memory()["locked"]:
            self._told_of_locks = True
            _log.warning(
                "host memory cannot be page-locked here, so copies to cuda:%d are slower: raise `ulimit -l`, or the "
                "container's bound (docker run --ulimit memlock=-1)",
                self._target,
            )
        return started

    def _paths(self, size: int) -> int:
        return 1 if size < SEVERAL_PATHS else 1 + self._relays.ready()

    def _straight(self, parts: Sequence[Part], settings: TransferSettings) -> list[Part]:
        if settings.direct_storage == "never" or not storage.kvikio():
            return []
        if settings.direct_storage == "auto" and not storage.is_direct():
            return []
        return [
            p
            for p in parts
            if p.rows == 1 and p.size >= storage.LEAST and not storage.is_cached(p.path, p.offset)
        ]


def _prepare(engine: _native.TransferEngine) -> None:
    with contextlib.suppress(DriverError):  # no memory: loads go on with what there is, and say so
        engine.prepare()


def in_flight() -> dict[str, int]:
    """Bytes of buffers between files and GPUs: allocated, in use, the most ever in use; and whether all are locked."""
    engine = CudaTransfers.engine()
    return engine.memory() if engine else {"allocated": 0, "in_use": 0, "peak": 0, "locked": True}
