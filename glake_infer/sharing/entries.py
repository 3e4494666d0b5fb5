"""The entries of a broker's table, and what is wrong with a request for them."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from glake_infer import layout
from glake_infer.sharing.protocol import PlacedWeight, RegionSpec, WeightSpec

LARGEST_RESUMED = 1 << 30
"""Bytes of a chunk that a client may bring; ours have layout.LARGEST_CHUNK at most."""


class UnknownError(Exception):
    """A token that the client was never told, or has given back. Nothing was done."""

    def __init__(self, what: str, token: str) -> None:
        """Name it."""
        super().__init__(f"this broker has told this client of no {what} {token}")


class NotMakingError(Exception):
    """The client says that it made a chunk that it was not to make, or not any more. It makes none of these now."""


class WrongError(Exception):
    """A request that contradicts itself, or what is known. Nothing was done."""


class NoRoomError(Exception):
    """`missing` bytes must go first. Nothing was done."""

    def __init__(self, missing: int) -> None:
        """Say how many."""
        super().__init__(f"{missing} bytes are missing")
        self.missing = missing


class Waiter(Protocol):
    """Somebody who waits for chunks."""

    def wake(self) -> None:
        """One of them has changed."""


class Fill(NamedTuple):
    """What fills a part of a chunk: `size` bytes of a weight's file from `offset`, to lie `at` bytes into the chunk."""

    weight: PlacedWeight
    offset: int
    size: int
    at: int


@dataclass(eq=False, repr=False)
class Client:
    """A process, as the table knows it."""

    name: str
    pid: int
    quota: int = 0
    """Bytes of private memory that it may have."""
    regions: dict[str, RegionSpec] = field(default_factory=dict)
    """Those that it refers to, as it was told of them."""
    has: set[Chunk] = field(default_factory=set)
    makes: set[Chunk] = field(default_factory=set)
    strays: dict[str, int] = field(default_factory=dict)
    """Chunks that it brought and that did not pass the check: it has them, and nobody else gets them."""

    @property
    def label(self) -> str:
        """Its name for people."""
        name = "".join(c if c.isprintable() else "?" for c in self.name[:100])
        return f"{name} ({self.pid})"


@dataclass(eq=False, repr=False)
class Chunk:
    """A piece of physical memory, or the place of one."""

    token: str
    size: int
    used: int
    last_use: float
    regions: list[Region] = field(default_factory=list)
    holders: dict[Client, None] = field(default_factory=dict)
    """Who has it, in the order in which they came."""
    maker: Client | None = None
    deadline: float = 0.0
    memory: str = ""
    descriptor: object = None
    checking: bool = False
    brought: bool = False
    """It is checked because a client brought it from an earlier broker."""
    waiting: dict[Waiter, None] = field(default_factory=dict)

    @property
    def there(self) -> bool:
        """Whether it counts: ready, or on its way."""
        return self.maker is not None or self.descriptor is not None

    @property
    def ready(self) -> bool:
        """Whether it can be given to anybody."""
        return self.descriptor is not None and not self.checking


@dataclass(eq=False, repr=False)
class Region:
    """Addresses that belong together. `spec` is what was told of them last."""

    spec: RegionSpec
    chunks: list[Chunk]
    clients: set[Client] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Index what lies where."""
        self.token = self.spec.token
        self.numbers = {chunk: number for number, chunk in enumerate(self.chunks)}
        self.starts = list(itertools.accumulate((chunk.size for chunk in self.chunks), initial=0))
        self.index = {weight.digest: i for i, weight in enumerate(self.spec.weights)}
        self.offsets = [weight.offset for weight in self.spec.weights]
        self.item: layout.Item | None = None
        if self.spec.pieces:
            weight = self.spec.weights[0]
            self.item = layout.Item(weight.digest, weight.mapped, pieces=tuple(self.spec.pieces))

    def fills(self, chunk: Chunk, spec: RegionSpec) -> list[Fill]:
        """What fills a chunk of it, with the files of `spec`."""
        start, end = self.starts[self.numbers[chunk]], self.starts[self.numbers[chunk] + 1]
        first = max(0, bisect_right(self.offsets, start) - 1)
        fills = []
        for weight in spec.weights[first : bisect_left(self.offsets, end)]:
            a, b = max(start, weight.offset), min(end, weight.offset + weight.mapped)
            if a < b:
                fills.append(Fill(weight, a - weight.offset, b - a, a - start))
        return fills


@dataclass
class Sorting:
    """Chunks that somebody asks for: those that can be given, that are on their way, that have to be made."""

    ready: list[Chunk] = field(default_factory=list)
    pending: list[Chunk] = field(default_factory=list)
    absent: list[Chunk] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes that making the absent ones takes."""
        return sum(chunk.size for chunk in self.absent)


@dataclass
class Counters:
    """Since the broker began; DeviceStatus says what each is."""

    loads: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    hits: int = 0
    hit_bytes: int = 0
    refusals: int = 0
    evictions: int = 0
    evicted_bytes: int = 0


def item_of(weight: WeightSpec) -> layout.Item:
    """A weight, as the layout takes it."""
    return layout.Item(weight.digest, weight.mapped, weight.group, tuple(weight.pieces), tuple(weight.edges))


def _are_pieces(pieces: Sequence[str], length: int, mapped: int) -> bool:
    return mapped == length and len(pieces) == -(-length // layout.PIECE)


def check_weight(weight: WeightSpec) -> None:
    """Raise WrongError where a weight contradicts itself."""
    if weight.mapped > weight.length:
        raise WrongError(f"of the {weight.length} bytes of {weight.digest} {weight.mapped} are wanted")
    if weight.pieces and not _are_pieces(weight.pieces, weight.length, weight.mapped):
        raise WrongError(f"the pieces of {weight.digest} do not fit its {weight.length} bytes")


def shape_of(spec: RegionSpec) -> object:
    """All of a region but its paths."""
    return (
        spec.chunks,
        spec.pieces,
        [(w.digest, w.length, w.mapped, w.offset) for w in spec.weights],
    )


def are_equal(one: tuple[RegionSpec, int], other: tuple[RegionSpec, int]) -> bool:
    """Whether two regions may have that chunk, by its number in each: of versions of one weight, with equal pieces."""
    found = []
    for spec, number in (one, other):
        start = sum(chunk.size for chunk in spec.chunks[:number])
        chunk = spec.chunks[number]
        end = start + chunk.size
        found.append((start, chunk, spec.pieces[start // layout.PIECE : -(-end // layout.PIECE)]))
    return found[0] == found[1] and bool(found[0][2])


def check_region(spec: RegionSpec, granule: int) -> bool:
    """Whether a broker could have told of such a region."""
    last = spec.weights[-1]
    ordered = all(a.offset + a.mapped <= b.offset for a, b in itertools.pairwise(spec.weights))
    return (
        ordered
        and last.offset + last.mapped <= sum(chunk.size for chunk in spec.chunks)
        and all(0 < w.mapped <= w.length for w in spec.weights)
        and all(c.size <= LARGEST_RESUMED and not c.size % granule and c.used <= c.size for c in spec.chunks)
        and len({c.token for c in spec.chunks}) == len(spec.chunks)
        and len({w.digest for w in spec.weights}) == len(spec.weights)
        and (
            not spec.pieces or (len(spec.weights) == 1 and _are_pieces(spec.pieces, last.length, last.mapped))
        )
    )
