"""Recording what a pool is asked for, for replay and for pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from .errors import InputError
from .trace import Step, Trace, from_steps, write

__all__ = ["MOST_EVENTS", "Event", "Recording"]

MOST_EVENTS = 1 << 22


class Event(NamedTuple):
    """Something that a pool was asked for, or did.

    Attributes:
        op: "a" allocate, "r" reserve (weights), "f" free, "m" physical memory was mapped, "u" unmapped.
        time_ns: of the system's clock.
        address: the first byte.
        bytes: as asked for; as mapped for "m" and "u".
        stream: the stream's handle, -1 when none was given.
        tag: "weights", "activations", ...; who holds it.
        label: the session or model, or "".
        id: of the allocation: 1, 2, ...; 0 for "m" and "u".
    """

    op: str
    time_ns: int
    address: int
    bytes: int
    stream: int
    tag: str
    label: str
    id: int


class _Recorded(Protocol):
    """What a recording needs of a pool (`_native.Pool`)."""

    def start_recording(self, most_events: int) -> None: ...
    def stop_recording(self) -> list[tuple[str, int, int, int, int, str, str, int]]: ...


class Recording:
    """The events of a pool from its making until `stop()`, or until the end of its `with`.

    Memory that was handed out before is not in it, nor is its end. After `most_events` events nothing more is
    kept (`truncated` says so). A pool has one recording at a time: a new one ends the one before it, which
    then has no events. Use it from one thread; the pool may be used from any meanwhile.
    """

    def __init__(self, pool: _Recorded, most_events: int = MOST_EVENTS) -> None:
        """Begin; use `Pool.record()`. Raises `InputError` if `most_events` is no positive number."""
        if not isinstance(most_events, int) or most_events < 1:
            raise InputError(f"most_events={most_events!r}: expected a whole number of at least 1")
        self._pool: _Recorded | None = pool
        self._most = most_events
        self._events: tuple[Event, ...] = ()
        pool.start_recording(most_events)

    def stop(self) -> Recording:
        """End the recording and return it. Stopping twice is fine."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            self._events = tuple(Event(*event) for event in pool.stop_recording())
        return self

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self._pool is not None

    @property
    def events(self) -> Sequence[Event]:
        """The events in order. Raises `InputError` while the recording goes on."""
        if self._pool is not None:
            raise InputError("this recording goes on: end it with stop(), or by leaving its `with`, first")
        return self._events

    @property
    def truncated(self) -> bool:
        """Whether events may be missing at the end."""
        return len(self.events) >= self._most

    def steps(self) -> Iterator[Step]:
        """Give the lines of the trace: ids 0, 1, ..., streams 0, 1, ... in order of appearance."""
        numbers: dict[int, int] = {-1: -1}
        names: dict[int, int] = {}
        for event in self.events:
            if event.op in ("a", "r"):
                name = names[event.id] = len(names)
            elif event.op == "f" and event.id in names:
                name = names[event.id]
            else:
                continue
            stream = numbers.setdefault(event.stream, len(numbers) - 1)
            yield Step(event.op, name, event.bytes, stream)

    def trace(self) -> Trace:
        """Return the trace, for the replay."""
        return from_steps(self.steps(), "recording")

    def save(self, path: str | os.PathLike[str], comment: str = "") -> Path:
        """Write the trace (`glake_infer.allocators.trace`), compressed where the name ends with `.gz`."""
        return write(path, self.steps(), comment)
