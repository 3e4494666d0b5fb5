"""Help is quick and needs none of the heavy packages."""

import os
import subprocess
import sys
import time

import pytest

COMMANDS = [
    [], ["convert"], ["run"], ["inspect"], ["export"], ["import"], ["zoo"], ["demo"], ["doctor"],
    ["store"], ["store", "ls"], ["store", "verify"], ["store", "gc"],
    ["trace"], ["trace", "replay"], ["trace", "plot"], ["bench"], ["bench", "pool"],
    ["bench", "load"], ["bench", "resume"], ["bench", "links"], ["links"],
    ["broker"], ["top"], ["report"],
]  # fmt: skip
HEAVY = [
    "cuda",
    "numpy",
    "onnx",
    "onnxruntime",
    "pydantic",
    "tensorrt",
    "tensorrt_rtx",
    "glake_infer.allocators._native",
]
SPY = """
import sys
from glake_infer.cli import main
sys.argv = ["glake-infer", *sys.argv[1:]]
try:
    main()
finally:
    print("HEAVY", [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy_and_fits(shop, fits, command):
    code = SPY.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"],
        env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == "HEAVY []\n"
    assert "Usage: glake-infer " + " ".join(command) in done.stdout
    assert ("--json" in done.stdout) == (command not in ([], ["store"], ["trace"], ["bench"]))
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_help_is_quick():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "glake_infer.cli", "run", "--help"], stdout=subprocess.DEVNULL, check=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0  # 0.35 s on an idle machine; CI is noisy


def test_version(shop):
    from glake_infer import __version__

    assert shop.run("--version") == (f"glake-infer {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["nope"], ["convert"], ["run", "a.glake", "--repeat", "0"], ["run", "--sharing", "x", "a"]]
)
def test_wrong_usage_is_exit_code_2(shop, arguments):
    out, err = shop.run(*arguments, code=2)
    assert out == ""
    assert "Usage" in err


def test_no_command_shows_help(shop):
    with shop.start() as process:
        out, err = process.communicate()
    assert "Commands" in out + err
