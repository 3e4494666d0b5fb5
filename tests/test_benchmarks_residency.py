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


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Each scene's line, from a copy of the benchmarks whose results do not go into this checkout."""
    folder = tmp_path_factory.mktemp("residency")
    links = folder / "links" / "benchmarks"
    links.mkdir(parents=True)
    for file in BENCHMARKS.glob("*.py"):
        (links / file.name).symlink_to(file)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(links.parent)}
    command = [sys.executable, "-m", "benchmarks.residency", "--device", "cpu", "--scale", "0.02"]
    command += ["--folder", str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (links / "results" / "residency.jsonl").read_text() == done.stdout
    assert [path.name for path in folder.iterdir()] == ["links"]
    return {line["scene"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("scene", RIGHT)
def test_scene(scene, lines):
    found = lines[scene]
    assert found["benchmark"] == "residency"
    assert {key: found[key] for key in RIGHT[scene]} == RIGHT[scene]
    if scene == "sleep":
        assert found["store"]["right"]
        assert found["pinned"]["right"]
    if scene == "twenty":
        assert found["wakes"] > 0
        assert found["peak_reserved"] <= found["limit"]
