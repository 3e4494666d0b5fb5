"""Archives: one self-contained file of a package, its weights and its engines, for another machine.

An archive is an uncompressed POSIX tar: `manifest.json`, the graphs, then `objects/DIGEST` once per distinct
weight and part of an engine, in that order. Its digests are checked while it is read, so a damaged download
never enters a store.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glake_infer.allocators.errors import DigestMismatchError, InputError, PackageError
from glake_infer.digest import PIECE, Buffer, digest_of, is_digest
from glake_infer.models.export import ExportReport, checked_object
from glake_infer.models.manifest import read_manifest
from glake_infer.models.package import SUFFIX, Package, check_target, write_package
from glake_infer.models.progress import Progress
from glake_infer.models.source import MAXIMUM_PROTOBUF
from glake_infer.store import MANIFEST, Store, storage_errors, temporary_sibling


@dataclass(frozen=True)
class ImportReport:
    """What an import brought. Sizes in bytes."""

    package: str
    weights: int
    distinct_weights: int
    distinct_bytes: int
    new_bytes: int
    """Bytes that it added to the store."""
    variants: tuple[str, ...]
    engines: tuple[str, ...] = ()


def export_archive(
    package: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    store: Store | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the package with all its weights into one file that `import_archive` takes on another machine.

    Raises PackageError, DigestMismatchError, StorageFullError; `file` is replaced only by a complete new one.
    """
    target = Path(file).absolute()
    if not target.parent.is_dir():
        raise InputError(
            f"the folder {target.parent} does not exist. Make it, or name the archive elsewhere."
        )
    if target.is_dir():
        raise InputError(f"{target} is a folder; --archive needs the name of a file.")
    store = store or Store()
    with store.using():
        opened = Package(package, store)
        opened.check_present()
        distinct = opened.manifest.distinct
        temporary = temporary_sibling(target)
        done = 0
        with store.writing(temporary), storage_errors("writing the archive", target):
            try:
                with tarfile.open(temporary, "x:", format=tarfile.PAX_FORMAT) as archive:
                    _append(archive, MANIFEST, (opened.path / MANIFEST).read_bytes())
                    for name, variant in opened.manifest.variants.items():
                        opened.graph(name)
                        _append(archive, variant.graph, (opened.path / variant.graph).read_bytes())
                    for digest, size in distinct.items():
                        entry = tarfile.TarInfo(f"objects/{digest}")
                        entry.size, entry.mode = size, 0o444
                        archive.addfile(
                            entry, io.BufferedReader(_Pieces(checked_object(opened, digest, size)))
                        )
                        done += size
                        if progress:
                            progress("weights", done, sum(distinct.values()))
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
    return ExportReport(str(target), len(opened.manifest.distinct_of_graphs), target.stat().st_size)


def import_archive(
    file: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Take an archive into the store and write its package to `target` (default: its name, `.glake`, here).

    Raises PackageError (not an archive, truncated, altered, something missing or extra); after an error the
    target is as it was, and no object with wrong bytes is in the store.
    """
    file = Path(file)
    target = (
        Path(target)
        if target is not None
        else Path(re.sub(r"(\.glake)?(\.tar|\.archive)?$", "", file.name) + SUFFIX)
    )
    check_target(target)
    store = store or Store()
    if not file.is_file():
        raise PackageError(
            f"{file} is not a file. Expected an archive made by `glake-infer export PACKAGE --archive FILE`."
        )
    try:
        with tarfile.open(file, "r:") as archive, store.using():
            return _take(archive, file, target, store, progress)
    except tarfile.TarError as error:
        raise PackageError(
            f"{file} is not a glake-infer archive, or it is truncated ({error}). Copy it again."
        ) from error


def _take(
    archive: tarfile.TarFile, file: Path, target: Path, store: Store, progress: Progress | None
) -> ImportReport:
    with tempfile.TemporaryDirectory(prefix="glake-import-") as scratch:
        first = archive.next()
        if first is None or first.name != MANIFEST or not first.isreg():
            raise PackageError(f"{file} is not a glake-infer archive: it does not begin with {MANIFEST}.")
        (Path(scratch) / MANIFEST).write_bytes(_content(archive, first, file))
        manifest = read_manifest(Path(scratch))
    graphs = {variant.graph: variant.digest for variant in manifest.variants.values()}
    missing = dict(manifest.distinct)
    total, done, new = sum(missing.values()), 0, 0
    files: dict[str, bytes] = {}
    while (entry := archive.next()) is not None:
        name = entry.name.removeprefix("objects/")
        if entry.name in graphs and entry.isreg():
            files[entry.name] = _content(archive, entry, file)
            if digest_of(files[entry.name]) != graphs[entry.name]:
                raise PackageError(f"{entry.name} in {file} was altered. Copy the archive again.")
        elif (
            entry.isreg()
            and is_digest(name)
            and entry.name == f"objects/{name}"
            and missing.pop(name, None) == entry.size
        ):
            if not store.objects.holds(name, entry.size):
                try:
                    store.objects.add(name, entry.size, _stream(archive, entry, file))
                    new += entry.size
                except DigestMismatchError as error:
                    raise PackageError(
                        f"the weight {name[:16]} in {file} was altered. Copy the archive again."
                    ) from error
            done += entry.size
            if progress:
                progress("weights", done, total)
        else:
            raise PackageError(
                f"{file} holds {entry.name!r}, which its manifest does not list. Copy the archive again."
            )
    if missing or graphs.keys() - files.keys():
        lost = next(iter(missing), None) or sorted(graphs.keys() - files.keys())[0]
        raise PackageError(f"{file} lacks {lost}: it is truncated. Copy the archive again.")
    write_package(store, target, manifest, files)
    return ImportReport(
        package=str(target),
        weights=len(manifest.weights),
        distinct_weights=len(manifest.distinct_of_graphs),
        distinct_bytes=total,
        new_bytes=new,
        variants=tuple(manifest.variants),
        engines=tuple(manifest.engines),
    )


def _append(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    archive.addfile(entry, io.BytesIO(data))


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo, file: Path) -> bytes:
    if entry.size > MAXIMUM_PROTOBUF:
        raise PackageError(f"{entry.name} in {file} has {entry.size} bytes: not part of a package.")
    return b"".join(bytes(piece) for piece in _stream(archive, entry, file))


def _stream(archive: tarfile.TarFile, entry: tarfile.TarInfo, file: Path) -> Iterator[Buffer]:
    source = archive.extractfile(entry)
    if source is None:
        raise PackageError(f"{entry.name} in {file} is not an ordinary file. Copy the archive again.")
    left = entry.size
    while left:
        piece = source.read(min(PIECE, left))
        if not piece:
            raise PackageError(f"{file} is truncated within {entry.name}. Copy it again.")
        left -= len(piece)
        yield piece


class _Pieces(io.RawIOBase):
    """A readable file over an iterator of buffers, for tarfile."""

    def __init__(self, pieces: Iterator[Buffer]) -> None:
        self._pieces = pieces
        self._rest: memoryview = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Buffer) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b"")).cast("B")
        count = min(len(self._rest), len(target))
        target[:count] = self._rest[:count]  # type: ignore[index]
        self._rest = self._rest[count:]
        return count
