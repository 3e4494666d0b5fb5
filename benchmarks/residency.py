"""Weights that are copied to the device once, and models that sleep: memory, latency and answers, beside their twins.

    python -m benchmarks.residency --device cuda:0 [--scene NAME ...] [--scale 1.0] [--folder DIR]

Every side runs in a process of its own; those that are compared take turns run by run, so that all see the same clocks.
TF32 is off and cuDNN's algorithms are the default ones.

The memory of a process on a GPU is what its driver has free right after the context is made, less what it has free now;
nobody else begins or ends anything meanwhile. On the CPU it is `glake_infer.process_memory`. `--device cpu --scale 0.02`
tries everything with tiny models; what the figures say is nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plain import SETTINGS, plain_session
from benchmarks.record import record
from benchmarks.workers import Process, serve
from glake_infer import cuda, process_memory
from glake_infer.allocators import Pool, import_onnxruntime
from glake_infer.holding import Holding, HostCopy
from glake_infer.models import load as loading
from glake_infer.models import zoo
from glake_infer.models.convert import convert
from glake_infer.models.load import WORKSPACE, Streams, load
from glake_infer.models.runtime import Runtime
from glake_infer.residency import Residency
from glake_infer.store import Store

GIB = 1 << 30
UNCHANGED = "unchanged"
WAYS = {  # of a session: $CUBLAS_WORKSPACE_CONFIG, streams
    "ours": ("", "per run"),
    "ours, one stream": ("", "one"),
    "cuBLAS as it is": (UNCHANGED, "per run"),
    "cuBLAS as it is, one stream": (UNCHANGED, "one"),
    ":16384:1": (":16384:1", "per run"),
    ":4096:2:16:8": (":4096:2:16:8", "per run"),
    ":16:8": (":16:8", "per run"),
}


class Worker:
    """One side, in its process: `Process.ask` calls these methods.

    "ours": packages on a pool, of a Runtime where there is a limit; "plain": ONNX files; "graph": the graphs of packages
    with weights from the store, by ONNX Runtime alone.
    """

    def __init__(self, side: str, device: str, limit: int) -> None:
        self.cuda, self.index = device != "cpu", int(device.partition(":")[2] or 0)
        if self.cuda:
            from cuda.bindings import runtime

            runtime.cudaSetDevice(self.index)
            runtime.cudaFree(0)
        self.base, self.highest, self.stop = self.free(), 0, threading.Event()
        self.buffers: tuple[int, int, int] | None = None
        if os.environ.get(WORKSPACE) == UNCHANGED:  # what cuBLAS does by itself, which gi.load changes
            del os.environ[WORKSPACE]
            loading.lower_workspaces = lambda index: None
        self.side, self.models, self.runs = side, list[Any](), list[Callable[..., list[Any]]]()
        self.ort = import_onnxruntime()
        if side == "ours":
            self.runtime = Runtime(limit, device=device) if limit else None
            self.pool = self.runtime.pool if self.runtime else Pool(device)

    def free(self) -> int:
        """What the driver has free; on the CPU the other way round, what this process does not take."""
        return cuda.free_memory(self.index) if self.cuda else -process_memory.measure().total

    def memory(self) -> int:
        """Bytes of this process."""
        return (self.base if self.cuda else 0) - self.free()

    def outside(self) -> int:
        """Those that are not the pool's."""
        return self.memory() - (self.pool.stats().reserved if self.side == "ours" else 0)

    def load(self, path: str, host_copy: HostCopy = "store", streams: Streams = "per run") -> float:
        """Make one more session; returns the seconds."""
        start = time.perf_counter()
        if self.side == "ours":
            loader = self.runtime.load if self.runtime else functools.partial(load, pool=self.pool)
            settings = SETTINGS if self.cuda else None
            model = loader(path, host_copy=host_copy, streams=streams, provider_options=settings)
            self.runs.append(lambda feeds: list(model.run(feeds).values()))
            self.models.append(model)
        else:
            session = self.session(path)
            self.runs.append(lambda feeds: list(session.run(None, feeds)))
        return time.perf_counter() - start

    def session(self, path: str) -> Any:
        """A session of ONNX Runtime as it is."""
        options = self.ort.SessionOptions()
        index = self.index if self.cuda else None
        return plain_session(options, path, index, of_package=self.side == "graph")

    def run(self, number: int, feeds: dict[str, Any], outputs: bool = True) -> tuple[float, list[Any]]:
        """Run a model; returns the seconds and the outputs."""
        start = time.perf_counter()
        found = self.runs[number](feeds)
        return time.perf_counter() - start, found if outputs else []

    def together(self, feeds: dict[str, Any], turns: int, threads: int) -> list[tuple[int, list[Any]]]:
        """Run all models in turn from each of several threads, which begin with different ones."""

        def work(thread: int) -> list[tuple[int, list[Any]]]:
            numbers = [(turn + thread) % len(self.runs) for turn in range(turns * len(self.runs))]
            return [(number, self.runs[number](feeds)) for number in numbers]

        with ThreadPoolExecutor(threads) as executor:
            return [each for found in executor.map(work, range(threads)) for each in found]

    def further_thread(self, number: int, feeds: dict[str, Any], runs: int) -> int:
        """Bytes outside the pool that a thread takes which runs a session while this one does too."""
        before = self.outside()

        def work(_: int = 0) -> None:
            for _ in range(runs):
                self.runs[number](feeds)

        with ThreadPoolExecutor(1) as executor:
            other = executor.submit(work)
            work()
            other.result()
            return self.outside() - before  # the other thread is still there

    def rate(self, number: int, feeds: dict[str, Any], threads: int, seconds: float) -> float:
        """Runs a second of one session by several threads."""
        end = time.monotonic() + seconds

        def work(_: int) -> int:
            count = 0
            while time.monotonic() < end:
                self.runs[number](feeds)
                count += 1
            return count

        with ThreadPoolExecutor(threads) as executor:
            return sum(executor.map(work, range(threads))) / seconds

    def sample(self, interval: float) -> None:
        """Begin to look at the memory of the process, over and over."""

        def work() -> None:
            while not self.stop.wait(interval):
                self.highest = max(self.highest, self.memory())

        threading.Thread(target=work, daemon=True).start()

    def sampled(self) -> dict[str, int]:
        """The highest that was seen until now, and the pool's own."""
        self.stop.set()
        stats = self.pool.stats()
        return {"memory_highest": self.highest, "peak_reserved": stats.peak_reserved, "limit": stats.limit}

    def weights(self) -> dict[str, int]:
        """Weights by the pool's table, by the pool, and by the driver: what all models' sleep makes free."""
        found = Residency.of(self.pool).users().values()
        distinct, held = sum(size for size, _ in found), self.pool.stats().weights
        self.pool.trim()
        before = self.free()
        for model in self.models:
            model.suspend()
        freed = self.free() - before
        for model in self.models:
            model.resume()
        used = sum(size * len(users) for size, users in found)
        return {"weight_bytes": used, "distinct_bytes": distinct, "held": held, "held_by_driver": freed}

    def naps(self, turns: int, feeds: dict[str, Any]) -> dict[str, Any]:
        """Suspend and resume the first model; after each time a run, and a plain copy of as many bytes."""
        model, first, right = self.models[0], self.runs[0](feeds), True
        suspend, resume, twin, freed = list[float](), list[float](), list[float](), list[int]()
        for _ in range(turns):
            before, start = self.free(), time.perf_counter()
            model.suspend()
            suspend.append(time.perf_counter() - start)
            freed.append(self.free() - before)
            asleep, start = model.memory.asleep, time.perf_counter()
            model.resume()
            resume.append(time.perf_counter() - start)
            right &= same(self.runs[0](feeds), first)
            twin.append(self.link(asleep))
        return {
            "bytes": asleep, "freed_at_return": min(freed), "chunks": len(model._holding.chunks), "right": right,
            "suspend": spread(suspend), "resume": spread(resume), "twin": spread(twin),
            "ratio": statistics.median(resume) / statistics.median(twin),
            "pinned": model.memory.pinned, "notes": model.notes,
        }  # fmt: skip

    def link(self, size: int) -> float:
        """Seconds of a plain copy from pinned memory, a buffer of at most 1 GiB over and over."""
        if not self.cuda:
            start = time.perf_counter()
            np.ones(size, np.uint8).copy()
            return time.perf_counter() - start
        from cuda.bindings import runtime

        piece, index = min(GIB, size), self.index
        if self.buffers is None:
            error, address = runtime.cudaMalloc(piece)
            assert error == 0, error
            self.buffers = int(address), cuda.allocate_pinned(index, piece), cuda.new_stream(index)
        target, source, stream = self.buffers
        start = time.perf_counter()
        for done in range(0, size, piece):
            cuda.queue_to_device(index, target, source, min(piece, size - done), stream)
        cuda.synchronize(index, stream)
        return time.perf_counter() - start

    def cycles(self, count: int, feeds: dict[str, Any]) -> dict[str, int]:
        """Suspend and resume the first model, with a run in each tenth cycle; ten cycles come before what counts."""
        wrong, first, seen = 0, self.runs[0](feeds), list[tuple[int, int]]()
        for turn in range(count + 10):
            if turn == 10:
                process_memory.release_unused_heap()
                seen.append((self.memory(), process_memory.measure().total))
            self.models[0].suspend()
            self.models[0].resume()
            wrong += turn % 10 == 0 and not same(self.runs[0](feeds), first)
        process_memory.release_unused_heap()
        seen.append((self.memory(), process_memory.measure().total))
        (before, host), (after, host_after) = seen
        return {
            "cycles": count, "wrong": wrong, "memory": before, "growth": after - before,
            "host_memory": host, "host_growth": host_after - host,
        }  # fmt: skip

    def requests(self, feeds: Sequence[dict[str, Any]], seconds: float, threads: int) -> dict[str, Any]:
        """Random requests from several threads; each answer is compared with the first one of its model."""
        firsts = [run(feed) for run, feed in zip(self.runs, feeds, strict=True)]
        table, brought, stop = Residency.of(self.pool), list[int](), threading.Event()
        plain_bring = table._bring

        def bring(holding: Holding, chunks: list[int], **options: bool) -> None:
            plain_bring(holding, chunks, **options)
            regions = [(chunk, table._owners[chunk][0]) for chunk in chunks]
            brought.append(sum(region.sizes[region.chunks.index(chunk)] for chunk, region in regions))

        def watch() -> list[int]:
            seen = []
            while not stop.wait(0.002):
                seen.append(self.pool.stats().reserved)
            return seen

        def work(seed: int) -> list[tuple[float, bool, bool]]:
            rng, found = random.Random(seed), []
            while time.perf_counter() < end:
                number = rng.randrange(len(self.runs))
                asleep = self.models[number].memory.asleep > 0
                taken, answer = self.run(number, feeds[number])
                found.append((taken, asleep, same(answer, firsts[number])))
            return found

        table._bring = bring  # type: ignore[method-assign]
        end = time.perf_counter() + seconds
        with ThreadPoolExecutor(threads + 1) as executor:
            watching = executor.submit(watch)
            try:
                done = [each for found in executor.map(work, range(threads)) for each in found]
            finally:
                stop.set()
        stats, samples = self.pool.stats(), watching.result()
        return {
            "requests": len(done), "per_second": len(done) / seconds, "wrong": sum(not right for *_, right in done),
            "awake": spread([taken for taken, asleep, _ in done if not asleep]),
            "asleep": spread([taken for taken, asleep, _ in done if asleep]),
            "wakes": len(brought), "bytes_brought_back": sum(brought),
            "limit": stats.limit, "peak_reserved": stats.peak_reserved,
            "samples": len(samples), "samples_over_limit": sum(each > stats.limit for each in samples),
        }  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Where, with what sizes, and in which folder a scene is run."""

    device: str
    scale: float
    folder: Path
    store: Store

    @property
    def tiny(self) -> bool:
        """Whether tiny models and feeds take the place of the large ones."""
        return self.scale < 0.1

    def times(self, count: int, least: int) -> int:
        """A count, fewer at a smaller scale."""
        return max(least, min(count, round(count * self.scale)))

    @contextlib.contextmanager
    def side(self, side: str, limit: int = 0, workspace: str = "") -> Iterator[Process]:
        """A side's process, until the block ends. `workspace` is cuBLAS's setting."""
        command = [sys.executable, "-m", "benchmarks.residency", "--child", side, "--device", self.device]
        environment = {
            **os.environ,
            "GLAKE_STORE": str(self.store.root),
            WORKSPACE: workspace,
        }
        if not workspace:
            del environment[WORKSPACE]
        made = Process([*command, "--limit", str(limit)], environment)
        try:
            made.ask("memory")  # it is there, and has its context, before another begins
            yield made
        finally:
            made.process.communicate(timeout=120)

    def write(self, specs: Sequence[Any]) -> list[str]:
        """Write models as packages."""

        def write(number: int) -> str:
            return zoo.convert(specs[number], self.folder / f"{number}.glake", store=self.store).package

        return first_then_four(write, range(len(specs)))

    def feeds(self, spec: Any, *shapes: tuple[int, int]) -> list[dict[str, Any]]:
        """Random feeds by batch and length."""
        kept = [(min(b, 2), min(n, 32)) if self.tiny else (b, n) for b, n in shapes]
        return [
            zoo.feeds(spec, seed, batch=batch, length=length) for seed, (batch, length) in enumerate(kept)
        ]


def first_then_four(make: Callable[[Any], str], items: Sequence[Any]) -> list[str]:
    """Make the first, and then, when what the others share with it is there, those, four at a time."""
    first = make(items[0])
    with ThreadPoolExecutor(4) as executor:
        return [first, *executor.map(make, items[1:])]


def same(answer: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether all outputs are the same bits."""
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(answer, other, strict=True))


def difference(answer: Sequence[Any], other: Sequence[Any]) -> float:
    """The largest difference in any output, relative to the largest value of that output of `other`."""
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(answer, other, strict=True)]
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)) for a, b in pairs)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Count, median, 95th percentile and maximum."""
    if not seconds:
        return {"count": 0}
    p50, p95, most = np.percentile(seconds, (50, 95, 100))
    return {"count": len(seconds), "p50": float(p50), "p95": float(p95), "max": float(most)}


def by_turns(sides: dict[str, Process], models: int, feeds: dict[str, Any], turns: int) -> dict[str, Any]:
    """Median seconds of a run of each side; they take turns, with another one first each time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(turns + 3):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds, _ = sides[name].ask("run", turn % models, feeds, False)
            if turn >= 3:
                times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {"shape": list(feeds["input_ids"].shape), "turns": turns, **medians}


def family(at: Setup) -> dict[str, Any]:
    """Fine-tunes of one trunk, all loaded: the memory of their weights and of the process, latency, answers."""
    name = "bert-tiny" if at.tiny else "bert-base"
    specs = [zoo.spec(name, head=f"task {n}", labels=2 + 3 * n) for n in range(at.times(8, 2))]
    files = [str(zoo.write(spec, at.folder / f"{n}.onnx")) for n, spec in enumerate(specs)]
    packages = first_then_four(lambda file: convert(file, store=at.store).package, files)
    feeds = at.feeds(specs[0], (1, 16), (8, 128), (4, 384))

    def begin(side: Process, paths: list[str]) -> tuple[list[Any], int]:
        """Load and run all; the answers, and the memory."""
        for path in paths:
            side.ask("load", path)
        return [side.ask("run", n, feed)[1] for feed in feeds for n in range(len(paths))], side.ask("memory")

    with at.side("ours") as ours:
        answers, memory = begin(ours, packages)
        held = ours.ask("weights")
        with at.side("plain") as plain:
            answers_plain, memory_plain = begin(plain, files)
            sides = {"ours": ours, "twin": plain}
            cases = [by_turns(sides, len(specs), feed, at.times(60, 4)) for feed in feeds]
    with at.side("graph") as graph:
        answers_graph, memory_graph = begin(graph, packages)
    return {
        "model": name, "models": len(specs), **held,
        "held_ratio": held["held_by_driver"] / held["distinct_bytes"],
        "memory": memory, "memory_twin": memory_plain, "memory_ratio": memory / memory_plain,
        "memory_same_graph": memory_graph,
        "cases": cases, "ratio": statistics.median(case["ours"] / case["twin"] for case in cases),
        "difference": max(map(difference, answers, answers_plain)),
        "bit_for_bit_same_graph": all(map(same, answers, answers_graph)),
    }  # fmt: skip


def decoder(at: Setup) -> dict[str, Any]:
    """A large decoder and variants of it in one Runtime, in turn and at once; the twin runs one of them alone."""
    name = "llama-tiny-fp16" if at.tiny else "llama-7b-fp16"
    sizes: dict[str, Any] = {} if at.tiny else {"layers": at.times(32, 2)}
    numbers = range(2 if at.tiny else 4)
    specs = [zoo.spec(name, variant=n, changed=0.05 if n else 0.0, **sizes) for n in numbers]
    packages, turns = at.write(specs), at.times(10, 2)
    (feeds,) = at.feeds(specs[0], (1, 16))
    with at.side("ours", limit=max(GIB // 4, int(24 * GIB * at.scale))) as ours:
        ours.ask("sample", 0.005)
        loads = [ours.ask("load", package) for package in packages]
        firsts = [ours.ask("run", n, feeds)[1] for n in numbers]
        steady = all(same(ours.ask("run", n, feeds)[1], firsts[n]) for _ in range(turns) for n in numbers)
        at_once = all(same(answer, firsts[n]) for n, answer in ours.ask("together", feeds, turns, 2))
        highest, held = ours.ask("sampled"), ours.ask("weights")
        woken = all(same(ours.ask("run", n, feeds)[1], firsts[n]) for n in numbers)
    with at.side("graph") as graph:
        load_twin = graph.ask("load", packages[-1])
        alone = graph.ask("run", 0, feeds)[1]
        memory_twin = graph.ask("memory")
    return {
        "model": name, "models": len(specs), **held, **highest,
        "held_ratio": held["held_by_driver"] / held["distinct_bytes"],
        "loads": loads, "load_twin_of_one": load_twin, "memory_twin_of_one": memory_twin,
        "same_in_turn": steady, "same_at_once": at_once, "same_after_sleep": woken,
        "variants_differ": not any(same(firsts[a], firsts[b]) for a in numbers for b in numbers if a < b),
        "bit_for_bit_same_graph": same(firsts[-1], alone), "difference": difference(firsts[-1], alone),
    }  # fmt: skip


def sleep(at: Setup) -> dict[str, Any]:
    """Suspend and resume a model of few large weights, beside a plain copy of as many bytes over the same link."""
    spec = zoo.spec("llama-tiny-fp16")
    if not at.tiny:  # 10 GiB in five layers
        large: dict[str, Any] = {"hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 64}
        spec = zoo.spec("llama-7b-fp16", layers=at.times(5, 1), **large)
    (package,) = at.write([spec])
    (feeds,) = at.feeds(spec, (1, 16))
    result: dict[str, Any] = {}
    for host_copy in ("store", "pinned"):
        with at.side("ours") as ours:
            load = ours.ask("load", package, host_copy)
            result[host_copy] = {"load": load, **ours.ask("naps", at.times(8, 5), feeds)}
    return {**result, "making_the_copy": result["pinned"]["load"] - result["store"]["load"]}


def twenty(at: Setup) -> dict[str, Any]:
    """Models of about 1 GiB each under a limit for eight of twenty, random requests from four threads."""
    sizes: dict[str, Any] = {"name": "bert-tiny"} if at.tiny else {"name": "bert-xl", "layers": 4}
    specs = [zoo.spec(**sizes, seed=n) for n in range(at.times(20, 3))]
    total = sum(zoo.build(spec).weights.total_bytes for spec in specs)
    packages, feeds = at.write(specs), at.feeds(specs[0], *[(2, 64)] * len(specs))
    with at.side("ours", limit=8 * GIB if at.scale >= 1 else total * 8 // 20) as ours:
        for package in packages:
            ours.ask("load", package)
        found = ours.ask("requests", feeds, max(1.0, 60 * min(1.0, at.scale)), 4)
    return {"models": len(specs), "weight_bytes": total, **found}


def cycles(at: Setup) -> dict[str, Any]:
    """A small model that sleeps and wakes over and over: what stays behind."""
    spec = zoo.spec("bert-tiny" if at.tiny else "bert-small")
    (package,) = at.write([spec])
    with at.side("ours") as ours:
        ours.ask("load", package)
        return {"model": spec.name, **ours.ask("cycles", at.times(1000, 20), zoo.feeds(spec, 1))}


def fixed(at: Setup) -> dict[str, Any]:
    """What a session costs beside weights and activations, and how fast it is, by cuBLAS's workspace and streams.

    The bytes are those outside the pool; plain ONNX Runtime has none, so that its figures contain everything.
    """
    name = "bert-tiny" if at.tiny else "bert-base"
    specs = [zoo.spec(name, head=f"task {n}") for n in range(at.times(4, 2))]
    packages = at.write(specs)
    files = [str(zoo.write(spec, at.folder / f"{n}.onnx")) for n, spec in enumerate(specs)]
    feeds = at.feeds(specs[0], (1, 16), (8, 128), (32, 128))
    sides, costs = dict[str, Process](), dict[str, Any]()
    with contextlib.ExitStack() as stack:
        for label in ("plain", *list(WAYS)[: 2 if at.tiny else None]):
            paths, kind = (files, "plain") if label == "plain" else (packages, "ours")
            workspace, streams = WAYS.get(label, ("", "per run"))
            made = at.side(kind, workspace=workspace)
            side = sides[label] = stack.enter_context(made)
            seen, loads = [side.ask("outside")], []
            for number, path in enumerate(paths):
                side.ask("load", path, "store", streams)
                loads.append(side.ask("outside") - seen[-1])
                for feed in feeds:
                    side.ask("run", number, feed, False)
                seen.append(side.ask("outside"))
            each = [after - before for before, after in itertools.pairwise(seen)]
            costs[label] = {
                "before": seen[0], "loads": loads, "loads_and_runs": each,
                "further_session": statistics.median(each[1:]),
                "further_thread": side.ask("further_thread", 0, feeds[1], 5),
                "runs_per_second": {n: side.ask("rate", 0, feeds[0], n, at.times(2, 0.1)) for n in (1, 4)},
            }  # fmt: skip
        cases = [by_turns(sides, len(specs), feed, at.times(80, 4)) for feed in feeds]
    weights = zoo.build(specs[0]).weights.total_bytes
    about = {"model": name, "sessions": len(specs), "weight_bytes_of_one": weights}
    return {**about, "bytes_outside_pool": costs, "cases": cases}


SCENES = {scene.__name__: scene for scene in (family, decoder, sleep, twenty, cycles, fixed)}


def main() -> None:
    """Record one line per scene."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--folder", help="for the models, until a scene has ended: up to 40 GiB")
    parser.add_argument("--child")
    parser.add_argument("--limit", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.child:
        serve(lambda: Worker(arguments.child, arguments.device, arguments.limit))
        return
    for name in arguments.scene:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            at = Setup(arguments.device, arguments.scale, Path(folder), Store(Path(folder) / "store"))
            found = SCENES[name](at)
        about = {"scene": name, "device": arguments.device, "scale": arguments.scale}
        record("residency", {**about, **found, "took": time.perf_counter() - start})


if __name__ == "__main__":
    main()
