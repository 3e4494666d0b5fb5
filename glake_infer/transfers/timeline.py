"""A timeline of readers, links and what goes on beside them, as a Chrome trace: for https://ui.perfetto.dev.

Source: the Trace Event Format, complete events ("X"), times in microseconds of the monotonic clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Named = tuple[str, str, int, int, int]
"""Of an engine: who (a row), what, start, end (nanoseconds), bytes."""


@dataclass(frozen=True)
class Span:
    """One thing that one row did, in nanoseconds of the monotonic clock."""

    row: str
    name: str
    start: int
    end: int
    bytes: int = 0


class Timeline:
    """What was recorded. `record()` makes one."""

    def __init__(self) -> None:
        """Empty."""
        self.spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        """Add what a thread did."""
        with self._lock:
            self.spans.append(span)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a trace that chrome://tracing and Perfetto open. Raises OSError."""
        spans = sorted(self.spans, key=lambda span: (span.start, span.row))
        first = spans[0].start if spans else 0
        rows = {row: number for number, row in enumerate(sorted({span.row for span in spans}), 1)}
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": row}}
            for row, number in rows.items()
        ]
        for span in spans:
            event: dict[str, object] = {
                "ph": "X",
                "pid": 1,
                "tid": rows[span.row],
                "name": span.name,
                "ts": (span.start - first) / 1000,
                "dur": (span.end - span.start) / 1000,
            }
            if span.bytes:
                rate = span.bytes / max(1, span.end - span.start)
                event["args"] = {"bytes": span.bytes, "GB/s": round(rate, 3)}
            events.append(event)
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


_current: Timeline | None = None
_sources: list[tuple[Callable[[bool], None], Callable[[], list[Named]]]] = []


def _forget() -> None:
    """In a child of fork(): the engines are the parent's."""
    global _current
    _current = None
    _sources.clear()


os.register_at_fork(after_in_child=_forget)


def add_source(record: Callable[[bool], None], take: Callable[[], list[Named]]) -> None:
    """Let an engine be recorded: `record` switches it on and off, `take` gives what it saw."""
    _sources.append((record, take))
    if _current is not None:
        record(True)


@contextlib.contextmanager
def record() -> Iterator[Timeline]:
    """Record what this process's transfers do inside the block. One recording at a time: an inner one records nothing."""
    global _current
    made = Timeline()
    if _current is not None:
        yield made
        return
    _current = made
    for switch, _ in _sources:
        switch(True)
    try:
        yield made
    finally:
        _current = None
        for switch, take in _sources:
            switch(False)
            for row, name, start, end, size in take():
                made.add(Span(row, name, start, end, size))


@contextlib.contextmanager
def span(row: str, name: str, size: int = 0) -> Iterator[None]:
    """Record what goes on inside the block, if something records."""
    made = _current
    if made is None:
        yield
        return
    start = time.monotonic_ns()
    try:
        yield
    finally:
        made.add(Span(row, name, start, time.monotonic_ns(), size))
