"""Files in the page cache and out of it, and weights as safetensors."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from glake_infer.models.export import checked_object
from glake_infer.models.package import Package

STEP = 8 << 20
THREADS = 8


def read_all(paths: Sequence[Path]) -> float:
    """Read files, so that they are in the page cache where it has room; returns bytes per second. Raises OSError."""
    todo = [(path, place) for path in paths for place in range(0, path.stat().st_size, STEP)]
    start = time.perf_counter()

    def read(piece: tuple[Path, int]) -> int:
        path, place = piece
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return len(os.pread(fd, STEP, place))
        finally:
            os.close(fd)

    with ThreadPoolExecutor(min(THREADS, 2 * len(os.sched_getaffinity(0)))) as executor:
        size = sum(executor.map(read, todo))
    return size / max(1e-9, time.perf_counter() - start)


def drop(paths: Iterable[Path]) -> None:
    """Put files out of the page cache, where the file system does so. Raises OSError."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # pages that are not on disk yet would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached(paths: Iterable[Path]) -> int:
    """Bytes of files that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    found = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        pages = -(-size // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
            start = ctypes.c_char.from_buffer(mapped)
            try:
                if libc.mincore(ctypes.addressof(start), size, seen):
                    raise OSError(ctypes.get_errno(), "asking what is in the page cache", os.fspath(path))
            finally:
                del start
        there = bytes(seen).translate(_LOWEST).count(1)
        found += min(size, there * mmap.PAGESIZE)
    return found


_LOWEST = bytes(value & 1 for value in range(256))


def write_safetensors(package: Package, path: Path) -> None:
    """Write the weights of a package's own graph as bytes of a safetensors file. Raises OSError, DigestMismatchError."""
    weights = package.manifest.distinct_of("onnx")
    entries, place = {}, 0
    for digest, size in weights.items():
        entries[digest] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % 4096)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for digest, size in weights.items():
            for piece in checked_object(package, digest, size):
                file.write(piece)
