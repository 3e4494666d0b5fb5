"""Files straight to a GPU's memory by GPUDirect Storage, through kvikio (https://docs.rapids.ai/api/kvikio).

Where kvikio is installed and the driver moves bytes between disk and GPU itself; kvikio's own way through the host (its
compatibility mode) is used only where the settings say "always", as the engine's readers are faster.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEAST = 1 << 20
"""Bytes from which a part of a file is worth it."""

NAP = 0.001
"""Seconds between two looks."""


class _Memory:
    """Device memory as kvikio takes it: anything with the CUDA array interface."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None, "stream": 1,
        }  # fmt: skip


@functools.cache
def kvikio() -> Any:
    """The library, or None where it is not installed or does not load."""
    try:
        import kvikio
        import kvikio.cufile_driver
    except Exception:  # a library of CUDA that it does not find is an error of any kind
        return None
    else:
        return kvikio


@functools.cache
def is_direct() -> bool:
    """Whether the driver moves the bytes by itself."""
    library = kvikio()
    if library is None:
        return False
    try:
        return bool(library.cufile_driver.get("is_gds_available"))
    except Exception:  # no driver of the kind, or a kvikio that names it otherwise
        return False


def is_cached(path: str | os.PathLike[str], offset: int) -> bool:
    """Whether the page cache has the page of a file at an offset. False where nobody knows."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        finally:
            os.close(fd)
    except OSError:
        return False


class StorageTransfer:
    """Parts of files on their way; looks like one of the engine's transfers."""

    def __init__(self, parts: Sequence[tuple[Path, int, int, int]]) -> None:
        """Begin. Parts: (file, offset, bytes, device address) each."""
        self._parts = list(parts)
        self._started: list[tuple[Any, tuple[Path, int, int, int]]] = []
        self._error: tuple[int, str, int] | None = None
        self._files: list[Any] = []
        self._cancelled = False
        files: dict[Path, Any] = {}
        for part in self._parts:
            path, offset, size, address = part
            try:
                if path not in files:
                    files[path] = kvikio().CuFile(os.fspath(path), "r")
                    self._files.append(files[path])
                future = files[path].pread(_Memory(address, size), size=size, file_offset=offset)
            except (OSError, RuntimeError) as error:
                self._error = (getattr(error, "errno", None) or 5, os.fspath(path), 0)
                return
            self._started.append((future, part))

    def wait(self, seconds: float) -> bool:
        """Whether all is there, at the latest after so many seconds."""
        end = time.monotonic() + seconds
        while not all(future.done() for future, _ in self._started):
            if time.monotonic() >= end:
                return False
            time.sleep(NAP)
        return True

    def cancel(self) -> None:
        """What has begun goes on to its end: wait for that."""
        self._cancelled = True

    def view(self) -> dict[str, Any]:
        """How far it is. Once all has ended: what went wrong."""
        done, total = 0, sum(size for _, _, size, _ in self._parts)
        for future, (path, _, size, _) in self._started:
            if not future.done():
                continue
            try:
                got = future.get()
            except (OSError, RuntimeError) as error:
                self._error = self._error or (getattr(error, "errno", None) or 5, os.fspath(path), 0)
                continue
            done += got
            if got < size:
                self._error = self._error or (0, os.fspath(path), size - got)
        return {
            "bytes": total, "done": done, "cancelled": self._cancelled, "read_error": self._error, "link_error": "",
            "lost_links": [],
        }  # fmt: skip
