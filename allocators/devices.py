"""Devices by name, and how much memory they have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .errors import DeviceNotFoundError

__all__ = ["cpu_memory", "parse_device"]


def parse_device(device: str) -> str:
    """Return the canonical name of a device that a pool can be made on.

    Raises `DeviceNotFoundError`.
    """
    if device == "cpu":
        return device
    if isinstance(device, str) and re.fullmatch(r"cuda(:\d+)?", device):
        raise DeviceNotFoundError(
            f"device {device!r} cannot have a pool: pools on CUDA devices arrive with a later version of "
            "glake-infer. Use device='cpu'."
        )
    raise DeviceNotFoundError(
        f"there is no device {device!r}. Valid names: 'cpu' (and, in a later version, 'cuda:N')."
    )


def cpu_memory() -> int:
    """Return the bytes of memory that this process may use at most: the machine's, or its control group's."""
    return min([_machine_memory(), *_group_limits()])


def _machine_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise DeviceNotFoundError("/proc/meminfo does not say how much memory there is: pass Pool(limit=...)")


def _group_limits(groups: str | None = None, root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    # Every ancestor's limit holds. In a container the group's path may be the host's, and the group
    # itself be mounted at the root: look at the root as well, and skip what is not there.
    if groups is None:
        try:
            groups = Path("/proc/self/cgroup").read_text()
        except OSError:
            return
    for line in groups.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / group.lstrip("/")
        while True:
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                text = ""
            if text.isdigit():
                yield int(text)
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
