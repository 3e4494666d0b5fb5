"""What the operating system says this process holds: proportional set size, and memory that it hides.

The proportional set size (PSS) counts a page that n mappings share as 1/n, so it adds up over processes. It
knows only what is mapped: bytes of a memfd that are not mapped at the moment are added from the file's own
account, or a pool that keeps its idle chunks unmapped would look smaller than it is.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_MEMFD = "/memfd:"


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of this process now, in bytes."""

    pss: int
    """Proportional set size, from /proc/self/smaps_rollup."""
    unmapped: int
    """Pages of this process's memfds that no mapping shows."""

    @property
    def total(self) -> int:
        """What this process costs the machine."""
        return self.pss + self.unmapped


def process_memory(*, trim_heap: bool = True) -> ProcessMemory:
    """Measure this process; first gives free heap pages back (`malloc_trim`), unless `trim_heap` is False."""
    if trim_heap:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
    return ProcessMemory(pss=_rollup(), unmapped=max(0, _memfd_bytes() - _memfd_pss()))


def _rollup() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def _memfd_bytes() -> int:
    """Bytes that this process's memfds hold, each file counted once."""
    files: dict[tuple[int, int], int] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith(_MEMFD):
                status = entry.stat()
                files[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:
            continue  # closed meanwhile
    return sum(files.values())


def _memfd_pss() -> int:
    """Bytes of memfds that the PSS holds already (a page mapped twice here counts half each time)."""
    total, ours = 0, False
    with Path("/proc/self/smaps").open() as smaps:
        for line in smaps:
            if line.startswith("Pss:"):
                total += (int(line.split()[1]) << 10) if ours else 0
            elif line[0] in "0123456789abcdef":
                ours = _MEMFD in line
    return total
