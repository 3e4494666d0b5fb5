"""Runs a benchmark as a user does, from a copy whose results do not go into this checkout."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def soaking(scenes: Iterable[str], *but: str) -> list[Any]:
    """Scenes as parameters, all `but` some for `make soak`: those are enough to see that the benchmark itself works."""
    return [scene if scene in but else pytest.param(scene, marks=pytest.mark.soak) for scene in scenes]


def scenes_of(name: str, results: str, folder: Path, timeout: float, *options: str) -> dict[str, Any]:
    """Each scene's line of `benchmarks.NAME` at a small scale on the CPU."""
    links = folder / "links" / "benchmarks"
    links.mkdir(parents=True)
    for file in BENCHMARKS.glob("*.py"):
        (links / file.name).symlink_to(file)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(links.parent)}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cpu", "--scale", "0.02", *options]
    command += ["--folder", str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    assert (links / "results" / results).read_text() == done.stdout
    assert [path.name for path in folder.iterdir()] == ["links"]
    return {line["scene"]: line for line in map(json.loads, done.stdout.splitlines())}
