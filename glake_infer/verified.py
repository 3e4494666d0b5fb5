"""The record of a store's objects whose bytes were found right, so that a file is read for that once while it is unchanged.

    ROOT/verified       a record of SIZE bytes for each: digest, seal, checksum

A seal is what changes when somebody writes to a file, replaces it, or copies it elsewhere. So a record of a file that
changed is void by itself: nothing is ever looked up but "this digest with this seal". Any number of processes append to the
file, one at a time (a lock on it) and in single writes, and read it at any time; what is torn or damaged equals nothing that
is looked up, and goes when the file is rewritten (a temporary sibling takes its place). Where it cannot be written,
everything goes on without it.

What this trusts: whoever can write to the store can write the record too, so it is no defence against them. Bytes that rot
on the disk after they were read change no seal: `glake-infer store verify` finds them, as it reads everything, and
GLAKE_VERIFY=always does, as then every process reads what it loads.

Not recorded is what a seal cannot tell from a later change: a file that changed less than RACY before it was read (a
second change may get the same time, the system's clocks have steps; so not what was written this moment, either), or that
seems to have changed in the future; and a file of a system that keeps no time of change.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from blake3 import blake3

from glake_infer.allocators.errors import InputError
from glake_infer.digest import Progress, digest_of_range
from glake_infer.store import write_file

VARIABLE = "GLAKE_VERIFY"

RACY = 2_000_000_000
"""Nanoseconds: the coarsest times of change that are in use, and clocks of servers that differ a little."""

ATTEMPTS = 3
"""How often a file is read that changes meanwhile."""

MOST = 1 << 18
"""Records that are read, and kept where the file is rewritten: half of them then."""

FEWEST = 1 << 10
"""Records from which the file is rewritten whenever it has doubled."""

PATIENCE = 0.1
"""Seconds that a load waits for others who write; it goes on without a record then."""

_BODY = struct.Struct("<32sQQQqq")
_CHECK = 8
SIZE = _BODY.size + _CHECK

Verdict: TypeAlias = Literal["right", "altered", "changed"]


class Seal(NamedTuple):
    """A file as it was at a moment. Times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    def tells(self, now: int) -> bool:
        """Whether a change after `now` (nanoseconds since 1970) is sure to give another seal."""
        return self.changed + RACY <= now and self.changed != self.modified


def seal_of(status: os.stat_result) -> Seal:
    """The seal of a file."""
    return Seal(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def examine(
    fd: int, digest: str, length: int, progress: Progress | None = None, *, alone: bool = False
) -> tuple[Seal, Verdict]:
    """Read a whole file: whether its bytes are right, and its seal; "changed": it was written to meanwhile.

    `progress`, `alone`: as for `digest_of_range`. Raises OSError, and what `progress` does.
    """
    seal = seal_of(os.fstat(fd))
    found = digest_of_range(fd, 0, length + 1, progress, alone=alone)
    if seal_of(os.fstat(fd)) != seal:
        return seal, "changed"
    return seal, "right" if found == (digest, length) else "altered"


def records_are_trusted() -> bool:
    """What $GLAKE_VERIFY says. Raises InputError."""
    value = os.environ.get(VARIABLE) or "once"
    if value not in ("always", "once"):
        raise InputError(
            f"{VARIABLE}={value!r}: expected 'once' (a file's bytes are checked when it is new or has changed) or 'always' "
            "(and by every process that loads it)."
        )
    return value == "once"


class Verified:
    """The record of the store at `root`. Thread-safe. Nothing here raises OSError."""

    def __init__(self, root: Path) -> None:
        """Read nothing yet."""
        self._root = root
        self._path = root / "verified"
        self._lock = threading.Lock()
        self._known: set[bytes] = set()
        self._file = (0, 0)
        self._read = 0

    def refresh(self) -> None:
        """Read what came since the last time."""
        with self._lock, contextlib.suppress(OSError), _opened(self._path, os.O_RDONLY) as fd:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != self._file or status.st_size < self._read:
                self._known, self._read = set(), 0
                self._file = (status.st_dev, status.st_ino)
            start = max(self._read, (status.st_size // SIZE - MOST) * SIZE)
            found = _records(fd, start)
            self._read = start + len(found) * SIZE
            self._known.update(found)

    def holds(self, digest: str, seal: Seal) -> bool:
        """Whether the bytes of a file with this seal were found to be the digest's, as far as was read."""
        return _record(digest, seal) in self._known

    def add(self, found: Iterable[tuple[str, Seal]]) -> None:
        """Record files that were found right; the seals must be ones that tell."""
        with self._lock:
            new = [
                record
                for record in dict.fromkeys(_record(*each) for each in found)
                if record not in self._known
            ]
            if not new:
                return
            with contextlib.suppress(OSError):
                self._append(new)

    def drop(self, digest: str) -> None:
        """Forget that an object was ever right. Processes that run already may remember it."""
        start = bytes.fromhex(digest)
        with self._lock, contextlib.suppress(OSError):
            self._known = {record for record in self._known if not record.startswith(start)}
            with _locked(self._path, patience=None) as fd:
                self._rewrite(fd, lambda record: not record.startswith(start))

    def compact(self) -> None:
        """Leave out what is void: damaged records, and those of files that are gone or have changed."""
        with self._lock, contextlib.suppress(OSError), _locked(self._path) as fd:
            self._rewrite(fd, self._lives)

    def _append(self, records: list[bytes]) -> None:
        with _locked(self._path, os.O_CREAT) as fd:
            before = os.fstat(fd).st_size
            torn = before % SIZE  # by a write that found the disk full
            if not torn:
                os.write(fd, b"".join(records))
                self._known.update(records)
            count = before // SIZE + len(records)
            if torn or (count >= FEWEST and count.bit_length() > (before // SIZE).bit_length()):
                self._rewrite(fd, self._lives)
        if torn:
            self._append(records)

    def _rewrite(self, fd: int, keep: Callable[[bytes], bool]) -> None:
        """In place of the record that is open, and locked."""
        found = [r for r in dict.fromkeys(_records(fd, 0)) if _is_whole(r) and keep(r)]
        write_file(self._path, b"".join(found[-MOST // 2 :]), sync=False)

    def _lives(self, record: bytes) -> bool:
        raw, *seal = _BODY.unpack(record[: _BODY.size])
        digest = raw.hex()
        for folder in ("objects", "prepared/objects"):
            with contextlib.suppress(OSError):
                if seal_of((self._root / folder / digest[:2] / digest).stat()) == tuple(seal):
                    return True
        return False


def _record(digest: str, seal: Seal) -> bytes:
    body = _BODY.pack(bytes.fromhex(digest), *seal)
    return body + _checksum(body)


def _checksum(body: bytes) -> bytes:
    return blake3(b"glake-infer verified 1" + body).digest(_CHECK)


def _is_whole(record: bytes) -> bool:
    return _checksum(record[: _BODY.size]) == record[_BODY.size :]


def _records(fd: int, start: int) -> list[bytes]:
    with open(fd, "rb", closefd=False) as file:
        file.seek(start)
        data = file.read()
    return [data[at : at + SIZE] for at in range(0, len(data) - SIZE + 1, SIZE)]


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open a record, and nothing that only has its name. Raises OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no file")
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(path: Path, flags: int = 0, *, patience: float | None = PATIENCE) -> Iterator[int]:
    """Open a record to which nobody else writes meanwhile. Raises OSError, also where others do for too long."""
    end = time.monotonic() + (patience or 0)
    while True:
        with _opened(path, os.O_RDWR | os.O_APPEND | flags) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if patience is None else fcntl.LOCK_NB))
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.001)
                continue
            if os.fstat(fd).st_nlink:  # else somebody has just rewritten it
                yield fd
                return
