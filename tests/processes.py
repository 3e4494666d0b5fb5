"""Python processes of their own, with what this one can import."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def environment(*, faults: bool = False) -> dict[str, str]:
    """The environment of such a process. One that is to fault ends by the signal: no sanitizer catches and reports it."""
    folders = [str(Path(__file__).parent), *filter(None, sys.path)]  # not "": this checkout is no package
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    if faults:
        for name in ("ASAN_OPTIONS", "TSAN_OPTIONS"):
            found[name] = found.get(name, "") + ":handle_segv=0:handle_sigbus=0"
    return found


def run(code: str, *arguments: str, faults: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code to its end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment(faults=faults),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
