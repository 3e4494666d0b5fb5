"""What the operating system says about memory."""

from __future__ import annotations

import os
import re
from pathlib import Path


def memfds() -> dict[str, int]:
    """The pools' memory files of this process: name -> number of bytes that they really hold."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if entry.readlink().name.startswith("memfd:glake-infer"):
                status = entry.stat()
                found[f"{status.st_dev}:{status.st_ino}"] = status.st_blocks * 512
        except OSError:  # closed meanwhile
            continue
    return found


class Physical:
    """Measures the memory file of the one pool that is made inside the `with` block."""

    def __enter__(self) -> Physical:
        self._before = set(memfds())
        return self

    def __exit__(self, *_: object) -> None:
        (self._name,) = set(memfds()) - self._before

    def bytes(self) -> int:
        return memfds()[self._name]

    def length(self) -> int:
        """The file's length: it grows only when no freed extent is large enough."""
        for entry in Path("/proc/self/fd").iterdir():
            try:
                status = entry.stat()
            except OSError:
                continue
            if f"{status.st_dev}:{status.st_ino}" == self._name:
                return status.st_size
        raise AssertionError("the memory file is gone")


def smaps(name: str) -> dict[str, int]:
    """The sums of Rss and Pss, in bytes, over this process's mappings whose file has `name` in its path."""
    sums = {"Rss": 0, "Pss": 0}
    counted = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = name in line
        elif counted and (match := re.match(r"(Rss|Pss):\s+(\d+) kB", line)):
            sums[match[1]] += int(match[2]) * 1024
    return sums


def file_of_bytes(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(min(size, 4096)) * (size // 4096 + 1))
    os.truncate(path, size)
    return path
