"""Devices by name, and how much memory they have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import DeviceNotFoundError, DriverError

__all__ = ["cpu_memory", "device_memory", "parse_device"]


def parse_device(device: str) -> str:
    """Return the canonical name of a device that a pool can be made on: "cpu" or "cuda:N".

    "cuda" is "cuda:0". N counts as CUDA does, among the devices that `CUDA_VISIBLE_DEVICES` leaves. A name of a
    CUDA device starts the CUDA driver in this process; nothing does so before.

    Raises `DeviceNotFoundError`, which says why: no such name, no driver, a driver that is too old, or no
    such device. Any thread may call this; in a child of fork() whose parent used CUDA, no CUDA device is found.
    """
    if device == "cpu":
        return device
    match = re.fullmatch(r"cuda(?::([0-9]{1,9}))?", device) if isinstance(device, str) else None
    if match is None:
        raise DeviceNotFoundError(
            f"there is no device {device!r}. Valid names: 'cpu', 'cuda' (the first CUDA device) and 'cuda:N'."
        )
    index = int(match[1] or 0)
    _check_cuda(device, index)
    return f"cuda:{index}"


def device_memory(device: str) -> int:
    """Return the bytes of memory that a pool on a device can have at most.

    For "cpu" this is `cpu_memory()`; for "cuda:N" all of that device's memory, used by others or not.

    Raises `DeviceNotFoundError`, as `parse_device` does, and `DriverError`.
    """
    name = parse_device(device)
    if name == "cpu":
        return cpu_memory()
    from . import _native

    return _native.cuda_device_memory(int(name.removeprefix("cuda:")))


def _check_cuda(device: str, index: int) -> None:
    from . import _native

    try:
        count = _native.cuda_device_count()
    except DriverError as error:
        message = f"device {device!r} cannot be used: {error} Without a GPU, use device='cpu'."
        raise DeviceNotFoundError(message) from error
    if index < count:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = (
        ""
        if visible is None
        else f" CUDA_VISIBLE_DEVICES is set to {visible!r}, which hides all others and counts anew."
    )
    if count == 0:
        raise DeviceNotFoundError(
            f"device {device!r} cannot be used: the CUDA driver is here and shows no device "
            f"(`nvidia-smi -L` lists the GPUs of the machine).{hidden} Without a GPU, use device='cpu'."
        )
    names = ", ".join(f"'cuda:{i}' ({_native.cuda_device_name(i)})" for i in range(count))
    raise DeviceNotFoundError(f"there is no device {device!r}. CUDA shows {names}.{hidden}")


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
