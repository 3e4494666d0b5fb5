"""Plain ONNX Runtime and ours on the same model, in two processes that take turns run by run."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from glake_infer.models.demo import Child, write_feeds
from glake_infer.process_memory import measure
from glake_infer.store import Store


def compare(
    model: Path, package: Path, feeds: list[dict[str, Any]], store: Store, sharing: str, rounds: int
) -> dict[str, Any]:
    """Memory after loading and running everything, per-feed latencies and their paired ratios, output differences."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "feeds.npz"
        write_feeds(file, feeds)
        with Child("plain", store) as plain, Child(sharing, store) as ours:
            before = {child.role: measure(child.pid) for child in (plain, ours)}
            plain.begin([str(model)], file, _quiet)
            ours.begin([str(package)], file, _quiet)
            difference, cases = 0.0, []
            for number in range(len(feeds)):
                times: dict[str, list[float]] = {"plain": [], sharing: []}
                peak = {"plain": 0, sharing: 0}
                for turn in range(rounds + 2):
                    order = (plain, ours) if turn % 2 else (ours, plain)
                    answers = {
                        child.role: child.ask("run", model=0, feed=number, outputs=turn == 0)
                        for child in order
                    }
                    if turn == 0:
                        for a, b in zip(
                            answers["plain"]["outputs"], answers[sharing]["outputs"], strict=True
                        ):
                            difference = max(difference, float(np.max(np.abs(np.subtract(a, b)), initial=0)))
                    elif turn > 1:
                        for role, answer in answers.items():
                            times[role].append(answer["seconds"])
                    for child in (plain, ours):
                        peak[child.role] = max(
                            peak[child.role], measure(child.pid).private - before[child.role].private
                        )
                ratios = [mine / theirs for mine, theirs in zip(times[sharing], times["plain"], strict=True)]
                cases.append(
                    {
                        "shapes": {name: list(array.shape) for name, array in feeds[number].items()},
                        "ours": statistics.median(times[sharing]),
                        "twin": statistics.median(times["plain"]),
                        "ratio": statistics.median(ratios),
                        "private_after_run": peak[sharing],
                        "private_after_run_twin": peak["plain"],
                    }
                )
            ours.ask("trim")
            for child in (plain, ours):
                child.measure()
            after = {child.role: measure(child.pid) for child in (plain, ours)}
    memory = {
        role: {
            part: getattr(after[role], part) - getattr(before[role], part)
            for part in ("total", "private", "files")
        }
        for role in after
    }
    return {
        "sharing": sharing,
        "twin": "plain",
        "cases": cases,
        "memory": memory[sharing],
        "memory_twin": memory["plain"],
        "load": ours.seconds,
        "load_twin": plain.seconds,
        "difference": difference,
    }


def _quiet(*_: object) -> None:
    """No progress."""
