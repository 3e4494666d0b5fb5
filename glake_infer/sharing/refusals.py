"""What a process sees of a broker that refuses or is gone, as errors."""

from __future__ import annotations

from pathlib import Path

from glake_infer.allocators.errors import (
    BrokerError,
    DriverError,
    GlakeError,
    OutOfMemoryError,
    StoreError,
)
from glake_infer.sharing import protocol


class BrokerGoneError(BrokerError):
    """No broker answers."""


class SupersededError(GlakeError):
    """What was made is not wanted any more: another process did it meanwhile. Begin again."""


class UnknownTokenError(BrokerError):
    """The broker was not told of a region or chunk: introduce this process again."""


class AlteredError(StoreError):
    """The broker found other bytes than the digest stands for, or could not read them."""

    def __init__(self, refusal: protocol.Refusal) -> None:
        """Keep which weight it was."""
        super().__init__(refusal.message)
        self.digest = refusal.digest
        self.path = Path(refusal.path)
        self.unreadable = refusal.reason == "unreadable"


class BrokerMemoryError(OutOfMemoryError):
    """The broker has no room within its limit: OutOfMemoryError, with the figures of the whole machine.

    `requested`, `reserved` (by all processes), `limit` and `needed_limit` are the broker's; `holders` are processes.
    """

    def __init__(self, refusal: protocol.Refusal) -> None:
        """Take the broker's figures and message."""
        super().__init__(
            requested=refusal.requested,
            active=refusal.used,
            idle=0,
            reserved=refusal.used,
            limit=refusal.limit,
            needed_limit=refusal.needed,
            device_free=max(0, refusal.limit - refusal.used),
            holders=refusal.holders,
            refusal=refusal.message,
        )
        self.args = (refusal.message,)
        self._refused = refusal

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling."""
        return type(self), (self._refused,)


def error_of(refusal: protocol.Refusal) -> GlakeError:
    """The error of a refusal."""
    if refusal.reason == "memory":
        return BrokerMemoryError(refusal)
    if refusal.reason in ("altered", "unreadable"):
        return AlteredError(refusal)
    if refusal.reason == "unknown":
        return UnknownTokenError(refusal.message)
    if refusal.reason == "lost":
        return SupersededError(refusal.message)
    if refusal.reason == "full":
        return DriverError(refusal.message)
    return BrokerError(refusal.message)
