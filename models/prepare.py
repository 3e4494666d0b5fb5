"""Prepared graphs: what ONNX Runtime makes of a graph on this machine, kept so that sessions can share it.

Optimizing a graph makes new weights (fused, folded, reordered for this CPU), and prepacking makes a copy of
every MatMul weight: private memory of each session. ORT can write all of it to a file
(`session.save_external_prepacked_constant_initializers`) and map it when it loads it again. Here the file is
cut into content-addressed objects, so that equal derived weights of different models are one object and their
pages are held once. A weight with prepacked forms is one object, the packed bytes first:

    [prepacked 0][prepacked 1]...[the weight itself]       each part at a multiple of 4096

Valid for one ORT version, one CPU and one optimization level: they are part of the key. Two thirds of the time
of building a session (optimizing) are saved as well.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from blake3 import blake3
from onnx import ModelProto, TensorProto

from glake_infer.allocators.errors import StoreError
from glake_infer.digest import Buffer, digest_of, digest_of_range, pieces_of
from glake_infer.models.graph import (
    external_entries,
    initializers,
    is_external,
    make_external,
    make_names_unique,
)
from glake_infer.models.package import Package
from glake_infer.store import storage_errors, temporary_sibling, write_file

FORMAT = 1
"""Part of every key: raise it when the layout of prepared graphs changes."""

PAGE = 4096
MINIMUM_EXTERNAL = 1024


@dataclass(frozen=True)
class PreparedWeight:
    """A weight of a prepared graph. `derived` objects lie in the store's prepared folder."""

    name: str
    digest: str
    length: int
    mapped: int
    """Leading bytes that sessions use: all of them, or the prepacked forms alone."""
    derived: bool
    injected: bool
    """Whether we hand ORT the address; prepacked objects are mapped by ORT itself."""


@dataclass(frozen=True)
class Prepared:
    """A graph ready for sessions of this machine, and its weights."""

    graph: bytes
    weights: tuple[PreparedWeight, ...]
    optimized: bool = True
    """Whether the graph is ONNX Runtime's own result, which must not be optimized again."""


def prepare(
    package: Package, variant: str, *, prepack: bool, level: str, session_options: Callable[[], Any]
) -> Prepared:
    """Return the prepared form of a package's variant, building it at first; the caller holds `store.using()`.

    `level` names the optimization level that `session_options()` (a fresh SessionOptions) already carries.
    Processes that want the same one build it once. Raises StorageFullError, or ORT's own errors.
    """
    store = package.store
    key = digest_of(
        json.dumps([FORMAT, package.manifest.variants[variant].digest, prepack, level, *_machine()]).encode()
    )[:32]
    folder = store.prepared / key
    if (found := _read(folder)) is None:
        with store.locked(f"prepared/{key}.lock", exclusive=True):
            if (found := _read(folder)) is None:
                _build(package, variant, folder, prepack=prepack, options=session_options())
                found = _read(folder)
    if found is None:
        raise StoreError(
            f"{folder} cannot be read back: something else writes to it. Remove it and try again."
        )
    return found


def _read(folder: Path) -> Prepared | None:
    """The prepared graph in `folder`; None where there is none, or a damaged one, or one that is just removed."""
    try:
        info = json.loads((folder / "info.json").read_bytes())
        graph = (folder / "graph.onnx").read_bytes()
        weights = tuple(PreparedWeight(**weight) for weight in info["weights"])
        sound = digest_of(graph) == info["graph"] and isinstance(info["derived"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Prepared(graph, weights) if sound else None


def forget(package: Package, digest: str) -> bool:
    """Drop the prepared graphs that use a damaged derived object; returns whether there were any.

    Building them again reads every derived object that is there already, and replaces those that are damaged.
    """
    found = False
    for folder in package.store.prepared.glob("*/"):
        prepared = _read(folder)
        if prepared and any(weight.derived and weight.digest == digest for weight in prepared.weights):
            found = True
            shutil.rmtree(folder, ignore_errors=True)
    return found


@functools.cache
def _machine() -> tuple[str, ...]:
    """What a prepacked weight depends on: ORT's version and the CPU's instruction set."""
    import onnxruntime

    flags = model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features") and not flags:
            flags = " ".join(sorted(value.split()))
        if name.strip() in ("model name", "CPU part") and not model:
            model = value.strip()
    return (onnxruntime.__version__, platform.machine(), model, flags)


def _build(package: Package, variant: str, folder: Path, *, prepack: bool, options: Any) -> None:
    import onnxruntime as ort

    store = package.store
    for _ in package.verify(
        package.manifest.distinct_of_graphs
    ):  # a wrong byte would be fused into other weights
        pass
    temporary = temporary_sibling(folder)
    with storage_errors("preparing the model for this machine", store.root):
        temporary.mkdir(parents=True)
        try:
            options.log_severity_level = (
                3  # it warns that the result fits this machine only: that is the point
            )
            options.optimized_model_filepath = str(temporary / "optimized.onnx")
            entries = {
                "session.model_external_initializers_file_folder_path": str(store.root),
                "session.optimized_model_external_initializers_file_name": "optimized.bin",
                "session.optimized_model_external_initializers_min_size_in_bytes": str(MINIMUM_EXTERNAL),
                "session.save_external_prepacked_constant_initializers": "1" if prepack else "0",
                "session.disable_prepacking": "0" if prepack else "1",
            }
            for name, value in entries.items():
                options.add_session_config_entry(name, value)
            graph = package.graph(variant).SerializeToString()
            ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            optimized = onnx.load(temporary / "optimized.onnx", load_external_data=False)
            weights = _cut(optimized, temporary / "optimized.bin", package)
            data = optimized.SerializeToString(deterministic=True)
            info = {
                "graph": digest_of(data),
                "identities": [package.manifest.identity],
                "derived": sorted({weight.digest for weight in weights if weight.derived}),
                "weights": [asdict(weight) for weight in weights],
            }
            (temporary / "optimized.onnx").unlink()
            (temporary / "optimized.bin").unlink(missing_ok=True)
            write_file(temporary / "graph.onnx", data)
            write_file(temporary / "info.json", json.dumps(info).encode())
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _cut(model: ModelProto, data: Path, package: Package) -> list[PreparedWeight]:
    """Move every external weight of a saved model into an object of its own; changes the references in `model`."""
    make_names_unique(model)
    weights: list[PreparedWeight] = []
    external = [item.tensor for item in initializers(model) if is_external(item.tensor)]
    if not external:
        return weights
    fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for tensor in external:
            weights.append(_cut_one(tensor, fd, package))
    finally:
        os.close(fd)
    return weights


def _cut_one(tensor: TensorProto, fd: int, package: Package) -> PreparedWeight:
    store = package.store
    entries = external_entries(tensor)
    weight = (int(entries["offset"]), int(entries["length"]))
    packed = {key: value for key, value in sorted(entries.items()) if key.startswith("prepacked_")}
    if not packed:
        digest, length = digest_of_range(fd, *weight)
        stored = (
            digest in package.manifest.distinct_of_graphs
        )  # another package's weight may go with that package
        folder = store.objects if stored else store.prepared_objects
        if not stored and not folder.holds(digest, length, thorough=True):
            folder.add(digest, length, pieces_of(fd, *weight))
        make_external(tensor, folder.location(digest), length)
        return PreparedWeight(tensor.name, digest, length, length, derived=not stored, injected=True)
    ranges: list[tuple[int, int]] = []
    position = 0
    renamed: dict[str, str] = {}
    for key, value in packed.items():  # "KERNEL+HASH|offset;length;checksum|offset;length;checksum..."
        head, *blobs = value.split("|")
        moved = []
        for blob in blobs:
            offset, size, checksum = blob.split(";")
            moved.append(f"{position};{size};{checksum}")
            ranges.append((int(offset), int(size)))
            position += padded(int(size))
        renamed[key] = "|".join([head, *moved])
    mapped = position
    ranges.append(weight)
    state = blake3(max_threads=blake3.AUTO)
    length = 0
    for piece in _laid_out(fd, ranges):
        state.update(piece)
        length += len(piece)
    digest = state.hexdigest()
    folder = store.prepared_objects
    if not folder.holds(digest, length, thorough=True):
        folder.add(digest, length, _laid_out(fd, ranges))
    make_external(tensor, folder.location(digest), weight[1], **renamed)
    tensor.external_data[1].value = str(mapped)  # the weight lies behind its packed forms
    return PreparedWeight(tensor.name, digest, length, mapped, derived=True, injected=False)


def _laid_out(fd: int, ranges: list[tuple[int, int]]) -> Iterator[Buffer]:
    """Bytes of an object: each range, padded to a page so that the next begins at one."""
    for offset, length in ranges:
        yield from pieces_of(fd, offset, length)
        if padding := padded(length) - length:
            yield bytes(padding)


def padded(length: int) -> int:
    """Round up to whole pages."""
    return -(-length // PAGE) * PAGE
