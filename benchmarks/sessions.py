"""ONNX Runtime's sessions on CUDA: on our pool, beside its own arena. Latency in pairs, memory, outputs bit for bit.

    python -m benchmarks.sessions --device cuda:0 [--rounds 60] [--out FILE]

Then the throughput of four threads with a session each, five turns of two seconds a side.

Each side runs in a process of its own; the two take turns run by run, so that both see the same clocks. TF32 is off
and cuDNN's algorithms are the default ones. Five models; real ones where they are in the tests' cache.
"""

import argparse
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from tests import real_models

# Zoo models with (batch, length) of their feeds; and real ones by name.
ZOO: dict[str, list[dict[str, int]]] = {
    "bert-base": [
        {"batch": batch, "length": length} for batch, length in ((1, 16), (8, 128), (32, 64), (4, 384))
    ],
    "resnet50": [{"batch": batch, "length": 224} for batch in (1, 4, 16)],
    "llama-125m": [
        {"batch": batch, "length": length, "past": 32} for batch, length in ((1, 1), (4, 64), (1, 256))
    ],
    "bert-small": [{"batch": 1, "length": 32}, {"batch": 16, "length": 128}],
    "resnet18": [{"batch": 1, "length": 224}, {"batch": 8, "length": 160}],
}
REAL = ("minilm-l3", "ppocr-rec")


def cases(folder: Path) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Five models as (name, file, feeds); cached real ones take the place of the last zoo models."""
    from glake_infer.models import zoo

    found: list[tuple[str, str, list[dict[str, Any]]]] = []
    for name in REAL:
        entry = real_models.ENTRIES[name]
        file = real_models.cache() / "models" / name / Path(entry["file"]).name
        if file.is_file():
            found.append((name, str(file), list(real_models.feeds_of(name))))
    for name, shapes in list(ZOO.items())[: 5 - len(found)]:
        spec = zoo.spec(name)
        feeds = [zoo.feeds(spec, seed, **shape) for seed, shape in enumerate(shapes)]
        found.append((name, str(zoo.write(spec, folder / f"{name}.onnx")), feeds))
    return found


def child(side: str, device: str) -> None:
    """One side. Reads pickled commands from stdin and answers each."""
    from cuda.bindings import runtime

    from glake_infer import Pool
    from glake_infer.allocators import import_onnxruntime

    index = int(device.partition(":")[2] or 0)
    (error,) = runtime.cudaSetDevice(index)
    assert error == 0, error
    runtime.cudaFree(0)
    ort = import_onnxruntime()
    pool = Pool(device) if side == "ours" else None
    session: Any = None
    many: list[Any] = []
    answers = sys.stdout.buffer
    while True:
        try:
            command, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Any = None
        if command == "load":
            session = make(ort, arguments[0], index, pool)
            answer = session.get_providers()
        elif command == "load many":
            many = [(make(ort, path, index, pool), feeds) for path, feeds in arguments[0]]
        elif command == "run many":
            answer = run_many(many, arguments[0])
        elif command == "run":
            start = time.perf_counter()
            outputs = session.run(None, arguments[0])
            answer = time.perf_counter() - start, outputs
        elif command == "pool":
            answer = pool._open().stats() if pool is not None else {}
        elif command == "free":
            error, answer, _ = runtime.cudaMemGetInfo()
            assert error == 0, error
        elif command == "unload":
            session = None
            many.clear()
            if pool is not None:
                pool.trim()
        pickle.dump(answer, answers)
        answers.flush()


def make(ort: Any, path: str, index: int, pool: Any) -> Any:
    """A session on CUDA, on the pool if there is one."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if pool is not None:
        pool.attach(options)
    settings = {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
    providers = [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]
    return ort.InferenceSession(path, options, providers=providers)


def run_many(many: list[Any], seconds: float) -> int:
    """A thread for each session, going through its feeds. Returns how many runs there were."""
    end, counts = time.monotonic() + seconds, [0] * len(many)

    def work(number: int) -> None:
        session, feeds = many[number]
        while time.monotonic() < end:
            session.run(None, feeds[counts[number] % len(feeds)])
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(many))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


class Side:
    """A process, and what it is asked."""

    def __init__(self, side: str, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.sessions", "--child", side, "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, *command: Any) -> Any:
        """Return the answer to one command."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(command, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def compare(
    name: str, path: str, feeds: list[dict[str, Any]], ours: Side, plain: Side, rounds: int
) -> dict[str, Any]:
    """Latencies of one model in pairs, the memory each side took, and whether the outputs are the same bits."""
    sides = {"ours": ours, "plain": plain}
    taken, running = {}, {}
    for label, side in sides.items():
        before = side.ask("free")
        running[label] = side.ask("load", path)[0]
        for feed in feeds:
            side.ask("run", feed)
        taken[label] = before - side.ask("free")
    shapes, equal = [], True
    for feed in feeds:
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for turn in range(rounds + 3):
            outputs = {}
            for label in ("ours", "plain") if turn % 2 else ("plain", "ours"):
                seconds, outputs[label] = sides[label].ask("run", feed)
                if turn >= 3:
                    times[label].append(seconds)
            if turn == 0:
                equal &= all(
                    np.asarray(a).tobytes() == np.asarray(b).tobytes()
                    for a, b in zip(outputs["ours"], outputs["plain"], strict=True)
                )
        ratios = [mine / twin for mine, twin in zip(times["ours"], times["plain"], strict=True)]
        shapes.append(
            {
                "shapes": {key: list(np.shape(value)) for key, value in feed.items()},
                "ours": statistics.median(times["ours"]),
                "twin": statistics.median(times["plain"]),
                "ratio": statistics.median(ratios),
            }
        )
    calls = ours.ask("pool")["driver_calls"]
    for feed in feeds:
        ours.ask("run", feed)
    steady = ours.ask("pool")["driver_calls"] - calls
    for side in sides.values():
        side.ask("unload")
    return {
        "benchmark": "sessions",
        "model": name,
        "providers": running,
        "cases": shapes,
        "ratio": statistics.median(case["ratio"] for case in shapes),
        "memory": taken["ours"],
        "memory_twin": taken["plain"],
        "bit_for_bit": equal,
        "driver_calls_when_warm": steady,
    }


def throughput(names: tuple[str, ...], folder: Path, device: str, turns: int = 5) -> dict[str, Any]:
    """Runs a second of a thread for each model, the sides in turn."""
    from glake_infer.models import zoo

    loads = []
    for number, name in enumerate(names):
        spec = zoo.spec(name, seed=number)
        feeds = [zoo.feeds(spec, seed, **shape) for seed, shape in enumerate(ZOO[name])]
        loads.append((str(zoo.write(spec, folder / f"{number}.onnx")), feeds))
    sides = {label: Side(label, device) for label in ("ours", "plain")}
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for side in sides.values():
        side.ask("load many", loads)
        side.ask("run many", 1.0)
    for turn in range(turns):
        for label in ("ours", "plain") if turn % 2 else ("plain", "ours"):
            rates[label].append(sides[label].ask("run many", 2.0) / 2.0)
    for side in sides.values():
        side.close()
    ours, twin = statistics.median(rates["ours"]), statistics.median(rates["plain"])
    return {"benchmark": "throughput", "models": names, "ours": ours, "twin": twin, "ratio": ours / twin}


def main() -> None:
    """Record one line per model, and two of several threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.device)
        return

    with tempfile.TemporaryDirectory() as scratch:
        for name, path, feeds in cases(Path(scratch)):
            ours, plain = Side("ours", arguments.device), Side("plain", arguments.device)
            record("sessions-cuda", compare(name, path, feeds, ours, plain, arguments.rounds))
            ours.close()
            plain.close()
        for names in (("bert-small",) * 4, ("bert-base", "bert-small", "llama-125m", "resnet18")):
            record("sessions-cuda", throughput(names, Path(scratch), arguments.device))


if __name__ == "__main__":
    main()
