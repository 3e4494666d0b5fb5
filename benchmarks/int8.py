"""What an int8 model costs in lean mode: memory after all feeds and a trim, the peak during a small run, latency.

The model is the real minilm-l6-int8, whose weights ONNX Runtime folds to fp32.
"""

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.pairs import compare
from benchmarks.record import record
from glake_infer.models.convert import convert
from glake_infer.models.demo import Child, write_feeds
from glake_infer.models.load import load
from glake_infer.process_memory import measure
from glake_infer.store import Store
from tests import real_models

MODEL = "minilm-l6-int8"


def main() -> None:
    """Record one line per side."""
    source = real_models.path_of(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        package = Path(folder) / "m.glake"
        weights = convert(source, package, store=store).distinct_bytes
        for sharing in ("lean", "fast"):
            load(package, sharing=sharing, store=store).close()
            feeds = list(real_models.feeds_of(MODEL))
            result = compare(source, package, feeds, store, sharing, rounds=30)
            memory = {
                role: memory_of(role, source if role == "plain" else package, feeds, store)
                for role in (sharing, "plain")
            }
            record(
                "int8",
                {
                    "model": MODEL,
                    "weight_bytes": weights,
                    "sharing": sharing,
                    "twin": "plain",
                    **{f"{key}_per_weights": value / weights for key, value in memory[sharing].items()},
                    **{f"{key}_per_weights_twin": value / weights for key, value in memory["plain"].items()},
                    "latency_ratios": {
                        str(case["shapes"]["input_ids"]): case["ratio"] for case in result["cases"]
                    },
                    "difference": result["difference"],
                },
            )


def memory_of(role: str, path: Path, feeds: list[dict[str, Any]], store: Store) -> dict[str, int]:
    """Private and total memory after all feeds and a trim, and the private peak while the first feed runs."""
    with tempfile.TemporaryDirectory() as scratch, Child(role, store) as child:
        file = Path(scratch) / "feeds.npz"
        write_feeds(file, feeds)
        before = measure(child.pid)
        child.begin([str(path)], file, lambda *_: None)
        for _ in range(3):
            child.ask("run", model=0, feed=0, outputs=False)
        child.ask("trim")
        peak, done = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, measure(child.pid).private - before.private)
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for _ in range(40):
            child.ask("run", model=0, feed=0, outputs=False)
        done.set()
        watcher.join()
        for number in range(len(feeds)):
            child.ask("run", model=0, feed=number, outputs=False)
        child.ask("trim")
        child.measure()
        after = measure(child.pid)
        return {
            "private": after.private - before.private,
            "total": after.total - before.total,
            "peak_private": peak,
        }
