"""Weights of a stripped TensorRT engine in the pool's chunks, which the engine maps itself, without a copy.

TensorRT-RTX 1.7 and later gives an engine that was built with STRIP_PLAN an IWeightsManager: it has addresses for the
weights and no memory, and maps allocations of the application's there (restoreFromVmmAllocation in NvInferRuntime.h). Here
those are chunks that are filled over the transfers' paths, checked, and shared with all that has the same bytes at the same
places: other engines of one layout, and blocks that TensorRT loaded itself (glake_infer/engine_weights.py).

Not run: building a stripped engine needs a GPU of its target kind. What is tested is what the manager is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from glake_infer.allocators.errors import DriverError, InputError
from glake_infer.allocators.pool import Pool
from glake_infer.engine_weights import THREADS, Block, BlockHolding, EngineWeights, key_of, sizes_of
from glake_infer.plan_bytes import PlanBytes, Stretch
from glake_infer.residency import Region


class WeightsManager(Protocol):
    """What is used of TensorRT's IWeightsManager."""

    def get_size(self) -> int:
        """Bytes of the weights' range, a multiple of the driver's granularity."""

    def restore_from_vmm_allocation(
        self, allocation_handle: int, offset: int, size: int, stream_handle: int
    ) -> bool:
        """Map the first `size` bytes of an allocation at `offset` of the range."""

    def unload(self, stream_handle: int) -> bool:
        """Unmap all, once the stream is done; the addresses stay."""


class StrippedWeights:
    """The weights of one stripped engine. Its methods are not for several threads at once, nor while the engine works.

    `manager`: what the engine's `create_weights_manager` gives, whose weights are unloaded or not yet there. `source`:
    where what the manager calls the weight data lies, from its first byte on; what is missing at the end is padding.
    `user`: a number that names the model. The weights are absent until `restore`. The pool does not take their memory by
    itself: the engine maps it.

    Raises InputError (no manager, bytes that no stretch has, or more than the engine has), AlteredObjectError,
    OutOfMemoryError or DriverError; then nothing is held.
    """

    def __init__(
        self,
        pool: Pool,
        manager: WeightsManager | None,
        source: Sequence[Stretch],
        *,
        user: int = 0,
        priority: int = 0,
    ) -> None:
        if manager is None:
            raise InputError(
                "the engine has no weights manager: this needs one that was built without its weights (STRIP_PLAN), and "
                "TensorRT-RTX 1.7 or newer. Load it with its weights."
            )
        self._manager = manager
        self._weights = weights = EngineWeights.of(pool)
        table, native = weights._table, weights._native
        size = int(manager.get_size())
        given = max((stretch.end for stretch in source), default=0)
        if given > size:
            raise InputError(
                f"the engine's weights take {size} bytes, and {given} were given: they are those of another engine."
            )
        data = PlanBytes(size, source)
        sizes = sizes_of(size, weights.grid_for(size), 0, native.granularity)
        starts = list(itertools.accumulate(sizes[:-1], initial=0))

        keys: list[str] = []

        def look(start: int, size: int) -> str:
            wanted = max(0, min(size, given - start))
            found = data.read(start, wanted)
            return key_of(size, 0, memoryview(found)) if len(found) == wanted else ""

        def look_at_all(failed: Callable[[], bool]) -> None:
            with ThreadPoolExecutor(THREADS, "glake-infer stripped weights") as threads:
                keys[:] = threads.map(look, starts, sizes)

        table._checker.beside([stretch.file for stretch in source], look_at_all)
        if "" in keys:
            start = starts[keys.index("")]
            raise InputError(
                f"of the engine's weights, bytes from {start} on are in no stretch of the source: it has gaps. Give "
                f"stretches for all {given} bytes, without gaps."
            )
        with weights._settling, table._locked():
            there = [weights.chunk_of(key) for key in keys]
            pieces = [(each, each, chunk, False) for each, chunk in zip(sizes, there, strict=True)]
            number, address, chunks = native.place_weights(pieces, "memory")
            region = Region(
                number, address, tuple(chunks), tuple(sizes), None, tuple(address + s for s in starts)
            )
            user_number = native.add_user(list(dict.fromkeys(chunks)), False, priority)
            addresses: dict[str, int] = {}
            for chunk, start, each in zip(chunks, starts, sizes, strict=True):
                region.parts[chunk] = data.parts(start, each, address + start)
            weights.enter(region, keys, list(zip(region.starts, sizes, strict=True)), user, addresses)
            region.files.update({stretch.file.path.name: stretch.file for stretch in source})
            self.holding = BlockHolding(
                table, native, user_number, user, addresses, tuple(dict.fromkeys(chunks)), "store", priority
            )
            self.holding.regions = frozenset([region])
            self.holding.blocks = (Block(region, 0, size, 0, sizes[0], 0, begin=0),)
        self.bytes = size
        self.shared_bytes = sum(each for each, chunk in zip(sizes, there, strict=True) if chunk)

    def restore(self, stream: int) -> None:
        """Bring what is absent, and map all of it into the engine, ordered on `stream`.

        Raises OutOfMemoryError, AlteredObjectError or DriverError, with nothing mapped.
        """
        native = self._weights._native
        with self.holding:
            (region,) = self.holding.regions
            offset = 0
            for chunk, size in zip(region.chunks, region.sizes, strict=True):
                if not self._manager.restore_from_vmm_allocation(
                    native.handle_of(chunk), offset, size, stream
                ):
                    if offset:
                        self._manager.unload(stream)
                    raise DriverError(
                        f"TensorRT did not map {size} bytes at {offset} of an engine's weights. Its log says why; the "
                        "engine's weights have to be unloaded, and it has to be one that was built with STRIP_PLAN."
                    )
                offset += size

    def suspend(self, stream: int) -> int:
        """Unmap the weights from the engine once `stream` is done, and give back what nobody else needs: the bytes.

        Raises DriverError where TensorRT refuses; the weights stay then.
        """
        if not self._manager.unload(stream):
            raise DriverError("TensorRT did not unload an engine's weights. Its log says why.")
        return self.holding.suspend()

    def close(self) -> None:
        """Give the weights back; the engine is destroyed, or unloaded. Closing twice is fine."""
        if not self.holding.closed:
            self.holding.settle()
            self.holding.close()
