"""A picture of a pool's address space, and the file that PyTorch's memory page opens.

`Snapshot.save("pool.pickle")` writes what `torch.cuda.memory._dump_snapshot` does; drop the file on
https://pytorch.org/memory_viz (nothing is uploaded). The format was read off torch/cuda/_memory_viz.py and
torch/utils/viz/MemoryViz.js, which replays the events backwards from the segments: an event that the segments
do not bear out is left out, since the page stops at it.
"""

from __future__ import annotations

import bisect
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .recording import Event

__all__ = ["Range", "Segment", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Range:
    """Neighbouring bytes of one state.

    Attributes:
        address: the first byte.
        bytes: the length.
        requested: of them as asked for; 0 unless it is active.
        state: "active" (handed out), "cached" (kept for a request of this size), "free".
        tag: "weights", "activations", ...; of an active range.
        label: the session or model that holds it, or "".
    """

    address: int
    bytes: int
    requested: int
    state: str
    tag: str
    label: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of addresses without a gap. `stream` is the handle of the stream it serves, -1 for all."""

    address: int
    bytes: int
    kind: str
    stream: int
    ranges: tuple[Range, ...]


class Snapshot:
    """The segments of a pool at one moment, and the events that led there if they were recorded."""

    def __init__(self, native: Mapping[str, Any], events: Iterable[Event] = (), device: str = "cpu") -> None:
        """Make it of what `_native.Pool.snapshot()` returns; use `Pool.snapshot()`."""
        self.device = device
        self.events: Sequence[Event] = tuple(events)
        self.segments: tuple[Segment, ...] = tuple(_segment(found) for found in native["segments"])

    @property
    def active_bytes(self) -> int:
        """The bytes of all active ranges."""
        return sum(r.bytes for segment in self.segments for r in segment.ranges if r.state == "active")

    def memory_viz(self) -> dict[str, Any]:
        """Return what PyTorch calls a snapshot. The device is its device 0, "no stream" its stream 0."""
        segments = sorted(self.segments, key=lambda segment: segment.address)
        return {
            "segments": [_viz_segment(segment) for segment in segments],
            "device_traces": [_viz_events(segments, self.events)],
            "allocator_settings": {"expandable_segments": True},
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file for memory_viz; its name must end with `.pickle`. Raises `InputError`, OSError."""
        path = Path(path)
        if path.suffix != ".pickle":
            raise InputError(
                f"the snapshot cannot be saved as {path.name!r}: expected a name that ends with .pickle"
            )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            # The page's reader of pickles knows protocols up to 4.
            temporary.write_bytes(pickle.dumps(self.memory_viz(), protocol=4))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def _segment(found: Mapping[str, Any]) -> Segment:
    ranges = sorted(
        (
            Range(
                r["address"], r["bytes"], r["requested"], r["state"], r.get("tag") or "", r.get("label") or ""
            )
            for r in found["ranges"]
        ),
        key=lambda r: r.address,
    )
    return Segment(found["address"], found["bytes"], found["kind"], found["stream"], tuple(ranges))


def _stream(handle: int) -> int:
    return max(handle, 0)


def _frames(*names: str) -> list[dict[str, Any]]:
    # The page has no place for a holder but the stack.
    return [{"name": name, "filename": "glake_infer", "line": 0} for name in names if name]


def _viz_segment(segment: Segment) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    end = segment.address

    def idle(upto: int) -> None:
        if upto > end:
            blocks.append(
                {"address": end, "size": upto - end, "requested_size": 0, "state": "inactive", "frames": []}
            )

    for r in segment.ranges:
        idle(r.address)
        active = r.state == "active"
        blocks.append(
            {
                "address": r.address,
                "size": r.bytes,
                "requested_size": r.requested if active else 0,
                "state": "active_allocated" if active else "inactive",
                "frames": _frames(r.label, r.tag) if active else [],
            }
        )
        end = r.address + r.bytes
    idle(segment.address + segment.bytes)
    in_use = [block for block in blocks if block["state"] == "active_allocated"]
    used = sum(block["size"] for block in in_use)
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.bytes,
        "allocated_size": used,
        "active_size": used,
        "requested_size": sum(block["requested_size"] for block in in_use),
        "stream": _stream(segment.stream),
        "segment_type": "small" if segment.kind in ("small", "slab", "slabs") else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": True,
        "frames": _frames(segment.kind),
        "blocks": blocks,
    }


class _Mapped:
    """The mapped stretches, each of one stream, as the page keeps them while it goes backwards."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._starts: list[int] = []
        self._parts: list[tuple[int, int]] = []  # end, stream
        for segment in segments:
            self._starts.append(segment.address)
            self._parts.append((segment.address + segment.bytes, _stream(segment.stream)))

    def around(self, start: int, end: int) -> int | None:
        """The stream of the stretch that has all of it, or None."""
        index = bisect.bisect_right(self._starts, start) - 1
        return self._parts[index][1] if index >= 0 and end <= self._parts[index][0] else None

    def remove(self, start: int, end: int) -> int | None:
        stream = self.around(start, end)
        if stream is None:
            return None
        index = bisect.bisect_right(self._starts, start) - 1
        first, (last, _) = self._starts.pop(index), self._parts.pop(index)
        for left, right in ((end, last), (first, start)):
            if left < right:
                self._starts.insert(index, left)
                self._parts.insert(index, (right, stream))
        return stream

    def add(self, start: int, end: int, stream: int) -> bool:
        index = bisect.bisect_right(self._starts, start)
        if index and self._parts[index - 1][0] > start:
            return False
        if index < len(self._starts) and self._starts[index] < end:
            return False
        if index < len(self._starts) and self._starts[index] == end and self._parts[index][1] == stream:
            self._starts.pop(index)
            end = self._parts.pop(index)[0]
        if index and self._parts[index - 1] == (start, stream):
            self._parts[index - 1] = (end, stream)
        else:
            self._starts.insert(index, start)
            self._parts.insert(index, (end, stream))
        return True


def _viz_events(segments: Sequence[Segment], events: Sequence[Event]) -> list[dict[str, Any]]:
    mapped = _Mapped(segments)
    alive = {r.address for segment in segments for r in segment.ranges if r.state == "active"}
    streams: dict[tuple[int, int], int] = {}  # of what was mapped there last
    left_out: set[int] = set()
    frames = {event.id: _frames(event.label, event.tag) for event in events if event.op in ("a", "r")}
    backwards: list[dict[str, Any]] = []

    def add(action: str, event: Event, stream: int) -> None:
        backwards.append(
            {
                "action": action,
                "addr": event.address,
                "size": event.bytes,
                "stream": stream,
                "time_us": event.time_ns // 1000,
                "frames": frames.get(event.id, []),
            }
        )

    for event in reversed(events):
        end = event.address + event.bytes
        if event.op == "m":
            stream = mapped.remove(event.address, end)
            if stream is not None:
                streams[event.address, end] = stream
                add("segment_map", event, stream)
        elif event.op == "u":
            stream = streams.get((event.address, end), 0)
            if mapped.add(event.address, end, stream):
                add("segment_unmap", event, stream)
        elif event.op == "f":
            if event.address in alive or mapped.around(event.address, end) is None:
                left_out.add(event.id)
                continue
            alive.add(event.address)
            add("free_completed", event, _stream(event.stream))
            add("free_requested", event, _stream(event.stream))
        elif event.id not in left_out and event.address in alive:
            alive.discard(event.address)
            add("alloc", event, _stream(event.stream))
    backwards.reverse()
    return backwards
