"""Fine-tunes as TensorRT engines: what they hold, and how fast they come, sleep and wake; beside TensorRT's own memory.

    python -m benchmarks.engines --device cuda:0 [--repeat 3]

Four engines of one BERT of 418 MiB, with heads of 2, 17, 1000 and none. Twins, in the same process and from the same
plans: engines that TensorRT deserializes into memory of its own, and, for sleep and wake, what TensorRT-RTX has for that
(`unload_weights` and `load_weights` of a deferred engine). Bytes are the driver's. Nothing is executed.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glake_infer as gi
from benchmarks.record import record
from glake_infer import cuda
from glake_infer.engine_weights import EngineWeights
from glake_infer.models import zoo
from glake_infer.models.tensorrt.library import module
from glake_infer.models.tensorrt.plan import Plan

HEADS = (2, 17, 1000, None)
SHAPES = dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), ((1, 8), (1, 128), (8, 512)))


def plans_in(folder: Path, capability: str) -> list[Plan]:
    """The four packages, converted."""
    options = gi.EngineOptions(kind="tensorrt-rtx", profiles=(SHAPES,), capabilities=(capability,))
    store = gi.Store(folder / "store")
    made = []
    for labels in HEADS:
        spec = zoo.spec("bert-base", labels=labels) if labels else zoo.spec("bert-base", head=None)
        path = folder / f"bert-{labels}.glake"
        zoo.convert(spec, path, engine=options, store=store)
        made.append(Plan(gi.Package(path, store), "tensorrt-rtx"))
    return made


class Ours:
    """Engines on the pool."""

    def __init__(self, pool: gi.Pool, trt: Any, logger: Any) -> None:
        self.weights = EngineWeights.of(pool)
        self.allocator = gi.TensorRTAllocator(pool, trt)
        self.runtime = trt.Runtime(logger)
        self.runtime.gpu_allocator = self.allocator

    def load(self, plan: Plan, data: bytes) -> tuple[Any, Any]:
        """(The engine, its weights)."""
        with self.weights.loading(
            self.allocator, plan_bytes=len(data), stretches=plan.stretches()
        ) as loading:
            engine = self.runtime.deserialize_cuda_engine(data)
        assert engine is not None
        return engine, loading.holding


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """(Seconds, result)."""
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def _sleep(engines: list[tuple[Any, Any]]) -> int:
    return sum(holding.suspend() for _, holding in engines)


def _wake(engines: list[tuple[Any, Any]]) -> None:
    for _, holding in engines:
        with holding:
            pass


def on_the_pool(
    ours: Ours, pool: gi.Pool, index: int, plans: list[Plan], data: list[bytes]
) -> dict[str, Any]:
    """Load, sleep, wake; all is given back."""
    before = cuda.free_memory(index)
    loads = [timed(ours.load, plan, each) for plan, each in zip(plans, data, strict=True)]
    seconds, engines = [took for took, _ in loads], [engine for _, engine in loads]
    held = before - cuda.free_memory(index)
    asleep, freed = timed(_sleep, engines)
    after_sleep = before - cuda.free_memory(index)
    woken, _ = timed(_wake, engines)
    loads.clear()
    engines.clear()
    gc.collect()
    pool.trim()
    return {
        "held": held, "after sleep": after_sleep, "freed": freed, "first load": seconds[0],
        "further load": statistics.median(seconds[1:]), "sleep": asleep, "wake": woken,
    }  # fmt: skip


def by_itself(runtime: Any, index: int, data: list[bytes]) -> dict[str, Any]:
    """The same with TensorRT's own memory, and its own way to unload weights."""
    before = cuda.free_memory(index)
    loads = [timed(runtime.deserialize_cuda_engine, each) for each in data]
    held = before - cuda.free_memory(index)
    seconds = [took for took, _ in loads]
    loads.clear()
    gc.collect()
    runtime.defer_weights_loading = True
    deferred = [runtime.deserialize_cuda_engine(each) for each in data]
    runtime.defer_weights_loading = False

    def load() -> None:
        for engine, each in zip(deferred, data, strict=True):
            engine.load_weights(each)

    load()
    unload, _ = timed(lambda: [engine.unload_weights() for engine in deferred])
    reload, _ = timed(load)
    cuda.synchronize_all(index)
    deferred.clear()
    gc.collect()
    return {
        "plain held": held, "plain load": statistics.median(seconds),
        "unload_weights": unload, "load_weights": reload,
    }  # fmt: skip


def measure(device: str, repeat: int, folder: Path) -> list[dict[str, Any]]:
    """Every figure, turn by turn."""
    index = int(device.partition(":")[2] or 0)
    major, minor = cuda.compute_capability(index)
    trt = module("tensorrt-rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    plans = plans_in(folder, f"{major}.{minor}")
    data = [plan.to_bytes() for plan in plans]
    rows = []
    with gi.Pool(device) as pool:
        ours, plain = Ours(pool, trt, logger), trt.Runtime(logger)
        for turn in range(repeat + 1):  # the first warms up
            row = {
                **on_the_pool(ours, pool, index, plans, data),
                **by_itself(plain, index, data),
            }
            if turn:
                rows.append(row)
    return rows


def main() -> None:
    """Measure, and print the medians as a JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.device, options.repeat, Path(folder))
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    record("engines", {"unit": "bytes and seconds", "turns": len(rows), **medians})


if __name__ == "__main__":
    main()
