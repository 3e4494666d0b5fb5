"""Offload: which weights of a model that is larger than the room for it stay in memory of the host, the coldest first.

The device reads them there over its link, in every run that needs them: 55 GB/s where its own memory gives 3 TB/s. So as
few bytes as will do are chosen, and first those that a run reads least of:

1. tables of which a node looks up rows (embeddings);
2. weights that only bodies of If and Loop use;
3. all others, from the end of the graph where there is a choice.

Of each kind the smallest weight is taken that suffices, else the largest: few weights, and few bytes too many. Weights
below 1 MiB go last: each saves less than a granule of the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onnx import GraphProto, ModelProto, NodeProto

from glake_infer.allocators.errors import InputError
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes, parse_bytes
from glake_infer.models.graph import bodies, initializers
from glake_infer.residency import Residency, Wanted

Offload = Literal["none", "auto"] | int | str
"""What `load` may leave on the host: nothing, what does not fit, or so many bytes ("6GiB") at least."""

TABLE, BODY, REST, SMALL = range(4)
"""Ranks of weights, the coldest first."""

LEAST = 1 << 20
"""Bytes below which a weight is SMALL."""

HEADROOM = 256 << 20
"""Bytes that "auto" leaves for activations and CUDA's libraries, or HEADROOM_SHARE of the limit if that is more."""

HEADROOM_SHARE = 0.05

LOOKUPS = {
    ("", "Gather"): (0,),
    ("com.microsoft", "GatherBlockQuantized"): (0, 2, 3),
    ("com.microsoft", "EmbedLayerNormalization"): (2, 3, 4),
}
"""Nodes that read some rows of a table: the inputs that are tables."""

CONDITIONAL = {"If", "Loop"}
"""Nodes whose bodies a run may pass by."""


@dataclass(frozen=True)
class Read:
    """How a graph uses a weight. `last`: the number of the last node that does, in the order of the graph."""

    rank: int
    last: int


@dataclass(frozen=True)
class Candidate:
    """A weight that may go to the host."""

    digest: str
    size: int
    rank: int
    last: int


def parse_offload(offload: Offload) -> Literal["none", "auto"] | int:
    """Return bytes for an amount; 0 is "none". Raises InputError."""
    if offload == "none" or offload == "auto":
        return "auto" if offload == "auto" else "none"
    try:
        return parse_bytes(offload) or "none"
    except InputError as error:
        raise InputError(
            f"offload={offload!r}: expected 'none', 'auto', or an amount of memory: {error}"
        ) from error


def headroom_for(limit: int, headroom: int | str | None = None) -> int:
    """The bytes that "auto" leaves free. Raises InputError."""
    return max(HEADROOM, int(limit * HEADROOM_SHARE)) if headroom is None else parse_bytes(headroom)


def reads_of(model: ModelProto) -> dict[str, Read]:
    """How each weight of a model is used, by its name, which no two scopes share."""
    names = {item.tensor.name for item in initializers(model)}
    ranks = dict.fromkeys(names, TABLE)  # what nobody reads is as cold
    last = dict.fromkeys(names, 0)
    for number, (node, conditional) in enumerate(_nodes(model.graph, conditional=False)):
        tables = _tables(node)
        for index, name in enumerate(node.input):
            if name in names:
                rank = TABLE if index in tables else BODY if conditional else REST
                ranks[name] = max(ranks[name], rank)
                last[name] = number
    for value in model.graph.output:
        if value.name in names:
            ranks[value.name] = REST
    return {name: Read(ranks[name], last[name]) for name in names}


def _nodes(graph: GraphProto, *, conditional: bool) -> Iterator[tuple[NodeProto, bool]]:
    """Every node of every scope, and whether it lies in a body that a run may pass by."""
    for node in graph.node:
        yield node, conditional
        for body in bodies(node):
            yield from _nodes(body, conditional=conditional or node.op_type in CONDITIONAL)


def _tables(node: NodeProto) -> tuple[int, ...]:
    """The inputs of a node of which it looks up rows."""
    axes = [attribute.i for attribute in node.attribute if attribute.name in ("axis", "gather_axis")]
    domain = "" if node.domain == "ai.onnx" else node.domain
    return LOOKUPS.get((domain, node.op_type), ()) if not any(axes) else ()


def candidates(
    items: Iterable[Wanted], names: Mapping[str, Sequence[str]], reads: Mapping[str, Read]
) -> list[Candidate]:
    """Weights that may go to the host; `names`: under which names the graph has each digest."""
    found = []
    for item in items:
        if item.mapped and not item.by_file:
            mine = [reads[name] for name in names[item.digest]]
            rank = max(read.rank for read in mine) if item.mapped >= LEAST else SMALL
            found.append(Candidate(item.digest, item.mapped, rank, max(read.last for read in mine)))
    return found


def pick(among: Iterable[Candidate], size: int) -> list[Candidate]:
    """The coldest weights of at least `size` bytes together, if there are as many."""
    picked: list[Candidate] = []
    by_rank: dict[int, list[Candidate]] = {}
    for candidate in among:
        by_rank.setdefault(candidate.rank, []).append(candidate)
    for rank in sorted(by_rank):
        left = sorted(by_rank[rank], key=lambda each: (each.size, each.last, each.digest), reverse=True)
        while left and size > 0:
            enough = [each for each in left if each.size >= size]
            smallest = min((each.size for each in enough), default=left[0].size)
            taken = next(
                each for each in left if each.size == smallest
            )  # of equal ones the last in the graph
            left.remove(taken)
            picked.append(taken)
            size -= taken.size
    return picked


@dataclass(frozen=True)
class Choice:
    """What goes to the host, by digest, and whether the rest fits then beside the headroom."""

    on_host: frozenset[str]
    fits: bool


def choose(
    residency: Residency,
    wanted: Sequence[Wanted],
    names: Mapping[str, Sequence[str]],
    reads: Mapping[str, Read],
    offload: Literal["auto"] | int,
    headroom: int,
) -> Choice:
    """Choose among the weights that no model has yet; those that one has stay where they are."""
    there = residency.placed(item.digest for item in wanted)
    left = candidates((item for item in wanted if item.digest not in there), names, reads)
    if offload != "auto":
        sizes = {item.digest: item.mapped for item in wanted}
        already = sum(sizes[digest] for digest, on_host in there.items() if on_host)
        return Choice(frozenset(each.digest for each in pick(left, offload - already)), True)
    chosen: set[str] = set()
    while True:
        needed, room = residency.room(placed_on_host(wanted, chosen))
        short = needed + headroom - room
        if short <= 0 or not left:
            return Choice(frozenset(chosen), short <= 0)
        chosen.update(each.digest for each in pick(left, short))
        left = [each for each in left if each.digest not in chosen]


def placed_on_host(wanted: Iterable[Wanted], chosen: Iterable[str]) -> list[Wanted]:
    """The same weights, the chosen ones on the host."""
    chosen = frozenset(chosen)
    return [replace(item, on_host=True) if item.digest in chosen else item for item in wanted]


def refuse_with_broker(pool: Pool, offload: Offload, short: int = 0) -> InputError:
    """The error for a model whose weights a broker holds."""
    why = (
        f" The model lacks {format_bytes(short)} of room there: raise the limit, or"
        if short
        else " Leave it out, or"
    )
    return InputError(
        f"offload={offload!r}: weights that a broker holds for all processes cannot lie in one process's host memory."
        f"{why} make the pool on {pool.device!r} with broker='off'."
    )
