"""The corruption test (stress.py), each part in a process of its own, briefly; scripts/gpu_check runs it for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu
SECONDS = os.environ.get("GLAKE_STRESS_SECONDS", "15")


def stress(device, *arguments, seconds=SECONDS):
    command = [sys.executable, Path(__file__).with_name("stress.py"), *arguments, "--device", device]
    done = subprocess.run([*command, "--seconds", seconds], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_stream_sees_what_another_writes(device):
    result = stress(device, "direct")
    assert result["errors"] == []
    assert result["wrong"] == 0
    assert result["checks"] > 500
    assert result["active"] == result["reserved"] == 0
    assert result["lost"] < 64 * 2**20


def test_the_test_finds_corruption_without_the_guard(device):
    result = stress(device, "direct", "--ignore-streams", seconds="15")
    # Wrong words; or a fault, where memory was unmapped under queued work.
    assert result["wrong"] > 0 or any("illegal" in error.lower() for error in result["errors"]), result


@pytest.mark.timeout(600)
def test_sessions_on_many_threads_give_what_plain_onnxruntime_gives(device):
    pytest.importorskip("onnxruntime")
    result = stress(device, "sessions")
    assert result["errors"] == []
    assert result["wrong"] == 0
    assert result["checks"] > 100
    assert result["active"] == result["reserved"] == 0
    assert result["lost"] < 64 * 2**20
