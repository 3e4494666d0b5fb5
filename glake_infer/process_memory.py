"""Memory of this process as the operating system counts it, not as we do.

The figure to compare is `ProcessMemory.total`: the proportional set size (a page that n processes map counts 1/n for
each, a page that is mapped twice in one process counts once) of everything but our memfds, plus every byte that our
memfds hold, whether it is mapped or not. Unmapped memfd bytes are memory too, and smaps does not show them.
Source: proc(5), /proc/PID/smaps and /proc/PID/fd.
"""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glake_infer.allocators.devices import cpu_memory

MEMFD = "/memfd:glake"
_HEADER = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process."""

    total: int
    """What it costs: see the module."""
    private: int
    """Part of `total` that no other process could share: heap, stacks, copies of pages, and our memfds."""
    files: int
    """Part of `total` that is mapped from files (libraries, weights of the store), proportionally."""
    pool: int
    """Part of `total` that our memfds hold."""


def release_unused_heap() -> None:
    """Ask the C library to give free heap pages back, so that two measurements can be compared."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Bytes that the machine could give without swapping (MemAvailable), or this control group's bound if that is less."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, cpu_memory())
    return cpu_memory()


def measure(pid: int | str = "self") -> ProcessMemory:
    """Measure a process of this user; raises OSError where /proc does not show it."""
    anonymous = files = 0
    inside = mapped = False
    for line in Path(f"/proc/{pid}/smaps").read_bytes().splitlines():
        if header := _HEADER.match(line):
            name = header[1]
            inside = name.startswith(MEMFD.encode())
            mapped = name.startswith(b"/") and not name.startswith((b"/memfd:", b"/dev/zero", b"/SYSV"))
        elif not inside:
            if line.startswith(b"Pss:"):
                proportional = int(line.split()[1]) << 10
                files += proportional if mapped else 0
                anonymous += 0 if mapped else proportional
            elif mapped and line.startswith(b"Private_Dirty:"):
                copied = int(line.split()[1]) << 10
                files -= copied
                anonymous += copied
    pool = _memfd_bytes(pid)
    return ProcessMemory(total=anonymous + files + pool, private=anonymous + pool, files=files, pool=pool)


def _memfd_bytes(pid: int | str) -> int:
    found: dict[int, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if str(entry.readlink()).startswith(MEMFD):
                status = entry.stat()
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())
