"""What the execution of engines needs of a device: streams, copies, graphs. One implementation for each kind of pool."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from typing import Any, Protocol

import numpy as np

from glake_infer import cuda
from glake_infer.allocators.errors import GlakeError
from glake_infer.allocators.pool import Pool
from glake_infer.models.model import gpu_index
from glake_infer.models.streams import give_stream_back, take_stream

Array = np.ndarray[Any, Any]


class Device(Protocol):
    """A device that engines run on. Streams are handles, as CUDA's. Every method may raise DriverError."""

    capability: str
    """Compute capability, as "8.6"."""
    title: str
    """The device's name, as "NVIDIA A10"."""
    captures: bool
    """Whether it has graphs."""

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make it the device of this thread inside the block: TensorRT asks which one that is."""

    def take_stream(self) -> int:
        """A stream that nobody else has, for as long as it is not given back."""

    def give_stream_back(self, stream: int) -> None:
        """Leave it to others."""

    def synchronize(self, stream: int) -> None:
        """Wait on the host until what is queued on a stream is done."""

    def queue_to_device(self, address: int, source: Array, stream: int) -> None:
        """Queue a copy of a contiguous array on the host to `address`; it stays as it is until the stream has passed."""

    def queue_within(self, address: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes from `source` to `address`, both on the device."""

    def to_host(self, address: int, target: Array) -> None:
        """Fill a contiguous array on the host with the bytes at `address`, whose work is done."""

    def begin_capture(self, stream: int) -> None:
        """What is queued on a stream by this thread goes into a graph, and is not run, until `end_capture`."""

    def end_capture(self, stream: int, *, keep: bool = True) -> int:
        """The graph, ready to be launched; 0 where it is not to be kept, or the capture was broken by what was queued."""

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""

    def destroy(self, graph: int) -> None:
        """Let go of a graph that no stream runs."""


class CudaDevice:
    """A GPU, through cuda-python."""

    captures = True

    def __init__(self, index: int) -> None:
        """GPU `index`, as CUDA counts in this process."""
        from glake_infer.allocators import _native

        self._index = index
        self.capability = ".".join(map(str, cuda.compute_capability(index)))
        self.title = _native.cuda_device_name(index)

    def current(self) -> contextlib.AbstractContextManager[None]:
        """See Device."""
        return cuda.current(self._index)

    def take_stream(self) -> int:
        """See Device."""
        return take_stream(self._index)

    def give_stream_back(self, stream: int) -> None:
        """See Device."""
        give_stream_back(self._index, stream)

    def synchronize(self, stream: int) -> None:
        """See Device."""
        cuda.synchronize(self._index, stream)

    def queue_to_device(self, address: int, source: Array, stream: int) -> None:
        """See Device."""
        cuda.queue_to_device(self._index, address, source.ctypes.data, source.nbytes, stream)

    def queue_within(self, address: int, source: int, size: int, stream: int) -> None:
        """See Device."""
        cuda.queue_within(self._index, address, source, size, stream)

    def to_host(self, address: int, target: Array) -> None:
        """See Device."""
        cuda.copy_to_host(self._index, address, target)

    def begin_capture(self, stream: int) -> None:
        """See Device."""
        cuda.begin_capture(self._index, stream)

    def end_capture(self, stream: int, *, keep: bool = True) -> int:
        """See Device."""
        return cuda.end_capture(self._index, stream, keep=keep)

    def launch(self, graph: int, stream: int) -> None:
        """See Device."""
        cuda.launch_graph(self._index, graph, stream)

    def destroy(self, graph: int) -> None:
        """See Device."""
        cuda.destroy_graph(self._index, graph)


class HostDevice:
    """Memory of the host in the place of a GPU's, for tests alone: TensorRT runs on no CPU.

    Work is done when it is queued, so there is nothing to wait for. It captures no graphs.
    """

    captures = False
    capability = "8.6"
    title = "memory of the host, for tests"

    def __init__(self) -> None:
        """Begin with stream 1."""
        self._streams = itertools.count(1)

    def current(self) -> contextlib.AbstractContextManager[None]:
        """See Device."""
        return contextlib.nullcontext()

    def take_stream(self) -> int:
        """See Device."""
        return next(self._streams)

    def give_stream_back(self, stream: int) -> None:
        """See Device."""

    def synchronize(self, stream: int) -> None:
        """See Device."""

    def queue_to_device(self, address: int, source: Array, stream: int) -> None:
        """See Device."""
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def queue_within(self, address: int, source: int, size: int, stream: int) -> None:
        """See Device."""
        ctypes.memmove(address, source, size)

    def to_host(self, address: int, target: Array) -> None:
        """See Device."""
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def begin_capture(self, stream: int) -> None:
        """See Device."""
        raise GlakeError("the host's memory captures no graphs")

    def end_capture(self, stream: int, *, keep: bool = True) -> int:
        """See Device."""
        raise GlakeError("the host's memory captures no graphs")

    def launch(self, graph: int, stream: int) -> None:
        """See Device."""
        raise GlakeError("the host's memory captures no graphs")

    def destroy(self, graph: int) -> None:
        """See Device."""


def device_of(pool: Pool) -> Device:
    """The device of a pool."""
    return HostDevice() if pool.device == "cpu" else CudaDevice(gpu_index(pool.device))
