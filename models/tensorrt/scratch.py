"""Scratch memory of execution contexts: leased for a run, shared by all contexts that do not run at the same time.

The rule: contexts are USER_MANAGED, so they hold no scratch of their own. A run asks TensorRT how much it needs for the
shapes at hand, takes that from the pool on its stream, and gives it back when its work is done. In between runs nothing is
held: the memory is idle in the pool, where the next run of any engine, or anybody else, takes it up again, without a
call of the driver where the size was seen before (docs/design.md tells how the pool puts idle chunks together). So
engines that run one after the other need the scratch of the largest, and those that run at the same time need the sum. A
captured CUDA graph keeps its scratch for as long as it lives, since the addresses are part of it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

from glake_infer.allocators.errors import GlakeError
from glake_infer.allocators.pool import Pool

TAG = "scratch"
"""What the pool's figures say that scratch is held for."""

ALIGNMENT = 256
"""Of every address that TensorRT is given."""


class Scratch:
    """The leases of a pool. Thread-safe."""

    _lock = threading.Lock()
    _of: ClassVar[weakref.WeakKeyDictionary[Pool, Scratch]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        """Use `Scratch.of`."""
        self._counting = threading.Lock()
        self.held: dict[int, int] = {}
        """Address -> bytes of every lease that is in use."""
        self.leases = 0
        """How many there were, ever."""
        self.most = 0
        """The most bytes that were leased at once."""

    @classmethod
    def of(cls, pool: Pool) -> Scratch:
        """The one of a pool."""
        with cls._lock:
            return cls._of.setdefault(pool, cls())

    def take(self, pool: Pool, size: int, stream: int | None) -> int:
        """Lease `size` bytes; returns the address, 0 for none. Raises as `Pool.allocate` does."""
        if not size:
            return 0
        address = pool.allocate(max(size, ALIGNMENT), TAG, stream)
        with self._counting:
            self.held[address] = size
            self.leases += 1
            self.most = max(self.most, sum(self.held.values()))
        return address

    def give_back(self, pool: Pool, address: int) -> None:
        """End a lease. Work that uses the memory is done, or queued on the stream that it was leased on."""
        if address:
            with self._counting:
                self.held.pop(address, None)
            pool.deallocate(address)

    @contextlib.contextmanager
    def lease(self, pool: Pool, size: int, stream: int | None) -> Iterator[int]:
        """A lease for a `with` block."""
        address = self.take(pool, size, stream)
        try:
            yield address
        finally:
            self.give_back(pool, address)


def needed(engine: Any, context: Any, profile: int, *, streaming: bool) -> int:
    """Bytes of scratch that a run needs whose profile, shapes and shape values are set; never too few.

    For the shapes where TensorRT can tell, else for the largest shapes of the profile. Where weights are streamed it is
    always the latter, which counts the buffers that they pass through. Raises GlakeError where TensorRT tells nothing.
    """
    for name, arguments in (
        ("get_device_memory_size_for_profile_v2", (profile,)),
        ("device_memory_size_v2", ()),
    ):
        if hasattr(engine, name):
            found = getattr(engine, name)
            largest = int(found(*arguments) if arguments else found)
            break
    else:
        raise GlakeError(
            "this TensorRT is too old: it does not say how much scratch memory an engine needs. Versions from 10.1 do: "
            "pip install -U 'glake-infer[tensorrt]'."
        )
    if streaming or not largest or not hasattr(context, "update_device_memory_size_for_shapes"):
        return largest
    # 0 stands for an error, too: then the upper bound.
    return int(context.update_device_memory_size_for_shapes()) or largest
