"""A plan of TensorRT's as bytes of files: what fills a part of it, and where in it something lies."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from glake_infer.checking import File
from glake_infer.transfers.device import Part, Step, device_for

TRAILER = 4
"""Bytes of a plan behind its weights (TensorRT-RTX 1.7): where they are looked for first."""

WINDOW = 8 << 20
"""Bytes of a plan that are searched at once."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive bytes of a plan, which lie in the object `file` from `start` on.

    Or `rows` times so many, which lie one behind the other in the object and `pitch` bytes apart in the plan: matrices that
    TensorRT has put side by side.
    """

    offset: int
    bytes: int
    file: File
    start: int = 0
    rows: int = 1
    pitch: int = 0

    @property
    def end(self) -> int:
        """Where the last row ends in the plan."""
        return self.offset + (self.rows - 1) * self.pitch + self.bytes


class PlanBytes:
    """A plan's bytes, read from the objects that hold them."""

    def __init__(self, size: int, stretches: Sequence[Stretch]) -> None:
        self.bytes = size
        self.stretches = sorted(stretches, key=lambda stretch: stretch.offset)
        self._places: list[
            tuple[int, int, list[Stretch]]
        ] = []  # (begin, end, what lies there, or side by side)
        for stretch in self.stretches:
            if self._places and stretch.offset < self._places[-1][1]:
                begin, end, there = self._places[-1]
                self._places[-1] = (begin, max(end, stretch.end), [*there, stretch])
            else:
                self._places.append((stretch.offset, stretch.end, [stretch]))
        self._begins = [begin for begin, _, _ in self._places]

    def within(self, offset: int, size: int) -> list[Stretch]:
        """The stretches that have some of `size` bytes from `offset` on."""
        return [s for s in self.stretches if s.offset < offset + size and s.end > offset]

    def parts(self, offset: int, size: int, address: int) -> list[Part]:
        """What fills `size` bytes at `address` with those from `offset` on."""
        found: list[Part] = []
        for index in range(max(0, bisect.bisect_right(self._begins, offset) - 1), len(self._places)):
            begin, _, stretches = self._places[index]
            if begin >= offset + size:
                break
            for stretch in stretches:
                found += parts_of(stretch, offset, offset + size, address - offset)
        return found

    def holds(self, offset: int, data: memoryview) -> bool:
        """Whether the plan is known to have these bytes at `offset`."""
        theirs = self.read(offset, len(data))
        return len(theirs) == len(data) and np.array_equal(
            np.frombuffer(theirs, np.uint8), np.frombuffer(data, np.uint8)
        )

    def find(self, sample: memoryview, size: int) -> int | None:
        """Where a block of `size` bytes that begins with `sample` begins in the plan; None where it is not found."""
        if not self.stretches or size > self.bytes:
            return None
        likely = self.bytes - TRAILER - size
        if likely >= 0 and self.holds(likely, sample):
            return likely
        wanted = bytes(sample)
        step = max(WINDOW, 4 * len(wanted))
        for first, last in self._runs():
            for start in range(first, last - len(wanted) + 1, step):
                data = self.read(start, min(step + len(wanted) - 1, last - start))
                at = data.find(wanted)
                if at >= 0 and start + at + size <= self.bytes:
                    return start + at
        return None

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Ranges of the plan that are known without a gap."""
        begin = end = 0
        for start, stop, _ in self._places:
            if start != end:
                yield begin, end
                begin = start
            end = stop
        yield begin, end

    def read(self, offset: int, size: int) -> bytearray:
        """Nothing where the plan is not known to have all of them, or a file is shorter than it was."""
        data = bytearray(size)
        parts = self.parts(offset, size, ctypes.addressof((ctypes.c_char * size).from_buffer(data)))
        known = sum(part.bytes for part in parts)
        try:
            device_for("cpu").bring([Step(parts, in_place=True)], known)
        except OSError:
            return bytearray()
        return data if known == size else bytearray()


def parts_of(stretch: Stretch, begin: int, end: int, shift: int) -> Iterator[Part]:
    """The bytes of a stretch that lie from `begin` to `end` in the plan; `shift` leads from there to addresses."""
    if stretch.rows == 1:
        first, last = max(begin, stretch.offset), min(end, stretch.end)
        if first < last:
            start = stretch.start + first - stretch.offset
            yield Part(stretch.file.path, start, last - first, first + shift)
        return
    size, pitch = stretch.bytes, stretch.pitch
    row = max(0, (begin - stretch.offset - size) // pitch + 1)
    stop = min(stretch.rows, -(-(end - stretch.offset) // pitch))
    while row < stop:
        place = stretch.offset + row * pitch
        first, last = max(begin, place), min(end, place + size)
        start = stretch.start + row * size + first - place
        whole = (min(stop, (end - stretch.offset - size) // pitch + 1) - row) if last - first == size else 0
        yield Part(stretch.file.path, start, last - first, first + shift, max(whole, 1), pitch)
        row += max(whole, 1)
