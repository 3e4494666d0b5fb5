"""What a session takes from the pool and the GPU when it is built."""

from __future__ import annotations

from glake_infer import cuda
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes
from glake_infer.allocators.snapshot import Range
from glake_infer.models.model import gpu_index
from glake_infer.models.prepare import Prepared

SECOND_COPIES = 1 << 20
"""Bytes of weights of a session's own that are worth a note."""


class Before:
    """What the pool and the GPU hold before a session is built, to tell what it takes."""

    def __init__(self, pool: Pool, label: str) -> None:
        self._pool = pool
        self._label = label
        stats = pool.stats()
        self.active = stats.active
        self._reserved = stats.reserved
        self._free = 0 if pool.device == "cpu" else cuda.free_memory(gpu_index(pool.device))
        self._weights = self._own_weights()
        self._known = {held.address for held in self._ranges()} if self._free else set()

    def _ranges(self) -> list[Range]:
        segments = self._pool.snapshot().segments
        return [r for s in segments for r in s.ranges if r.state == "active" and r.tag == "weights"]

    def libraries(self) -> int:
        """Bytes of the GPU that are gone, and not in the pool."""
        gone = self._free - cuda.free_memory(gpu_index(self._pool.device))
        return max(0, gone - (self._pool.stats().reserved - self._reserved))

    def _own_weights(self) -> int:
        return sum(h.bytes for h in self._pool.holders() if (h.label, h.tag) == (self._label, "weights"))

    def second_copies(self, prepared: Prepared) -> list[str]:
        """Notes on weights that ONNX Runtime put into the pool although it was given all that are large."""
        grown = self._own_weights() - self._weights
        if grown < SECOND_COPIES:
            return []
        mine = [r for r in self._ranges() if r.label == self._label and r.address not in self._known]
        sizes = sorted((held.requested for held in mine), reverse=True)
        names: dict[int, list[str]] = {}
        for weight in prepared.weights:
            names.setdefault(weight.length, []).append(weight.name)
        told = [
            f"{format_bytes(size)}" + (f" (as large as {names[size].pop(0)!r})" if names.get(size) else "")
            for size in sizes[:5]
        ]
        return [
            f"ONNX Runtime holds {format_bytes(grown)} of weights of its own for this session: {', '.join(told)}. It "
            "derived them from shared ones while it optimized the graph at the load (folded, fused, or moved for a node "
            "that runs elsewhere), or they are below 1 KiB. optimization='basic' keeps it from most of that."
        ]
