"""File descriptors of memory: who closes them, what they are, how many there may be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import stat
from collections.abc import Sequence

F_GET_SEALS = 1034
SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""SEAL, SHRINK, GROW, WRITE: all that keep the bytes and the size as they are."""


class Descriptor:
    """An open file descriptor of ours. It is closed when nobody refers to it any more, and not before.

    So one that waits in a queue to be sent is still the same file when its turn comes, and none is forgotten.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        """Take it over."""
        self.number = number

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]  # bound: modules may be gone at exit
        with contextlib.suppress(OSError):
            close(self.number)


def own(numbers: Sequence[int]) -> list[Descriptor]:
    """Take over all of them."""
    return [Descriptor(number) for number in numbers]


def is_sealed_memory(number: int, size: int) -> bool:
    """Whether it is a memfd of exactly `size` bytes, and nobody can ever change its bytes or its size."""
    try:
        seals = fcntl.fcntl(number, F_GET_SEALS)
    except OSError:  # no memfd
        return False
    return seals & SEALS == SEALS and os.fstat(number).st_size == size


def is_device_memory(number: int) -> bool:
    """Whether it belongs to NVIDIA's driver, as a handle of GPU memory does."""
    try:
        return stat.S_ISCHR(os.fstat(number).st_mode) and os.readlink(f"/proc/self/fd/{number}").startswith(  # noqa: PTH115
            "/dev/nvidia"
        )
    except OSError:
        return False


def raise_limit() -> int:
    """Let this process open as many files as the system allows it; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Spare:
    """A descriptor that is kept for the moment when there are no more."""

    def __init__(self) -> None:
        """Take one. Raises OSError."""
        self._number = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def free(self) -> bool:
        """Make room for one descriptor; whether that was possible."""
        if self._number < 0:
            return False
        os.close(self._number)
        self._number = -1
        return True

    def take(self) -> None:
        """Keep one again, if there is one."""
        if self._number < 0:
            with contextlib.suppress(OSError):
                self._number = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Keep none."""
        self.free()
