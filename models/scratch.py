"""Temporary folders for much data, on a disk that has room for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from glake_infer.allocators.errors import InputError, StorageFullError
from glake_infer.allocators.sizes import format_bytes


@contextlib.contextmanager
def temporary_folder(
    prefix: str, needed: int, what: str, option: str, at: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """Yield a new folder, removed afterwards: in `at`, or where `needed` bytes are free.

    `what` writes there, and `option` names another disk. Raises InputError where `at` is no folder, StorageFullError.
    """
    if at is not None and not Path(at).is_dir():
        raise InputError(f"there is no folder {at}. Make it first, or name another.")
    places = [Path(at)] if at is not None else [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.home()]
    place = next(
        (p for p in places if p.is_dir() and os.access(p, os.W_OK) and free_bytes(p) >= needed), places[0]
    )
    check_room(place, needed, what, option)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as folder:
        yield Path(folder)


def check_room(folder: Path, needed: int, what: str, option: str) -> None:
    """Raise StorageFullError where a folder's disk has less than `needed` bytes."""
    if free_bytes(folder) < needed:
        raise StorageFullError(
            f"{what} writes about {format_bytes(needed)}, and {folder} has {format_bytes(free_bytes(folder))} "
            f"free. Free some space, or point TMPDIR or {option} to another disk."
        )


def free_bytes(folder: Path) -> int:
    """Of the disk that has it."""
    return shutil.disk_usage(folder).free
