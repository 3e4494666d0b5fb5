"""The demo: four fine-tunes of one trunk, together on one pool, beside plain ONNX Runtime on the same models.

Each side runs in a process of its own, so that its memory is its own. The processes take turns request by
request: both meet the same machine, and the ratio of each pair is free of what else goes on. One
side of ours runs at a time, beside the plain one: the processes would otherwise share the store's pages, and
each count half.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glake_infer.allocators.attach import import_onnxruntime
from glake_infer.allocators.errors import GlakeError, InputError
from glake_infer.models import zoo
from glake_infer.models.convert import convert
from glake_infer.models.progress import Progress
from glake_infer.models.scratch import check_room, temporary_folder
from glake_infer.store import Store

HEADS = {"sentiment": 2, "topics": 14, "intents": 77, "languages": 128}
"""Name and labels of each fine-tune's head."""

ROLES = ("fast", "lean")


@dataclass(frozen=True)
class Scale:
    """How large the demo is; tests make it small."""

    model: str = "bert-base"
    layers: int = 6
    length: int = 64
    rounds: int = 8
    warmup: int = 1
    feeds: int = 3


@dataclass(frozen=True)
class Side:
    """What one process did. Bytes and seconds."""

    name: str
    """"plain", "fast" or "lean"."""
    memory: int
    """After all runs, less what the same process had before loading: see glake_infer/process_memory.py."""
    baseline: int
    load: float
    latency: float
    """Median over all models and rounds."""
    ratio: float
    """Median of (this latency / plain ONNX Runtime's just before or after); 1 for plain."""
    difference: float
    """Largest absolute difference of any output from plain ONNX Runtime's."""
    pool: dict[str, int]
    """The pool's statistics after all runs; empty for plain."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo found. Bytes and seconds."""

    models: tuple[str, ...]
    weight_bytes: int
    """Of the four models together."""
    distinct_bytes: int
    """Of their distinct weights."""
    stored: tuple[int, ...]
    """Bytes that each conversion added to the store."""
    sides: tuple[Side, ...]
    runs: int
    """Of each model on each side, measured."""
    folder: str | None
    seconds: float


def demo(
    *,
    keep: str | os.PathLike[str] | None = None,
    scale: Scale | None = None,
    progress: Progress | None = None,
) -> DemoReport:
    """Build, convert, run and compare; leaves nothing behind unless `keep` names a folder for it.

    Raises MissingDependencyError without ONNX Runtime, StorageFullError where the disk is too small,
    InputError where `keep` is not a new or empty folder.
    """
    import_onnxruntime()
    start = time.perf_counter()
    scale = scale or Scale()
    progress = progress or (lambda *_: None)
    with _folder(keep, scale) as folder:
        store = Store(folder / "store")
        sources, reports = [], []
        for head, labels in HEADS.items():
            spec = zoo.spec(scale.model, layers=scale.layers, head=head, labels=labels)
            written = zoo.write(
                spec, folder / f"{head}.onnx", progress=functools.partial(progress, f"building {head}")
            )
            sources.append(str(written))
            step = functools.partial(_renamed, progress, f"converting {head}")
            reports.append(convert(written, folder / f"{head}.glake", store=store, progress=step))
        feeds = folder / "feeds.npz"
        write_feeds(feeds, [zoo.feeds(spec, number, length=scale.length) for number in range(scale.feeds)])
        sides = _compare(store, sources, [report.package for report in reports], feeds, scale, progress)
        return DemoReport(
            models=tuple(HEADS),
            weight_bytes=sum(report.weight_bytes for report in reports),
            distinct_bytes=sum(report.new_bytes for report in reports),
            stored=tuple(report.new_bytes for report in reports),
            sides=sides,
            runs=scale.rounds,
            folder=str(folder) if keep is not None else None,
            seconds=time.perf_counter() - start,
        )


def _renamed(progress: Progress, name: str, _: str, done: int, total: int) -> None:
    progress(name, done, total)


def _compare(
    store: Store, sources: list[str], packages: list[str], feeds: Path, scale: Scale, progress: Progress
) -> tuple[Side, ...]:
    with Child("plain", store) as plain:
        plain.begin(sources, feeds, progress)
        times: list[float] = []
        ours = []
        for role in ROLES:
            with Child(role, store) as child:
                child.begin(packages, feeds, progress)
                ours.append(_take_turns(plain, child, scale, times, progress))
                child.ask("close")
        memory, pool = plain.measure()
        first = Side(
            "plain",
            memory - plain.baseline,
            plain.baseline,
            plain.seconds,
            statistics.median(times),
            1.0,
            0.0,
            pool,
        )
        plain.ask("close")
    return (first, *ours)


def _take_turns(plain: Child, child: Child, scale: Scale, times: list[float], progress: Progress) -> Side:
    """Send the same requests to both, in turn, who is first changing each time."""
    ratios, latencies = [], []
    difference = 0.0
    count = scale.warmup + scale.rounds
    for number in range(count):
        for model in range(len(HEADS)):
            request = {"model": model, "feed": number % scale.feeds}
            order = (plain, child) if (number + model) % 2 else (child, plain)
            answers = {id(one): one.ask("run", **request) for one in order}
            theirs, mine = answers[id(plain)], answers[id(child)]
            for a, b in zip(theirs["outputs"], mine["outputs"], strict=True):
                difference = max(difference, float(np.max(np.abs(np.subtract(a, b)), initial=0)))
            if number >= scale.warmup:
                times.append(theirs["seconds"])
                latencies.append(mine["seconds"])
                ratios.append(mine["seconds"] / theirs["seconds"])
        progress(f"running plain and {child.role} in turn", number + 1, count)
    memory, pool = child.measure()
    return Side(
        child.role, memory - child.baseline, child.baseline, child.seconds,
        statistics.median(latencies), statistics.median(ratios), difference, pool,
    )  # fmt: skip


class Child:
    """A process that runs the models of one side; `with` ends it."""

    def __init__(self, role: str, store: Store) -> None:
        """Start it and wait until its libraries are imported."""
        self.role = role
        self.baseline = 0
        self.seconds = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "glake_infer.models.demo_child", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLAKE_STORE": str(store.root)},
        )
        self._answer()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def begin(self, paths: list[str], feeds: Path, progress: Progress) -> None:
        """Load the models, having measured the process without them."""
        self.baseline, _ = self.measure()
        progress(f"loading {self.role}", 0, 1)
        self.seconds = self.ask("load", paths=paths, feeds=str(feeds))["seconds"]
        progress(f"loading {self.role}", 1, 1)

    def measure(self) -> tuple[int, dict[str, int]]:
        """Return the process's memory and its pool's statistics."""
        answer = self.ask("measure")
        return answer["memory"], answer["pool"]

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the answer; raises GlakeError with what went wrong in the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says it better
            self._process.stdin.write(json.dumps({"do": action, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise GlakeError(
                f"the {self.role} process ended with code {self._process.wait()}; see its message above."
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise GlakeError(f"the demo's {self.role} process failed: {answer['error']}")
        return answer

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def write_feeds(path: Path, feeds: Sequence[Mapping[str, Any]]) -> None:
    """Write what a child's `begin` reads: the feeds that its runs choose from by number."""
    arrays = {f"{number}/{name}": array for number, feed in enumerate(feeds) for name, array in feed.items()}
    np.savez(path, **arrays)


@contextlib.contextmanager
def _folder(keep: str | os.PathLike[str] | None, scale: Scale) -> Iterator[Path]:
    """Yield where everything is written: `keep`, or a temporary folder on a disk that has room for it."""
    size = zoo.build(zoo.spec(scale.model, layers=scale.layers)).weights.total_bytes
    needed = size * (len(HEADS) + 4)  # the ONNX files, the store, and what is prepared for this machine
    if keep is not None:
        folder = Path(keep).absolute()
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"--keep {keep}: expected a new or an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, needed, "the demo", "--keep")
        yield folder
        return
    with temporary_folder("glake-demo-", needed, "the demo", "--keep") as temporary:
        yield temporary
