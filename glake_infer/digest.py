"""BLAKE3 digests of weights: whole buffers and byte ranges of files, streamed.

A digest names a weight in the store, so it covers the raw bytes alone (row-major, little-endian, as
ONNX `raw_data` holds them): two weights of equal bytes and different dtype or shape are one object.
Source: the BLAKE3 paper, https://github.com/BLAKE3-team/BLAKE3-specs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TypeAlias

from blake3 import blake3

Buffer: TypeAlias = bytes | bytearray | memoryview
Progress: TypeAlias = Callable[[int], None]

DIGEST_LENGTH = 64
"""Hexadecimal characters of a digest (256 bits)."""

PIECE = 16 << 20
"""Bytes held in memory at once while a file is streamed."""


def digest_of(data: Buffer) -> str:
    """Return the digest of `data` as 64 hexadecimal characters."""
    return blake3(data, max_threads=blake3.AUTO).hexdigest()


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a digest; guards every path that is built from one."""
    return len(text) == DIGEST_LENGTH and all(c in "0123456789abcdef" for c in text)


def pieces_of(fd: int, offset: int, length: int) -> Iterator[memoryview]:
    """Yield `length` bytes of `fd` from `offset` in pieces; stops early where the file ends.

    Each piece is valid only until the next one is asked for (one buffer is reused). Reads with
    `pread`, not `mmap`: a file that shrinks meanwhile gives a short read here, not a SIGBUS.
    """
    buffer = memoryview(bytearray(min(PIECE, max(length, 1))))
    end = offset + length
    while offset < end:
        count = os.preadv(fd, [buffer[: min(len(buffer), end - offset)]], offset)
        if count == 0:
            return
        yield buffer[:count]
        offset += count


def digest_of_range(fd: int, offset: int, length: int, progress: Progress | None = None) -> tuple[str, int]:
    """Digest of `length` bytes of `fd` from `offset`, and how many there were (fewer at its end).

    `progress` is called with the bytes of each piece.
    """
    state, done = blake3(max_threads=blake3.AUTO), 0
    for piece in pieces_of(fd, offset, length):
        state.update(piece)
        done += len(piece)
        if progress:
            progress(len(piece))
    return state.hexdigest(), done


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """Return the digest of a whole file; raises OSError as `open` does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return digest_of_range(fd, 0, os.fstat(fd).st_size)[0]
    finally:
        os.close(fd)
