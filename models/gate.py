"""Gate: many runs together, or one alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Gate:
    """Lets runs through together, until one asks to be alone: that waits for the others, and new ones wait for it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._alone = 0  # that are, or want to be
        self._entries = 0

    @contextlib.contextmanager
    def together(self) -> Iterator[Callable[[], bool]]:
        """Be inside with others; yields what tells whether any have been there in the meantime."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            others = bool(self._inside)
            self._inside += 1
            self._entries += 1
            mine = self._entries
        try:
            yield lambda: others or self._entries != mine
        finally:
            self._leave()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside alone."""
        with self._condition:
            self._alone += 1
            try:
                self._condition.wait_for(lambda: not self._inside)
                self._inside += 1
            except BaseException:  # Ctrl-C
                self._alone -= 1
                self._condition.notify_all()
                raise
        try:
            yield
        finally:
            with self._condition:
                self._alone -= 1
            self._leave()

    def _leave(self) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()
