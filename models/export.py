"""Out of the store again: a package as an ordinary ONNX model with external data, for any other tool."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
from blake3 import blake3
from google.protobuf.message import DecodeError
from onnx import ModelProto, helper

from glake_infer.allocators.errors import InputError
from glake_infer.digest import Buffer, pieces_of
from glake_infer.models.graph import initializers, is_external, make_external
from glake_infer.models.package import Package
from glake_infer.models.progress import Progress
from glake_infer.store import MANIFEST, Store, storage_errors, temporary_sibling

EXPORTED = "glake-infer.exported"
"""Metadata of an exported model: the identity of its package."""

ALIGNMENT = 4096
"""Weights of at least this size begin at a multiple of it in the data file, so that ORT can map them."""


@dataclass(frozen=True)
class ExportReport:
    """What was written. Sizes in bytes."""

    target: str
    weights: int
    bytes: int


def export(
    package: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    store: Store | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the package as `folder/NAME.onnx` with its weights in `folder/NAME.onnx.data`, for any ONNX tool.

    Each distinct weight is written once; its bytes are checked on the way. The folder is made where it is
    missing; files of other names in it are left alone. An earlier export is replaced, only when the new one is
    complete; a model of that name from elsewhere is refused. Raises InputError, PackageError,
    DigestMismatchError or StorageFullError.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; export needs a folder (-o DIR).")
    if (folder / MANIFEST).exists():
        raise InputError(f"{folder} is a package; export needs a folder of its own (-o DIR).")
    store = store or Store()
    with store.using():
        opened = Package(package, store)
        needed = opened.manifest.distinct_of("onnx")
        opened.check_present(needed)
        name = opened.name
        model, data = f"{name}.onnx", f"{name}.onnx.data"
        _check_replaceable(folder / model)
        graph = opened.graph()
        helper.set_model_props(graph, {**_properties(graph), EXPORTED: opened.manifest.identity})
        external = [item.tensor for item in initializers(graph) if is_external(item.tensor)]
        weights = {weight.name: weight for weight in opened.manifest.weights}
        total = sum(needed.values())
        offsets: dict[str, int] = {}
        position = 0
        made = not folder.exists()
        with storage_errors("exporting", folder):
            folder.mkdir(parents=True, exist_ok=True)
            temporary = temporary_sibling(folder.absolute() / model)
            try:
                with store.writing(temporary), _new_file(temporary, data) as file:
                    for tensor in external:
                        weight = weights[tensor.name]
                        if weight.digest not in offsets:
                            if weight.bytes >= ALIGNMENT:
                                position = -(-position // ALIGNMENT) * ALIGNMENT
                                file.seek(position)
                            offsets[weight.digest] = position
                            for piece in checked_object(opened, weight.digest, weight.bytes):
                                position += file.write(piece)
                            if progress:
                                progress("weights", position, total)
                        make_external(tensor, data, weight.bytes)
                        tensor.external_data[1].value = str(offsets[weight.digest])
                    file.truncate(position)
                    file.flush()
                    os.fsync(file.fileno())
                    (temporary / model).write_bytes(graph.SerializeToString(deterministic=True))
                    if external:
                        (temporary / data).replace(folder / data)
                    (temporary / model).replace(folder / model)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                if made and not any(folder.iterdir()):
                    folder.rmdir()
    return ExportReport(str(folder / model), len(external), position)


def _check_replaceable(path: Path) -> None:
    """Raise InputError where `path` is not an earlier export: it may be the very model that was converted."""
    if not path.exists():
        return
    with contextlib.suppress(DecodeError, OSError):
        if EXPORTED in _properties(onnx.load(path, load_external_data=False)):
            return
    raise InputError(
        f"{path} exists and was not exported by glake-infer: it was left alone. Choose another folder with -o."
    )


def _properties(model: ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def checked_object(package: Package, digest: str, length: int) -> Iterator[Buffer]:
    """Yield an object's bytes in pieces; where they are wrong, raises DigestMismatchError before the last."""
    state, done = blake3(max_threads=blake3.AUTO), 0
    fd = os.open(package.store.objects.path(digest), os.O_RDONLY | os.O_CLOEXEC)
    try:
        for piece in pieces_of(fd, 0, length):
            state.update(piece)
            done += len(piece)
            if done == length and state.hexdigest() != digest:  # now: whoever counts bytes asks for no more
                raise package.damaged(digest)
            yield piece
    finally:
        os.close(fd)
    if done != length:
        raise package.damaged(digest)


def _new_file(folder: Path, name: str) -> BinaryIO:
    folder.mkdir()
    return (folder / name).open("xb")
