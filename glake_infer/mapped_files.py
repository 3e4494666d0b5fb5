"""Files that others have mapped in this process: where, and how their pages go."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

Span = tuple[int, int]
"""The first address and the one behind the last."""


def mappings_of(paths: Iterable[Path]) -> set[Span]:
    """Where this process has mapped these files by itself: privately, as ONNX Runtime does."""
    names = {str(path) for path in paths}
    found: set[Span] = set()
    if not names:
        return found
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].endswith("p") and fields[5] in names:
            start, _, end = fields[0].partition("-")
            found.add((int(start, 16), int(end, 16)))
    return found


def drop_pages(mappings: Iterable[Span]) -> None:
    """Let go of the pages of mapped files: they are read again when they are touched.

    Only where nothing was written. The mappings must stay until this returns.
    """
    wanted = set(mappings)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    dont_need = 4
    span: Span | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            start, _, end = head.partition("-")
            span = (int(start, 16), int(end, 16))
        elif head == "Anonymous:" and span in wanted and rest.split()[0] == "0":
            libc.madvise(span[0], span[1] - span[0], dont_need)
