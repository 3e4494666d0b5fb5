"""Processes that a benchmark asks to call methods of a worker: names and arguments go in pickled, answers come out."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

Worker = TypeVar("Worker")


def serve(make: Callable[[], Worker]) -> Worker:
    """Make a worker, and call its methods that stdin names until that ends; returns the worker.

    Answers are (whether it went well, what it returned). What anything prints meanwhile goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = make()
    while True:
        try:
            name, *given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return worker
        try:
            answer = True, getattr(worker, name)(*given)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


class Process:
    """A process that serves a worker."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe)

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    def send(self, *command: Any) -> None:
        """Let it call a method; the first name is its name."""
        assert self.process.stdin is not None
        pickle.dump(command, self.process.stdin)
        self.process.stdin.flush()

    def receive(self) -> Any:
        """What that returned."""
        assert self.process.stdout is not None
        try:
            well, answer = pickle.load(self.process.stdout)
        except EOFError:
            raise RuntimeError(f"a process ended with {self.process.wait()}: see above") from None
        if not well:
            raise RuntimeError(f"another process failed:\n{answer}")
        return answer

    def ask(self, *command: Any) -> Any:
        """Send and receive."""
        self.send(*command)
        return self.receive()
