"""Where stored weights lie in a plan: searched for, never assumed.

TensorRT copies most weights into the plan as they are, at steps of 128 bytes. Some it puts side by side, row by row (query,
key and value of attention become one matrix), some it folds or packs anew. So: whole weights at steps of 128 bytes, then
whole weights and rows at any multiple of 4 bytes. A match is a match only when all bytes are equal.

A weight is looked for by a probe, 8 of its bytes that are no filling. For all probes together the data is read once.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

STEP = 128
"""Tensors lie at multiples of this in a plan's section of weights."""

MOST_PLACES = 4096
"""Places where one probe may be found; one that is found more often says nothing."""

MINIMUM_ROW = 64
"""Rows shorter than this are not looked for."""

PROBE_WITHIN = 4096
"""Leading bytes of a weight in which its probe is chosen."""

WORDS = 8 << 20
"""Words of 4 bytes that are looked at together."""


@dataclass(frozen=True)
class Needle:
    """A weight to look for: its bytes, and how many rows they are (the first axis of its shape)."""

    digest: str
    data: Bytes
    rows: int

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)


@dataclass(frozen=True)
class Place:
    """A weight found whole at `offset`."""

    offset: int
    needle: Needle


@dataclass(frozen=True)
class Weave:
    """Rows of several weights in turn, from `offset` on. `strands`: (weight or None for other bytes, bytes per row)."""

    offset: int
    rows: int
    strands: tuple[tuple[Needle | None, int], ...]

    @property
    def pitch(self) -> int:
        """Bytes of a row of all strands."""
        return sum(width for _, width in self.strands)


def find(data: Bytes, needles: Sequence[Needle], phases: Sequence[int] = (0,)) -> list[Place | Weave]:
    """Return where the needles lie in `data`, in order and without overlap; the larger first where they compete.

    phases: what the offset of a weight is modulo 4.
    """
    taken = _Intervals()
    found: list[Place | Weave] = []
    probed = [(needle, at) for needle in needles if (at := _probe_of(needle.data)) is not None]
    found += _accept(_whole_at_steps(data, probed), taken)
    seen = {place.needle.digest for place in found if isinstance(place, Place)}
    missing = [(needle, at) for needle, at in probed if needle.digest not in seen]
    if missing:
        whole, rows = _anywhere(data, missing, phases)
        found += _accept(whole, taken)
        seen |= {place.needle.digest for place in whole}
        found += _weaves(data, [r for r in rows if r[0].digest not in seen], taken)
    return sorted(found, key=lambda place: place.offset)


class _Intervals:
    """Ranges that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, start: int, end: int) -> bool:
        """Add a range unless it overlaps one that is there."""
        index = bisect.bisect_right(self._starts, start)
        if index and self._ends[index - 1] > start:
            return False
        if index < len(self._starts) and self._starts[index] < end:
            return False
        self._starts.insert(index, start)
        self._ends.insert(index, end)
        return True


def _accept(places: list[Place], taken: _Intervals) -> list[Place]:
    ordered = sorted(places, key=lambda place: (-place.needle.size, place.offset))
    return [place for place in ordered if taken.take(place.offset, place.offset + place.needle.size)]


def _probe_of(data: Bytes) -> int | None:
    """Where 8 bytes begin by which `data` can be told: two different words, none of them zero or the first repeated."""
    words = _words(data[: min(len(data), PROBE_WITHIN)])
    if len(words) < 2:
        return None
    low, high = words[:-1], words[1:]
    good = np.flatnonzero((low != high) & (low != 0) & (high != 0))
    return int(good[0]) * 4 if len(good) else None


def _words(data: Bytes, phase: int = 0) -> npt.NDArray[np.uint32]:
    part = data[phase : phase + (len(data) - phase) // 4 * 4]
    if part.ctypes.data % 4:
        part = part.copy()
    return part.view(np.uint32)


def _key_at(data: Bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8].tobytes(), "little")


def _equal(data: Bytes, offset: int, needle: Needle) -> bool:
    return (
        0 <= offset <= len(data) - needle.size
        and bool(data[offset] == needle.data[0])
        and np.array_equal(data[offset : offset + needle.size], needle.data)
    )


def _whole_at_steps(data: Bytes, probed: list[tuple[Needle, int]]) -> list[Place]:
    """Whole weights at multiples of STEP. One look at every step for each distinct place of a probe in it."""
    groups: dict[int, dict[int, list[Needle]]] = defaultdict(lambda: defaultdict(list))
    for needle, at in probed:
        groups[at][_key_at(needle.data, at)].append(needle)
    places = []
    steps = len(data) // STEP
    lines = data[: steps * STEP].reshape(steps, STEP)
    for at, keys in groups.items():
        column, within = at // STEP, at % STEP
        if within > STEP - 8 or column >= steps:
            continue  # the look at every word finds it
        here = np.ascontiguousarray(lines[column:, within : within + 8]).view(np.uint64).ravel()
        wanted = np.array(sorted(keys), np.uint64)
        for line in np.flatnonzero(_is_in(here, wanted))[: MOST_PLACES * len(keys)]:
            places += [
                Place(int(line) * STEP, needle)
                for needle in keys[int(here[line])]
                if _equal(data, int(line) * STEP, needle)
            ]
    return places


def _is_in(values: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    index = np.searchsorted(wanted, values)
    index[index == len(wanted)] = 0
    return np.asarray(wanted[index] == values)


Rows = tuple[Needle, int, list[int], list[int]]
"""A weight, bytes of its rows, where its first row may lie, and its second."""


def _anywhere(
    data: Bytes, missing: list[tuple[Needle, int]], phases: Sequence[int]
) -> tuple[list[Place], list[Rows]]:
    """Whole weights and first and second rows of others at any word."""
    probes: dict[int, list[tuple[int, int, int]]] = defaultdict(
        list
    )  # key -> (needle's number, row or -1, at)
    for number, (needle, at) in enumerate(missing):
        probes[_key_at(needle.data, at)].append((number, -1, at))
        width = needle.size // max(needle.rows, 1)
        if needle.rows >= 2 and width >= MINIMUM_ROW and needle.size % needle.rows == 0:
            for row in (0, 1):
                line = needle.data[row * width : (row + 1) * width]
                if (within := _probe_of(line)) is not None:
                    probes[_key_at(line, within)].append((number, row, within))
    places: list[Place] = []
    rows: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for key, position in _every_word(data, np.array(sorted(probes), np.uint64), phases):
        for number, row, at in probes[key]:
            needle, offset = missing[number][0], position - at
            if row >= 0 and offset >= 0:
                rows[number][row].append(offset)
            elif _equal(data, offset, needle):
                places.append(Place(offset, needle))
    return places, [
        (missing[number][0], missing[number][0].size // missing[number][0].rows, first, second)
        for number, (first, second) in sorted(rows.items())
    ]


def _every_word(
    data: Bytes, wanted: npt.NDArray[np.uint64], phases: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yield (key, offset) wherever 8 bytes of `data` are one of `wanted`, rare ones only."""
    table = np.zeros(1 << 16, np.bool_)
    table[_folded((wanted & 0xFFFFFFFF).astype(np.uint32))] = True
    counts: dict[int, int] = defaultdict(int)
    for phase in phases:
        words = _words(data, phase)
        for start in range(0, len(words) - 1, WORDS):
            part = words[start : min(start + WORDS + 1, len(words))]
            index = np.flatnonzero(table[_folded(part[:-1])])
            keys = part[index].astype(np.uint64) | (part[index + 1].astype(np.uint64) << np.uint64(32))
            hits = np.flatnonzero(_is_in(keys, wanted))
            for key, place in zip(keys[hits].tolist(), index[hits].tolist(), strict=True):
                counts[key] += 1
                if counts[key] <= MOST_PLACES:
                    yield key, (start + place) * 4 + phase


def _folded(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    return (words ^ (words >> np.uint32(16))).astype(np.uint16)


def _weaves(data: Bytes, rows: list[Rows], taken: _Intervals) -> list[Weave]:
    """Put weights whose rows lie at equal distances together: those of one pitch and count that lie within each other."""
    groups: dict[tuple[int, int], list[tuple[int, Needle, int]]] = defaultdict(list)
    for needle, width, first, second in rows:
        seconds = np.array(sorted(second))
        for offset in first:
            for pitch in (seconds[seconds > offset] - offset).tolist():
                if pitch > width and _equal_rows(data, offset, pitch, needle, width):
                    groups[pitch, needle.rows].append((offset, needle, width))
                    break
    made = []
    for (pitch, count), strands in groups.items():
        strands.sort(key=lambda strand: strand[0])
        while strands:
            begin = strands[0][0]
            inside = [s for s in strands if s[0] + s[2] <= begin + pitch]
            strands = [s for s in strands if s[0] + s[2] > begin + pitch]
            slack = begin + pitch - max(offset + width for offset, _, width in inside)
            start = min(begin, len(data) - pitch * count)  # a row may begin with other bytes
            weave = _weave(start, pitch, count, inside) if start >= max(0, begin - slack) else None
            if weave is not None and taken.take(start, start + pitch * count):
                made.append(weave)
    return made


def _equal_rows(data: Bytes, offset: int, pitch: int, needle: Needle, width: int) -> bool:
    if offset + pitch * (needle.rows - 1) + width > len(data):
        return False
    strided: Any = np.lib.stride_tricks.as_strided(data[offset:], (needle.rows, width), (pitch, 1))
    return np.array_equal(strided, needle.data.reshape(needle.rows, width))


def _weave(begin: int, pitch: int, count: int, inside: list[tuple[int, Needle, int]]) -> Weave | None:
    strands: list[tuple[Needle | None, int]] = []
    position = begin
    for offset, needle, width in inside:
        if offset < position:
            continue  # of two weights with equal bytes the first
        if offset > position:
            strands.append((None, offset - position))
        strands.append((needle, width))
        position = offset + width
    if position < begin + pitch:
        strands.append((None, begin + pitch - position))
    other = sum(width for needle, width in strands if needle is None)
    return Weave(begin, count, tuple(strands)) if 2 * other <= pitch else None
