"""The pool as PyTorch's allocator: torch tensors and ONNX Runtime's sessions on one pool.

PyTorch loads a pluggable allocator by the path of a library and the names of two functions; ours are in the native
module (torch_face.hpp). Two ways to use it:

- a MemPool (`mem_pool`): tensors made inside `with torch.cuda.use_mem_pool(pool.torch_mem_pool()):` take their memory
  from the pool. PyTorch's caching allocator stays in front: memory comes in its segments (2 MiB for tensors up to
  1 MiB, 20 MiB up to 10 MiB, larger ones rounded up to 2 MiB) and stays with the MemPool until that is deleted or
  emptied. Streams, `Tensor.record_stream` and CUDA graphs work as ever.
- the whole process (`use`): every tensor is one allocation of the pool, which then does what the caching allocator
  does, and nothing is cached twice. PyTorch does not tell a pluggable allocator of `Tensor.record_stream`: keep a
  tensor that another stream uses until that stream is done with it.

Nothing here imports torch before it is called.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .errors import GlakeError, InputError, MissingDependencyError

__all__ = ["allocator", "check", "mem_pool", "use"]


@functools.cache  # for ever: PyTorch's pools hold a plain pointer to it
def allocator(whole_process: bool = False) -> Any:
    """Return the `torch.cuda.memory.CUDAPluggableAllocator` over the pools of all CUDA devices.

    Args:
        whole_process: for `torch.cuda.memory.change_current_allocator`, where a request that fails must raise an
            error; False: for a MemPool, where it must return null.

    Raises:
        MissingDependencyError: PyTorch is not installed, is older than 2.5, or was built without CUDA.
    """
    torch = _import_torch()
    from . import _native

    name = "glake_torch_allocate" if whole_process else "glake_torch_try_allocate"
    return torch.cuda.memory.CUDAPluggableAllocator(str(_native.__file__), name, "glake_torch_free")


def mem_pool(device: str) -> Any:
    """Return a new `torch.cuda.MemPool` on the pool of `device` ("cuda:N").

    Raises as `allocator` does, and `InputError` where the device is no CUDA device.
    """
    index = check(device)
    torch = _import_torch()
    with torch.cuda.device(index):  # a MemPool belongs to the device that is current when it is made
        return torch.cuda.MemPool(allocator().allocator())


def use(device: str) -> None:
    """Make the pools of this process PyTorch's only CUDA allocator, on every device, until the process ends.

    Raises as `mem_pool` does, and `GlakeError`, with nothing changed, where PyTorch has used its own already.
    """
    check(device)
    torch = _import_torch()
    ours = allocator(whole_process=True)
    try:
        torch.cuda.memory.change_current_allocator(ours)
    except RuntimeError as error:
        raise GlakeError(
            "PyTorch cannot change to the pool: it has used an allocator in this process already (PyTorch says: "
            f"{str(error).splitlines()[0]}). Call pool.use_in_torch() before anything else uses torch.cuda, or use "
            "`with torch.cuda.use_mem_pool(pool.torch_mem_pool()):`, which works at any time."
        ) from error


def check(device: str) -> int:
    """Return the index of a CUDA device; raises `InputError` for another device."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        raise InputError(f"PyTorch's allocator can be a pool on a CUDA device, and this one is on {device!r}")
    return int(index or 0)


def _import_torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError(f"PyTorch is not installed ({error}): pip install torch") from error
    if not hasattr(torch._C, "_cuda_customAllocator") or not hasattr(torch.cuda, "MemPool"):
        raise MissingDependencyError(
            f"PyTorch {torch.__version__} has no pluggable CUDA allocator: version 2.5 or newer, built for CUDA, is "
            "needed (pip install torch)"
        )
    return torch
