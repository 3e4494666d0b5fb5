"""Kin: what the packages of a store have in common, so that weights can be laid out for all of them.

Weights that the same packages have come and go together; where two packages have versions of one large weight, the
pieces that are equal can be held once (glake_infer/layout.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from glake_infer.allocators.errors import PackageError, StoreError
from glake_infer.layout import LARGE, PIECE
from glake_infer.models.manifest import Weight, read_manifest
from glake_infer.models.package import Package

MOST_KIN = 32
"""Packages that are looked at, those with the most weights in common first."""


@dataclass(frozen=True)
class Hint:
    """How one weight is to be laid out; see `glake_infer.residency.Wanted`."""

    group: frozenset[int]
    pieces: tuple[str, ...]
    edges: tuple[int, ...]


def hints(package: Package, digests: Iterable[str]) -> dict[str, Hint]:
    """Return the hints for weights of `package` by digest."""
    mine = set(digests)
    weights = {weight.digest: weight for weight in package.manifest.weights if weight.digest in mine}
    place = package.path.absolute()
    kin = []
    with contextlib.suppress(
        StoreError, OSError
    ):  # a damaged record: without hints less comes and goes by itself
        kin = sorted(
            (record for record in package.store.records() if record.path != place and record.digests & mine),
            key=lambda record: (-len(record.digests & mine), str(record.path)),
        )[:MOST_KIN]
    large = [weight for weight in weights.values() if weight.pieces and weight.bytes >= LARGE]
    edges: dict[str, set[int]] = {weight.digest: set() for weight in large}
    for record in kin:
        if all(weight.digest in record.digests for weight in large):
            continue
        with contextlib.suppress(PackageError, OSError):
            theirs = {weight.name: weight for weight in read_manifest(record.path).weights if weight.pieces}
            for weight in large:
                if (other := theirs.get(weight.name)) and other.digest != weight.digest:
                    edges[weight.digest] |= _edges(weight, other)
    return {
        digest: Hint(
            frozenset(number for number, record in enumerate(kin) if digest in record.digests),
            tuple(pieces_of(weights[digest])) if digest in weights else (),
            tuple(sorted(edges.get(digest, ()))),
        )
        for digest in mine
    }


def pieces_of(weight: Weight) -> list[str]:
    """The digests of a weight's pieces."""
    return [weight.pieces[i : i + 64] for i in range(0, len(weight.pieces), 64)]


def _edges(mine: Weight, other: Weight) -> set[int]:
    """Bytes at which the pieces of both begin or stop to be equal."""
    equal = [a == b for a, b in zip(pieces_of(mine), pieces_of(other), strict=False)]
    equal.append(False)
    return {index * PIECE for index in range(1, len(equal)) if equal[index] != equal[index - 1]}
