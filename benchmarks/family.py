"""Four fine-tunes of one trunk (about 250 MB each): memory and latency, beside plain ONNX Runtime. See models/demo.py."""

from dataclasses import asdict

from benchmarks.record import record
from glake_infer.models.demo import demo


def main() -> None:
    """Record one line per side."""
    report = demo()
    plain = report.sides[0]
    for side in report.sides:
        record(
            "family",
            {
                **{key: value for key, value in asdict(side).items() if key != "pool"},
                "twin": "plain",
                "memory_ratio": side.memory / plain.memory,
                "memory_per_distinct": side.memory / report.distinct_bytes,
                "load_ratio": side.load / plain.load,
                "distinct_bytes": report.distinct_bytes,
                "weight_bytes": report.weight_bytes,
                "runs": report.runs,
            },
        )
