"""Weights for tests of residency: stored objects, as a model asks for them."""

from glake_infer import layout
from glake_infer.digest import digests_of_pieces
from glake_infer.residency import Wanted


def wanted(folder, data, mapped=None, **more):
    digest, _ = folder.add_buffer(data)
    return Wanted(digest, len(data), len(data) if mapped is None else mapped, folder, **more)


def parted(folder, data, **more):
    """A weight with the digests of its pieces."""
    _, pieces, _ = digests_of_pieces([data], layout.PIECE)
    return wanted(folder, data, pieces=tuple(pieces[i : i + 64] for i in range(0, len(pieces), 64)), **more)
