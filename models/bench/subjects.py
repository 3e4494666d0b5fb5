"""What a benchmark measures: a package, the same as an ordinary ONNX model, and a tiny one that warms a process."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glake_infer.allocators.devices import parse_device
from glake_infer.allocators.errors import InputError
from glake_infer.allocators.sizes import parse_bytes
from glake_infer.models.bench import made
from glake_infer.models.bench.files import write_safetensors
from glake_infer.models.convert import convert
from glake_infer.models.export import export
from glake_infer.models.package import SUFFIX, Package
from glake_infer.models.progress import Progress
from glake_infer.models.scratch import temporary_folder
from glake_infer.store import Store

WARMING = 256 << 10
"""Bytes of the model that warms a process."""


@dataclass(frozen=True)
class Subject:
    """One model, in all the forms that sides load."""

    name: str
    package: Path
    store: Store
    onnx: Path
    """An ordinary model with external data."""
    safetensors: Path | None
    bytes: int
    """Of distinct weights, as they were given."""
    weights: int

    @property
    def onnx_files(self) -> list[Path]:
        """The ordinary model's files."""
        return sorted(file for file in self.onnx.parent.glob(f"{self.onnx.name}*") if file.is_file())


@dataclass(frozen=True)
class Workshop:
    """Subjects in a folder that is removed afterwards."""

    folder: Path
    device: str
    warming: Subject
    subjects: tuple[Subject, ...]


@contextlib.contextmanager
def workshop(
    model: str | os.PathLike[str] | None,
    size: int | str | None,
    *,
    small: int | None = None,
    device: str = "cpu",
    tensors: bool = False,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[Workshop]:
    """Yield the forms of `model`, or of one that is made with `size` bytes of weights, or of two with `small` ones.

    `tensors`: also as safetensors. fp16 on GPUs, fp32 on the CPU, which has no products of fp16. Raises InputError,
    DeviceNotFoundError, StorageFullError before anything is written, and what `convert` and `export` raise.
    """
    device = parse_device(device)
    given = sum(item is not None for item in (model, size, small))
    if given != 1:
        raise InputError(
            "expected one of: a model, --bytes SIZE to have one made, --small N for many small weights."
        )
    copies = (3 if tensors else 2) + (device == "cpu")  # the CPU's prepared weights
    if size is not None:
        needed = parse_bytes(size)
    elif small is not None:
        needed = 2 * small * made.SMALL
    else:
        needed = _bytes_of(Path(model))  # type: ignore[arg-type]
    with temporary_folder("glake-bench-", copies * needed, "the benchmark", "--folder", folder) as place:
        store = Store(place / "store")
        half = device != "cpu"
        make = functools.partial(_made, place, store, half=half, tensors=tensors, progress=progress)
        subjects = []
        if model is not None:
            subjects.append(_given(Path(model), place, store, tensors, progress))
        elif size is not None:
            subjects.append(make("large", needed))
        else:
            subjects += [
                make("small", small or 0, small=True),
                make("large", max(made.SMALLEST, needed // 2)),
            ]
        warming = _made(place, store, "warming", WARMING, half=half, tensors=tensors, progress=None)
        yield Workshop(place, device, warming, tuple(subjects))


def _bytes_of(model: Path) -> int:
    if _is_package(model):
        return sum(Package(model).manifest.distinct.values())
    with contextlib.suppress(OSError):  # convert says it better
        return sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))
    return 0


def _is_package(path: Path) -> bool:
    return path.is_dir() or (path.suffix == SUFFIX and not path.exists())


def _given(model: Path, place: Path, store: Store, tensors: bool, progress: Progress | None) -> Subject:
    if _is_package(model):
        package, store = model, Store()
    else:
        package = place / f"{model.stem}{SUFFIX}"
        convert(model, package, store=store, progress=_said("converting", progress))
    report = export(package, place / "exported", store=store, progress=_said("exporting", progress))
    return _subject(package, store, Path(report.target), place, tensors)


def _made(
    place: Path,
    store: Store,
    name: str,
    size: int,
    *,
    half: bool,
    tensors: bool,
    progress: Progress | None,
    small: bool = False,
) -> Subject:
    folder = place / name
    folder.mkdir()
    path = folder / f"{name}.onnx"
    if small:
        made.write_small(path, size, half=half, progress=progress)
    else:
        made.write_chain(path, size, half=half, progress=progress)
    package = place / f"{name}{SUFFIX}"
    convert(path, package, store=store, progress=_said("converting", progress))
    return _subject(package, store, path, place, tensors)


def _subject(package: Path, store: Store, onnx: Path, place: Path, tensors: bool) -> Subject:
    opened = Package(package, store)
    path = place / f"{opened.name}.safetensors" if tensors else None
    if path is not None:
        write_safetensors(opened, path)
    distinct = opened.manifest.distinct_of("onnx")
    return Subject(opened.name, package, store, onnx, path, sum(distinct.values()), len(distinct))


def _said(what: str, progress: Progress | None) -> Progress | None:
    return progress and (lambda _, done, total: progress(what, done, total))


def missing(*packages: str) -> str:
    """Which of these Python packages are not installed, in words; empty where all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""
