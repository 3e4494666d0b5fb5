"""Transfers: bytes of files to memory of a device.

Readers, one thread each, take the next piece when they are free: they read it from the files (`preadv`, so a file that
shrinks or a disk that is gone is an error here and no SIGBUS) into one of two pinned buffers, and queue its copy on
their stream, so that the next read and this copy overlap.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from glake_infer import cuda

PIECE = 8 << 20
"""Bytes of one read and one copy."""

READERS = 8
"""Threads of all loads of a GPU together (each load has one at least). Their 2 * READERS * PIECE bytes of pinned memory
stay with the process."""

GAP = 4096
"""Weights that are at most so far apart are copied at once, with zeros between them."""


@dataclass(frozen=True)
class Part:
    """`size` bytes of a file from `offset`, to be at `address` of the device."""

    path: Path
    offset: int
    size: int
    address: int


class Device(Protocol):
    """Where bytes go. Each method may be called from several threads."""

    def load(self, parts: Sequence[Part]) -> None:
        """Copy the parts; complete when this returns. Raises OSError (with the file's name) or DriverError."""

    def keep(self, address: int, size: int) -> int:
        """Return the address of a new copy, fast to restore from, of device memory that nothing writes to."""

    def restore(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy (device address, address of a kept copy, bytes) each; complete when this returns."""

    def forget(self, copy: int) -> None:
        """Give back what `keep` returned."""


def device_for(name: str) -> Device:
    """The transfers of a device by its canonical name."""
    return HostTransfers() if name == "cpu" else CudaTransfers.of(int(name.removeprefix("cuda:")))


class HostTransfers:
    """Memory of the process itself: for regions of copied weights on the host."""

    def load(self, parts: Sequence[Part]) -> None:
        """Read each part into its place."""
        for piece in _pieces(parts):
            for part in piece:
                view = (ctypes.c_char * part.size).from_address(part.address)
                _read(part, memoryview(view).cast("B"))

    def keep(self, address: int, size: int) -> int:
        """Return a copy on the heap."""
        copy = _libc().malloc(size)
        if not copy:
            raise MemoryError(f"no memory for a copy of {size} bytes")
        ctypes.memmove(copy, address, size)
        return int(copy)

    def restore(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy back."""
        for address, copy, size in copies:
            ctypes.memmove(address, copy, size)

    def forget(self, copy: int) -> None:
        """Free a copy."""
        _libc().free(ctypes.c_void_p(copy))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    return libc


class CudaTransfers:
    """Memory of one GPU. Its pinned buffers and streams are kept for the next load."""

    _made: dict[int, CudaTransfers] = {}  # noqa: RUF012
    _making = threading.Lock()

    def __init__(self, index: int) -> None:
        """Use `of`."""
        self._index = index
        self._lock = threading.Lock()
        self._idle: list[_Reader] = []
        self._busy = 0

    @classmethod
    def of(cls, index: int) -> CudaTransfers:
        """The one of GPU `index`."""
        with cls._making:
            return cls._made.setdefault(index, cls(index))

    def load(self, parts: Sequence[Part]) -> None:
        """Copy files with several readers."""
        pieces = _pieces(parts)
        errors: list[BaseException] = []
        lock = threading.Lock()

        def work(reader: _Reader) -> None:
            try:
                with cuda.captures_left_alone():
                    while not errors:
                        with lock:
                            piece = next(pieces, None)
                        if piece is None:
                            break
                        reader.copy(piece)
                    reader.finish()
            except BaseException as error:
                errors.append(error)
            finally:
                finished.release()

        finished = threading.Semaphore(0)
        total = sum(part.size for part in parts)
        count = max(1, min(READERS, os.cpu_count() or 1, total // PIECE))
        with self._readers(count) as readers:
            threads = [threading.Thread(target=work, args=(reader,), daemon=True) for reader in readers[1:]]
            for thread in threads:
                thread.start()
            work(readers[0])
            left = len(readers)
            while left:
                try:
                    finished.acquire()
                    left -= 1
                except BaseException as error:  # Ctrl-C: the others end, before the memory is taken back
                    errors.append(error)
            if errors:
                for reader in readers:  # nothing may be queued when the caller takes the memory back
                    with contextlib.suppress(Exception), cuda.captures_left_alone():
                        reader.finish()
                raise errors[0]

    def keep(self, address: int, size: int) -> int:
        """Return a copy in page-locked memory."""
        with self._readers(1) as (reader,), cuda.captures_left_alone():
            copy = cuda.allocate_pinned(self._index, size)
            try:
                cuda.queue_to_host(self._index, copy, address, size, reader.stream)
                reader.finish()
            except BaseException:
                cuda.free_pinned(self._index, copy)
                raise
            return copy

    def restore(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy page-locked memory at the rate of the link."""
        with self._readers(1) as (reader,), cuda.captures_left_alone():
            try:
                for address, copy, size in copies:
                    cuda.queue_to_device(self._index, address, copy, size, reader.stream)
            finally:
                reader.finish()

    def forget(self, copy: int) -> None:
        """Give page-locked memory back."""
        with cuda.captures_left_alone():
            cuda.free_pinned(self._index, copy)

    @contextlib.contextmanager
    def _readers(self, count: int) -> Iterator[list[_Reader]]:
        """At most `count` readers; one where others use READERS already, so that nobody waits."""
        taken: list[_Reader] = []
        with self._lock:
            count = max(1, min(count, READERS - self._busy))
            self._busy += count
        try:
            while len(taken) < count:
                with self._lock:
                    reader = self._idle.pop() if self._idle else None
                taken.append(reader or _Reader(self._index))
            yield taken
        finally:
            with self._lock:
                self._busy -= count
                room = READERS - len(self._idle)
                self._idle += taken[:room]
                spare = taken[room:]
            for reader in spare:
                reader.close()


class _Reader:
    """A stream and two pinned buffers, used by one thread at a time."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.stream = cuda.new_stream(index)
        self._streams = [self.stream, 0]
        self._buffers: list[int] = []
        self._turn = 0

    def copy(self, piece: Sequence[Part]) -> None:
        """Read a piece into the next buffer, once that is free, and queue its copy."""
        if len(self._buffers) < 2:
            with cuda.captures_left_alone():
                self._streams[1] = self._streams[1] or cuda.new_stream(self._index)
                while len(self._buffers) < 2:
                    self._buffers.append(cuda.allocate_pinned(self._index, PIECE))
        self._turn ^= 1
        buffer, stream = self._buffers[self._turn], self._streams[self._turn]
        cuda.synchronize(self._index, stream)  # the copy before last
        first = piece[0].address
        size = piece[-1].address + piece[-1].size - first
        view = memoryview((ctypes.c_char * PIECE).from_address(buffer)).cast("B")
        end = 0
        for part in piece:
            start = part.address - first
            view[end:start] = bytes(start - end)
            end = start + part.size
            _read(part, view[start:end])
        cuda.queue_to_device(self._index, first, buffer, size, stream)

    def finish(self) -> None:
        """Wait for what is queued."""
        for stream in self._streams:
            if stream:
                cuda.synchronize(self._index, stream)

    def close(self) -> None:
        """Give everything back; nothing is queued."""
        with cuda.captures_left_alone():
            for buffer in self._buffers:
                cuda.free_pinned(self._index, buffer)
            for stream in self._streams:
                if stream:
                    cuda.destroy_stream(self._index, stream)


def _pieces(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Cut parts into pieces of at most PIECE bytes of the device, each without gaps worth mentioning."""
    piece: list[Part] = []
    for whole in sorted(parts, key=lambda part: part.address):
        for done in range(0, whole.size, PIECE):
            size = min(PIECE, whole.size - done)
            part = Part(whole.path, whole.offset + done, size, whole.address + done)
            if piece:
                end = piece[-1].address + piece[-1].size
                near = 0 <= part.address - end <= GAP
                if not near or part.address + part.size - piece[0].address > PIECE:
                    yield piece
                    piece = []
            piece.append(part)
    if piece:
        yield piece


def _read(part: Part, view: memoryview) -> None:
    fd = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < part.size:
            try:
                count = os.preadv(fd, [view[done:]], part.offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(part.path)) from error
            if count == 0:
                raise OSError(0, f"the file ends {part.size - done} bytes early", str(part.path))
            done += count
    finally:
        os.close(fd)
