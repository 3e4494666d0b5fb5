"""A side in a process of its own: it is asked once, tells how far it is, and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from glake_infer.allocators import errors
from glake_infer.allocators.errors import GlakeError
from glake_infer.models.progress import Progress

TOLD = 1000
"""The last characters of what a process said that ended without an answer."""


def ask(
    request: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Start a process, send it a request, and return its answer. Raises what went wrong there, as GlakeError at least."""
    command = [sys.executable, "-m", "glake_infer.models.bench.child"]
    with tempfile.TemporaryFile() as said:
        begun = time.monotonic_ns()
        process = subprocess.Popen(
            [*command, json.dumps({**request, "begun": begun})],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        answer: dict[str, Any] | None = None
        try:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if "progress" not in told:
                    answer = told
                elif progress:
                    progress(*told["progress"])
            process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        if answer is None:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()[-TOLD:]
            code = process.returncode
            what = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise GlakeError(
                f"the process of {request['side']!r} ended with {what} and no answer. It said: {text or 'nothing'}"
            )
    if "error" in answer:
        kind = getattr(errors, answer["error"], GlakeError)
        if kind in (errors.OutOfMemoryError, errors.PoolExistsError):  # these take more than a message
            kind = GlakeError
        raise kind(answer["message"])
    return answer


def told(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """What a process tells, as progress of that name, from now on."""
    if progress is None:
        return None
    say = progress
    say(what, 0, 1)
    return lambda done, total: say(what, done, total)
