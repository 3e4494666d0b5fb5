"""Fixtures for all tests. `import building` gives the small ONNX models (tests/building.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import processes

from glake_infer.store import Store


def pytest_collection_modifyitems(items):
    """Skip what needs the full TensorRT where it is not installed."""
    if importlib.util.find_spec("tensorrt") is None:
        for item in items:
            if item.get_closest_marker("tensorrt"):
                item.add_marker(pytest.mark.skip(reason="the package tensorrt is not installed"))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store, which is also the default one of this test and of the processes it starts."""
    monkeypatch.setenv("GLAKE_STORE", str(tmp_path / "store"))
    return Store()


@pytest.fixture
def place(tmp_path):
    """A folder for sockets: their paths are short, and nobody else writes there."""
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def python():
    """Start `code` in a new Python process with the tests' helpers on its path; returns the Popen."""
    started = []

    def start(code, *arguments, **options):
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
        options = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": processes.environment(),
            **options,
        }
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


@contextmanager
def _mounted(path, *arguments):
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True)
    if done.returncode:
        if "permission denied" in done.stderr or "must be superuser" in done.stderr:
            pytest.skip(f"no right to mount here: {done.stderr.strip()}")
        raise AssertionError(done.stderr)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB."""
    with _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as path:
        yield path


@pytest.fixture
def read_only():
    """Make a folder read-only for this test (also for root): `read_only(path)`."""
    with ExitStack() as stack:

        def lock(path):
            stack.enter_context(_mounted(path, "--bind", str(path)))
            subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)

        yield lock
