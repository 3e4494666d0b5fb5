"""DeviceArray: an output that stays in the pool."""

from __future__ import annotations

import contextlib
import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from glake_infer import cuda
from glake_infer.allocators.errors import ForkedProcessError, GlakeError
from glake_infer.allocators.pool import Pool
from glake_infer.models.interchange import DLPACK_CPU, DLPACK_CUDA, Borrowed, correct_bool, export

if TYPE_CHECKING:
    import onnxruntime as ort


class OrtMemory:
    """A tensor of ONNX Runtime's: an OrtValue."""

    def __init__(self, value: ort.OrtValue) -> None:
        """Take the value over."""
        self._value = value
        self.shape = tuple(int(size) for size in value.shape())

    @property
    def address(self) -> int:
        """Of the first element."""
        return int(self._value.data_ptr())

    def to_dlpack(self, array: DeviceArray) -> Any:
        """A capsule that keeps the memory alive; raises BufferError for a type that ONNX Runtime cannot export."""
        try:
            capsule = self._value._ortvalue.to_dlpack()
        except (RuntimeError, AttributeError) as error:
            raise BufferError(f"ONNX Runtime cannot export {array.dtype} through DLPack: {error}") from error
        return correct_bool(capsule) if array.dtype == np.bool_ else capsule


class PoolMemory:
    """A block of a pool that goes back when this object is dropped, in any thread."""

    def __init__(self, pool: Pool, address: int, shape: tuple[int, ...]) -> None:
        """Take over what `pool.allocate` returned. Work that uses it is done, or queued on the stream of the allocation."""
        self.address = address
        self.shape = shape
        weakref.finalize(self, _give_back, pool, address).atexit = False  # as sessions', it is leaked at exit

    def to_dlpack(self, array: DeviceArray) -> Any:
        """A capsule that keeps the memory alive."""
        return export(array.borrowed())


def _give_back(pool: Pool, address: int) -> None:
    with contextlib.suppress(ForkedProcessError):  # in a child of fork() it is the parent's
        pool.deallocate(address)


class DeviceArray:
    """An output of `Model.run(..., to="device")`: a C-contiguous array in the pool's memory, on the pool's device.

    It implements DLPack (`torch.from_dlpack(x)`, `cupy.from_dlpack(x)`, `numpy.from_dlpack(x)` on the CPU) and, on
    CUDA, `__cuda_array_interface__`; both share the memory. It can be fed to `run` again, of any model on the device.

    The memory is active in the pool until this object and everything made from it through DLPack is dropped; it
    outlives the model. What reads through `__cuda_array_interface__` must keep this object itself.

    Streams: the data is complete when `run` returns, so that any stream may read it at once. Memory that is dropped
    may be given to another session at once: keep the array until the work that reads it is done (synchronize the
    stream that you queued it on), and not just until it is queued.
    """

    def __init__(self, memory: OrtMemory | PoolMemory, dtype: np.dtype[Any], device: str) -> None:
        """Take over memory that holds a tensor of `dtype` on `device`; for `Model.run`."""
        self._memory = memory
        self._device = device
        self._dtype = dtype
        self._shape = memory.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The elements' type, as numpy's (ml_dtypes' for bfloat16 and float8)."""
        return self._dtype

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self._shape)

    @property
    def size(self) -> int:
        """How many elements there are."""
        return math.prod(self._shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self._dtype.itemsize

    @property
    def device(self) -> str:
        """Where the memory is: "cpu" or "cuda:N"."""
        return self._device

    @property
    def address(self) -> int:
        """Of the first element; 0 where there is none."""
        return self._memory.address if self.size else 0

    def numpy(self) -> np.ndarray[Any, Any]:
        """Copy the data to the host. The result is yours and holds none of the pool's memory.

        Raises DriverError (the GPU failed).
        """
        target = np.empty(self._shape, self._dtype)
        if self._device == "cpu":
            target[...] = self.borrowed().numpy()
        else:
            cuda.copy_to_host(self._index, self.address, target)
        return target

    def borrowed(self) -> Borrowed:
        """This array as an input of another run: nothing to wait for."""
        strides = tuple(math.prod(self._shape[axis + 1 :]) for axis in range(self.ndim))
        return Borrowed(self._device, self.address, self._dtype, self._shape, strides, self._memory)

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's (device type, device id)."""
        return (DLPACK_CPU, 0) if self._device == "cpu" else (DLPACK_CUDA, self._index)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export the memory, without a copy, as a DLPack capsule (of the unversioned kind).

        `stream` need not wait for anything: the data is complete. Raises BufferError for a copy, another device, or
        a type that ONNX Runtime cannot export (float8; engines' outputs can be of it).
        """
        del stream, max_version
        if copy:
            raise BufferError("a DeviceArray is exported in place; copy what you made from it (`.clone()`)")
        if dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__():
            raise BufferError(
                f"the array lies on {self._device} and is exported only there; `.numpy()` copies it"
            )
        return self._memory.to_dlpack(self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The memory in the CUDA array interface, version 3; AttributeError on the CPU and for bfloat16 and float8."""
        if self._device == "cpu" or self._dtype.isbuiltin != 1:
            raise AttributeError(f"{self._dtype} on {self._device} has no CUDA array interface; use DLPack")
        return {
            "version": 3,
            "shape": self._shape,
            "typestr": self._dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": None,  # the data is complete
        }

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Serve `numpy.asarray` on the CPU; on a GPU raise TypeError, for a copy should be seen in the code."""
        if self._device != "cpu":
            raise TypeError(f"the array lies on {self._device}: copy it to the host with `.numpy()`")
        if copy is False:
            raise ValueError("use numpy.from_dlpack for an array without a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("a scalar has no length")
        return self._shape[0]

    def __repr__(self) -> str:
        return f"<DeviceArray {self._dtype}{list(self._shape)} on {self._device}>"

    def __reduce__(self) -> Any:
        raise GlakeError("a DeviceArray is memory of this process and cannot be pickled; send `.numpy()`.")

    @property
    def _index(self) -> int:
        return int(self._device.removeprefix("cuda:"))
