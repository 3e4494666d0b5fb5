"""Every error that glake_infer raises on purpose, as one tree.

GlakeError                      anything below
|- OutOfMemoryError             the pool's limit has no room for a request (is also a MemoryError)
|- DriverError                  a call to the operating system or the driver failed
|- PoolExistsError              the device has a pool already
|- PoolInUseError               memory is still handed out
|- PoolClosedError              the handle was closed
|- InvalidPointerError          an address that is not in use: freed twice, or never handed out
|- MemoryCorruptionError        memory of a pool in debug mode was overwritten
|- BrokerError                  there is no broker to share weights with, or it is not for this process
|- DeviceNotFoundError          no such device here
|- MissingDependencyError       a package has to be installed (is also an ImportError)
|- ForkedProcessError           the pool belongs to the parent process
|- InputError                   a wrong argument (is also a ValueError)
|- ModelError                   not an ONNX model that can be read
|- PackageError                 not a package that can be read
|  `- UnsupportedVersionError   written by a newer version
`- StoreError                   the store of weights cannot be used
   |- DigestMismatchError       bytes in the store are not what their name says
   `- StorageFullError          no space left on the disk

Messages say what happened, what was received, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from .sizes import format_bytes

__all__ = [
    "BrokerError",
    "DeviceNotFoundError",
    "DigestMismatchError",
    "DriverError",
    "ForkedProcessError",
    "GlakeError",
    "InputError",
    "InvalidPointerError",
    "MemoryCorruptionError",
    "MissingDependencyError",
    "ModelError",
    "OutOfMemoryError",
    "PackageError",
    "PoolClosedError",
    "PoolExistsError",
    "PoolInUseError",
    "StorageFullError",
    "StoreError",
    "UnsupportedVersionError",
]


class GlakeError(Exception):
    """What every error of glake_infer is."""


class OutOfMemoryError(GlakeError, MemoryError):
    """The pool's limit has no room for a request; idle memory was not in the way, it never is.

    Attributes, in bytes at the moment of the failure: `requested`, `active`, `idle`, `reserved`,
    `limit`, `device_free`; `needed_limit`, the smallest limit with which this request would have
    passed; `holders`, who holds memory, as (label, tag, bytes as asked for), the largest first;
    `device_full`, whether the limit had room but the device had none; `refusal`, what a broker said that had no
    more room for this process; `hint`, what else would do. For a request of ONNX
    Runtime's `sequence` numbers the failures of this process from 1 on, and `thread` is the native id
    of the thread that asked; else both are 0.
    """

    def __init__(
        self,
        *,
        requested: int,
        active: int,
        idle: int,
        reserved: int,
        limit: int,
        needed_limit: int,
        device_free: int,
        holders: Iterable[tuple[str, str, int]],
        device_full: bool = False,
        refusal: str = "",
        hint: str = "",
    ) -> None:
        self.requested = requested
        self.active = active
        self.idle = idle
        self.reserved = reserved
        self.limit = limit
        self.needed_limit = needed_limit
        self.device_free = device_free
        self.holders = [(label, tag, size) for label, tag, size in holders]
        self.device_full = device_full
        self.refusal = refusal
        self.hint = hint
        self.sequence = 0
        self.thread = 0
        largest = [
            f"{f'{label}: ' if label else ''}{tag} {format_bytes(size)}"
            for label, tag, size in self.holders[:5]
        ]
        if len(self.holders) > 5:
            rest = sum(size for _, _, size in self.holders[5:])
            largest.append(f"{len(self.holders) - 5} more {format_bytes(rest)}")
        remedy = refusal or (
            "The limit has room, but the device has none: other processes, or memory of this process outside the "
            "pool, hold the rest (`nvidia-smi` lists the processes). End them, or close sessions."
            if device_full
            else f"This request would have passed with a limit of {needed_limit} bytes "
            f"({format_bytes(needed_limit)}): raise pool.limit, close sessions, or use smaller inputs."
        )
        super().__init__(
            f"out of memory: {format_bytes(requested)} ({requested} bytes) were requested from a pool with a "
            f"limit of {format_bytes(limit)}, of which {format_bytes(active)} are active "
            f"({', '.join(largest) or 'nothing'}); "
            f"{format_bytes(idle)} more are idle and were of no use; the device has "
            f"{format_bytes(device_free)} free. {remedy}{' ' if hint else ''}{hint}"
        )

    @classmethod
    def told(cls, message: str, requested: int = 0) -> OutOfMemoryError:
        """Make the error for memory that a library lacked outside a pool: its words are all that is known."""
        error = cls(
            requested=requested,
            active=0,
            idle=0,
            reserved=0,
            limit=0,
            needed_limit=0,
            device_free=0,
            holders=(),
        )
        error.args = (message,)
        return error

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling (an error that crosses processes) in spite of the keyword arguments."""
        names = (
            "requested", "active", "idle", "reserved", "limit", "needed_limit", "device_free", "holders",
            "device_full", "refusal", "hint",
        )  # fmt: skip
        again = partial(type(self), **{name: getattr(self, name) for name in names})
        return again, (), {"sequence": self.sequence, "thread": self.thread, "args": self.args}


class DriverError(GlakeError):
    """A call to the operating system or the driver failed; the message has its name and its code.

    `sequence` and `thread` as for `OutOfMemoryError`.
    """

    def __init__(self, message: str) -> None:
        self.sequence = 0
        self.thread = 0
        super().__init__(message)


class PoolExistsError(GlakeError):
    """The device has a pool already; a process has one per device."""

    def __init__(self, device: str) -> None:
        self.device = device
        super().__init__(
            f"this process has a pool on device {device!r} already, and there is one per device. "
            f"Pool.current({device!r}) gives it; close() it first to make another."
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling."""
        return type(self), (self.device,)


class PoolInUseError(GlakeError):
    """Memory of the pool is still handed out. Nothing changed."""

    @classmethod
    def limit_too_low(cls, limit: int, active: int) -> PoolInUseError:
        """Make the error for a limit below what is active."""
        return cls(
            f"the limit cannot be {format_bytes(limit)}: {format_bytes(active)} ({active} bytes) are active. "
            "Close sessions and free what you allocated first, or choose a limit of at least that."
        )

    @classmethod
    def close(cls, active: int, weights: int) -> PoolInUseError:
        """Make the error for closing a pool that is in use."""
        return cls(
            f"the pool cannot be closed: {format_bytes(active)} ({active} bytes) are active, "
            f"{format_bytes(weights)} of them weights. Drop the sessions on this pool, free what you "
            "allocated and unmap what you mapped, then close it. (Dropping the handle itself is always "
            "allowed: what is active stays as it is.)"
        )


class PoolClosedError(GlakeError):
    """The handle was closed."""

    def __init__(self, message: str = "this pool was closed: make another with Pool(...)") -> None:
        super().__init__(message)


class InvalidPointerError(GlakeError):
    """An address that is not in use: freed twice, or never handed out. The memory was left alone."""


class MemoryCorruptionError(GlakeError):
    """Bytes around an allocation were overwritten (`Pool(debug=True)`). The allocation was taken back.

    `corruptions` holds what was found (`glake_infer.allocators.debugging.Corruption`).
    """

    def __init__(self, message: str, corruptions: tuple[object, ...] = ()) -> None:
        self.corruptions = corruptions
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling."""
        return type(self), (str(self), self.corruptions)


class BrokerError(GlakeError):
    """There is no broker to share weights with, or it does not take this process. What is loaded goes on."""


class DeviceNotFoundError(GlakeError):
    """There is no such device here."""


class MissingDependencyError(GlakeError, ImportError):
    """A package has to be installed; the message has the command."""


class ForkedProcessError(GlakeError):
    """The pool belongs to the parent process: a child of fork() must not use it."""

    def __init__(
        self,
        message: str = "this process was forked from one that has a pool, and the pool's memory belongs to "
        "the parent. Start workers with the multiprocessing method 'spawn' or 'forkserver', or fork before "
        "the first pool is made.",
    ) -> None:
        super().__init__(message)


class InputError(GlakeError, ValueError):
    """A wrong argument."""


class ModelError(GlakeError):
    """Not an ONNX model that can be read, or one that cannot be run."""


class PackageError(GlakeError):
    """Not a package that can be read."""


class UnsupportedVersionError(PackageError):
    """The package was written by a newer version of glake-infer."""


class StoreError(GlakeError):
    """The store of weights cannot be used as asked."""


class DigestMismatchError(StoreError):
    """Bytes in the store are not what their name says: they were changed on disk."""


class StorageFullError(StoreError):
    """No space is left on the disk. Nothing half-written stays behind."""
