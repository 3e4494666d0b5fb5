"""Errors end a command with a message, an exit code and nothing half-written."""

import os
import signal
import time
from pathlib import Path

import pytest
from folders import temporaries

from glake_infer.models import zoo


def test_debug_shows_the_traceback(shop):
    with shop.start("inspect", "missing.onnx", env={"GLAKE_DEBUG": "1"}) as process:
        _, err = process.communicate()
    assert process.returncode == 1
    assert "Traceback" in err
    assert "ModelError" in err


def test_a_closed_pipe_is_quiet(shop):
    reader, writer = os.pipe()
    os.close(reader)
    with shop.start("store", "ls", stdout=writer) as process:
        os.close(writer)
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 141


def _wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_convert_leaves_nothing(empty_shop, number, code):
    folder = empty_shop.folder
    zoo.write(zoo.spec("bert-small"), folder / "m.onnx")
    with empty_shop.start("convert", "m.onnx") as process:
        _wait_for(lambda: len(list(empty_shop.store.objects)) > 2, process)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert not (folder / "m.glake").exists()
    assert not temporaries(folder)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupted_run_ends_soon(shop, threads):
    with shop.start("run", "a.glake", "--repeat", "10000000", "--threads", threads) as process:
        _wait_for(lambda: str(shop.store.root) in Path(f"/proc/{process.pid}/maps").read_text(), process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_full_disk_is_explained(shop, small_disk):
    err = shop.error("convert", "a.onnx", "-o", "x.glake", env={"GLAKE_STORE": str(small_disk / "store")})
    assert "no space left" in err
    assert not (shop.folder / "x.glake").exists()
    assert not temporaries(small_disk)


def test_without_onnx_runtime_the_error_says_what_to_install(shop, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('hidden by the test')")
    err = shop.error("run", "a.glake", env={"PYTHONPATH": str(tmp_path)})
    assert "pip install 'glake-infer[" in err
