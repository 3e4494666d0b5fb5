"""The examples run as a user would run them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import machines
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@needs_ray
def test_ray_serve_can_be_asked():
    command = [sys.executable, str(EXAMPLES / "ray_serve.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "--requests" in done.stdout


@needs_ray
@pytest.mark.soak  # a cluster, twice as many replicas as tests/models/test_ray.py has in CI
def test_ray_serve():
    with machines.machine() as (_, environment):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "ray_serve.py"), "--requests", "4"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    pids = re.findall(r"^  (sentiment|topics) +pid (\d+)", done.stdout, re.MULTILINE)
    assert len(pids) == len(set(pids)) == 8, done.stdout
    assert re.search(r"^  broker .* holds [\d.]+ MiB of weights", done.stdout, re.MULTILINE), done.stdout
    assert "largest difference of an output: 0.0e+00" in done.stdout
    ratio = float(re.search(r"with glake-infer: ([\d.]+)x", done.stdout)[1])
    assert ratio < 0.8, done.stdout
