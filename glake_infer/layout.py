"""Layout: where weights lie in a region of device addresses, and where its chunks of physical memory begin and end.

A chunk is mapped whole or not at all, so what is to come and go by itself must not share a chunk with anything else;
but mapping costs are per chunk, and rounding every weight up to a granule would waste a quarter of a BERT. So weights of
one group (those that the same models have) are packed one behind the other, and chunks are cut at the edges of groups
alone: large ones inside, one granule where an edge falls into it. A group begins at a granule where that padding stays
under 1 % of everything. Where a granule is more than that, the first weights of a region lie in what an earlier region
has left of its last granule (its tail), so that eight heads of 2.3 MiB do not take 4 MiB each.

A large weight of which another version is known, or may come (the largest of a model), has a region of its own, in
which versions share the chunks whose bytes are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

ALIGNMENT = 256
"""Of each weight's address: what cuMemAlloc promises, and every kernel may count on."""

LARGEST_CHUNK = 128 << 20
"""Larger ones make suspending no faster (10 GiB: 12 ms; 15 ms in chunks of 64 MiB, 23 ms of 26 MiB, on an H200)."""

PIECE = 2 << 20
"""Bytes that one digest of `Item.pieces` stands for."""

LARGE = 64 << 20
"""From here on a weight that differs in part from another may share chunks with it: it has a region of its own."""

MOST_LARGEST = 2
"""Of a model's largest weights (embedding and head, as a rule) other versions are expected, unless there are more."""

PARTED_CHUNK = 32 << 20
"""The largest chunk of such a region: what is shared of it later is whole chunks."""


@dataclass(frozen=True)
class Item:
    """A weight to be placed: `size` bytes. `edges`: where versions of it in other models begin or stop to be equal."""

    digest: str
    size: int
    group: Hashable = None
    pieces: tuple[str, ...] = ()
    edges: tuple[int, ...] = ()


@dataclass(frozen=True)
class Region:
    """One reservation of addresses. `offsets`: digest -> bytes from its beginning; `chunks`: bytes of each chunk."""

    offsets: dict[str, int]
    chunks: tuple[int, ...]
    used: tuple[int, ...]
    """Bytes of weights in each chunk; of a tail, what this region adds."""
    in_tail: bool
    """Whether the first chunk is an earlier region's last one."""
    shared: tuple[int | None, ...]
    """For each chunk the index of the twin's chunk that has the same bytes, or None."""
    parted: Item | None = None
    """The only weight of the region, where others may share chunks with it."""


@dataclass(frozen=True)
class Twin:
    """A large weight that is placed, and the chunks of its region."""

    item: Item
    chunks: tuple[int, ...]


@dataclass
class _Packed:
    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    borders: set[int] = field(default_factory=set)
    end: int = 0


def plan(
    items: Sequence[Item],
    granule: int,
    twin_of: Callable[[Item], Twin | None],
    tail_for: Callable[[int], int] = lambda size: 0,
    *,
    aligned: bool = False,
) -> list[Region]:
    """Lay items out in regions: one for all, and one each for large weights that may be shared in part.

    Groups lie in the order of their first item. `twin_of` finds the placed weight that a large one resembles.
    `tail_for`, asked with the bytes that are to be packed, says how many bytes of an earlier region's last granule are
    used; 0 where there is none to go on in. With `aligned` every group begins at a granule, whatever that takes, and
    there are no tails: a chunk then has weights of one group only.
    """
    total = sum(item.size for item in items)
    spare = total // 100  # bytes of padding that may be spent
    largest = max((item.size for item in items), default=0)
    expected = largest if sum(item.size == largest for item in items) <= MOST_LARGEST else 0
    regions, packed = [], _Packed()
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        padding = -item.size % granule
        large = item.pieces and item.size >= LARGE and PIECE % granule == 0
        twin = twin_of(item) if large else None
        if large and (twin or item.edges or (item.size == expected and padding <= spare)):
            spare -= padding
            regions.append(_parted(item, granule, twin))
        else:
            groups.setdefault(item.group, []).append(item)
    left = sum(_up(item.size, ALIGNMENT) for members in groups.values() for item in members)
    if left and granule > total // 100 and not aligned:
        packed.end = tail_for(left)
    in_tail = packed.end > 0
    for members in groups.values():
        padding = -packed.end % granule
        if aligned or (padding <= spare and not (in_tail and not packed.offsets)):
            spare -= padding
            packed.end += padding
        packed.borders.add(packed.end)
        for item in members:
            packed.end = _up(packed.end, ALIGNMENT)
            packed.offsets[item.digest] = packed.end
            packed.sizes[item.digest] = item.size
            packed.end += item.size
    if packed.offsets:
        regions.insert(0, _cut(packed, granule, in_tail, tail=not aligned))
    return regions


def _parted(item: Item, granule: int, twin: Twin | None) -> Region:
    """A region for one weight: cut as its twin's, as far as that goes, then at the edges."""
    end = _up(item.size, granule)
    chunks: list[int] = []
    shared: list[int | None] = []
    start = 0
    for index, size in enumerate(twin.chunks if twin else ()):
        if start + size > end:
            break
        same = slice(start // PIECE, -(-(start + size) // PIECE))
        equal = twin is not None and item.pieces[same] == twin.item.pieces[same]
        chunks.append(size)
        shared.append(index if equal else None)
        start += size
    edges = {edge for edge in item.edges if start < edge < item.size and edge % granule == 0}
    rest = _between({start, end, *edges}, granule, PARTED_CHUNK)
    chunks += rest
    shared += [None] * len(rest)
    used = _used({item.digest: (0, item.size)}, chunks)
    return Region({item.digest: 0}, tuple(chunks), used, False, tuple(shared), item)


def _cut(packed: _Packed, granule: int, in_tail: bool, tail: bool) -> Region:
    """Cut the packed weights into chunks: a granule that a border falls into is one by itself, and so is a tail."""
    end = _up(packed.end, granule)
    bounds = {0, end}
    if tail:
        bounds.add(packed.end // granule * granule)
    if in_tail:
        bounds.add(granule)
    for border in packed.borders:
        bounds.update((border // granule * granule, min(_up(border, granule), end)))
    chunks = _between(bounds, granule, LARGEST_CHUNK)
    spans = {digest: (offset, packed.sizes[digest]) for digest, offset in packed.offsets.items()}
    used = _used(spans, chunks)
    return Region(packed.offsets, tuple(chunks), used, in_tail, (None,) * len(chunks))


def _between(bounds: set[int], granule: int, most: int) -> list[int]:
    """Chunks of at most `most` bytes that end at each of the bounds."""
    return [size for a, b in itertools.pairwise(sorted(bounds)) for size in _split(b - a, granule, most)]


def _split(size: int, granule: int, most: int) -> list[int]:
    """Cut `size`, a multiple of the granule, into parts of at most `most` that are about equal."""
    parts = -(-size // most)
    granules = size // granule
    return [(granules * (i + 1) // parts - granules * i // parts) * granule for i in range(parts)]


def _used(spans: dict[str, tuple[int, int]], chunks: Sequence[int]) -> tuple[int, ...]:
    ordered = sorted(spans.values())
    used, start, first = [], 0, 0
    for size in chunks:
        end, total = start + size, 0
        while first < len(ordered) and sum(ordered[first]) <= start:
            first += 1
        index = first
        while index < len(ordered) and ordered[index][0] < end:
            offset, length = ordered[index]
            total += max(0, min(end, offset + length) - max(start, offset))
            index += 1
        used.append(total)
        start = end
    return tuple(used)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
