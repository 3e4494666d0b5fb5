"""Residency: which weights have an address on a device, and who needs them.

Per pool a table digest -> (address, bytes, references). Two models with an equal weight get the same
address: one read-only mapping of the store's object, so the operating system holds its pages once for all
sessions of all processes. Bytes are read and their digest checked when a weight becomes resident.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakKeyDictionary

from glake_infer.allocators.errors import StoreError
from glake_infer.allocators.pool import Pool
from glake_infer.digest import digest_of_range
from glake_infer.store import ObjectFolder


@dataclass(frozen=True)
class Wanted:
    """A weight that a model asks for: an object of `folder`, of whose `length` bytes the first `mapped` are used."""

    digest: str
    length: int
    mapped: int
    folder: ObjectFolder


class AlteredObjectError(StoreError):
    """An object's bytes are not those that its name promises; `digest` names it. Nothing was mapped for it."""

    def __init__(self, digest: str, path: object) -> None:
        """State which object it was; models/package.py adds which packages are hurt."""
        super().__init__(f"{path} does not hold the bytes that its name stands for (or is gone).")
        self.digest = digest


@dataclass
class _Entry:
    address: int
    length: int
    mapped: int
    references: int = 0
    users: dict[int, int] = field(default_factory=dict)


class Residency:
    """The table of one pool. Thread-safe; loads of different threads check bytes one after the other."""

    def __init__(self) -> None:
        """Make an empty table; use `Residency.of(pool)` to get a pool's one."""
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()

    _tables: ClassVar[WeakKeyDictionary[Pool, Residency]] = WeakKeyDictionary()
    _tables_lock = threading.Lock()

    @classmethod
    def of(cls, pool: Pool) -> Residency:
        """Return the table of `pool`."""
        with cls._tables_lock:
            return cls._tables.setdefault(pool, cls())

    def acquire(self, pool: Pool, wanted: Iterable[Wanted], user: int) -> dict[str, int]:
        """Make weights resident and count a reference of `user` (any number that names a model) on each.

        Returns {digest: address}. Raises AlteredObjectError (bytes are wrong or gone) or OutOfMemoryError (the
        pool's limit); then every reference that this call had taken is given back.
        """
        taken: dict[str, int] = {}
        with self._lock:
            try:
                for item in wanted:
                    if item.digest in taken:
                        continue
                    entry = self._entries.get(item.digest)
                    if entry is None:
                        entry = self._entries[item.digest] = self._load(pool, item)
                    entry.references += 1
                    entry.users[user] = entry.users.get(user, 0) + 1
                    taken[item.digest] = entry.address
            except BaseException:
                self.release(pool, taken, user)
                raise
        return taken

    def release(self, pool: Pool, digests: Iterable[str], user: int) -> None:
        """Give references back; a weight without any is unmapped."""
        with self._lock:
            for digest in list(digests):
                entry = self._entries[digest]
                entry.references -= 1
                entry.users[user] -= 1
                if not entry.users[user]:
                    del entry.users[user]
                if not entry.references:
                    del self._entries[digest]
                    if entry.mapped:
                        pool.unmap_file(entry.address)

    def users(self) -> dict[str, tuple[int, frozenset[int]]]:
        """{digest: (bytes, the models that use it)} of everything resident."""
        with self._lock:
            return {d: (e.mapped, frozenset(e.users)) for d, e in self._entries.items()}

    def _load(self, pool: Pool, item: Wanted) -> _Entry:
        with _checked(item) as fd:
            address = pool.map_file(fd, item.mapped) if item.mapped else 0
        return _Entry(address, item.length, item.mapped)


def check_objects(wanted: Iterable[Wanted]) -> None:
    """Check the bytes of weights that somebody else is about to read from the store, each of them once.

    As for weights that become resident, all bytes are read (which also brings them into memory for the reader).
    Raises AlteredObjectError.
    """
    for item in {item.digest: item for item in wanted}.values():
        with _checked(item):
            pass


@contextlib.contextmanager
def _checked(item: Wanted) -> Iterator[int]:
    """Open an object whose bytes are right, for reading; raises AlteredObjectError."""
    path = item.folder.path(item.digest)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise AlteredObjectError(item.digest, path) from error
    try:
        digest, length = digest_of_range(fd, 0, item.length + 1)
        if digest != item.digest or length != item.length:
            raise AlteredObjectError(item.digest, path)
        yield fd
    finally:
        os.close(fd)
