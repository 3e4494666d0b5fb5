"""Processes that are to fault."""

import os
import subprocess
import sys
import textwrap


def environment() -> dict[str, str]:
    """Variables with which a fault ends a process by its signal; a sanitizer would catch it and report it."""
    return {
        name: os.environ.get(name, "") + ":handle_segv=0:handle_sigbus=0"
        for name in ("ASAN_OPTIONS", "TSAN_OPTIONS")
    }


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code that may fault in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
