"""From files to a session that has answered, beside plain ONNX Runtime and the copy alone."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glake_infer.allocators.errors import GlakeError, InputError
from glake_infer.models.bench import files
from glake_infer.models.bench.processes import ask, told
from glake_infer.models.bench.subjects import Subject, Workshop, missing, workshop
from glake_infer.models.progress import Progress
from glake_infer.verified import RACY

Start = Literal["warm", "cold"]

OF_THE_LINK = 0.85
"""Of the rate of one link: what a load should reach, beside BESIDE seconds."""

BESIDE = 0.05

LONG_TO_CHECK = 64 << 20
"""Bytes from which it matters that files are checked once: those that were written this moment are checked again."""


@dataclass(frozen=True)
class LoadReport:
    """One side and one model. Bytes, seconds and bytes per second; medians of all turns."""

    model: str
    side: str
    """"glake-infer", "onnxruntime", "safetensors" or "fastsafetensors"; these two copy, and make no session."""
    start: Start
    """"warm": the process has loaded and run a tiny model before; "cold": from the start of the process, imports too."""
    device: str
    weights: int
    bytes: int
    to_weights: float | None
    """Until all weights are on the device; None where nobody says so (mapped files, plain ONNX Runtime)."""
    copying: float | None
    """From the first byte that is read to the last one on the device, where weights are moved by us."""
    to_session: float | None
    to_answer: float | None
    rate: float
    """Of all until the answer, or of the copy alone."""
    link: float
    """One link's raw rate in the same run, from page-locked memory; on the CPU, that of a copy in memory."""
    goal: float | None
    """Seconds for `bytes` at OF_THE_LINK of that, and BESIDE. None on the CPU, where weights are mapped."""
    cached: float
    """Which part of the files was in the page cache before the turns."""
    disk: float | None
    """With `cold_files`: the rate of reading the files from disk."""
    in_flight: int | None
    """The most bytes between files and the device."""
    in_flight_bound: int | None
    paths: str | None
    """Whose links were used (GLAKE_PATHS)."""
    verified: str | None
    """How the bytes were verified."""
    difference: float | None
    """The largest difference from plain ONNX Runtime's answer, relative to its largest number."""
    turns: tuple[float, ...]


@dataclass(frozen=True)
class LeftOut:
    """A twin that did not run."""

    side: str
    reason: str


@dataclass(frozen=True)
class _Side:
    side: str
    start: Start
    task: str = "load"

    @property
    def name(self) -> str:
        return f"{self.side}, {self.start}"


SESSIONS = tuple(_Side(side, start) for side in ("glake-infer", "onnxruntime") for start in ("warm", "cold"))
COPIES = tuple(_Side(side, "warm", "tensors") for side in ("safetensors", "fastsafetensors"))


def bench_load(
    model: str | os.PathLike[str] | None = None,
    *,
    size: int | str | None = None,
    small: int | None = None,
    device: str = "cpu",
    repeat: int = 3,
    cold_files: bool = False,
    shapes: Sequence[str] = (),
    trace: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[LoadReport | LeftOut]:
    """Load a package or an ONNX model, one that is made with `size` bytes of weights, or ones of `small` weights.

    cold_files
        Drop the files from the page cache before every turn; otherwise they are read before.
    shapes
        As for `glake-infer run --shape`: what the model is fed.
    trace
        A file for the timeline of the last warm turn of ours, as a Chrome trace.
    folder
        Where models are written, and removed again; by default a temporary folder.

    Raises InputError, DeviceNotFoundError, StorageFullError, MissingDependencyError (no ONNX Runtime), what `convert` and
    `load` raise, and GlakeError where our side's process fails; a twin that fails is left out. Nothing is left but the
    trace.
    """
    if repeat < 1:
        raise InputError(f"repeat={repeat}: expected 1 or more.")
    target = writable(trace)
    absent = {twin.side: missing("torch", twin.side) for twin in COPIES}
    tensors = not all(absent.values())
    with workshop(
        model, size, small=small, device=device, tensors=tensors, folder=folder, progress=progress
    ) as shop:
        found: list[LoadReport | LeftOut] = []
        sides = SESSIONS if small is None else (_Side("glake-infer", "warm"), _Side("onnxruntime", "warm"))
        sides += tuple(twin for twin in COPIES if not absent[twin.side])
        lost = {side: reason for side, reason in absent.items() if reason}
        for number, subject in enumerate(shop.subjects):
            asked = target if number == len(shop.subjects) - 1 else None
            found += _Turns(shop, subject, sides, repeat, cold_files, shapes, asked, progress).take(lost)
        return [*found, *(LeftOut(side, reason) for side, reason in lost.items())]


def writable(trace: str | os.PathLike[str] | None) -> str | None:
    """The full path of a trace. Raises InputError where it cannot be a file."""
    if trace is None:
        return None
    path = Path(trace).absolute()
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"the trace {trace} cannot be written: name a file in a folder that is there.")
    return os.fspath(path)


@dataclass
class _Turns:
    """Turns of all sides over one model."""

    shop: Workshop
    subject: Subject
    sides: Sequence[_Side]
    repeat: int
    cold_files: bool
    shapes: Sequence[str]
    trace: str | None
    progress: Progress | None

    def take(self, lost: dict[str, str]) -> list[LoadReport | LeftOut]:
        answers: dict[_Side, list[dict[str, Any]]] = {side: [] for side in self.sides}
        links, cached, disk = list[float](), dict[_Side, float](), dict[_Side, float]()
        if self.subject.bytes >= LONG_TO_CHECK:
            time.sleep(RACY / 1e9 + 0.1)
        package = [Path(file) for file in self._ask(_Side("glake-infer", "warm"), None)["files"]]
        for turn in range(self.repeat):
            links.append(
                ask({"task": "raw", "side": "raw", "device": self.shop.device, "paths": "own"})["to_device"]
            )
            for side in self.sides:
                if side.side in lost:
                    continue
                paths = package if side.side == "glake-infer" else self._files(side)
                rate = self._prepare(paths)
                if rate is not None:
                    disk[side] = rate
                total = sum(path.stat().st_size for path in paths)
                cached[side] = files.cached(paths) / max(1, total)
                last = turn == self.repeat - 1 and side.name == "glake-infer, warm"
                try:
                    answers[side].append(self._ask(side, self.trace if last else None))
                except GlakeError as error:
                    if side.side == "glake-infer":
                        raise
                    lost[side.side] = str(error)
        link = statistics.median(links)
        right = next((a[0]["outputs"] for s, a in answers.items() if s.side == "onnxruntime" and a), None)
        return [
            self._report(side, found, link, cached[side], disk.get(side), right)
            for side, found in answers.items()
            if found
        ]

    def _files(self, side: _Side) -> list[Path]:
        if side.task == "tensors":
            assert self.subject.safetensors is not None
            return [self.subject.safetensors]
        return self.subject.onnx_files

    def _prepare(self, paths: list[Path]) -> float | None:
        """Bring files into the page cache, or out of it; returns the rate of the disk where that was seen."""
        if not self.cold_files:
            files.read_all(paths)
            return None
        files.drop(paths)
        rate = files.read_all(paths)
        files.drop(paths)
        return rate

    def _ask(self, side: _Side, trace: str | None) -> dict[str, Any]:
        def forms(subject: Subject) -> str:
            if side.task == "tensors":
                return os.fspath(subject.safetensors or "")
            return os.fspath(subject.package if side.side == "glake-infer" else subject.onnx)

        request = {
            "task": side.task, "side": side.side, "start": side.start, "device": self.shop.device,
            "path": forms(self.subject), "warming": forms(self.shop.warming), "shapes": list(self.shapes),
            "store": str(self.subject.store.root), "warming_store": str(self.shop.warming.store.root), "trace": trace,
        }  # fmt: skip
        return ask(request, progress=told(self.progress, f"loading {self.subject.name} by {side.name}"))

    def _report(
        self,
        side: _Side,
        answers: list[dict[str, Any]],
        link: float,
        cached: float,
        disk: float | None,
        right: list[list[float]] | None,
    ) -> LoadReport:
        def median(name: str) -> float | None:
            values = [answer[name] for answer in answers if answer.get(name) is not None]
            return statistics.median(values) if values else None

        first, size = answers[0], self.subject.bytes
        turns = tuple(a["to_weights"] if side.task == "tensors" else a["to_answer"] for a in answers)
        own = side.side == "glake-infer"
        return LoadReport(
            model=self.subject.name, side=side.side, start=side.start, device=self.shop.device,
            weights=self.subject.weights, bytes=size,
            to_weights=median("to_weights"), copying=median("copying"),
            to_session=median("to_session"), to_answer=median("to_answer"),
            rate=size / statistics.median(turns), link=link,
            goal=None if self.shop.device == "cpu" else size / (OF_THE_LINK * link) + BESIDE,
            cached=cached, disk=disk,
            in_flight=max(a["in_flight"] for a in answers) if own else None,
            in_flight_bound=first["in_flight_bound"] if own else None,
            paths=first["paths"] if own else None,
            verified=first["verified"] if own else None,
            difference=_difference(first["outputs"], right) if own and right is not None else None,
            turns=turns,
        )  # fmt: skip


def _difference(answer: list[list[float]], other: list[list[float]]) -> float:
    """The largest one, relative to the largest number of that output of `other`; infinite where one is no number."""
    largest = 0.0
    for mine, theirs in zip(answer, other, strict=True):
        scale = max((abs(value) for value in theirs if math.isfinite(value)), default=0.0) or 1.0
        for a, b in zip(mine, theirs, strict=True):
            apart = abs(a - b) / scale if math.isfinite(a) and math.isfinite(b) else math.inf
            largest = max(largest, 0.0 if repr(a) == repr(b) else apart)
    return largest
