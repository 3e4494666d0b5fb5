"""Checks of weights: files against their digests, memory against the files. In threads; each file is read once.

A file that was found right is so until its seal changes: device, inode, size, and the times of its last changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from glake_infer.digest import digest_of, digests_of_pieces, pieces_of
from glake_infer.layout import PIECE
from glake_infer.sharing.descriptors import Descriptor
from glake_infer.sharing.entries import Fill
from glake_infer.sharing.protocol import PlacedWeight
from glake_infer.verified import Seal, examine, seal_of

MOST_REMEMBERED = 1 << 16
"""Files, and claims about pieces, that are known to be right."""

STEP = 1 << 20
"""Bytes that are compared at once."""

Result = TypeVar("Result")
Key = TypeVar("Key")


class CheckError(Exception):
    """Bytes are not what their name says, or cannot be read; `reason` as in protocol.Refusal."""

    def __init__(
        self, reason: Literal["altered", "unreadable", "full"], message: str, digest: str = "", path: str = ""
    ) -> None:
        """Say which."""
        super().__init__(message)
        self.reason, self.digest, self.path = reason, digest, path


class _EndedError(Exception):
    """Nobody waits for the check any more."""


class Checks:
    """All of a broker's. To be used in its loop's thread."""

    def __init__(self, threads: int | None = None) -> None:
        """No thread is started before it is needed."""
        count = threads or min(8, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="glake-infer check")
        self._seals: dict[tuple[str, str, int], Seal] = {}
        self._sound: dict[str, str] = {}
        self._running: dict[tuple[str, str, int], asyncio.Future[Seal]] = {}
        self._ended = threading.Event()
        self.background = asyncio.Semaphore(max(1, count // 2))
        """For checks that nobody waits for urgently."""

    def begin(self, weights: Iterable[PlacedWeight]) -> None:
        """Begin to check files that will be asked for."""
        for weight in weights:
            if not self._known(weight):
                self._start(weight)

    async def files(self, weights: Iterable[PlacedWeight]) -> dict[str, Seal]:
        """Check that these files hold what their digests say; returns their seals by path. Raises CheckError."""
        found: dict[str, Seal] = {}
        for weight in {(w.path, w.digest): w for w in weights}.values():
            key = _key(weight)
            seal = self._known(weight)
            if not seal:
                seal = await asyncio.shield(self._running.get(key) or self._start(weight))
            found[weight.path] = seal
        return found

    async def chunk(self, descriptor: Descriptor, size: int, fills: Sequence[Fill], *, memory: bool) -> None:
        """Check the files of a chunk, and its `memory` if that can be read: their bytes, and zeros between them.

        Raises CheckError.
        """
        if not fills:
            raise CheckError("altered", "no weight lies in a chunk that a process brought.")
        seals = await self.files(fill.weight for fill in fills)
        if memory:
            await self._in_thread(self._compare, descriptor, size, fills, seals)

    async def pieces(self, weight: PlacedWeight, pieces: tuple[str, ...]) -> bool:
        """Whether these are the digests of a weight's pieces. A file that cannot tell says no."""
        if not self.sound(weight.digest, pieces):
            try:
                right = await self._in_thread(self._check_pieces, weight, pieces)
            except CheckError:
                return False
            if right:
                _remember(self._sound, weight.digest, _digest_of(pieces))
        return self.sound(weight.digest, pieces)

    def sound(self, digest: str, pieces: tuple[str, ...]) -> bool:
        """Whether these are known to be the digests of a weight's pieces."""
        return digest in self._sound and self._sound[digest] == _digest_of(pieces)

    def close(self) -> None:
        """End all checks."""
        self._ended.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _known(self, weight: PlacedWeight) -> Seal | None:
        """The seal of a file that was checked and has not changed since."""
        key = _key(weight)
        if key not in self._seals:
            return None
        try:
            if (now := seal_of(Path(weight.path).stat())) == self._seals[key]:
                return now
        except (OSError, ValueError):
            pass
        del self._seals[key]
        return None

    def _start(self, weight: PlacedWeight) -> asyncio.Future[Seal]:
        key = _key(weight)
        if key in self._running:
            return self._running[key]
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._check_file, weight)
        self._running[key] = future

        def done(future: asyncio.Future[Seal]) -> None:
            del self._running[key]
            if not future.cancelled() and not future.exception():
                _remember(self._seals, key, future.result())

        future.add_done_callback(done)
        return future

    # In threads.

    def _check_file(self, weight: PlacedWeight) -> Seal:
        with _opened(weight) as fd:
            seal, verdict = examine(fd, weight.digest, weight.length, self._go_on)
        if verdict == "changed":
            raise _changed(weight)
        if verdict == "altered":
            raise CheckError(
                "altered",
                f"{weight.path} does not hold the bytes that its name stands for.",
                weight.digest,
                weight.path,
            )
        return seal

    def _check_pieces(self, weight: PlacedWeight, pieces: tuple[str, ...]) -> bool:
        with _opened(weight) as fd:
            digest, found, length = digests_of_pieces(self._each(fd, weight.length + 1), PIECE)
        return digest == weight.digest and length == weight.length and found == "".join(pieces)

    def _each(self, fd: int, length: int) -> Iterator[memoryview]:
        for piece in pieces_of(fd, 0, length):
            self._go_on(0)
            yield piece

    def _go_on(self, done: int) -> None:
        if self._ended.is_set():
            raise _EndedError

    def _compare(
        self, descriptor: Descriptor, size: int, fills: Sequence[Fill], seals: dict[str, Seal]
    ) -> None:
        memory, file = _Buffer(), _Buffer()
        zeros = _Buffer()
        position = 0
        for fill in fills:
            self._compare_zeros(descriptor, position, fill.at, memory, zeros, fill.weight)
            with _opened(fill.weight) as fd:
                if seal_of(os.fstat(fd)) != seals[fill.weight.path]:
                    raise _changed(fill.weight)
                for start in range(0, fill.size, STEP):
                    self._go_on(0)
                    count = min(STEP, fill.size - start)
                    memory.read(descriptor.number, fill.at + start, count)
                    if file.read(fd, fill.offset + start, count) != count:
                        raise _changed(fill.weight)
                    if not memory.equals(file, count):
                        raise CheckError(
                            "altered",
                            f"memory that a process made for {fill.weight.digest} does not hold the bytes of its file.",
                            fill.weight.digest,
                            fill.weight.path,
                        )
                if seal_of(os.fstat(fd)) != seals[fill.weight.path]:
                    raise _changed(fill.weight)
            position = fill.at + fill.size
        self._compare_zeros(descriptor, position, size, memory, zeros, fills[-1].weight)

    def _compare_zeros(
        self,
        descriptor: Descriptor,
        start: int,
        end: int,
        memory: _Buffer,
        zeros: _Buffer,
        near: PlacedWeight,
    ) -> None:
        for at in range(start, end, STEP):
            self._go_on(0)
            count = min(STEP, end - at)
            memory.read(descriptor.number, at, count)
            if not memory.equals(zeros, count):
                raise CheckError(
                    "altered",
                    f"memory that a process made for {near.digest} has other bytes than zeros beside it.",
                    near.digest,
                    near.path,
                )


class _Buffer:
    """STEP bytes, at first zeros.

    Memory is read into one, not mapped: a mapping would give pages to a memfd where it has none.
    """

    def __init__(self) -> None:
        """Take them."""
        self._view = memoryview(bytearray(STEP))
        self._bytes = (ctypes.c_char * STEP).from_buffer(self._view)

    def read(self, fd: int, offset: int, count: int) -> int:
        """Fill it with up to `count` bytes of a file; returns how many there were. Raises OSError."""
        done = 0
        while done < count and (got := os.preadv(fd, [self._view[done:count]], offset + done)):
            done += got
        return done

    def equals(self, other: _Buffer, count: int) -> bool:
        """Whether the first `count` bytes of both are the same."""
        return bool(_libc.memcmp(self._bytes, other._bytes, count) == 0)


_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@contextlib.contextmanager
def _opened(weight: PlacedWeight) -> Iterator[int]:
    """Open a weight's file and nothing else; turns what the system says into CheckError."""
    fd = -1
    try:
        if not os.path.isabs(weight.path):  # noqa: PTH117
            raise ValueError("it is no absolute path")
        fd = os.open(weight.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no file")
        yield fd
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise CheckError("full", "the broker cannot open more files: raise its `ulimit -n`.") from error
        raise _unreadable(weight, error.strerror or str(error)) from error
    except ValueError as error:
        raise _unreadable(weight, str(error)) from error
    finally:
        if fd >= 0:
            os.close(fd)


def _unreadable(weight: PlacedWeight, why: str) -> CheckError:
    message = f"the broker cannot read {weight.path}: {why}."
    return CheckError("unreadable", message, weight.digest, weight.path)


def _changed(weight: PlacedWeight) -> CheckError:
    return CheckError("altered", f"{weight.path} was changed while it was read.", weight.digest, weight.path)


def _digest_of(pieces: tuple[str, ...]) -> str:
    return digest_of("".join(pieces).encode())


def _key(weight: PlacedWeight) -> tuple[str, str, int]:
    return weight.path, weight.digest, weight.length


def _remember(known: dict[Key, Result], key: Key, value: Result) -> None:
    if len(known) >= MOST_REMEMBERED:
        del known[next(iter(known))]
    known[key] = value
