"""CUDA streams that sessions and engines have one after the other."""

from __future__ import annotations

from glake_infer import cuda

_streams: dict[int, list[int]] = {}
"""Streams whose users are gone, by GPU, for the next ones: a session may still end while its stream is free."""


def take_stream(index: int) -> int:
    """The handle of a stream on GPU `index` that nobody else has. Raises DriverError."""
    try:
        return _streams[index].pop()
    except (KeyError, IndexError):
        return cuda.new_stream(index)


def give_stream_back(index: int, stream: int) -> None:
    """Leave a stream to others. It is never destroyed: the pool may still order memory by it."""
    _streams.setdefault(index, []).append(stream)
