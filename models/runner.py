"""Run several models in one process and one pool, and say how fast they are and where the memory is."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glake_infer.allocators.errors import InputError, ModelError
from glake_infer.allocators.pool import Pool
from glake_infer.models.convert import convert
from glake_infer.models.feeds import Override, feeds_of, parse_overrides, parse_shapes
from glake_infer.models.load import EngineChoice
from glake_infer.models.manifest import Value
from glake_infer.models.model import Model, ModelMemory, Sharing
from glake_infer.models.offload import Offload
from glake_infer.models.package import SUFFIX
from glake_infer.models.progress import Progress
from glake_infer.models.runtime import Runtime
from glake_infer.models.tensorrt.graphs import CudaGraph
from glake_infer.pool import Pool as BrokeredPool
from glake_infer.process_memory import ProcessMemory, measure, release_unused_heap
from glake_infer.residency import Residency
from glake_infer.store import Store, temporary_sibling


@dataclass(frozen=True)
class OutputSummary:
    """One output of the last run. Statistics are None where there are no numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    mean: float | None
    min: float | None
    max: float | None


@dataclass(frozen=True)
class ModelResult:
    """One model's runs. Times in seconds, sizes in bytes."""

    name: str
    """Unique among the models of this call."""
    path: str
    inputs: tuple[Value, ...]
    outputs: tuple[OutputSummary, ...]
    runs: int
    load: float
    median: float
    min: float
    p95: float
    memory: ModelMemory
    notes: tuple[str, ...]
    """What `load` had to say; what convert did is in the package."""


@dataclass(frozen=True)
class MemoryReport:
    """Where the memory is after the runs, in bytes: the pool's on its device, and the process's on the host."""

    shared: int
    """Weights that more than one model uses, held once."""
    own: int
    """Weights that one model uses."""
    asleep: int
    """Of both, what is not there now: the models that the limit has no room for bring it back when they run."""
    private: int
    """Copies that sessions made for themselves when they were built."""
    activations: int
    """What else the pool has handed out: activations and outputs that are still held."""
    peak_activations: int
    """The most that they were."""
    idle: int
    """Kept by the pool for the next request."""
    reserved: int
    peak_reserved: int
    limit: int
    offloaded: int
    """Of the weights, what lies in memory of the host, beside the pool's."""
    libraries: int
    """On a GPU, outside the pool: what CUDA's libraries took while the sessions were built, as the driver counts."""
    process: ProcessMemory


@dataclass(frozen=True)
class RunReport:
    """What `run` did. `device` is the pool's; `seconds` is the time of all runs together."""

    models: tuple[ModelResult, ...]
    memory: MemoryReport
    device: str
    sharing: str
    threads: int
    repeat: int
    seconds: float


@dataclass
class _Loaded:
    name: str
    path: Path
    model: Model
    seconds: float
    feeds: dict[str, Any] = field(default_factory=dict)
    generated: tuple[str, ...] = ()
    times: list[float] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)


def run(
    paths: Sequence[str | os.PathLike[str]],
    *,
    inputs: Sequence[str] = (),
    shapes: Sequence[str] = (),
    repeat: int = 1,
    threads: int = 1,
    sharing: Sharing = "fast",
    limit: int | str | None = None,
    device: str = "cpu",
    broker: str | os.PathLike[str] | None = None,
    intra_op: int | None = None,
    offload: Offload = "none",
    engine: EngineChoice = "auto",
    concurrency: int | None = None,
    cuda_graph: CudaGraph = "auto",
    seed: int = 0,
    save: str | os.PathLike[str] | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Load packages (and ONNX models, converted on the fly) into one Runtime and run each `repeat` times.

    More models than fit below the limit take turns: those that were run longest ago sleep.

    inputs, shapes
        What is fed, as texts `[MODEL:]NAME=FILE` and `[MODEL:]NAME=1,128`; see models/feeds.py. The rest is
        generated from `seed`.
    threads
        How many runs go on at once, over all models.
    device
        "cpu", "cuda:N" or "cuda" (the first GPU). On a GPU the feeds come from the host, and the outputs go there.
    broker
        As for `Pool`: other processes may have the weights too.
    offload
        As for `load`: what stays in host memory of each model.
    engine, cuda_graph
        As for `load`: what runs packages that have a TensorRT engine, on a GPU.
    concurrency
        Runs of one engine at the same time. None: as many as there are threads.
    save
        A folder that gets the last outputs of each model as `NAME.npz`.

    Raises InputError and whatever `load` and `Model.run` raise. Everything is closed on return and on error.
    """
    if repeat < 1 or threads < 1:
        raise InputError(f"repeat={repeat}, threads={threads}: both must be at least 1.")
    names = labels([Path(path) for path in paths])
    overrides, given_shapes = parse_overrides(inputs, names), parse_shapes(shapes, names)
    store = store or Store()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(BrokeredPool(device=device, limit=limit, broker=broker))
        runtime = stack.enter_context(Runtime(pool=pool, store=store))
        options = {
            "sharing": sharing,
            "threads": intra_op,
            "offload": offload,
            "engine": engine,
            "concurrency": threads if concurrency is None else concurrency,
            "cuda_graph": cuda_graph,
        }
        loaded = _load_all(names, [Path(path) for path in paths], runtime, options, store, progress)
        _feed_all(loaded, overrides, given_shapes, seed)
        start = time.perf_counter()
        _run_all(loaded, repeat, threads)
        seconds = time.perf_counter() - start
        results = tuple(_result(entry) for entry in loaded)
        memory = _memory(pool, [entry.model for entry in loaded])
        if save is not None:
            _save_all(loaded, Path(save))
    return RunReport(results, memory, pool.device, sharing, threads, repeat, seconds)


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each model: the file's without its suffix, with `#2`, `#3` behind where it comes again."""
    counts: dict[str, int] = {}
    names = []
    for path in paths:
        stem = path.name.removesuffix(SUFFIX).removesuffix(".onnx")
        counts[stem] = counts.get(stem, 0) + 1
        names.append(stem if counts[stem] == 1 else f"{stem}#{counts[stem]}")
    return names


def _load_all(
    names: Sequence[str],
    paths: Sequence[Path],
    runtime: Runtime,
    options: Mapping[str, Any],
    store: Store,
    progress: Progress | None,
) -> list[_Loaded]:
    loaded = []
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        with as_package(path, store, progress) as package:
            if progress:
                progress("loading", number, len(paths))
            start = time.perf_counter()
            model = runtime.load(
                package,
                configure=_quieten,
                progress=progress and functools.partial(progress, f"loading {name}"),
                **options,
            )
            loaded.append(_Loaded(name, path, model, time.perf_counter() - start))
    if progress:
        progress("loading", len(paths), len(paths))
    return loaded


def _quieten(options: Any) -> None:
    """Keep ONNX Runtime from printing its errors as well: they come as exceptions."""
    options.log_severity_level = 4


@contextlib.contextmanager
def as_package(path: Path, store: Store, progress: Progress | None = None) -> Iterator[Path]:
    """Yield `path`, or, where it is a file, a package of it in a temporary folder.

    The folder is only needed while the model is loaded. The weights stay in the store until the next gc, so
    that converting the same model again writes nothing.
    """
    if path.is_dir() or (path.suffix == SUFFIX and not path.exists()):
        yield path
        return
    with store.using():
        folder = Path(tempfile.mkdtemp(prefix="glake-run-", suffix=".tmp"))
        package = folder / f"{path.stem}{SUFFIX}"
        try:
            with store.writing(folder):
                convert(path, package, store=store, progress=_said(progress, f"converting {path.name}"))
                yield package
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            store.forget(package)


def _said(progress: Progress | None, what: str) -> Progress | None:
    """`progress`, told `what` instead of its caller's word for it."""
    return progress and (lambda _, done, total: progress(what, done, total))


def _feed_all(
    loaded: Sequence[_Loaded], overrides: Sequence[Override], shapes: Sequence[Override], seed: int
) -> None:
    used: set[int] = set()
    for entry in loaded:
        rng = np.random.default_rng(seed)
        known = [*entry.model.inputs, *entry.model.overridable]
        entry.feeds, entry.generated = feeds_of(
            entry.name, entry.model.inputs, known, overrides, shapes, rng, used
        )
    for item in (*overrides, *shapes):
        if id(item) not in used:
            inputs = "; ".join(f"{e.name}: {', '.join(map(str, e.model.inputs)) or 'none'}" for e in loaded)
            raise InputError(f"{item.text}: no model has such an input. Inputs are {inputs}.")


def _run_all(loaded: Sequence[_Loaded], repeat: int, threads: int) -> None:
    """Run every model `repeat` times, in turn, by `threads` workers; the first error ends it."""
    work = (entry for _ in range(repeat) for entry in loaded)
    if threads == 1:
        for entry in work:
            _run_once(entry)
        return
    lock = threading.Lock()
    errors: list[BaseException] = []
    stop = threading.Event()

    def worker() -> None:
        while not stop.is_set():
            with lock:
                entry = next(work, None)
            if entry is None:
                return
            try:
                _run_once(entry)
            except BaseException as error:
                errors.append(error)
                stop.set()

    workers = [threading.Thread(target=worker, name=f"run-{index}") for index in range(threads)]
    for thread in workers:
        thread.start()
    try:
        for thread in workers:
            thread.join()
    finally:  # Ctrl-C: runs in flight end, no new ones begin
        stop.set()
        for thread in workers:
            thread.join()
    if errors:
        raise errors[0]


def _run_once(entry: _Loaded) -> None:
    start = time.perf_counter()
    try:
        results = entry.model.run(entry.feeds)
    except ModelError as error:
        if not entry.generated:
            raise
        fed = ", ".join(f"{name}{list(np.shape(entry.feeds[name]))}" for name in entry.generated)
        raise ModelError(
            f"{str(error).strip()} Maybe the generated data ({fed}) does not suit it: give other sizes "
            f"with --shape, or real data with --input."
        ) from error
    entry.times.append(time.perf_counter() - start)
    entry.results = results


def _result(entry: _Loaded) -> ModelResult:
    times = np.array(entry.times)
    return ModelResult(
        name=entry.name,
        path=str(entry.path),
        inputs=tuple(entry.model.inputs),
        outputs=tuple(summary(name, value) for name, value in entry.results.items()),
        runs=len(entry.times),
        load=entry.seconds,
        median=float(np.median(times)),
        min=float(times.min()),
        p95=float(np.percentile(times, 95)),
        memory=entry.model.memory,
        notes=entry.model.notes,
    )


def summary(name: str, value: Any) -> OutputSummary:
    """Describe an output: its type and shape, and mean, least and largest value of numbers."""
    if not isinstance(value, np.ndarray):
        return OutputSummary(name, type(value).__name__, None, None, None, None)
    mean = least = largest = None
    if value.size and value.dtype.kind not in "OUSc":
        wide = value.astype(np.float64)
        mean, least, largest = float(wide.mean()), float(wide.min()), float(wide.max())
    return OutputSummary(
        name, "string" if value.dtype.kind in "OU" else str(value.dtype), value.shape, mean, least, largest
    )


def _memory(pool: Pool, models: Sequence[Model]) -> MemoryReport:
    release_unused_heap()
    stats = pool.stats()
    residency = Residency.of(pool)
    resident, asleep = residency.users(), residency.asleep()
    shared = sum(size for size, users in resident.values() if len(users) > 1)
    own = sum(size for size, users in resident.values() if len(users) == 1)
    private = sum(model.memory.private for model in models)
    weights = shared + own + private - asleep - stats.offloaded
    return MemoryReport(
        shared=shared,
        own=own,
        asleep=asleep,
        private=private,
        activations=max(0, stats.active - weights),
        peak_activations=max(0, stats.peak_active - weights),
        idle=stats.idle,
        reserved=stats.reserved,
        peak_reserved=stats.peak_reserved,
        limit=stats.limit,
        offloaded=stats.offloaded,
        libraries=sum(model.memory.libraries for model in models),
        process=measure(),
    )


def _save_all(loaded: Sequence[_Loaded], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in loaded:
        save_npz(folder / f"{entry.name}.npz", entry.results)


def save_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write what is an array of numbers to `path`, all or nothing."""
    temporary = temporary_sibling(path)
    kept = {
        name: value
        for name, value in arrays.items()
        if isinstance(value, np.ndarray) and value.dtype.kind != "O"
    }
    try:
        with temporary.open("wb") as file:
            np.savez(file, **kept)  # type: ignore[arg-type]  # numpy's stub takes a keyword for allow_pickle
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
