"""What a pool in debug mode (`Pool(debug=True)`) reports: live allocations and overwritten memory."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .errors import MemoryCorruptionError
from .sizes import format_bytes

__all__ = [
    "Allocation",
    "Corruption",
    "DebugReport",
    "allocations",
    "corruption_error",
    "corruptions",
    "leak_report",
]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A live allocation of a pool in debug mode, and who made it.

    Attributes:
        id: counts the pool's allocations from 1 on.
        address: as `Pool.allocate` returned it.
        bytes: as asked for.
        tag: "activations", "weights" or another tag of the pool.
        label: the session or model of the thread that allocated; "" for none.
        stream: the handle of the stream that it was made for; None for none.
        thread: the operating system's id of the thread (`threading.get_native_id()`).
        time_ns: when, in nanoseconds since 1970.
        stack: "FILE:LINE in FUNCTION" per line, innermost frame first, at most 24; text in brackets
            where a native thread asked.
    """

    id: int
    address: int
    bytes: int
    tag: str
    label: str
    stream: int | None
    thread: int
    time_ns: int
    stack: str

    def __str__(self) -> str:
        """Return a paragraph: what it is on the first line, the stack below."""
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        name = f" ({names[self.thread]})" if self.thread in names else ""
        label = f", label {self.label!r}" if self.label else ""
        stream = "" if self.stream is None else f", stream {self.stream:#x}"
        time = datetime.datetime.fromtimestamp(self.time_ns / 1e9, datetime.UTC)
        stack = "".join(f"\n    {line}" for line in self.stack.splitlines())
        return (
            f"#{self.id}: {format_bytes(self.bytes)} ({self.bytes} bytes) at {self.address:#x}, {self.tag}{label}"
            f"{stream}, allocated {time:%H:%M:%S}.{time.microsecond // 1000:03} UTC by thread {self.thread}{name} "
            f"at{stack}"
        )


@dataclass(frozen=True, slots=True)
class Corruption:
    """Bytes around an allocation, or in a freed one, that something overwrote.

    Attributes:
        kind: "overrun" (behind the allocation), "underrun" (before it), "use after free", or
            "stray write" (in a place that was never handed out).
        found_at: when it was noticed, in words.
        allocation: whose surroundings were overwritten. For a stray write only its address is known.
        freed_stack: where it was freed; None while it is live. `freed_thread` and `freed_time_ns` likewise.
        offset: of the first wrong byte, in bytes from the allocation's beginning; below 0 before it.
        overwritten: count of wrong bytes.
        extent: count of bytes from the first wrong one to the last.
        expected: the value that each of these bytes should have.
        found: what stands there, from the first wrong byte on; at most 32 bytes.
        text: all of it as a paragraph.
    """

    kind: str
    found_at: str
    allocation: Allocation
    offset: int
    overwritten: int
    extent: int
    expected: int
    found: bytes
    text: str
    freed_thread: int | None = None
    freed_time_ns: int | None = None
    freed_stack: str | None = None

    def __str__(self) -> str:
        """Return the paragraph."""
        return self.text


class DebugReport(tuple[Any, ...]):
    """What `Pool.leaks()` and `Pool.check()` return: a tuple whose text is a report for people.

    The items are `Allocation`s or `Corruption`s. It is false when there are none.
    """

    __slots__ = ()

    def text(self, most: int = 10) -> str:
        """Return the report with at most `most` items in full; of allocations those with the most bytes."""
        if not self:
            return "nothing: no allocation is live and no byte was overwritten"
        held = [item for item in self if isinstance(item, Allocation)]
        damage = [item for item in self if not isinstance(item, Allocation)]
        lines = []
        if held:
            lines.append(
                f"{_count(held, 'live allocation')}, {format_bytes(sum(one.bytes for one in held))}:"
            )
            lines += _shown(sorted(held, key=_by_size), most)
        if damage:
            lines.append(f"{_count(damage, 'place')} overwritten:")
            lines += _shown(damage, most)
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return `text()`."""
        return self.text()


def allocations(records: Sequence[Mapping[str, Any]]) -> DebugReport:
    """Make a report of the native core's records of live allocations."""
    return DebugReport(Allocation(**record) for record in records)


def corruptions(records: Sequence[Mapping[str, Any]]) -> DebugReport:
    """Make a report of the native core's records of overwritten memory."""
    return DebugReport(_corruption(record) for record in records)


def corruption_error(text: str, records: Sequence[Mapping[str, Any]]) -> MemoryCorruptionError:
    """Make the exception for memory that was found overwritten at a free. The native core calls this."""
    return MemoryCorruptionError(
        f"{text}\nThe memory was taken back. Something wrote there that should not have: correct the program, or "
        "use debug='guard' to make the write itself fault.",
        tuple(corruptions(records)),
    )


def leak_report(pool: Any, most: int = 5) -> str:
    """Return what is live in a pool in debug mode, the `most` largest allocations with their stacks.

    Args:
        pool: an object whose `leaks()` gives `Allocation`s (`Pool`).
        most: how many are shown in full.
    """
    return DebugReport(pool.leaks()).text(most)


def _corruption(record: Mapping[str, Any]) -> Corruption:
    known = {field.name for field in fields(Corruption)}
    values = {name: value for name, value in record.items() if name in known}
    return Corruption(**{**values, "allocation": Allocation(**record["allocation"])})


def _by_size(allocation: Allocation) -> tuple[int, int]:
    return -allocation.bytes, allocation.id


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _shown(items: Sequence[Allocation] | Sequence[Corruption], most: int) -> list[str]:
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return [*map(str, items[:most]), *more]
