"""Twins: the allocators that the pool is compared with, and the replay of traces on them.

Every replay runs in a process of its own: an allocator starts empty, keeps no memory of the trace before,
and its settings (of ONNX Runtime's environment, of PyTorch) touch nobody else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .. import errors
from ..errors import DeviceNotFoundError, GlakeError, InputError

__all__ = ["TWINS", "ReplayReport", "Twin", "names", "replay"]


class Twin(NamedTuple):
    """An allocator that a trace can be replayed on."""

    name: str
    devices: tuple[str, ...]
    description: str
    reserved: str  # how its reserved bytes are measured


TWINS = {
    twin.name: twin
    for twin in (
        Twin("glake", ("cpu", "cuda"), "the pool of glake_infer", "Pool.stats().peak_reserved"),
        Twin(
            "ort-arena",
            ("cpu", "cuda"),
            "ONNX Runtime's arena, kNextPowerOfTwo (its default)",
            "GetStats: TotalAllocated, before what was reserved goes back and at the end",
        ),
        Twin(
            "ort-arena-same",
            ("cpu", "cuda"),
            "ONNX Runtime's arena, kSameAsRequested",
            "GetStats: TotalAllocated, before what was reserved goes back and at the end",
        ),
        Twin("malloc", ("cpu",), "the C library's malloc", "mallinfo2: arena + hblkhd, before every free"),
        Twin(
            "ort-mempool",
            ("cuda",),
            "ONNX Runtime's CUDA memory pool arena, asked without streams, release threshold at its maximum",
            "CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH",
        ),
        Twin(
            "cuda-async",
            ("cuda",),
            "cudaMallocAsync, release threshold at its maximum",
            "CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH",
        ),
        Twin("torch", ("cuda",), "PyTorch's caching allocator", "memory_stats: reserved_bytes.all.peak"),
        Twin(
            "torch-expandable",
            ("cuda",),
            "PyTorch's caching allocator with expandable segments",
            "memory_stats: reserved_bytes.all.peak",
        ),
        Twin("rmm", ("cuda",), "RMM's pool", "PoolMemoryResource.pool_size() after every allocation"),
    )
}


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay showed; in bytes and seconds.

    Attributes:
        trace: the trace's name.
        allocator: the allocator's name.
        device: the device's name.
        peak_requested: the largest sum of live bytes, as asked for.
        peak_active: the largest sum of live bytes as the allocator rounds them; None where it does not tell.
        peak_reserved: the most memory that the allocator held, over all repetitions.
        ratio: peak_reserved / peak_requested; None for a trace that asks for nothing.
        seconds: of the last repetition.
        all_seconds: of all repetitions.
        repeat: how many repetitions.
        events: the lines of the trace.
        allocations: how many of them allocate.
        live_bytes: what was still alive after the last line; it is freed then.
        driver_calls: calls for memory to the system or the driver, of all repetitions; None if not told.
        last_driver_calls: those of the last repetition; None if not told.
        loop: "native", or "python" where each call costs what Python costs.
        reserved_by: how peak_reserved was measured.
    """

    trace: str
    allocator: str
    device: str
    peak_requested: int
    peak_active: int | None
    peak_reserved: int
    ratio: float | None
    seconds: float
    all_seconds: float
    repeat: int
    events: int
    allocations: int
    live_bytes: int
    driver_calls: int | None
    last_driver_calls: int | None
    loop: str
    reserved_by: str


def names(device: str = "cpu") -> list[str]:
    """Return the names of the allocators that a device can have; not all need be installed."""
    kind = device.partition(":")[0]
    return [twin.name for twin in TWINS.values() if kind in twin.devices]


def check(allocator: str, device: str) -> Twin:
    """Return the twin of that name. Raises `InputError` or `DeviceNotFoundError`."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise DeviceNotFoundError(f"there is no device {device!r}. Valid names: 'cpu', 'cuda' and 'cuda:N'.")
    if allocator not in names(device):
        raise InputError(
            f"there is no allocator {allocator!r} for device {device!r}: choose from {', '.join(names(device))}"
        )
    return TWINS[allocator]


def replay(
    path: str | os.PathLike[str],
    allocator: str = "glake",
    device: str = "cpu",
    *,
    repeat: int = 1,
    limit: int | None = None,
) -> ReplayReport:
    """Replay a trace on an allocator, in a process of its own, as fast as it goes.

    Args:
        path: a trace (`glake_infer.allocators.trace`).
        allocator: one of `names(device)`.
        device: "cpu" or "cuda:N".
        repeat: times; what is alive at the end of the trace is freed after each.
        limit: the limit of the pool, in bytes; the twins have none.

    Raises:
        InputError: no trace, no such allocator.
        DeviceNotFoundError: no such device.
        MissingDependencyError: a package that the allocator comes with is not installed.
        GlakeError: the allocator ran out of memory or failed.
    """
    check(allocator, device)
    request = {
        "trace": os.fspath(Path(path).absolute()),
        "allocator": allocator,
        "device": device,
        "repeat": repeat,
        "limit": limit,
    }
    environment = dict(os.environ)
    if allocator.startswith("torch"):
        setting = f"expandable_segments:{allocator == 'torch-expandable'}"
        environment["PYTORCH_ALLOC_CONF"] = environment["PYTORCH_CUDA_ALLOC_CONF"] = (
            setting  # the new and the old name
        )
    command = [sys.executable, "-m", "glake_infer.allocators.twins", json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        what = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise GlakeError(
            f"the process that replayed {request['trace']} on {allocator!r} ended with {what} and no result. "
            f"It said: {done.stderr.strip()[-1000:] or 'nothing'}"
        ) from None
    if "error" in answer:
        kind = getattr(errors, answer["error"], GlakeError)
        if kind in (errors.OutOfMemoryError, errors.PoolExistsError):  # these take more than a message
            kind = GlakeError
        raise kind(answer["message"])
    return ReplayReport(**answer)
