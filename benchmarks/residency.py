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
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from glake_infer import process_memory
from glake_infer.store import Store

GIB = 1 << 30
SETTINGS = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
WORKSPACES = (None, ":4096:2:16:8", ":16:8", ":32768:1", ":16384:1")


class Worker:
    """One side, in its process; `Side.ask` calls these methods. "ours": packages on a pool, of a Runtime where there is
    a limit; "plain": ONNX files; "graph": the graphs of packages, by ONNX Runtime alone."""

    def __init__(self, side: str, device: str, limit: int) -> None:
        self.cuda, self.index = device != "cpu", int(device.partition(":")[2] or 0)
        if self.cuda:
            from cuda.bindings import runtime

            (error,) = runtime.cudaSetDevice(self.index)
            assert error == 0, error
            runtime.cudaFree(0)
        self.base = self.free()
        self.highest, self.sampling = 0, threading.Event()
        self.link_buffers: list[tuple[int, int]] = []
        self.side, self.models, self.runs = side, list[Any](), list[Callable[..., list[Any]]]()
        from glake_infer.allocators import import_onnxruntime

        self.ort = import_onnxruntime()
        if side == "ours":
            import glake_infer as gi

            self.runtime = gi.Runtime(limit, device=device) if limit else None
            self.pool = self.runtime.pool if self.runtime else gi.Pool(device)

    def free(self) -> int:
        """What the driver has free; on the CPU the other way round, what this process does not take."""
        if not self.cuda:
            return -process_memory.measure().total
        from cuda.bindings import runtime

        error, free, _ = runtime.cudaMemGetInfo()
        assert error == 0, error
        return int(free)

    def memory(self) -> int:
        """Bytes of this process."""
        return (self.base if self.cuda else 0) - self.free()

    def outside(self) -> int:
        """Those that are not the pool's."""
        return self.memory() - (self.pool.stats().reserved if self.side == "ours" else 0)

    def load(self, path: str, host_copy: str = "store") -> float:
        """Make one more session; returns the seconds."""
        start = time.perf_counter()
        if self.side == "ours":
            import glake_infer as gi

            options: dict[str, Any] = {"provider_options": SETTINGS} if self.cuda else {}
            options["host_copy"] = host_copy
            model = (
                self.runtime.load(path, **options) if self.runtime else gi.load(path, self.pool, **options)
            )
            self.runs.append(lambda feeds: list(model.run(feeds).values()))
            self.models.append(model)
        else:
            session = self.session(path)
            self.runs.append(lambda feeds: list(session.run(None, feeds)))
        return time.perf_counter() - start

    def session(self, path: str) -> Any:
        """A session of ONNX Runtime as it is."""
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.cuda:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(self.index), **SETTINGS}))
        source: Any = path
        if self.side == "graph":
            from glake_infer.models.package import Package

            package = Package(Path(path), Store())
            source = package.graph("cuda" if self.cuda and "cuda" in package.manifest.variants else "onnx")
            source = source.SerializeToString()
            entry = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(entry, str(package.store.root))
        session = self.ort.InferenceSession(source, options, providers=providers)
        assert not self.cuda or session.get_providers()[0] == "CUDAExecutionProvider"
        return session

    def run(self, number: int, feeds: dict[str, Any], outputs: bool = True) -> tuple[float, list[Any]]:
        """Run a model; returns the seconds and the outputs."""
        start = time.perf_counter()
        found = self.runs[number](feeds)
        return time.perf_counter() - start, found if outputs else []

    def together(self, feeds: dict[str, Any], turns: int, threads: int) -> list[tuple[int, list[Any]]]:
        """Run all models in turn from each of several threads, which begin with different ones."""
        order = range(turns * len(self.runs))

        def work(thread: int) -> list[tuple[int, list[Any]]]:
            numbers = [(turn + thread) % len(self.runs) for turn in order]
            return [(number, self.runs[number](feeds)) for number in numbers]

        with ThreadPoolExecutor(threads) as executor:
            return [each for found in executor.map(work, range(threads)) for each in found]

    def further_thread(self, number: int, feeds: dict[str, Any], runs: int) -> int:
        """Bytes outside the pool that a thread takes which runs a session while this one does too."""
        before, ran, done = self.outside(), threading.Event(), threading.Event()

        def work() -> None:
            for _ in range(runs):
                self.runs[number](feeds)
            ran.set()
            done.wait()

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(runs):
            self.runs[number](feeds)
        ran.wait()
        taken = self.outside() - before
        done.set()
        thread.join()
        return taken

    def sample(self, interval: float = 0.005) -> None:
        """Begin to look at the memory of the process, over and over."""

        def work() -> None:
            while not self.sampling.wait(interval):
                self.highest = max(self.highest, self.memory())

        threading.Thread(target=work, daemon=True).start()

    def sampled(self) -> int:
        """The highest that was seen."""
        self.sampling.set()
        return self.highest

    def stats(self) -> dict[str, int]:
        """The pool's."""
        stats = self.pool.stats()
        return {name: getattr(stats, name) for name in ("reserved", "peak_reserved", "limit", "weights")}

    def weights(self) -> dict[str, int]:
        """Weights as the table of the pool knows them, as the pool holds them, and as the driver counts them: what is
        free once all models sleep, and was not before."""
        from glake_infer.residency import Residency

        found = Residency.of(self.pool).users().values()
        held = self.pool.stats().weights
        self.pool.trim()
        awake = self.memory()
        for model in self.models:
            model.suspend()
        asleep = self.memory()
        for model in self.models:
            model.resume()
        return {
            "weight_bytes": sum(size * len(users) for size, users in found),
            "distinct_bytes": sum(size for size, _ in found),
            "held_bytes": held,
            "held_by_driver": awake - asleep,
        }

    def about(self) -> dict[str, Any]:
        """The first model's weights."""
        model = self.models[0]
        return {"chunks": len(model._holding.chunks), "pinned": model.memory.pinned, "notes": model.notes}

    def nap(self) -> dict[str, Any]:
        """Suspend the first model and resume it."""
        model, before = self.models[0], self.free()
        start = time.perf_counter()
        model.suspend()
        suspended = time.perf_counter() - start
        freed, asleep = self.free() - before, model.memory.asleep
        start = time.perf_counter()
        model.resume()
        resumed = time.perf_counter() - start
        return {"suspend": suspended, "resume": resumed, "freed": freed, "bytes": asleep}

    def link(self, size: int) -> float:
        """Seconds of a plain copy of so many bytes, from pinned memory, over two buffers of at most 1 GiB in turn."""
        piece = min(GIB, size)
        if not self.cuda:
            source, target = np.ones(piece, np.uint8), np.zeros(piece, np.uint8)
            start = time.perf_counter()
            for done in range(0, size, piece):
                target[: size - done] = source[: size - done]
            return time.perf_counter() - start
        from cuda.bindings import runtime

        from glake_infer import cuda

        if not self.link_buffers:
            self.link_stream = cuda.new_stream(self.index)
            for _ in range(2):
                error, address = runtime.cudaMalloc(piece)
                assert error == 0, error
                self.link_buffers.append((int(address), cuda.allocate_pinned(self.index, piece)))
        start = time.perf_counter()
        for turn, done in enumerate(range(0, size, piece)):
            address, pinned = self.link_buffers[turn % 2]
            cuda.queue_to_device(self.index, address, pinned, min(piece, size - done), self.link_stream)
        cuda.synchronize(self.index, self.link_stream)
        return time.perf_counter() - start

    def cycles(self, count: int, feeds: dict[str, Any]) -> dict[str, int]:
        """Suspend and resume the first model, with a run in each tenth cycle; growth in bytes."""
        wrong = 0
        first = self.runs[0](feeds)
        for turn in range(count + 10):
            if turn == 10:
                process_memory.release_unused_heap()
                before = self.memory(), process_memory.measure().total
            self.models[0].suspend()
            self.models[0].resume()
            if turn % 10 == 0:
                wrong += not same(self.runs[0](feeds), first)
        process_memory.release_unused_heap()
        after = self.memory(), process_memory.measure().total
        return {
            "cycles": count,
            "wrong": wrong,
            "memory": before[0],
            "growth": after[0] - before[0],
            "host_memory": before[1],
            "host_growth": after[1] - before[1],
        }

    def requests(self, feeds: Sequence[dict[str, Any]], seconds: float, threads: int) -> dict[str, Any]:
        """Random requests from several threads; each answer is compared with the first one of its model."""
        firsts = [run(feed) for run, feed in zip(self.runs, feeds, strict=True)]
        woken, mine = self._watch_wakes()
        woken.clear()
        over, stop = 0, threading.Event()

        def watch() -> None:
            nonlocal over
            while not stop.wait(0.002):
                stats = self.pool.stats()
                over += stats.reserved > stats.limit

        def work(seed: int) -> list[tuple[float, bool, bool]]:
            rng, found = random.Random(seed), []
            while time.perf_counter() < end:
                number = rng.randrange(len(self.runs))
                mine.woke = self.models[number].memory.asleep > 0
                start = time.perf_counter()
                answer = self.runs[number](feeds[number])
                taken = time.perf_counter() - start
                found.append((taken, mine.woke, same(answer, firsts[number])))
            return found

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        end = start + seconds
        with ThreadPoolExecutor(threads) as executor:
            done = [each for found in executor.map(work, range(threads)) for each in found]
        taken = time.perf_counter() - start
        stop.set()
        watcher.join()
        return {
            "requests": len(done),
            "per_second": len(done) / taken,
            "wrong": sum(not right for _, _, right in done),
            "wakes": len(woken),
            "bytes_brought_back": sum(woken),
            "times_over_limit": over,
            "awake": spread([seconds for seconds, asleep, _ in done if not asleep]),
            "asleep": spread([seconds for seconds, asleep, _ in done if asleep]),
        }

    def _watch_wakes(self) -> tuple[list[int], threading.local]:
        """Bytes of every time weights are brought in; `woke` becomes true in the thread that does it."""
        from glake_infer.residency import Holding, Residency

        table, woken, mine = Residency.of(self.pool), list[int](), threading.local()
        plain = table._bring

        def bring(holding: Holding, chunks: list[int]) -> None:
            plain(holding, chunks)
            mine.woke = True
            regions = [(chunk, table._owners[chunk][0]) for chunk in chunks]
            woken.append(sum(region.sizes[region.chunks.index(chunk)] for chunk, region in regions))

        table._bring = bring  # type: ignore[method-assign]
        return woken, mine


def child(side: str, device: str, limit: int) -> None:
    """Call the worker's methods that stdin names, pickled; answer with (whether it went well, what it returned)."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = Worker(side, device, limit)
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, getattr(worker, name)(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


class Side:
    """A process with a `Worker`."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, *command: Any) -> Any:
        """Return what a method of the worker returned; the first name is its name."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(command, self.process.stdin)
        self.process.stdin.flush()
        well, answer = pickle.load(self.process.stdout)
        if not well:
            raise RuntimeError(f"{command[0]} failed in another process:\n{answer}")
        return answer


@dataclass(frozen=True)
class Setup:
    """Where, with what sizes, and in which folder a scene is run."""

    device: str
    scale: float
    folder: Path

    @property
    def tiny(self) -> bool:
        """Whether tiny models take the place of the large ones."""
        return self.scale < 0.1

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def times(self, count: int, least: int) -> int:
        """A count, fewer at a smaller scale."""
        return max(least, min(count, round(count * self.scale)))

    @contextlib.contextmanager
    def side(self, side: str, limit: int = 0, workspace: str | None = None) -> Iterator[Side]:
        """A side's process, until the block ends. `workspace` is cuBLAS's setting."""
        command = [sys.executable, "-m", "benchmarks.residency", "--child", side, "--device", self.device]
        environment = {**os.environ, "GLAKE_STORE": str(self.store.root)}
        environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if workspace:
            environment["CUBLAS_WORKSPACE_CONFIG"] = workspace
        made = Side([*command, "--limit", str(limit)], environment)
        try:
            made.ask("memory")  # it is there, and has its context, before another begins
            yield made
        finally:
            made.process.communicate(timeout=120)

    def write(self, specs: Sequence[Any]) -> list[str]:
        """Write models as packages, four at a time."""
        from glake_infer.models import zoo

        def write(number: int) -> str:
            return zoo.convert(specs[number], self.folder / f"{number}.glake", store=self.store).package

        first = write(0)  # what the others share with it is there then
        with ThreadPoolExecutor(4) as executor:
            return [first, *executor.map(write, range(1, len(specs)))]


def same(answer: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether all outputs are the same bits."""
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(answer, other, strict=True))


def difference(answer: Sequence[Any], other: Sequence[Any]) -> float:
    """The largest difference in any output, relative to the largest value of that output of `other`."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(answer, other, strict=True)
    ]
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)) for a, b in pairs)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Count, median and 95th percentile."""
    if not seconds:
        return {"count": 0}
    p50, p95 = np.percentile(seconds, (50, 95))
    return {"count": len(seconds), "p50": float(p50), "p95": float(p95)}


def by_turns(sides: dict[str, Side], models: int, feeds: dict[str, Any], turns: int) -> dict[str, float]:
    """Median seconds of a run of each side; they take turns, with another one first each time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(turns + 3):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds, _ = sides[name].ask("run", turn % models, feeds, False)
            if turn >= 3:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def family(at: Setup) -> dict[str, Any]:
    """Fine-tunes of one trunk, all loaded: the memory of their weights and of the process, latency, answers."""
    import glake_infer as gi
    from glake_infer.models import zoo

    name = "bert-tiny" if at.tiny else "bert-base"
    specs = [zoo.spec(name, head=f"task {n}", labels=2 + 3 * n) for n in range(at.times(8, 2))]
    files = [str(zoo.write(spec, at.folder / f"{n}.onnx")) for n, spec in enumerate(specs)]
    packages = [gi.convert(file, store=at.store).package for file in files]
    feeds = [
        zoo.feeds(specs[0], seed, batch=batch, length=length)
        for seed, (batch, length) in enumerate(((1, 16), (8, 128), (4, 384)))
    ]
    answers: dict[str, list[Any]] = {}
    memory, held = {}, {}

    def begin(side: Side, label: str, paths: list[str]) -> None:
        for path in paths:
            side.ask("load", path)
        answers[label] = [side.ask("run", n, feed)[1] for feed in feeds for n in range(len(paths))]
        memory[label] = side.ask("memory")

    with at.side("ours") as ours:
        begin(ours, "ours", packages)
        held = ours.ask("weights")
        with at.side("plain") as plain:
            begin(plain, "plain", files)
            cases = []
            for feed in feeds:
                sides = {"ours": ours, "plain": plain}
                found = by_turns(sides, len(specs), feed, at.times(60, 4))
                ratio = found["ours"] / found["plain"]
                shape = list(feed["input_ids"].shape)
                cases.append({"shape": shape, "ours": found["ours"], "twin": found["plain"], "ratio": ratio})
    with at.side("graph") as graph:
        begin(graph, "graph", packages)
    return {
        "model": name,
        "models": len(specs),
        **held,
        "held_ratio": held["held_by_driver"] / held["distinct_bytes"],
        "memory": memory["ours"],
        "memory_twin": memory["plain"],
        "memory_ratio": memory["ours"] / memory["plain"],
        "cases": cases,
        "ratio": statistics.median(case["ratio"] for case in cases),
        "difference": max(map(difference, answers["ours"], answers["plain"])),
        "bit_for_bit_of_same_graph": all(map(same, answers["ours"], answers["graph"])),
    }


def decoder(at: Setup) -> dict[str, Any]:
    """A large decoder and variants of it in one Runtime, in turn and at once; one of them alone is the twin."""
    from glake_infer.models import zoo

    name = "llama-tiny-fp16" if at.tiny else "llama-7b-fp16"
    sizes = {} if at.tiny else {"layers": at.times(32, 2)}
    specs = [
        zoo.spec(name, variant=n, changed=0.05 if n else 0.0, **sizes) for n in range(2 if at.tiny else 4)
    ]
    packages, numbers = at.write(specs), range(len(specs))
    feeds = zoo.feeds(specs[0], 1, batch=1, length=16)
    turns = at.times(10, 2)
    with at.side("ours", limit=max(GIB // 4, int(24 * GIB * at.scale))) as ours:
        ours.ask("sample")
        loads = [ours.ask("load", package) for package in packages]
        firsts = [ours.ask("run", n, feeds)[1] for n in numbers]
        steady = all(same(ours.ask("run", n, feeds)[1], firsts[n]) for _ in range(turns) for n in numbers)
        at_once = all(same(answer, firsts[n]) for n, answer in ours.ask("together", feeds, turns, 2))
        highest, stats, held = ours.ask("sampled"), ours.ask("stats"), ours.ask("weights")
        woken = all(same(ours.ask("run", n, feeds)[1], firsts[n]) for n in numbers)
    chosen = numbers[-1]
    with at.side("graph") as graph:
        load_twin = graph.ask("load", packages[chosen])
        alone = graph.ask("run", 0, feeds)[1]
        memory_twin = graph.ask("memory")
    return {
        "model": name,
        "models": len(specs),
        **held,
        "held_ratio": held["held_by_driver"] / held["distinct_bytes"],
        "memory_highest": highest,
        "memory_twin_of_one": memory_twin,
        "peak_reserved": stats["peak_reserved"],
        "limit": stats["limit"],
        "loads": loads,
        "load_twin": load_twin,
        "same_in_turn": steady,
        "same_at_once": at_once,
        "same_after_sleep": woken,
        "variants_differ": not any(same(firsts[a], firsts[b]) for a in numbers for b in numbers if a < b),
        "bit_for_bit_of_same_graph": same(firsts[chosen], alone),
        "difference": difference(firsts[chosen], alone),
    }


def sleep(at: Setup) -> dict[str, Any]:
    """Suspend and resume a model of few large weights, beside a plain copy of as many bytes over the same link."""
    from glake_infer.models import zoo

    spec = zoo.spec("llama-tiny-fp16")
    if not at.tiny:  # 10 GiB in five layers
        large = {"hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 64}
        spec = zoo.spec("llama-7b-fp16", layers=at.times(5, 1), **large)
    (package,) = at.write([spec])
    feeds = zoo.feeds(spec, 1, batch=1, length=16)
    result: dict[str, Any] = {}
    for host_copy in ("store", "pinned"):
        with at.side("ours") as ours:
            load = ours.ask("load", package, host_copy)
            first = ours.ask("run", 0, feeds)[1]
            naps, twins, right = [], [], True
            for _ in range(at.times(8, 5)):
                naps.append(ours.ask("nap"))
                right &= same(ours.ask("run", 0, feeds)[1], first)
                twins.append(ours.ask("link", naps[-1]["bytes"]))
            about = ours.ask("about")
        twin = statistics.median(twins)
        result[host_copy] = {
            "load": load,
            "bytes": naps[0]["bytes"],
            **about,
            "suspend": statistics.median(nap["suspend"] for nap in naps),
            "suspend_max": max(nap["suspend"] for nap in naps),
            "freed_at_return": min(nap["freed"] for nap in naps),
            "resume": statistics.median(nap["resume"] for nap in naps),
            "resume_max": max(nap["resume"] for nap in naps),
            "twin": twin,
            "ratio": statistics.median(nap["resume"] for nap in naps) / twin,
            "gib_per_second": naps[0]["bytes"] / GIB / statistics.median(nap["resume"] for nap in naps),
            "first_run_right": right,
        }
    return {**result, "making_the_copy": result["pinned"]["load"] - result["store"]["load"]}


def twenty(at: Setup) -> dict[str, Any]:
    """Models of about 1 GiB each under a limit for eight of twenty, random requests from four threads."""
    from glake_infer.models import zoo

    options = {"name": "bert-tiny"} if at.tiny else {"name": "bert-xl", "layers": 4}
    specs = [zoo.spec(**options, seed=n) for n in range(at.times(20, 4))]
    total = sum(zoo.build(spec).weights.total_bytes for spec in specs)
    packages = at.write(specs)
    feeds = [zoo.feeds(spec, n, batch=2, length=64) for n, spec in enumerate(specs)]
    with at.side("ours", limit=8 * GIB if at.scale >= 1 else total * 8 // 20) as ours:
        for package in packages:
            ours.ask("load", package)
        found = ours.ask("requests", feeds, max(2.0, 60 * min(1.0, at.scale)), 4)
        stats = ours.ask("stats")
    stats.pop("weights")
    return {"models": len(specs), "weight_bytes": total, **found, **stats}


def cycles(at: Setup) -> dict[str, Any]:
    """A small model that sleeps and wakes over and over: what stays behind."""
    from glake_infer.models import zoo

    spec = zoo.spec("bert-tiny" if at.tiny else "bert-small")
    (package,) = at.write([spec])
    with at.side("ours") as ours:
        ours.ask("load", package)
        found: dict[str, Any] = ours.ask("cycles", at.times(1000, 20), zoo.feeds(spec, 1))
    return {"model": spec.name, **found}


def fixed(at: Setup) -> dict[str, Any]:
    """What a session costs beside weights and activations, and how fast it is, by cuBLAS's workspace."""
    from glake_infer.models import zoo

    name = "bert-tiny" if at.tiny else "bert-base"
    specs = [zoo.spec(name, head=f"task {n}") for n in range(at.times(4, 2))]
    packages = at.write(specs)
    file = str(zoo.write(specs[0], at.folder / "plain.onnx"))
    feeds = [
        zoo.feeds(specs[0], seed, batch=batch, length=length)
        for seed, (batch, length) in enumerate(((1, 16), (8, 128), (32, 128)))
    ]
    sides: dict[str, Side] = {}
    costs: dict[str, Any] = {}
    workspaces = WORKSPACES[: 2 if at.tiny else None]
    with contextlib.ExitStack() as stack:
        for workspace in (*workspaces, "plain"):
            label, plain = workspace or "unset", workspace == "plain"
            made = at.side("plain") if plain else at.side("ours", workspace=workspace)
            side = sides[label] = stack.enter_context(made)
            loaded, ran = [side.ask("outside")], []
            for number, package in enumerate(packages):
                side.ask("load", file if plain else package)
                loaded.append(side.ask("outside"))
                for feed in feeds:
                    side.ask("run", number, feed, False)
                ran.append(side.ask("outside"))
                loaded[-1] -= ran[-2] if number else loaded[0]  # what this load took
            taken = [after - before for before, after in zip([loaded[0], *ran], ran, strict=False)]
            costs[label] = {
                "before": loaded[0],
                "by_load": loaded[1:],
                "by_load_and_runs": taken,
                "of_a_further_session": statistics.median(taken[1:]),
                "of_a_further_thread": side.ask("further_thread", 0, feeds[1], 5),
            }
        cases = [by_turns(sides, len(specs), feed, at.times(80, 4)) for feed in feeds]
    shapes = [list(feed["input_ids"].shape) for feed in feeds]
    return {
        "model": name,
        "sessions": len(specs),
        "weight_bytes_of_one": zoo.build(specs[0]).weights.total_bytes,  # which the twin's figures contain
        "bytes_outside_the_pool": costs,
        "cases": [
            {
                "shape": shape,
                "seconds": found,
                "ratio_to_unset": {label: found[label] / found["unset"] for label in found},
            }
            for shape, found in zip(shapes, cases, strict=True)
        ],
    }


SCENES: dict[str, Callable[[Setup], dict[str, Any]]] = {
    scene.__name__: scene for scene in (family, decoder, sleep, twenty, cycles, fixed)
}


def main() -> None:
    """Record one line per scene."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument(
        "--folder", help="where models are written for as long as a scene lasts; up to 40 GiB"
    )
    parser.add_argument("--child")
    parser.add_argument("--limit", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.device, arguments.limit)
        return
    for name in arguments.scene:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found = SCENES[name](Setup(arguments.device, arguments.scale, Path(folder)))
        about = {"scene": name, "device": arguments.device, "scale": arguments.scale}
        record("residency", {**about, **found, "took": time.perf_counter() - start})


if __name__ == "__main__":
    main()
