"""The ten real models, fast and lean, beside plain ONNX Runtime: latency of every listed feed, memory, outputs."""

import tempfile
from pathlib import Path

from benchmarks.pairs import compare
from benchmarks.record import record
from glake_infer.models.convert import convert
from glake_infer.models.load import load
from glake_infer.store import Store
from tests import real_models


def main() -> None:
    """Record one line per model and mode."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        for name in real_models.ENTRIES:
            source = real_models.path_of(name)
            package = Path(folder) / f"{name}.glake"
            report = convert(source, package, store=store)
            feeds = list(real_models.feeds_of(name))
            for sharing in ("fast", "lean"):
                load(package, sharing=sharing, store=store).close()  # prepared before the clock runs
                result = compare(source, package, feeds, store, sharing, rounds=12)
                record("real_models", {"model": name, "weight_bytes": report.distinct_bytes, **result})
