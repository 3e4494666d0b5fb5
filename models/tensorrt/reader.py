"""A plan as TensorRT reads it: piece by piece, so that it never lies in the host's memory as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from glake_infer.transfers.device import Progress

PIECE = 64 << 20
"""Most bytes that TensorRT is given at once; it asks again for the rest."""


class ReadablePlan(Protocol):
    """What a reader needs of a plan (models/tensorrt/plan.py)."""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the plan."""


def make_reader(
    trt: ModuleType,
    plan: ReadablePlan,
    size: int,
    go_on: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Return an IStreamReaderV2 of the module `trt` over a plan of `size` bytes.

    What fails while it reads ends the reading, and is kept in its `error`: nothing may be raised into TensorRT. So does
    `go_on()`, where it says no. `progress` is called with the bytes that were read, and `size`, in the thread that reads.
    Needs a CUDA driver with the real library (RuntimeError).
    """
    return _reader_class(trt)(plan, size, go_on, progress)


@functools.cache
def _reader_class(trt: ModuleType) -> Any:
    class Reader(trt.IStreamReaderV2):  # type: ignore[misc, name-defined]
        def __init__(
            self,
            plan: ReadablePlan,
            size: int,
            go_on: Callable[[], bool] | None,
            progress: Progress | None,
        ) -> None:
            trt.IStreamReaderV2.__init__(self)
            self._plan = plan
            self._size = size
            self._go_on = go_on
            self._progress = progress
            self._position = self._furthest = 0
            self.error: BaseException | None = None

        def read(self, num_bytes: int, stream: int) -> bytes:
            """Called by TensorRT; fewer bytes than asked for make it ask again, none end the reading."""
            del stream  # what is returned lies in the host's memory
            try:
                if self._go_on is not None and not self._go_on():
                    return b""
                size = min(int(num_bytes), PIECE, self._size - self._position)
                data = self._plan.read(self._position, size) if size > 0 else b""
                self._position += len(data)
                if self._position > self._furthest:  # TensorRT reads the beginning twice
                    self._furthest = self._position
                    if self._progress is not None:
                        self._progress(self._furthest, self._size)
                return data
            except BaseException as error:
                self.error = error.with_traceback(None)  # it would keep this, and who called TensorRT
                return b""

        def seek(self, offset: int, where: Any) -> bool:
            """Called by TensorRT."""
            start = {"SET": 0, "CUR": self._position, "END": self._size}[where.name]
            if not 0 <= start + int(offset) <= self._size:
                return False
            self._position = start + int(offset)
            return True

    return Reader
