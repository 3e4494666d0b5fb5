"""Stripped engines of TensorRT-RTX 1.7 and later: their weights are chunks of ours, mapped and not copied.

An engine that was built with STRIP_PLAN has no weights until its weights manager gets them. The manager maps allocations
that were made by `cuMemCreate`, as the pool's chunks are, at an address range of TensorRT's own; the weights then lie in
physical memory that other engines, and the pool's own mappings, have too.

Building such an engine needs a GPU that TensorRT-RTX serves: this was tested with a stand-in of the manager, and not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glake_infer.allocators.errors import InputError
from glake_infer.models.tensorrt.runtimes import EngineRuntime


@dataclass(frozen=True)
class Chunk:
    """Physical memory that holds bytes of the weights, from the allocation's first byte on."""

    handle: int
    """The CUmemGenericAllocationHandle. It may be released once it is mapped; to map it again later it must be kept."""
    offset: int
    """Of its bytes in the weights as the manager orders them."""
    bytes: int
    """A multiple of the granule, as `offset` is."""


def map_chunks(
    runtime: EngineRuntime, engine: Any, chunks: Sequence[Chunk], granule: int, stream: int
) -> Any:
    """Give a stripped engine its weights: chunks that cover all of them. Returns the weights manager.

    `stream` orders it with other work on the chunks. No context of the engine may be made, or run, meanwhile. Raises
    InputError (the engine has no manager, or the chunks leave a gap, overlap, or are no granules; nothing is mapped then),
    or ModelError with what TensorRT says (the engine is then without weights, and may be tried again after
    `manager.unload`).
    """
    create = getattr(engine, "create_weights_manager", None)
    manager = create() if create is not None else None
    if manager is None:
        raise InputError(
            f"the engine's weights cannot be mapped by {runtime.kind} {runtime.version}: this needs an engine that was "
            "built without its weights (STRIP_PLAN), and TensorRT-RTX 1.7 or newer. Load it with its weights."
        )
    size = int(manager.get_size())
    position = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        if chunk.offset != position or chunk.bytes <= 0 or chunk.offset % granule or chunk.bytes % granule:
            raise InputError(
                f"a chunk holds the bytes {chunk.offset} to {chunk.offset + chunk.bytes} of the weights, where one was "
                f"expected that begins at {position} and has a multiple of {granule} bytes."
            )
        position += chunk.bytes
    if position != size:
        raise InputError(
            f"the chunks hold {position} bytes of weights; the engine's weights are {size} bytes."
        )
    runtime.take_errors()
    for chunk in chunks:
        if not manager.restore_from_vmm_allocation(chunk.handle, chunk.offset, chunk.bytes, stream):
            raise runtime.failure(
                f"TensorRT did not map the chunk of the bytes {chunk.offset} to {chunk.offset + chunk.bytes} of its weights"
            )
    return manager
