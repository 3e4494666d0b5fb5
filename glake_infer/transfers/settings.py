"""Settings of transfers: of the process, from its environment or `configure_transfers`."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from typing import Literal, get_args

from glake_infer.allocators.errors import InputError
from glake_infer.allocators.sizes import parse_bytes

Paths = Literal["auto", "own", "all"]
Sometimes = Literal["auto", "never", "always"]

SLOT = 4 << 20
"""Bytes of one read and one copy: larger ones leave the caches of the processor, smaller ones leave gaps on the link (of
1, 2, 4 and 8 MiB this was the fastest with 8 to 16 threads: 51.5 GB/s of 55.3 from the page cache, H200, 32 cores)."""

READERS = 12
"""Threads that read, on a machine with as many cores: they nearly fill a PCIe 5 link, and more of them are slower."""


@dataclass(frozen=True)
class TransferSettings:
    """How this process moves weights."""

    in_flight: int = 512 << 20
    """The most bytes of page-locked buffers between files and devices, of all devices together. As many as the readers
    and links need are made, which is 50 MiB or so: more is of no use."""
    readers: int = 0
    """Threads that read files, of all devices together; 0: one per core of the process, at most READERS."""
    paths: Paths = "auto"
    """Whose PCIe links carry the bytes of a GPU: "own": its own. "auto": also those of the peers on which this process has
    a pool. "all": those of all peers that the process sees; each costs a CUDA context there (500 MiB or so)."""
    host_cache: int | None = None
    """The most bytes of page-locked copies of weights (`host_copy="pinned"`), of all models together; None: no bound."""
    direct_io: Sometimes = "auto"
    """Whether what is not in the page cache is read around it (O_DIRECT). "auto": where the page cache could not hold it."""
    direct_storage: Sometimes = "auto"
    """Whether files go straight to the GPU by GPUDirect Storage. "auto": where kvikio is installed, the driver does it
    without falling back, and the file is not in the page cache."""

    @property
    def reader_count(self) -> int:
        """Threads that read."""
        return self.readers or min(READERS, len(os.sched_getaffinity(0)))


_VARIABLES = {
    "in_flight": "GLAKE_IN_FLIGHT",
    "readers": "GLAKE_READERS",
    "paths": "GLAKE_PATHS",
    "host_cache": "GLAKE_HOST_CACHE",
    "direct_io": "GLAKE_DIRECT_IO",
    "direct_storage": "GLAKE_DIRECT_STORAGE",
}
_lock = threading.RLock()
_settings: TransferSettings | None = None


def transfer_settings() -> TransferSettings:
    """The settings in force: at first those of the environment. Raises InputError for a variable that says nothing valid."""
    global _settings
    with _lock:
        if _settings is None:
            given = {name: os.environ[v] for name, v in _VARIABLES.items() if os.environ.get(v)}
            _settings = _changed(TransferSettings(), given, _VARIABLES)
        return _settings


def configure_transfers(**changes: int | str | None) -> TransferSettings:
    """Change settings of this process, for transfers that begin from here on; returns all of them.

    The names are those of TransferSettings, and of the variables GLAKE_IN_FLIGHT, GLAKE_READERS, GLAKE_PATHS,
    GLAKE_HOST_CACHE, GLAKE_DIRECT_IO and GLAKE_DIRECT_STORAGE, which set them from the start; sizes are bytes or text such
    as "256MiB". Raises InputError, with nothing changed.
    """
    global _settings
    with _lock:
        _settings = _changed(transfer_settings(), changes, {})
        return _settings


def _changed(
    settings: TransferSettings, changes: dict[str, int | str | None] | dict[str, str], names: dict[str, str]
) -> TransferSettings:
    found: dict[str, int | str | None] = {}
    for name, value in changes.items():
        if name not in _VARIABLES:
            raise InputError(
                f"there is no setting {name!r} of transfers; there are {', '.join(sorted(_VARIABLES))}."
            )
        shown = f"{names.get(name, name)}={value!r}"
        if name in ("in_flight", "host_cache"):
            found[name] = _size(name, value, shown)
        elif name == "readers":
            found[name] = _count(value, shown)
        else:
            allowed = get_args(Paths if name == "paths" else Sometimes)
            if value not in allowed:
                raise InputError(f"{shown}: expected one of {', '.join(map(repr, allowed))}.")
            found[name] = value
    return replace(settings, **found)  # type: ignore[arg-type]


def _size(name: str, value: int | str | None, shown: str) -> int | None:
    if name == "host_cache" and value in (None, "none"):
        return None
    try:
        size = parse_bytes(value)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{shown}: {error}") from error
    if name == "in_flight" and size < SLOT:
        raise InputError(f"{shown}: less than one buffer of {SLOT} bytes.")
    return size


def _count(value: int | str | None, shown: str) -> int:
    try:
        count = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        count = -1
    if not 0 <= count <= 256:
        raise InputError(
            f"{shown}: expected a number of threads up to 256, or 0 for as many as there are cores."
        )
    return count
