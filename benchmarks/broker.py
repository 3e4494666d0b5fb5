"""One copy of every weight for all processes of a machine: memory, latency, starts and limits, beside their twins.

    python -m benchmarks.broker --device cuda:0 [--scene NAME ...] [--scale 1.0] [--folder DIR] [--json]

Every process is one of its own, started by `python -m benchmarks.broker worker SIDE`, and imports what its side needs and
no more. Those that are compared take turns; those that work at once begin at the same moment. TF32 is off and cuDNN's
algorithms are the default ones; on the CPU ONNX Runtime's idle threads sleep, on every side.

Memory is counted from outside. On a GPU: what its driver has free before the processes begin, less what it has free when
all have loaded and run, as a process beside them sees it, which has a context and does nothing. On the CPU: the
proportional set sizes (smaps_rollup) of all processes and the broker, and the bytes of their memfds that nobody has mapped;
what is mapped from files is touched, and the C library gives back what is free. "Empty" processes have Python, NumPy and
ONNX Runtime, on a GPU a context, and one plain session over y = Relu(x) of four numbers that was run once; "bare" ones have
on a GPU the context alone, on the CPU only Python and NumPy.

`--device cpu --scale 0.02` tries everything with tiny models; what the figures say is nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.plain import SETTINGS, plain_session
from benchmarks.record import record
from benchmarks.workers import Process, serve

if TYPE_CHECKING:
    from glake_infer.holding import Holding
    from glake_infer.sharing.status import DeviceStatus, MachineStatus

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
OURS = ("glake", "broker")
POPULATE_READ = 22  # MADV_POPULATE_READ
INTERVAL = 0.01  # seconds between samples
Feeds = dict[str, Any]


class Worker:
    """A process: `Process.ask` calls these methods.

    "bare", "empty": see the module; "meter": counts the GPU's memory; "maker": writes models; "plain": ONNX files on ONNX
    Runtime; "graph": the graphs of packages on ONNX Runtime; "glake": packages on a pool, "broker": on one with a broker.
    """

    def __init__(self, side: str, device: str, sharing: str, broker: str, limit: int, runtime: bool) -> None:
        self.side, self.device, self.sharing, self.broker = side, device, sharing, broker
        self.limit, self.has_runtime = limit, runtime
        self.cuda, self.index = device != "cpu", int(device.partition(":")[2] or 0)
        if self.cuda and side != "maker":
            from cuda.bindings import runtime as driver

            driver.cudaSetDevice(self.index)
            driver.cudaFree(0)
            self.base = self.free()
        self.models, self.runs = list[Any](), list[Callable[[Feeds], list[Any]]]()
        self.feeds, self.expected = list[Feeds](), list[list[Any]]()
        self.holdings, self.uses = list[Any](), list[float]()
        self.pool: Any = None
        self.runtime: Any = None
        self.stop = threading.Event()
        self.highest = self.samples = 0
        if side in ("empty", "plain", "graph", *OURS):
            self.ort = self.onnxruntime()
        if side in OURS:
            self.note_uses()

    def onnxruntime(self) -> Any:
        """ONNX Runtime, its CUDA libraries loaded on a GPU."""
        if self.cuda:
            from glake_infer.allocators.attach import require_cuda_provider

            return require_cuda_provider()
        import onnxruntime

        return onnxruntime

    def note_uses(self) -> None:
        """Import what a load needs, and note when a use of weights has begun."""
        from glake_infer.holding import Holding
        from glake_infer.models import load, runtime  # noqa: F401

        enter = Holding.__enter__

        def noted(holding: Holding) -> Holding:
            found = enter(holding)
            self.uses.append(time.perf_counter())
            return found

        Holding.__enter__ = noted  # type: ignore[method-assign]

    def ready(self) -> None:
        """The process is there."""

    # The GPU's memory.

    def free(self) -> int:
        """Bytes that the GPU has free, as its driver counts."""
        from glake_infer import cuda

        return cuda.free_memory(self.index)

    def gone(self) -> int:
        """Bytes that went since this process has its context."""
        return self.base - self.free()

    def watch(self) -> None:
        """Begin to look at that over and over."""

        def work() -> None:
            while not self.stop.wait(INTERVAL):
                self.highest = max(self.highest, self.gone())
                self.samples += 1

        self.stop.clear()
        self.highest = self.samples = 0
        threading.Thread(target=work, daemon=True).start()

    def watched(self) -> dict[str, int]:
        """The most that was seen."""
        self.stop.set()
        return {"highest": self.highest, "samples": self.samples}

    # Models.

    def make(self, specs: Sequence[dict[str, Any]], folder: str, files: bool) -> list[tuple[str, str]]:
        """Write models; returns (ONNX file, package) of each. Without `files` there are packages alone."""
        from benchmarks.residency import first_then_four
        from glake_infer.models import zoo
        from glake_infer.models.convert import convert
        from glake_infer.models.load import load
        from glake_infer.pool import Pool
        from glake_infer.store import Store

        store = Store()
        made = [zoo.spec(**spec) for spec in specs]

        def write(number: int) -> str:
            if files:
                file = zoo.write(made[number], Path(folder) / f"{number}.onnx")
                return str(convert(file, store=store).package)
            return str(zoo.convert(made[number], Path(folder) / f"{number}.glake", store=store).package)

        packages = first_then_four(write, range(len(made)))
        if not self.cuda:  # prepared for this machine, as after the first load there
            with Pool("cpu") as pool:
                for package in packages:
                    for sharing in ("fast", "lean"):
                        load(package, pool, sharing=sharing, store=store).close()  # type: ignore[arg-type]
        return [(str(Path(folder) / f"{number}.onnx"), package) for number, package in enumerate(packages)]

    def trivial_model(self, path: str) -> None:
        """Write y = Relu(x) of four numbers."""
        from onnx import TensorProto, helper, save

        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "trivial", [x], [y])
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)

    def random_feeds(self, spec: dict[str, Any], shapes: Sequence[tuple[int, int]]) -> list[Feeds]:
        """Feeds by batch and length."""
        from glake_infer.models import zoo

        made = zoo.spec(**spec)
        return [zoo.feeds(made, seed, batch=b, length=n) for seed, (b, n) in enumerate(shapes)]

    def session(self, path: str) -> Any:
        """A session of ONNX Runtime as it is."""
        options = self.ort.SessionOptions()
        quieten(options)
        index = self.index if self.cuda else None
        return plain_session(options, path, index, of_package=self.side == "graph")

    def trivial(self, path: str) -> None:
        """Make a plain session over the trivial model, and run it."""
        side, self.side = self.side, "plain"
        session = self.session(path)
        session.run(None, {"x": np.ones(4, np.float32)})
        self.models.append(session)
        self.side = side

    def open(self) -> None:
        """Make the pool, unless it is there, or a Runtime with one; with a broker, connect."""
        if self.pool is not None:
            return
        from glake_infer.models.runtime import Runtime
        from glake_infer.pool import Pool

        broker = self.broker if self.side == "broker" else "off"
        if self.has_runtime:
            self.runtime = Runtime(self.limit or None, device=self.device, broker=broker)
            self.pool = self.runtime.pool
        else:
            self.pool = Pool(self.device, self.limit or None, broker=broker)

    def open_once(self) -> None:
        """Make the device's pool and end it, without a broker: the next one takes over what is beneath it."""
        from glake_infer.pool import Pool

        Pool(self.device, broker="off").close()

    def load(self, path: str, begin: float = 0.0) -> dict[str, float]:
        """Make one more session; returns the seconds until there was a pool, weights in use, and a session."""
        wait_until(begin)
        self.uses.clear()
        start = time.perf_counter()
        seconds = dict[str, float]()
        if self.side in OURS:
            self.open()
            seconds["connected"] = time.perf_counter() - start
            model = self.loader()(path)
            seconds["mapped"] = self.uses[0] - start
            self.models.append(model)
            self.holdings.append(model._holding)
            self.runs.append(lambda feeds: list(model.run(feeds).values()))
        else:
            session = self.session(path)
            self.runs.append(lambda feeds: list(session.run(None, feeds)))
        return {**seconds, "loaded": time.perf_counter() - start}

    def loader(self) -> Callable[[str], Any]:
        """Loads a package, with the options that all sides have."""
        from glake_infer.models.load import load

        make = self.runtime.load if self.runtime else functools.partial(load, pool=self.pool)
        settings = SETTINGS if self.cuda else None
        return functools.partial(make, sharing=self.sharing, configure=quieten, provider_options=settings)

    def first(self, path: str, begin: float = 0.0) -> dict[str, float]:
        """Load and run; the seconds until there was an answer too."""
        wait_until(begin)
        start = time.perf_counter()
        seconds = self.load(path)
        self.runs[-1](self.feeds[0])
        return {**seconds, "answered": time.perf_counter() - start}

    def hold(self, path: str) -> Holding:
        """The weights of a package, as a load holds them, without a session."""
        from glake_infer.models import load as loading
        from glake_infer.models.package import Package
        from glake_infer.models.session_model import SessionModel
        from glake_infer.store import Store

        package = Package(Path(path), Store())
        sharing: Any = self.sharing
        model = SessionModel(package, self.pool, sharing, "store", maps=loading.maps_weights(self.pool))
        variant = loading._variant(package, self.pool, sharing)
        prepared = loading._prepared(model, variant, "all", self.ort.SessionOptions)
        return model._residency.hold(loading._wanted(model, prepared), model._number)

    def attach_all(self, paths: Sequence[str]) -> dict[str, float]:
        """Connect and begin a use of the weights of each package in turn; the seconds until the last one's."""
        start = time.perf_counter()
        self.open()
        connected = time.perf_counter() - start
        for path in paths:
            self.holdings.append(self.hold(path))
            with self.holdings[-1]:
                mapped = time.perf_counter() - start
        return {"connected": connected, "mapped": mapped}

    def right(self) -> bool:
        """Whether everything that is held has the bytes of its files."""
        found = True
        for holding in self.holdings:
            with holding:
                for digest, address in holding.addresses.items():
                    wanted = holding._table._entries[digest].wanted
                    expected = np.fromfile(wanted.folder.path(digest), np.uint8, wanted.mapped)
                    found &= np.array_equal(self.bytes_at(address, wanted.mapped), expected)
        return found

    def bytes_at(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """What lies on the device."""
        if not size:
            return np.empty(0, np.uint8)
        if not self.cuda:
            return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        from glake_infer import cuda

        found = np.empty(size, np.uint8)
        cuda.copy_to_host(self.index, address, found)
        return found

    # Runs.

    def take_feeds(self, feeds: list[Feeds]) -> None:
        """Keep what the runs get."""
        self.feeds = feeds

    def answers(self) -> list[list[Any]]:
        """Run every model on every feed."""
        return [run(feeds) for run in self.runs for feeds in self.feeds]

    def run(self, feeds: int, count: int, begin: float = 0.0) -> list[float]:
        """Run the first model; returns the seconds of each run."""
        wait_until(begin)
        found = []
        for _ in range(count):
            start = time.perf_counter()
            self.runs[0](self.feeds[feeds])
            found.append(time.perf_counter() - start)
        return found

    def expect(self, answers: list[list[Any]]) -> None:
        """Keep what the models have to answer to the first feeds."""
        self.expected = answers

    def turn(self, rounds: int, begin: float = 0.0) -> dict[str, float]:
        """Run every model in turn, several times; each answer is compared."""
        wait_until(begin)
        start, wrong = time.perf_counter(), 0
        for _ in range(rounds):
            for run, expected in zip(self.runs, self.expected, strict=True):
                wrong += not same(run(self.feeds[0]), expected)
        taken = time.perf_counter() - start
        return {"wrong": wrong, "runs": rounds * len(self.runs), "seconds": taken}

    # Coming and going.

    def settle(self, folder: str) -> None:
        """Touch what is mapped from the folder's files, and give back what the heap does not need."""
        from glake_infer.process_memory import release_unused_heap

        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1].startswith("r") and fields[5].startswith(f"{folder}/"):
                first, end = (int(address, 16) for address in fields[0].split("-"))
                libc.madvise(first, end - first, POPULATE_READ)
        release_unused_heap()

    def weights(self) -> int:
        """Bytes of weights in the pool."""
        return int(self.pool.stats().weights)

    def trim(self) -> None:
        """Give back what the pool does not need."""
        if self.pool is not None:
            self.pool.trim()

    def cycles(self, paths: Sequence[str], count: int) -> int:
        """Make the pool, use weights of each package, end it, over and over; each tenth time with sessions and runs.

        Returns how many answers were wrong.
        """
        from glake_infer.process_memory import release_unused_heap

        wrong = 0
        for number in range(count):
            self.open()
            if number % 10:
                for path in paths:
                    with contextlib.closing(self.hold(path)) as holding, holding:
                        pass
            else:
                answers = []
                for path in paths:
                    with self.loader()(path) as model:
                        answers.append(list(model.run(self.feeds[0]).values()))
                self.expected = self.expected or answers
                wrong += sum(not same(a, b) for a, b in zip(answers, self.expected, strict=True))
            self.pool.close()
            self.pool = None
            self.uses.clear()
        release_unused_heap()
        return wrong

    def close(self) -> None:
        """End the models, then the pool, and say goodbye to the broker."""
        self.runs.clear()
        for each in (*self.models, *self.holdings):
            if hasattr(each, "close"):
                each.close()
        self.models.clear()
        self.holdings.clear()
        if self.runtime is not None:
            self.runtime.close()
        elif self.pool is not None:
            self.pool.close()


def quieten(options: Any) -> None:
    """Idle threads sleep at once: processes take turns, and spinning ones would slow the others."""
    options.add_session_config_entry("session.force_spinning_stop", "1")


def wait_until(moment: float) -> None:
    """Until time.monotonic(), the same in all processes, is there."""
    time.sleep(max(0.0, moment - time.monotonic()))


def same(answer: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether all outputs are the same bits."""
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(answer, other, strict=True))


def difference(answer: Sequence[Any], other: Sequence[Any]) -> float:
    """The largest difference in any output, relative to the largest value of that output of `other`."""
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(answer, other, strict=True)]
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)) for a, b in pairs)


def ask(processes: Sequence[Process], *command: Any) -> list[Any]:
    """Let all call a method, at the same time."""
    for process in processes:
        process.send(*command)
    return [process.receive() for process in processes]


def soon() -> float:
    """A moment at which all can begin together."""
    return time.monotonic() + 0.05


@dataclass(frozen=True)
class Mode:
    """A way to run a model: a worker's side, and how weights are shared."""

    name: str
    side: str
    sharing: str = "fast"


@dataclass
class Broker:
    """A broker that runs, and in the end what it had to complain of: kinds of events, and how often."""

    socket: Path
    pid: int
    complaints: dict[str, int] = field(default_factory=dict)

    def status(self) -> MachineStatus:
        """All that it sees."""
        from glake_infer.window.observe import observe

        return observe(self.socket)

    def device(self) -> DeviceStatus:
        """Its only device."""
        (found,) = self.status().devices
        return found


@dataclass(frozen=True)
class Setup:
    """Where, with what sizes, and in which folder a scene is run."""

    device: str
    scale: float
    folder: Path

    @property
    def cuda(self) -> bool:
        """Whether on a GPU."""
        return self.device != "cpu"

    @property
    def tiny(self) -> bool:
        """Whether tiny models and feeds take the place of the large ones."""
        return self.scale < 0.1

    def times(self, count: int, least: int) -> int:
        """A count, fewer at a smaller scale."""
        return max(least, min(count, round(count * self.scale)))

    @property
    def modes(self) -> list[Mode]:
        """Plain ONNX Runtime, then each way of ours without and with a broker."""
        if self.cuda:
            return [Mode("plain", "plain"), Mode("glake", "glake"), Mode("broker", "broker")]
        ways = ("fast", "lean")
        ours = [
            Mode(f"{way}{more}", side, way)
            for way in ways
            for side, more in zip(OURS, ("", ", broker"), strict=True)
        ]
        return [Mode("plain", "plain"), *ours]

    def without_broker(self, mode: Mode) -> str:
        """The name of the mode that is the same without a broker."""
        return next(each.name for each in self.modes if each.side == "glake" and each.sharing == mode.sharing)

    @property
    def sharing(self) -> str:
        """That in which the broker has all weights: on the CPU `fast` leaves the prepacked ones to files."""
        return "fast" if self.cuda else "lean"

    def fine_tune(self, number: int) -> dict[str, Any]:
        """A BERT-base of a family, smaller at a smaller scale."""
        sizes = {"name": "bert-tiny"} if self.tiny else {"name": "bert-base", "layers": self.times(12, 2)}
        return {**sizes, "head": f"task {number}", "labels": 2 + 3 * number}

    def large(self, number: int) -> dict[str, Any]:
        """A model of 1 GiB, smaller at a smaller scale, that has nothing in common with the others."""
        if self.tiny:
            return {"name": "bert-mini", "seed": number}
        return {"name": "bert-xl", "layers": 4 if self.scale >= 1 else 1, "seed": number}

    # Processes.

    def environment(self) -> dict[str, str]:
        """Of all processes."""
        unset = (WORKSPACE, "GLAKE_BROKER", "GLAKE_MONITOR")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        return {**kept, "GLAKE_STORE": str(self.folder / "store")}

    @contextlib.contextmanager
    def group(
        self, side: str, count: int = 1, *, sharing: str = "fast", broker: Broker | None = None, limit: int = 0,
        runtime: bool = False,
    ) -> Iterator[list[Process]]:  # fmt: skip
        """Processes of a side, until the block ends."""
        command = [sys.executable, "-m", "benchmarks.broker", "worker", side, "--device", self.device]
        command += ["--sharing", sharing, "--broker", str(broker.socket) if broker else ""]
        command += ["--limit", str(limit), *(["--runtime"] if runtime else [])]
        processes, failed = list[Process](), True
        try:
            for _ in range(count):
                processes.append(Process(command, self.environment()))
            ask(processes, "ready")
            yield processes
            failed = False
        finally:
            for each in processes:
                if failed:
                    each.process.kill()
                with contextlib.suppress(OSError):
                    each.process.stdin.close()  # type: ignore[union-attr]
            for each in processes:
                each.process.wait(120)
                each.process.stdout.close()  # type: ignore[union-attr]

    @contextlib.contextmanager
    def broker(self, limit: int = 0) -> Iterator[Broker]:
        """A broker, until the block ends."""
        from glake_infer.window.observe import NobodyThereError

        with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
            made, log = Path(folder) / "broker.sock", Path(folder) / "log"
            command = [sys.executable, "-m", "glake_infer.cli", "broker", "--socket", str(made), "--json"]
            command += ["--exit-when-idle", "120"]  # should this process be killed
            command += ["--limit", str(limit)] if limit else []
            with log.open("wb") as output:
                process = subprocess.Popen(command, env=self.environment(), stdout=output, stderr=output)
            broker = Broker(made, process.pid)
            try:
                while True:
                    try:
                        broker.status()
                        break
                    except NobodyThereError:
                        if process.poll() is not None:
                            raise RuntimeError(f"the broker ended:\n{log.read_text()}") from None
                        time.sleep(0.02)
                yield broker
            finally:
                process.terminate()
                process.wait(60)
                events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
                for event in events:
                    if event["event"] in ("wrong", "error", "lost", "refused", "full"):
                        broker.complaints[event["event"]] = broker.complaints.get(event["event"], 0) + 1
                        print(f"broker: {event['event']}: {event['text']}", file=sys.stderr)

    @contextlib.contextmanager
    def maybe_broker(self, wanted: bool) -> Iterator[Broker | None]:
        """A broker where one is wanted."""
        if wanted:
            with self.broker() as broker:
                yield broker
        else:
            yield None

    def make(
        self, specs: Sequence[dict[str, Any]], *, files: bool, folder: str = "models"
    ) -> list[tuple[str, str]]:
        """Write models, and the trivial one; see `Worker.make`."""
        (target := self.folder / folder).mkdir()
        with self.group("maker") as (maker,):
            maker.ask("trivial_model", self.trivial)
            made: list[tuple[str, str]] = maker.ask("make", specs, str(target), files)
            return made

    @property
    def trivial(self) -> str:
        """The trivial model's file."""
        return str(self.folder / "trivial.onnx")

    def feeds(self, spec: dict[str, Any], *shapes: tuple[int, int]) -> list[Feeds]:
        """Random feeds by batch and length."""
        kept = [(min(b, 2), min(n, 32)) if self.tiny else (b, n) for b, n in shapes]
        with self.group("maker") as (maker,):
            found: list[Feeds] = maker.ask("random_feeds", spec, kept)
            return found

    @contextlib.contextmanager
    def meter(self) -> Iterator[Callable[[], int]]:
        """Counts what is gone of a GPU's memory; on the CPU always 0."""
        if not self.cuda:
            yield lambda: 0
            return
        with self.group("meter") as (meter,):
            yield lambda: int(meter.ask("gone"))


# The operating system's figures.

_HEADER = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+) *(.*)$")


def pss(pids: Sequence[int]) -> int:
    """The proportional set sizes of processes."""
    found = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
        found += int(re.search(rb"^Pss: +(\d+)", text, re.MULTILINE)[1]) << 10  # type: ignore[index]
    return found


def memfds(pids: Sequence[int]) -> dict[int, int]:
    """Bytes of the memfds of processes, by inode."""
    found: dict[int, int] = {}
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):  # noqa: PTH208  as fast as can be
                with contextlib.suppress(OSError):
                    if os.readlink(f"{folder}/{name}").startswith("/memfd:"):  # noqa: PTH115
                        status = os.stat(f"{folder}/{name}")  # noqa: PTH116
                        found[status.st_ino] = status.st_blocks * 512
    return found


def counted(pids: Sequence[int]) -> dict[str, int]:
    """Memory of processes: their proportional set sizes, and those bytes of their memfds that nobody has mapped."""
    mapped: dict[int, int] = {}
    for pid in pids:
        inode = 0
        for line in Path(f"/proc/{pid}/smaps").read_bytes().splitlines():
            if header := _HEADER.match(line):
                inode = int(header[1]) if header[2].startswith(b"/memfd:") else 0
            elif inode and line.startswith(b"Pss:"):
                mapped[inode] = mapped.get(inode, 0) + (int(line.split()[1]) << 10)
    held, resident = memfds(pids), pss(pids)
    unmapped = sum(max(0, size - mapped.get(inode, 0)) for inode, size in held.items())
    return {
        "memory": resident + unmapped,
        "pss": resident,
        "memfds": sum(held.values()),
        "unmapped": unmapped,
    }


def kept_by(pid: int) -> dict[str, int]:
    """What a process has: descriptors, threads, and bytes of resident memory."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return {
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(lines["Threads"]),
        "resident": int(lines["VmRSS"].split()[0]) << 10,
        "anonymous": int(lines["RssAnon"].split()[0]) << 10,
    }


# Figures.


@dataclass(frozen=True)
class Figure:
    """A number of one mode, and the twin's. `most`: what the ratio (or without a twin the value) must not exceed."""

    what: str
    mode: str
    value: float
    unit: str
    twin: float | None = None
    ratio: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it keeps within its bound."""
        bounded = self.value if self.ratio is None else self.ratio
        return self.most is None or bounded <= self.most


class Figures:
    """All of a scene."""

    def __init__(self) -> None:
        self.all: list[Figure] = []

    def add(
        self, what: str, mode: str, value: float, unit: str, twin: float | None = None, *,
        ratio: float | None = None, most: float | None = None,
    ) -> None:  # fmt: skip
        """Note one; the ratio is that to the twin's unless it is given."""
        if ratio is None and twin:
            ratio = value / twin
        self.all.append(Figure(what, mode, value, unit, twin, ratio, most))

    def result(self) -> dict[str, Any]:
        """For a JSON line."""
        bounded = [figure for figure in self.all if figure.most is not None]
        return {
            "holds": all(figure.holds for figure in bounded),
            "figures": [{k: v for k, v in asdict(f).items() if v is not None} for f in self.all],
        }


def ready(device: DeviceStatus) -> int:
    """Chunks that are there."""
    return sum(chunk.state == "ready" for chunk in device.chunks)


def medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each key."""
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


# Scenes.


def six(at: Setup) -> dict[str, Any]:
    """Six processes with six fine-tunes of one trunk, and six with the same model: memory, latency, answers."""
    count = 2 if at.tiny else 6
    specs = [at.fine_tune(number) for number in range(count)]
    made = at.make(specs, files=True)
    shapes = [(1, 16), (8, 128), (4, 384)] if at.cuda else [(1, 16), (1, 64)]
    feeds, figures = at.feeds(specs[0], *shapes), Figures()
    with at.meter() as gone:
        base = {side: _nothing_loaded(at, side, count, gone) for side in ("bare", "empty")}
        cases = {
            case: _case(at, case, models, feeds, {side: base[side]["memory"] for side in base}, gone, figures)
            for case, models in (("six fine-tunes", made), ("one model six times", made[:1] * count))
        }
    about = {
        "model": specs[0]["name"],
        "processes": count,
        "shapes": [list(f["input_ids"].shape) for f in feeds],
    }
    return {**about, "base": base, "cases": cases, **figures.result()}


def _case(
    at: Setup, case: str, models: Sequence[tuple[str, str]], feeds: list[Feeds], base: dict[str, int],
    gone: Callable[[], int], figures: Figures,
) -> dict[str, Any]:  # fmt: skip
    found = {mode.name: _memory_of(at, mode, models, feeds, gone) for mode in at.modes}
    latencies = _latencies(at, models, feeds)
    answers = {name: each.pop("answers") for name, each in found.items()}
    if at.cuda:
        graph = _answers_on_graphs(at, models, feeds)
    plain = found["plain"]["memory"]
    for mode in at.modes:
        name, ours = mode.name, found[mode.name]
        most = 0.35 if mode.side == "broker" else None
        figures.add(f"{case}: memory, all of it", name, ours["memory"], "bytes", plain)
        for side, less in base.items():
            label = f"{case}: memory, less {len(models)} {side} processes"
            bound = most if side == "empty" else None
            figures.add(label, name, ours["memory"] - less, "bytes", plain - less, most=bound)
        if mode.side == "plain":
            continue
        for label, times in latencies[name].items():
            most = (
                1.02 if mode.side == "broker" and mode.sharing == "fast" else None
            )  # lean is slow by itself
            figures.add(
                f"{case}: run, {label}", name, times["ours"], "seconds", times["twin"], ratio=times["ratio"], most=most
            )  # fmt: skip
        ours["difference"] = max(map(difference, answers[name], answers["plain"]))
        ours["same_as_plain"] = all(map(same, answers[name], answers["plain"]))
        ours["same_as_without_broker"] = all(map(same, answers[name], answers[at.without_broker(mode)]))
        if at.cuda:
            ours["same_as_plain_on_its_graph"] = all(map(same, answers[name], graph))
    return found


def _nothing_loaded(at: Setup, side: str, count: int, gone: Callable[[], int]) -> dict[str, int]:
    before = gone()
    with at.group(side, count) as processes:
        if side == "empty":
            ask(processes, "trivial", at.trivial)
        ask(processes, "settle", str(at.folder))
        pids = [each.pid for each in processes]
        found = {"memory": gone() - before} if at.cuda else counted(pids)
    _wait_for_exit(gone, before)
    return found


def _wait_for_exit(gone: Callable[[], int], before: int) -> int:
    """Wait until processes that have ended hold nothing any more; returns the bytes that are gone for good."""
    end = time.monotonic() + 15
    while (left := gone() - before) > MIB and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _memory_of(
    at: Setup, mode: Mode, models: Sequence[tuple[str, str]], feeds: list[Feeds], gone: Callable[[], int]
) -> dict[str, Any]:
    """What processes take that have loaded a model each, at the same time, and have run it; and their answers."""
    before = gone()
    with (
        at.maybe_broker(mode.side == "broker") as broker,
        at.group(mode.side, len(models), sharing=mode.sharing, broker=broker) as processes,
    ):
        ask(processes, "take_feeds", feeds)
        begin = soon()
        for process, (file, package) in zip(processes, models, strict=True):
            process.send("load", file if mode.side == "plain" else package, begin)
        loads = [process.receive()["loaded"] for process in processes]
        answers = ask(processes, "answers")
        ask(processes, "settle", str(at.folder))
        pids = [each.pid for each in processes] + ([broker.pid] if broker else [])
        found: dict[str, Any] = {"memory": gone() - before} if at.cuda else counted(pids)
        if mode.side != "plain":
            ask(processes, "trim")
            found["after_trim"] = gone() - before if at.cuda else counted(pids)["memory"]
        found |= {"answers": [each for some in answers for each in some], "loads": loads}
        if broker:
            if not at.cuda:
                found["of_the_broker"] = counted([broker.pid])["pss"]
            device = broker.device()
            found |= {"chunks": ready(device), "weights": device.weights, "loads_of_chunks": device.loads}
    found["left_behind"] = _wait_for_exit(gone, before)
    if broker:
        found["complaints"] = broker.complaints
    return found


def _answers_on_graphs(at: Setup, models: Sequence[tuple[str, str]], feeds: list[Feeds]) -> list[list[Any]]:
    """What plain ONNX Runtime answers on the graphs of packages, in one process, in the order of the models."""
    with at.group("graph") as (process,):
        process.ask("take_feeds", feeds)
        for _, package in models:
            process.ask("load", package)
        found: list[list[Any]] = process.ask("answers")
        return found


def _latencies(
    at: Setup, models: Sequence[tuple[str, str]], feeds: list[Feeds]
) -> dict[str, dict[str, dict[str, float]]]:
    """Of each mode beside plain ONNX Runtime: median seconds of a run, and the median of the ratios of pairs."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with at.group("plain", len(models)) as plain:
        _begin(plain, [file for file, _ in models], feeds)
        for mode in at.modes[1:]:
            with (
                at.maybe_broker(mode.side == "broker") as broker,
                at.group(mode.side, len(models), sharing=mode.sharing, broker=broker) as ours,
            ):
                _begin(ours, [package for _, package in models], feeds)
                shapes = ["x".join(map(str, each["input_ids"].shape)) for each in feeds]
                turns, busy = (48, 1) if at.cuda else (16, 0)
                times = {
                    f"one at a time, {shape}": _take_turns(ours, plain, number, at.times(turns, 2))
                    for number, shape in enumerate(shapes)
                }
                label = f"all at once, {shapes[busy]}"
                times[label] = _all_at_once(ours, plain, busy, at.times(turns // 3, 2), at.times(12, 2))
                found[mode.name] = times
    return found


def _begin(processes: Sequence[Process], paths: Sequence[str], feeds: list[Feeds]) -> None:
    ask(processes, "take_feeds", feeds)
    for process, path in zip(processes, paths, strict=True):
        process.send("load", path)
    for process in processes:
        process.receive()
    for _ in range(2):
        ask(processes, "answers")


def _take_turns(
    ours: Sequence[Process], plain: Sequence[Process], feeds: int, turns: int
) -> dict[str, float]:
    """One process is busy at a time; a turn is three runs, after one that does not count."""
    mine, theirs = list[float](), list[float]()
    for turn in range(turns):
        sides = [(ours, mine), (plain, theirs)]
        for processes, times in sides if turn % 2 else sides[::-1]:
            found = processes[turn % len(processes)].ask("run", feeds, 4)
            times.append(statistics.median(found[1:]))
    return _paired(mine, theirs)


def _all_at_once(
    ours: Sequence[Process], plain: Sequence[Process], feeds: int, turns: int, runs: int
) -> dict[str, float]:
    """All processes of a side are busy, then all of the other."""
    mine, theirs = list[float](), list[float]()
    for turn in range(turns + 1):
        sides = [(ours, mine), (plain, theirs)]
        for processes, times in sides if turn % 2 else sides[::-1]:
            found = [each for some in ask(processes, "run", feeds, runs, soon()) for each in some]
            if turn:
                times.append(statistics.median(found))
    return _paired(mine, theirs)


def _paired(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return {
        "ours": statistics.median(mine), "twin": statistics.median(theirs), "ratio": statistics.median(ratios),
        "turns": len(ratios),
    }  # fmt: skip


def attach(at: Setup) -> dict[str, Any]:
    """A broker holds 10 GiB for a process: another one's time to the last model's weights, and to an answer."""
    count, fresh = at.times(10, 3), 3 if at.tiny else 10
    specs = [at.large(number) for number in range(count)]
    packages = [package for _, package in at.make(specs, files=False)]
    ((file, _),) = at.make(specs[-1:], files=True, folder="last")  # for plain ONNX Runtime
    feeds, figures, facts = at.feeds(specs[0], (2, 64)), Figures(), dict[str, Any](models=count)
    with at.broker() as broker:
        with at.group("broker", sharing=at.sharing, broker=broker) as (holder,):
            holder.ask("take_feeds", feeds)
            facts["loads"] = [holder.ask("load", package)["loaded"] for package in packages]
            expected = holder.ask("answers")[-1]
            before = broker.device()
            plain = _fresh(at, "plain", min(fresh, 3), None, file, feeds)
            glake = _fresh(at, "glake", min(fresh, 3), None, packages[-1], feeds)
            ours = _fresh(at, "broker", fresh, broker, packages[-1], feeds)
            with at.group("broker", fresh, sharing=at.sharing, broker=broker) as processes:
                ask(processes, "open_once")
                every = [process.ask("attach_all", packages) for process in processes]
                facts["all_right"] = processes[-1].ask("right")
            after = broker.device()
        left = broker.device()
    facts |= {
        "weights": before.weights, "right": ours["right"], "same_as_loaded": same(ours["answer"], expected),
        "loaded_again": after.loads - before.loads, "processes_left": len(left.processes),
        "weights_left": left.weights, "complaints": broker.complaints,
    }  # fmt: skip
    figures.add("chunks that the broker holds", "broker", ready(before), "count", most=400)
    figures.add("from connecting: connected", "broker", ours["connected"], "seconds")
    first = "the last model's first weight mapped"
    figures.add(f"from connecting: {first}", "broker", ours["mapped"], "seconds", most=0.2)
    figures.add(f"from connecting: {first}", "glake", glake["mapped"], "seconds")
    figures.add("the same, the slowest process", "broker", ours["slowest"], "seconds")
    for name, found in (("broker", ours), ("glake", glake)):
        figures.add(
            "from connecting: a session has answered", name, found["answered"], "seconds", plain["answered"]
        )
    all_of_them = "from connecting: all models mapped, one after the other"
    figures.add(all_of_them, "broker", medians(every)["mapped"], "seconds", most=None)
    return {**facts, **figures.result()}


def _fresh(
    at: Setup, side: str, count: int, broker: Broker | None, path: str, feeds: list[Feeds]
) -> dict[str, Any]:
    """Fresh processes that attach one after the other; each has its context, and what lies beneath a pool."""
    with at.group(side, count, sharing=at.sharing, broker=broker) as processes:
        ask(processes, "take_feeds", feeds)
        if side in OURS:
            ask(processes, "open_once")
        found = [process.ask("first", path) for process in processes]
        right = all(process.ask("right") for process in processes)
        answers = [process.ask("answers")[0] for process in processes]
    assert all(same(answer, answers[0]) for answer in answers)
    slowest = max(each.get("mapped", 0.0) for each in found)
    return {**medians(found), "slowest": slowest, "right": right, "answer": answers[0]}


def cycles(at: Setup) -> dict[str, Any]:
    """A process comes to the broker and leaves, a thousand times, for a model that another has and one that it makes."""
    specs = [{"name": "bert-tiny" if at.tiny else "bert-small", "seed": seed} for seed in (0, 1)]
    packages = [package for _, package in at.make(specs, files=False)]
    feeds, count = at.feeds(specs[0], (2, 64)), at.times(1000, 40)
    figures, wrong, seconds = Figures(), dict[str, int](), dict[str, float]()
    samples: dict[str, list[dict[str, int]]] = {"broker": [], "client": [], "twin": []}
    with (
        at.meter() as gone,
        at.broker() as broker,
        at.group("glake", sharing=at.sharing) as (twin,),
        at.group("broker", 2, sharing=at.sharing, broker=broker) as (holder, client),
    ):
        holder.ask("load", packages[0])
        for name, process in (("twin", twin), ("client", client)):
            process.ask("take_feeds", feeds)
            start, wrong[name] = time.perf_counter(), 0
            for _ in range(10):
                wrong[name] += process.ask("cycles", packages, count // 10)
                samples[name].append({**kept_by(process.pid), "device": gone()})
                if process is client:
                    time.sleep(0.2)  # the broker has seen it leave
                    samples["broker"].append(kept_by(broker.pid))
            seconds[name] = time.perf_counter() - start
        device = broker.device()
    figures.add("a cycle", "client", seconds["client"] / count, "seconds", seconds["twin"] / count)
    for what, slack in (("descriptors", 0), ("threads", 0), ("resident", 2 * MIB), ("device", 0)):
        if what == "device" and not at.cuda:
            continue
        unit = "bytes" if what in ("resident", "device") else "count"
        more_of_twin = max(0, samples["twin"][-1][what] - samples["twin"][0][what])
        for name, found in samples.items():
            if what in found[0]:
                first, last = found[0][what], found[-1][what]
                most = None if name == "twin" else slack + more_of_twin
                figures.add(f"{what} after {count} cycles", name, last, unit, first)
                figures.add(f"{what} more than after {count // 10}", name, last - first, unit, most=most)
    return {
        "model": specs[0]["name"], "cycles": count, "wrong": wrong, "processes_left": len(device.processes) - 1,
        "loads": device.loads, "hits": device.hits, "complaints": broker.complaints, "samples": samples,
        **figures.result(),
    }  # fmt: skip


def start(at: Setup) -> dict[str, Any]:
    """A second process loads a model that a first one has, the page cache warm; the same by plain ONNX Runtime."""
    spec = at.fine_tune(0)
    made = at.make([spec], files=True)
    ((file, package),) = made
    feeds, count, complaints = at.feeds(spec, (1, 16)), at.times(5, 2), dict[str, int]()
    figures, found, answers = Figures(), dict[tuple[str, str], dict[str, float]](), dict[str, Any]()
    for mode in at.modes:
        path = file if mode.side == "plain" else package
        options: dict[str, Any] = {"sharing": mode.sharing}
        with (
            at.maybe_broker(mode.side == "broker") as broker,
            at.group(mode.side, **options, broker=broker) as (holder,),
        ):
            holder.ask("take_feeds", feeds)
            holder.ask("first", path)
            for state in ("first session", "after another session"):
                with at.group(mode.side, count, **options, broker=broker) as processes:
                    ask(processes, "take_feeds", feeds)
                    if state != "first session":
                        ask(processes, "trivial", at.trivial)
                    found[mode.name, state] = medians([each.ask("first", path) for each in processes])
                    answers.setdefault(mode.name, processes[0].ask("answers")[0])
        if broker:
            complaints |= broker.complaints
    for (name, state), seconds in found.items():
        twin = found["plain", state]
        for what in ("loaded", "answered"):
            figures.add(f"{state} of the process: {what}", name, seconds[what], "seconds", twin[what])
    differing = [
        mode.name for mode in at.modes[1:] if not same(answers[mode.name], answers[at.without_broker(mode)])
    ]
    same_as_plain = {mode.name: same(answers[mode.name], answers["plain"]) for mode in at.modes[1:]}
    return {
        "model": spec["name"], "processes": count, "differ_from_without_broker": differing,
        "same_as_plain": same_as_plain, "complaints": complaints, **figures.result(),
    }  # fmt: skip


class Watch:
    """Looks at the broker and at the processes over and over, from threads of its own."""

    def __init__(self, broker: Broker, pids: Sequence[int], meter: Process | None) -> None:
        self.used, self.memfds, self.pss = list[int](), list[int](), list[int]()
        self.slowest = 0.0  # seconds that the broker took to answer
        self._broker, self._pids, self._meter, self._stop = broker, pids, meter, threading.Event()
        self._failed: list[BaseException] = []
        looks = [self._look_at_broker]
        if not meter:
            looks.append(lambda: self.memfds.append(sum(memfds(self._pids).values())))
            looks.append(lambda: self.pss.append(pss(self._pids)))
        self._threads = [threading.Thread(target=self._loop, args=(look,)) for look in looks]

    def __enter__(self) -> Watch:
        from glake_infer.sharing.channel import Channel
        from glake_infer.sharing.protocol import Hello
        from glake_infer.version import __version__

        self._channel = Channel.connect(self._broker.socket, 10)
        hello = Hello(id=1, release=__version__, pid=os.getpid(), name="observer", device=None)
        self._channel.send(hello)
        self._channel.receive()
        if self._meter:
            self._meter.ask("watch")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()
        self.driver = self._meter.ask("watched") if self._meter else {}
        if self._failed:
            raise self._failed[0]

    def _loop(self, look: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                begun = time.monotonic()
                look()
                self._stop.wait(max(0.0, INTERVAL - (time.monotonic() - begun)))
        except BaseException as error:
            self._failed.append(error)

    def _look_at_broker(self) -> None:
        from glake_infer.sharing.protocol import Done, Ping, Statement, Status

        begun = time.monotonic()
        self._channel.send(Status(id=2))
        while (received := self._channel.receive()) is not None:
            message, _ = received
            if isinstance(message, Ping):
                self._channel.send(Done(to=message.id))
            elif isinstance(message, Statement):
                (device,) = message.status.devices
                self.used.append(device.used)
                self.slowest = max(self.slowest, time.monotonic() - begun)
                return
            else:
                raise RuntimeError(f"the broker answered {message!r}")
        raise RuntimeError("the broker ended the connection")


def budget(at: Setup) -> dict[str, Any]:
    """Two processes whose models together exceed the broker's limit, in turn and at once; the twins have a half each."""
    count, rounds = 4, at.times(6, 2)
    specs = [at.large(number) for number in range(2 * count)]
    packages = [package for _, package in at.make(specs, files=False)]
    feeds, figures, facts = at.feeds(specs[0], (2, 64)), Figures(), dict[str, Any](models=2 * count)
    with at.group("glake", sharing=at.sharing) as (reference,):
        reference.ask("take_feeds", feeds)
        for package in packages:
            reference.ask("load", package)
        expected, weights = reference.ask("answers"), reference.ask("weights")
    limit = weights * 5 // 8 + (512 if at.cuda else 32 if at.tiny else 128) * MIB

    def begin(processes: Sequence[Process]) -> None:
        for number, process in enumerate(processes):
            part = slice(number * count, (number + 1) * count)
            process.ask("take_feeds", feeds)
            process.ask("expect", expected[part])
            for path in packages[part]:
                process.ask("load", path)

    def work(processes: Sequence[Process]) -> dict[str, float]:
        """Seconds of a run when the processes take turns of two rounds, and when they work at once."""
        in_turn = [process.ask("turn", 2) for _ in range(rounds) for process in processes]
        at_once = ask(processes, "turn", 2 * rounds, soon())
        return {
            "wrong": sum(each["wrong"] for each in (*in_turn, *at_once)),
            "runs": sum(each["runs"] for each in (*in_turn, *at_once)),
            "in_turn": sum(each["seconds"] for each in in_turn) / sum(each["runs"] for each in in_turn),
            "at_once": max(each["seconds"] for each in at_once) / sum(each["runs"] for each in at_once),
        }

    with at.group("glake", 2, sharing=at.sharing, limit=limit // 2, runtime=True) as processes:
        begin(processes)
        twin = work(processes)
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(at.group("meter"))[0] if at.cuda else None
        before = meter.ask("gone") if meter else 0
        broker = stack.enter_context(at.broker(limit))
        processes = stack.enter_context(
            at.group("broker", 2, sharing=at.sharing, broker=broker, runtime=True)
        )
        ask(processes, "open")
        with Watch(broker, [broker.pid, *(each.pid for each in processes)], meter) as watch:
            begin(processes)
            watched = work(processes)
        device = broker.device()
        pools = sum(process.pool.reserved - process.pool.shared for process in device.processes)
        outside = (meter.ask("gone") - before - device.weights - pools) if meter else 0
        ours = work(processes)  # nobody looks
        device = broker.device()
    facts |= {
        "weights": weights, "limit": limit, "runs": ours["runs"] + watched["runs"],
        "wrong": ours["wrong"] + watched["wrong"], "twin_wrong": twin["wrong"],
        "samples": len(watch.used), "samples_over_limit": sum(used > limit for used in watch.used),
        "slowest_sample": watch.slowest, "loads": device.loads, "loaded_bytes": device.loaded_bytes,
        "evictions": device.evictions, "evicted_bytes": device.evicted_bytes, "refusals": device.refusals,
        "complaints": broker.complaints,
    }  # fmt: skip
    figures.add("used at the most, by the broker", "broker", max(watch.used), "bytes", limit, most=1)
    if meter:
        highest = watch.driver["highest"] - before - outside
        label = "the same by the driver, less contexts and libraries"
        figures.add(label, "broker", highest, "bytes", limit, most=1)
        facts |= {"contexts_and_libraries": outside, "samples_of_driver": watch.driver["samples"]}
    else:
        figures.add("memfds at the most", "broker", max(watch.memfds), "bytes", limit, most=1)
        figures.add("proportional set sizes at the most", "broker", max(watch.pss), "bytes")
        facts |= {"samples_of_memfds": len(watch.memfds), "samples_of_pss": len(watch.pss)}
    for what in ("in_turn", "at_once"):
        figures.add(f"a run, {what.replace('_', ' ')}", "broker", ours[what], "seconds", twin[what])
    return {**facts, **figures.result()}


SCENES = {scene.__name__: scene for scene in (six, attach, cycles, start, budget)}


def show(name: str, found: dict[str, Any]) -> None:
    """Print a table of the figures, and the facts that have room in a line."""
    from rich.console import Console
    from rich.table import Table

    from glake_infer.cli.output import duration, size

    units: dict[str, Callable[[Any], str]] = {"bytes": size, "seconds": duration, "count": str}
    table = Table(title=f"{name}: {SCENES[name].__doc__}", title_justify="left")
    table.add_column("")
    for heading in ("", "ours", "twin", "ratio", "at most"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    groups: dict[str, list[Figure]] = {}
    for each in found["figures"]:
        groups.setdefault(each["what"], []).append(Figure(**each))
    for what, figures in groups.items():
        for number, figure in enumerate(figures):
            write, bound = units[figure.unit], ""
            if figure.most is not None:
                bound = write(figure.most) if figure.ratio is None else f"{figure.most:g}x"
                bound += " yes" if figure.holds else " [bold red]NO[/]"
            table.add_row(
                "" if number else what,
                figure.mode,
                write(figure.value),
                "" if figure.twin is None else write(figure.twin),
                "" if figure.ratio is None else f"{figure.ratio:.3f}x",
                bound,
                end_section=number == len(figures) - 1,
            )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    facts = [f"{key}: {value}" for key, value in found.items() if key not in ("figures", "samples", "cases")]
    for case, modes in found.get("cases", {}).items():
        facts += [f"{case}, {mode}: {facts_of_mode}" for mode, facts_of_mode in modes.items()]
    console.print(*facts, sep="\n", markup=False, highlight=False)


def main() -> None:
    """Record one line per scene; or be a worker."""
    if sys.argv[1:2] == ["worker"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("side")
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--sharing", default="fast")
        parser.add_argument("--broker", default="")
        parser.add_argument("--limit", type=int, default=0)
        parser.add_argument("--runtime", action="store_true")
        given = vars(parser.parse_args(sys.argv[2:]))
        serve(lambda: Worker(**given)).close()
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--folder", help="for the models, until a scene has ended: up to 20 GiB")
    parser.add_argument("--json", action="store_true", help="print JSON lines in the place of tables")
    arguments = parser.parse_args()
    for name in arguments.scene:
        begun, loads = time.perf_counter(), [os.getloadavg()[0]]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found = SCENES[name](Setup(arguments.device, arguments.scale, Path(folder)))
        about = {"scene": name, "device": arguments.device, "scale": arguments.scale}
        loads.append(
            os.getloadavg()[0]
        )  # where it is far above what the scene itself makes, times say little
        result = {**about, **found, "load_average": loads, "took": time.perf_counter() - begun}
        with contextlib.redirect_stdout(sys.stdout if arguments.json else io.StringIO()):
            record(f"broker-{arguments.device.partition(':')[0]}", result)
        if not arguments.json:
            show(name, {**found, "load_average": loads})


if __name__ == "__main__":
    main()
