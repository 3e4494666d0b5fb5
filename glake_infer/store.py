"""The store: one file per distinct weight of this machine, named by its digest.

    ROOT/objects/ab/abcd...        a weight's raw bytes, mode 0444, never modified
    ROOT/prepared/objects/ab/...   weights that ONNX Runtime derived on this machine (fused, prepacked)
    ROOT/prepared/KEY/             a graph over them (models/prepare.py)
    ROOT/archives/KEY/NAME.glake   a package taken from an archive, for all processes of a node (models/node_packages.py)
    ROOT/packages/HASH.json        which package lies where and which objects it needs
    ROOT/tensorrt/                 what TensorRT timed on this machine (models/tensorrt/build.py)
    ROOT/tensorrt/jit/PLAN/KEY     what it compiled for an engine, named by its plan's digest (models/tensorrt/jit_cache.py)
    ROOT/pending/ID.json           a folder that is being written; what a killed process left is found here
    ROOT/verified                  whose bytes were found right, and are not read for that again (verified.py)
    ROOT/lock                      held shared by whoever reads or adds objects, exclusively by gc

ROOT is `$GLAKE_STORE`, or `$XDG_CACHE_HOME/glake-infer/store` (`~/.cache/...`).

An object is written to a temporary sibling, synced and linked to its name, so a name always stands for
complete bytes. Its modification time is set to `SEALED`: a different one means that somebody wrote to the
file, and the next convert that needs it looks at its bytes again. Whoever loads a weight checks its digest,
once while the file is unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3

from glake_infer.allocators.errors import DigestMismatchError, StorageFullError, StoreError
from glake_infer.digest import Buffer, Progress, digest_of, digest_of_file, is_digest

ObjectState = Literal["intact", "missing", "short", "altered"]

MANIFEST = "manifest.json"
"""The file that makes a folder a package."""

SEALED = 1_000_000_000
"""Modification time (seconds since 1970) of every object that nobody has touched."""

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def default_root() -> Path:
    """Where the store lies when nobody says otherwise."""
    if root := os.environ.get("GLAKE_STORE"):
        return Path(root).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache else Path.home() / ".cache"
    return (base / "glake-infer" / "store").absolute()


@contextlib.contextmanager
def storage_errors(what: str, where: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into StorageFullError or StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"no space left on the disk of {where} while {what}. Nothing was left half-written. "
                f"Free some space (`glake-infer store gc` removes what no package needs), or point "
                f"GLAKE_STORE or -o at another disk, and run the command again."
            ) from error
        if error.errno == errno.EFBIG:
            raise StoreError(
                f"a file in {where} would be larger than this process or that file system allows, while {what}. Nothing was "
                "left half-written. Raise the limit (`ulimit -f unlimited`), or point GLAKE_STORE or -o at a file system "
                "that takes large files, and run the command again."
            ) from error
        if error.errno in READ_ONLY:
            raise StoreError(
                f"may not write to {where} while {what}: {error.strerror}. "
                f"Make it writable for this user, or point GLAKE_STORE or -o elsewhere."
            ) from error
        raise


def temporary_sibling(path: Path) -> Path:
    """Return a new name beside `path` for something half-written; never longer than a file's name may be."""
    return path.with_name(f".{path.name[:48]}.{uuid.uuid4().hex}.tmp")


def write_file(path: Path, data: Buffer, *, sync: bool = True) -> None:
    """Write `data` to `path` through a temporary sibling, synced unless it may be lost: all or nothing."""
    temporary = temporary_sibling(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class ObjectFolder:
    """A folder of content-addressed files. Thread- and process-safe: of two equal ones the first stays."""

    def __init__(self, store_root: Path, relative: str) -> None:
        """Address `store_root/relative`; the folder is made when the first object comes."""
        self.store_root = store_root
        self._relative = relative
        self.root = store_root / relative

    def location(self, digest: str) -> str:
        """Path of an object relative to the store's root: what a graph's `external_data` names."""
        if not is_digest(digest):
            raise StoreError(f"{digest[:80]!r} is not a digest (64 hexadecimal characters)")
        return f"{self._relative}/{digest[:2]}/{digest}"

    def path(self, digest: str) -> Path:
        """Where the object lies, whether it exists or not."""
        return self.store_root / self.location(digest)

    def state(self, digest: str, length: int) -> ObjectState:
        """Whether the object is there with these bytes: by size and seal, or digest if unsealed."""
        path = self.path(digest)
        try:
            status = path.stat()
            if status.st_size != length:
                return "short" if status.st_size < length else "altered"
            sealed = int(status.st_mtime) == SEALED or digest_of_file(path) == digest
        except FileNotFoundError:
            return "missing"
        return "intact" if sealed else "altered"

    def holds(self, digest: str, length: int, *, thorough: bool = False) -> bool:
        """Whether the object is intact. A damaged one is removed, so that whoever asked can add it again.

        `thorough` reads its bytes even where the seal is whole.
        """
        state = self.state(digest, length)
        if thorough and state == "intact" and digest_of_file(self.path(digest)) != digest:
            state = "altered"
        if state in ("short", "altered"):
            self.path(digest).unlink(missing_ok=True)
        return state == "intact"

    def add(
        self, digest: str, length: int, pieces: Iterable[Buffer], progress: Progress | None = None
    ) -> None:
        """Write an object from `pieces`, `length` bytes together.

        Raises DigestMismatchError where the bytes are not those of `digest` (the source changed meanwhile)
        and StorageFullError on a full disk; either way nothing is left behind.
        """
        path = self.path(digest)
        temporary = temporary_sibling(path)
        with storage_errors("adding a weight to the store", self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                state, done = blake3(max_threads=blake3.AUTO), 0
                with temporary.open("xb", buffering=0) as file:
                    for piece in pieces:
                        view = memoryview(piece).cast("B")
                        state.update(view)
                        for written in _write_all(file.fileno(), view):
                            done += written
                            if progress:
                                progress(written)
                    os.fchmod(file.fileno(), 0o444)
                    os.fsync(file.fileno())
                if done != length or state.hexdigest() != digest:
                    raise DigestMismatchError(
                        f"{done} bytes with digest {state.hexdigest()[:16]} came where {length} bytes with "
                        "digest "
                        f"{digest[:16]} were expected: the source changed while it was read. Run the command "
                        "again "
                        f"when nothing writes to it."
                    )
                os.utime(temporary, (SEALED, SEALED))
                _publish(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def add_buffer(self, data: Buffer, digest: str | None = None) -> tuple[str, bool]:
        """Add `data` if it is missing; returns its digest and whether it was new."""
        digest = digest or digest_of(data)
        if self.holds(digest, len(data)):
            return digest, False
        self.add(digest, len(data), [data])
        return digest, True

    def __iter__(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield (digest, status) of every object."""
        for path in sorted(self.root.glob("[0-9a-f][0-9a-f]/*")):
            if is_digest(path.name):
                with contextlib.suppress(FileNotFoundError):
                    yield path.name, path.stat()

    def temporaries(self) -> Iterator[Path]:
        """What killed processes left; only meaningful under the exclusive lock."""
        yield from self.root.glob("[0-9a-f][0-9a-f]/.*.tmp")


def _publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name; where somebody else was faster theirs stays, it may be mapped already."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if not path.exists():  # a file system without hard links: the last of two that are equally fast wins
            temporary.replace(path)


def _write_all(fd: int, view: memoryview) -> Iterator[int]:
    while view:
        written = os.write(fd, view[: 16 << 20])
        yield written
        view = view[written:]


@dataclass(frozen=True)
class Record:
    """A registered package: where its record and its folder lie, its manifest's identity, what it needs."""

    file: Path
    path: Path
    identity: str
    digests: frozenset[str]

    def exists(self) -> bool:
        """Whether the package is still where it was (some version of it: its path is what is registered)."""
        return (self.path / MANIFEST).is_file()


class Store:
    """The store at `root`. Cheap to make; nothing is created before something is written."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        """Open the store at `root`, by default `default_root()`."""
        self.root = Path(root).expanduser().absolute() if root is not None else default_root()
        self.objects = ObjectFolder(self.root, "objects")
        self.prepared = self.root / "prepared"
        self.prepared_objects = ObjectFolder(self.root, "prepared/objects")
        self.compiled = self.root / "tensorrt" / "jit"
        self.packages = self.root / "packages"
        self.pending = self.root / "pending"

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keep gc away while objects are read or added (a shared lock; any number of holders)."""
        with self.locked("lock", exclusive=False):
            yield

    @contextlib.contextmanager
    def locked(self, name: str, *, exclusive: bool, wait: bool = True) -> Iterator[None]:
        """Hold the file lock `name`; raises BlockingIOError if `wait` is False and somebody holds it.

        A store that this user may only read can be locked shared, where somebody has locked it before.
        """
        path = self.root / name
        with storage_errors("opening the store", self.root):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                if exclusive or error.errno not in READ_ONLY or not path.is_file():
                    raise
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            fcntl.flock(fd, mode if wait else mode | fcntl.LOCK_NB)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Announce that `folder` (temporary, anywhere) is being written, so that gc finds it after a kill.

        A store that this user may only read cannot be told; exporting from it works all the same.
        """
        note = self.pending / f"{uuid.uuid4().hex}.json"
        told = True
        with storage_errors("preparing to write", self.root):
            try:
                self.pending.mkdir(parents=True, exist_ok=True)
                write_file(note, json.dumps({"path": str(folder)}).encode())
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                told = False
        try:
            yield
        finally:
            if told:
                note.unlink(missing_ok=True)

    def register(self, path: Path, identity: str, digests: Iterable[str]) -> None:
        """Remember that the package at `path` needs these objects. The last word on a path wins."""
        path = path.absolute()
        record = {"path": str(path), "identity": identity, "digests": sorted(set(digests))}
        target = self.packages / f"{digest_of(str(path).encode())[:32]}.json"
        data = json.dumps(record).encode()
        with storage_errors("registering a package", self.root):
            self.packages.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_bytes() != data:
                write_file(target, data)

    def forget(self, path: Path) -> None:
        """Forget the package at `path`: the next gc may take its weights."""
        for record in self.records():
            if record.path == path.absolute():
                record.file.unlink(missing_ok=True)

    def users_of(self, digest: str) -> list[str]:
        """Paths of the registered packages that need an object."""
        return sorted(str(record.path) for record in self.records() if digest in record.digests)

    def records(self) -> Iterator[Record]:
        """Yield every registered package; an unreadable record is an error (gc would take its weights)."""
        for file in sorted(self.packages.glob("[0-9a-f]*.json")):
            try:
                raw = json.loads(file.read_bytes())
                yield Record(file, Path(raw["path"]), raw["identity"], frozenset(raw["digests"]))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{file} is damaged ({error!r}). Remove it and register its package again by "
                    f"`glake-infer inspect PACKAGE`, before the next `glake-infer store gc`."
                ) from error
