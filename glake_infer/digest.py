"""BLAKE3 digests of weights: whole buffers and byte ranges of files, streamed.

A digest names a weight in the store, so it covers the raw bytes alone (row-major, little-endian, as
ONNX `raw_data` holds them): two weights of equal bytes and different dtype or shape are one object.
Source: the BLAKE3 paper, https://github.com/BLAKE3-team/BLAKE3-specs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from blake3 import blake3

Buffer: TypeAlias = bytes | bytearray | memoryview
Progress: TypeAlias = Callable[[int], None]

DIGEST_LENGTH = 64
"""Hexadecimal characters of a digest (256 bits)."""

PIECE = 16 << 20
"""Bytes held in memory at once while a file is streamed."""

SMALL_PIECE = 1 << 20
"""The same where one thread does it: what it has just read is still in its cache."""

_threads = blake3.AUTO


def _in_one_thread() -> None:
    """In a child of fork(): the parent's threads, for which blake3 would wait, are not there."""
    global _threads
    _threads = 1


os.register_at_fork(after_in_child=_in_one_thread)


def digest_of(data: Buffer) -> str:
    """Return the digest of `data` as 64 hexadecimal characters."""
    return blake3(data, max_threads=_threads).hexdigest()


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a digest; guards every path that is built from one."""
    return len(text) == DIGEST_LENGTH and not text.strip("0123456789abcdef")


def pieces_of(fd: int, offset: int, length: int, size: int | None = None) -> Iterator[memoryview]:
    """Yield `length` bytes of `fd` from `offset` in pieces (of `size`, else PIECE); stops early where the file ends.

    Each piece is valid only until the next one is asked for (one buffer is reused). Reads with
    `pread`, not `mmap`: a file that shrinks meanwhile gives a short read here, not a SIGBUS.
    """
    buffer = memoryview(bytearray(min(size or PIECE, max(length, 1))))
    end = offset + length
    while offset < end:
        count = os.preadv(fd, [buffer[: min(len(buffer), end - offset)]], offset)
        if count == 0:
            return
        yield buffer[:count]
        offset += count


def digest_of_range(
    fd: int, offset: int, length: int, progress: Progress | None = None, *, alone: bool = False
) -> tuple[str, int]:
    """Digest of `length` bytes of `fd` from `offset`, and how many there were (fewer at its end).

    `progress` is called with the bytes of each piece. alone: by this thread, with no others of blake3's.
    """
    state, done = blake3(max_threads=1 if alone else _threads), 0
    for piece in pieces_of(fd, offset, length, SMALL_PIECE if alone else PIECE):
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


def digests_of_pieces(buffers: Iterable[Buffer], size: int) -> tuple[str, str, int]:
    """Digest of all bytes, the digests of each `size` bytes of them one after the other, and how many there were.

    Each buffer need only be valid until the next one is asked for.
    """
    state, done = blake3(max_threads=_threads), 0
    digests: list[str] = []
    begun = blake3()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            head = min(-done % size, len(view))  # what is missing of the piece that was begun
            tail = (len(view) - head) % size
            whole = range(head, len(view) - tail, size)
            found = threads.map(lambda start, v=view: digest_of_piece(v[start : start + size]), whole)
            state.update(view)
            begun.update(view[:head])
            done += len(view)
            if head and not (done - (len(view) - head)) % size:
                digests.append(begun.hexdigest())
                begun = blake3()
            digests += found
            begun.update(view[len(view) - tail :])
    if done % size:
        digests.append(begun.hexdigest())
    return state.hexdigest(), "".join(digests), done


def digest_of_piece(data: Buffer) -> str:
    """Like `digest_of`, in one thread."""
    return blake3(data).hexdigest()
