"""A broker's limits as a user says them: "20GiB", "cpu=8GiB", "cuda:0=20GiB"."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable

from glake_infer.allocators.errors import DeviceNotFoundError, InputError
from glake_infer.allocators.sizes import parse_bytes

MOST = 1 << 59
"""Bytes; what the protocol can say, and more than there are."""

ASK = "import sys; from glake_infer import cuda; print(cuda.uuid(int(sys.argv[1])))"


def parse_limits(given: Iterable[str]) -> tuple[int | None, dict[str, int]]:
    """The limit of every device that is not named, and those of the others, by the names that a broker has for them.

    A GPU is named as elsewhere (cuda:0) or by its UUID (GPU-...). Raises InputError, DeviceNotFoundError.
    """
    every: int | None = None
    named: dict[str, int] = {}
    for text in given:
        device, equals, size = text.rpartition("=")
        limit = parse_bytes(size)
        if not 0 < limit < MOST:
            raise InputError(f"a limit cannot be {size}: expected more than nothing, as in 20GiB.")
        if not equals:
            if every is not None:
                raise InputError(
                    f"two limits for all devices were given, {every} bytes and {size}: expected one."
                )
            every = limit
            continue
        name = _name_of(device)
        if name in named:
            raise InputError(f"two limits for {device} were given: expected one.")
        named[name] = limit
    return every, named


def _name_of(device: str) -> str:
    if device == "cpu" or device.startswith("GPU-"):
        return device
    match = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", device)
    if not match:
        raise InputError(
            f"a limit for {device!r} was given: expected cpu, cuda:N, or a GPU's UUID (GPU-...)."
        )
    # In a process of its own: the broker has nothing to do with CUDA.
    done = subprocess.run(
        [sys.executable, "-c", ASK, match[1] or "0"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise DeviceNotFoundError(f"a limit for {device} was given, and there is no such device: {reason}")
    return f"GPU-{done.stdout.strip().removeprefix('GPU-')}"
