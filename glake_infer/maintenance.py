"""Looking after the store: what is in it, whether its bytes are right, what nobody needs any more."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from glake_infer.allocators.errors import StoreError
from glake_infer.store import MANIFEST, ObjectFolder, Record, Store
from glake_infer.verified import ATTEMPTS, Verified, examine, records_are_trusted


@dataclass(frozen=True)
class StoredObject:
    """One object: its size and the packages that need it."""

    digest: str
    bytes: int
    packages: tuple[str, ...]


@dataclass(frozen=True)
class StoreListing:
    """What `glake-infer store ls` shows. Sizes in bytes."""

    root: str
    objects: tuple[StoredObject, ...]
    packages: dict[str, int]
    """Bytes each package refers to."""
    missing_packages: tuple[str, ...]
    prepared_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(entry.bytes for entry in self.objects)

    @property
    def unreferenced_bytes(self) -> int:
        """Bytes that the next gc gives back."""
        return sum(entry.bytes for entry in self.objects if not entry.packages)


@dataclass
class VerifyReport:
    """Result of `verify`: damaged objects, each with the packages it hurts."""

    checked: int = 0
    bytes: int = 0
    damaged: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)
    """Damaged objects that ONNX Runtime derived; they were deleted and are made again at the next load."""
    removed: bool = False

    @property
    def ok(self) -> bool:
        """Whether every object that a package needs is there and right."""
        return not self.damaged and not self.missing


@dataclass
class GcReport:
    """Result of `gc`. Sizes in bytes."""

    objects: int = 0
    bytes: int = 0
    kept_objects: int = 0
    kept_bytes: int = 0
    prepared: int = 0
    compiled: int = 0
    temporary: int = 0
    vanished: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False


def _users(records: Iterable[Record]) -> dict[str, list[str]]:
    """{digest: the packages that need it and are where they were registered}."""
    users: dict[str, list[str]] = {}
    for record in records:
        if record.exists():
            for digest in record.digests:
                users.setdefault(digest, []).append(str(record.path))
    return users


def ls(store: Store) -> StoreListing:
    """List the store's objects and the registered packages."""
    records = list(store.records())
    users = _users(records)
    objects = tuple(
        StoredObject(digest, status.st_size, tuple(sorted(users.get(digest, ()))))
        for digest, status in store.objects
    )
    sizes = {entry.digest: entry.bytes for entry in objects}
    return StoreListing(
        root=str(store.root),
        objects=objects,
        packages={str(r.path): sum(sizes.get(d, 0) for d in r.digests) for r in records if r.exists()},
        missing_packages=tuple(str(r.path) for r in records if not r.exists()),
        prepared_bytes=sum(status.st_size for _, status in store.prepared_objects),
    )


def verify(
    store: Store, *, remove: bool = False, progress: Callable[[int], None] | None = None
) -> VerifyReport:
    """Read every object and compare its bytes with its name, whatever is known of it, and bring that up to date.

    With `remove`, damaged objects are deleted so that converting (or importing) their packages again
    restores them; derived objects are always deleted, since they are made again at the next load.
    """
    report = VerifyReport(removed=remove)
    users = _users(store.records())
    verified = Verified(store.root)
    with store.using():
        verified.compact()
        verified.refresh()
        present = set()
        for folder in (store.objects, store.prepared_objects):
            for digest, status in folder:
                derived = folder is store.prepared_objects
                if not derived:
                    present.add(digest)
                report.checked += 1
                report.bytes += status.st_size
                if not _is_right(folder, digest, verified):
                    verified.drop(digest)
                    if derived:
                        report.derived.append(digest)
                    else:
                        report.damaged[digest] = sorted(users.get(digest, []))
                    if remove or derived:
                        folder.path(digest).unlink(missing_ok=True)
                if progress:
                    progress(status.st_size)
        report.missing = {d: sorted(paths) for d, paths in users.items() if d not in present}
    return report


def _is_right(folder: ObjectFolder, digest: str, verified: Verified) -> bool:
    started = time.time_ns()
    with folder.path(digest).open("rb") as file:
        for _ in range(ATTEMPTS):
            seal, verdict = examine(file.fileno(), digest, os.fstat(file.fileno()).st_size)
            if verdict != "changed":
                break
    if verdict == "right" and records_are_trusted() and seal.tells(started):
        verified.add([(digest, seal)])
    return verdict == "right"


def gc(store: Store, *, dry_run: bool = False, wait: bool = True) -> GcReport:
    """Remove objects that no registered package needs, and what killed processes left half-written.

    Waits for running converts and loads (they hold the store's lock), so it never takes what they
    need; with `wait=False` raises StoreError instead. Sessions that are already loaded keep their
    mappings. A package counts as alive while its folder is where it was registered or was renamed
    beside it; one that was moved elsewhere must be opened there once (`glake-infer inspect`) before.
    """
    try:
        with store.locked("lock", exclusive=True, wait=wait):
            return _gc_locked(store, dry_run)
    except BlockingIOError:
        raise StoreError(
            f"a convert or a load is using the store at {store.root}, and gc was asked not to wait. Try "
            "again later."
        ) from None


def _gc_locked(store: Store, dry_run: bool) -> GcReport:
    report = GcReport(dry_run=dry_run)
    _remove_temporaries(store, report)
    live: set[str] = set()
    identities: set[str] = set()
    plans: set[str] = set()
    known = {record.path for record in store.records()}
    for record in list(store.records()):
        path: Path | None = record.path if record.exists() else _renamed(record, known)
        if path is None:
            report.vanished.append(str(record.path))
            if not dry_run:
                record.file.unlink(missing_ok=True)
            continue
        if path != record.path:
            report.moved[str(record.path)] = str(path)
            if not dry_run:
                record.file.unlink(missing_ok=True)
                store.register(path, record.identity, record.digests)
        needed = _needed(path, record)
        live |= needed.objects
        identities |= {needed.identity, record.identity}
        plans |= needed.plans
    for digest, status in store.objects:
        if digest in live:
            report.kept_objects += 1
            report.kept_bytes += status.st_size
        else:
            report.objects += 1
            report.bytes += status.st_size
            if not dry_run:
                store.objects.path(digest).unlink(missing_ok=True)
    _remove_prepared(store, identities, report)
    _remove_compiled(store, plans, report)
    if not dry_run:
        Verified(store.root).compact()
    return report


def _remove_temporaries(store: Store, report: GcReport) -> None:
    leftovers = [*store.objects.temporaries(), *store.prepared_objects.temporaries()]
    leftovers += store.packages.glob(".*.tmp")
    leftovers += store.root.glob(".verified.*.tmp")
    leftovers += store.pending.glob(".*.tmp")
    leftovers += store.prepared.glob(".*.tmp")
    leftovers += store.compiled.glob("*/.*.tmp")
    leftovers += (lock for lock in store.prepared.glob("*.lock") if not lock.with_suffix("").is_dir())
    for note in store.pending.glob("[0-9a-f]*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            folder = Path(json.loads(note.read_bytes())["path"])
            if folder.name.endswith(".tmp"):  # never anything else, whatever the note says
                leftovers.append(folder)
        leftovers.append(note)
    for path in leftovers:
        if path.exists():
            report.temporary += 1
            if not report.dry_run:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _remove_prepared(store: Store, identities: set[str], report: GcReport) -> None:
    """Remove derived graphs whose package is gone, then the derived objects that no graph needs."""
    live: set[str] = set()
    for info in store.prepared.glob("*/info.json"):
        try:
            content = json.loads(info.read_bytes())
            wanted = bool(identities.intersection(content["identities"]))
            digests = set(content["derived"])
        except (OSError, ValueError, KeyError):
            wanted, digests = False, set()
        if wanted:
            live |= digests
        else:
            report.prepared += 1
            if not report.dry_run:
                shutil.rmtree(info.parent, ignore_errors=True)
    for digest, status in store.prepared_objects:
        if digest not in live:
            report.objects += 1
            report.bytes += status.st_size
            if not report.dry_run:
                store.prepared_objects.path(digest).unlink(missing_ok=True)


def _remove_compiled(store: Store, plans: set[str], report: GcReport) -> None:
    """Remove what TensorRT compiled for engines that are in no package."""
    for folder in store.compiled.glob("*/"):
        if folder.name not in plans:
            report.compiled += 1
            if not report.dry_run:
                shutil.rmtree(folder, ignore_errors=True)


class _Needed(NamedTuple):
    """What a package needs of the store."""

    identity: str
    objects: frozenset[str]
    plans: frozenset[str] = frozenset()
    """Digests of its engines' plans."""


def _needed(path: Path, record: Record) -> _Needed:
    """What the package at `path` needs: what is recorded, and what its manifest says.

    They differ where a convert was killed between registering the new version and putting it in place, and
    where a package was copied over another.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads((path / MANIFEST).read_bytes())
        found = {str(weight["digest"]) for weight in content["weights"]}
        engines = content.get("engines", {}).values()
        found |= {str(digest) for engine in engines for digest in engine["objects"]}
        plans = frozenset(str(engine["digest"]) for engine in engines)
        return _Needed(str(content["identity"]), record.digests | found, plans)
    return _Needed(record.identity, record.digests)


def _renamed(record: Record, known: set[Path]) -> Path | None:
    """The folder beside a vanished package that holds the same manifest and is registered for itself nowhere."""
    with contextlib.suppress(OSError):
        for sibling in sorted(set(record.path.parent.iterdir()) - known):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads((sibling / MANIFEST).read_bytes()).get("identity") == record.identity:
                    return sibling
    return None
