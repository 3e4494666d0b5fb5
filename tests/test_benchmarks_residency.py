"""Every scene of `benchmarks.residency`, tiny and on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

RIGHT = {
    "family": {"difference": 0.0, "bit_for_bit_same_graph": True},
    "decoder": {
        "same_in_turn": True,
        "same_at_once": True,
        "same_after_sleep": True,
        "variants_differ": True,
        "bit_for_bit_same_graph": True,
    },
    "sleep": {},
    "twenty": {"wrong": 0, "samples_over_limit": 0},
    "cycles": {"wrong": 0, "cycles": 20},
    "fixed": {"sessions": 2},
}


def run(scene, tmp_path):
    """One scene's line, from a copy of the benchmarks whose results do not go into this checkout."""
    links = tmp_path / "links" / "benchmarks"
    links.mkdir(parents=True)
    for file in BENCHMARKS.glob("*.py"):
        (links / file.name).symlink_to(file)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(links.parent)}
    command = [sys.executable, "-m", "benchmarks.residency", "--device", "cpu", "--scale", "0.02"]
    command += ["--scene", scene, "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert (links / "results" / "residency.jsonl").read_text() == line + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["links"]
    return json.loads(line)


@pytest.mark.parametrize("scene", RIGHT)
def test_scene(scene, tmp_path):
    found = run(scene, tmp_path)
    assert found["benchmark"] == "residency"
    assert found["scene"] == scene
    assert {key: found[key] for key in RIGHT[scene]} == RIGHT[scene]
    if scene == "sleep":
        assert found["store"]["right"]
        assert found["pinned"]["right"]
    if scene == "twenty":
        assert found["wakes"] > 0
        assert found["peak_reserved"] <= found["limit"]
