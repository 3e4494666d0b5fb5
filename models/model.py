"""A loaded package: run it, put it to sleep, close it. models/load.py makes it, models/tensorrt/load.py for engines."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from glake_infer.allocators.errors import (
    GlakeError,
    InputError,
    InvalidPointerError,
    OutOfMemoryError,
    StoreError,
)
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes
from glake_infer.checking import AlteredObjectError
from glake_infer.holding import Holding, HostCopy
from glake_infer.models.device_array import DeviceArray
from glake_infer.models.gate import Gate
from glake_infer.models.manifest import Value
from glake_infer.models.package import Package
from glake_infer.models.values import (
    DTYPES,
    check_feeds,
)
from glake_infer.residency import Residency

if TYPE_CHECKING:
    pass

Sharing = Literal["fast", "lean"]
Place = Literal["host", "device"]

_numbers = itertools.count(1)
_by_number: weakref.WeakValueDictionary[int, Model] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class ModelMemory:
    """Where a model's weights are, and what else it holds, in bytes. Other models may hold what is shared."""

    shared: int
    """Weights that another loaded model uses too, held once for all of them."""
    own: int
    """Weights that only this model uses."""
    private: int
    """Copies that the session made for itself in the pool: small weights and what could not be shared."""
    asleep: int = 0
    """Memory of its weights that is not there now: the next run, or `resume`, brings it back."""
    waking: float | None = None
    """Seconds that this would take at the rate of the last load; None where nothing was loaded yet."""
    offloaded: int = 0
    """Of its weights, what lies in memory of the host (`offload`), whether it is there now or asleep."""
    reading: float | None = None
    """Seconds that reading these takes in a run that needs all of them but tables (of those it looks up rows), at the
    rate of the last load; None where nothing was loaded yet."""
    pinned: int = 0
    """Page-locked host memory that keeps copies of weights (`host_copy="pinned"`)."""
    libraries: int = 0
    """On a GPU: what the session made CUDA's libraries take outside the pool when it was built (cuBLAS and cuDNN
    handles with their workspaces, code of kernels), as the driver counts. The first run takes more."""
    shared_with: Mapping[str, int] = field(default_factory=dict)
    """Other loaded models, by name, and the bytes of weights that each of them uses too."""


class ModelClosedError(GlakeError):
    """A model is used after `close()`."""


class Model:
    """A loaded package, whose weights are shared and whose memory is the pool's.

    An ONNX Runtime session (models/session_model.py) or a TensorRT engine (models/tensorrt/engine.py) runs it. `run`
    may be called from several threads at once. Use as a context manager, or call `close()`.
    """

    name: str
    """The package's folder name without `.glake`."""

    def __init__(self, package: Package, pool: Pool, host_copy: HostCopy) -> None:
        """Use `load`; this only makes the empty shell."""
        self.package = package
        self.pool = pool
        self.host_copy: HostCopy = host_copy
        self._notes: tuple[str, ...] = ()
        self.name = package.name
        self._label = self.name or "model"  # a package may be called just ".glake"
        self._number = next(_numbers)
        self._residency = Residency.of(pool)
        self._holding: Holding | None = None
        self._evictable = False
        self._priority = 0
        self._gate: Gate | None = None
        self._private = 0
        self._libraries = 0
        _by_number[self._number] = self
        self._running = 0
        self._runs = 0
        self._closed = False
        self._ending = self._ended = False  # the session, by close()
        self._condition = threading.Condition()
        self._lookups = 0  # bytes of tables that lie on the host
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._optional: list[Value] = []
        self._names: list[str] = []
        self._known: dict[str, Value] = {}

    @property
    def inputs(self) -> list[Value]:
        """Inputs that must be fed, in order."""
        return self._inputs

    @property
    def overridable(self) -> list[Value]:
        """Weights that may be fed too, instead of their stored values."""
        return self._optional

    @property
    def outputs(self) -> list[Value]:
        """Outputs, in the order in which `run` gives them."""
        return self._outputs

    @property
    def notes(self) -> tuple[str, ...]:
        """What `load` has to say: what could not be done, and what the session holds for itself."""
        return (*self._notes, *self._offload_notes())

    def _offload_notes(self) -> Iterator[str]:
        memory = self.memory
        if not memory.offloaded:
            return
        said = f"{format_bytes(memory.offloaded)} of weights stay in host memory"
        read = memory.offloaded - self._lookups
        if not read:
            yield f"{said}: tables of which each run reads some rows over PCIe"
            return
        whole = "them" if not self._lookups else f"{format_bytes(read)} of them"
        rows = ", and some rows of the rest" if self._lookups else ""
        rate = self._residency.rate
        cost = (
            f", about {memory.reading * 1e3:.3g} ms at the last load's {rate / 1e9:.2g} GB/s"
            if memory.reading
            else ""
        )
        yield f"{said}: each run reads {whole} over PCIe{cost}{rows}"

    @property
    def memory(self) -> ModelMemory:
        """Where this model's weights are now."""
        if self._holding is None or self._closed:
            return ModelMemory(0, 0, 0)
        weighed = self._holding.weigh()
        rate = self._residency.rate
        read = max(0, weighed.offloaded - self._lookups)
        names: dict[str, int] = {}
        for number, size in weighed.shared_with.items():
            other = _by_number.get(number)
            name = other.name if other else "a model that is being closed"
            names[name] = max(size, names.get(name, 0))
        return ModelMemory(
            shared=weighed.shared,
            own=weighed.own,
            private=self._private_bytes(),
            asleep=weighed.asleep,
            waking=0.0 if not weighed.asleep else weighed.asleep / rate if rate else None,
            offloaded=weighed.offloaded,
            reading=0.0 if not read else read / rate if rate else None,
            pinned=weighed.pinned,
            libraries=self._libraries,
            shared_with=dict(sorted(names.items())),
        )

    def _private_bytes(self) -> int:
        return self._private

    @property
    def suspended(self) -> bool:
        """Whether the model sleeps by `suspend`. What a Runtime took from it is in `memory.asleep`."""
        return self._holding is not None and not self._closed and self._holding.suspended

    def suspend(self) -> int:
        """Give the memory of the weights back, and the pool's idle memory; return the bytes.

        The session stays alive and every address as it is; `resume`, or the next run, brings the same bytes back from
        the store's files or from a page-locked copy (`host_copy`); what is offloaded goes as well, and comes from the
        store. Runs in progress are waited for. What another model that is awake uses stays, and with it the granules
        (2 MiB on CUDA) in which both have weights. So does what the session holds for itself, and what CUDA's libraries
        hold.

        Raises GlakeError after `close()`, DriverError (the GPU failed; the model stays awake).
        """
        holding = self._open_holding()
        try:
            freed = holding.suspend()
        except InvalidPointerError:
            self._open_holding()  # closed meanwhile
            raise
        self._fallen_asleep()
        return freed + self.pool.trim()

    def _fallen_asleep(self) -> None:
        """What else a suspended model gives back; before the pool's idle memory goes."""

    def resume(self) -> None:
        """Bring the weights back now rather than in the next run.

        Raises what a run does: OutOfMemoryError, DriverError, DigestMismatchError or StoreError (the store's file was
        changed, or cannot be read). The model then still sleeps, and can be resumed once that is mended.
        """
        with self._waking(), self._open_holding():
            pass

    @property
    def pinned(self) -> bool:
        """Whether its Runtime leaves it where it is. Always, for models that are in none."""
        return not self._evictable

    @pinned.setter
    def pinned(self, value: bool) -> None:
        if self._gate is None and not value:
            raise InputError(
                "only models of a Runtime are put to sleep by themselves: load it with Runtime.load."
            )
        self._evictable = not value
        self._set_policy()

    @property
    def priority(self) -> int:
        """Models of lower priority are put to sleep first by their Runtime."""
        return self._priority

    @priority.setter
    def priority(self, value: int) -> None:
        self._priority = value
        self._set_policy()

    @property
    def idle_seconds(self) -> float:
        """Seconds since its last run ended; 0 during one."""
        return self._open_holding().idle_seconds

    @property
    def busy(self) -> bool:
        """Whether runs are in progress."""
        return self._open_holding().busy

    @property
    def runs(self) -> int:
        """How many runs `run` has begun."""
        return self._runs

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _set_policy(self) -> None:
        if self._holding is not None and not self._closed:
            self._holding.set_policy(evictable=self._evictable, priority=self._priority)

    def _join(self, gate: Gate, *, pin: bool, priority: int) -> None:
        """Become one of the models among which a Runtime shares out its memory."""
        self._gate, self._evictable, self._priority = gate, not pin, priority
        self._set_policy()

    def _open_holding(self) -> Holding:
        if self._closed or self._holding is None:
            raise self._is_closed()
        return self._holding

    def _is_closed(self) -> ModelClosedError:
        return ModelClosedError(
            f"the model {self.name} is closed. Load it again with gi.load({str(self.package.path)!r}, pool)."
        )

    @contextlib.contextmanager
    def _waking(self) -> Iterator[None]:
        """Say what to do where a weight cannot be brought back."""
        try:
            yield
        except AlteredObjectError as error:
            if error.digest in self.package.manifest.distinct and not error.unreadable:
                raise self.package.damaged(error.digest) from error
            raise StoreError(
                f"{error} The model {self.name} could not be brought back and sleeps on. Mend the store "
                f"({self.package.store.root}), and run it again."
            ) from error

    @overload
    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, *, to: Literal["host"] = "host"
    ) -> dict[str, np.ndarray[Any, Any]]: ...

    @overload
    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, *, to: Literal["device"]
    ) -> dict[str, DeviceArray]: ...

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, *, to: Place = "host"
    ) -> dict[str, Any]:
        """Run the model on `feeds` (name -> array) and return name -> array, in the order of `outputs`.

        feeds
            numpy arrays, lists, numbers, and arrays of other libraries: whatever has DLPack or
            `__cuda_array_interface__` (PyTorch, CuPy, JAX, DeviceArray). Those on the pool's GPU are read in place
            and must be contiguous; those on the host are copied to the GPU. The run waits, on the host, for the
            work that makes them: what the producer orders before the legacy default stream through DLPack, or the
            stream that its `__cuda_array_interface__` names. What lies on the host must be complete.
        to
            "host": numpy arrays that are yours: they hold none of the pool's memory and outlive the model.
            "device": `DeviceArray`s in the pool's memory, without a copy, complete when `run` returns.

        Returns when the results are complete. Raises InputError (a wrong name, dtype, shape or device, an array
        that is not contiguous), OutOfMemoryError (the pool's limit; the model stays usable), ModelError (ONNX
        Runtime failed inside the model), DriverError (the GPU failed), or GlakeError after `close()`.
        """
        if to not in ("host", "device"):
            raise InputError(f"to={to!r}: expected 'host' or 'device'.")
        names = self._names if outputs is None else list(outputs)
        if unknown := set(names).difference(self._names):
            raise InputError(
                f"the model has no output {sorted(unknown)[0]!r}; its outputs are {', '.join(map(str, self._outputs))}."
            )
        if to == "device":
            for value in self._outputs:
                if value.name in names and value.dtype not in DTYPES:
                    raise InputError(
                        f"the output {value} cannot stay on the device: it is no tensor of numbers. Take it with "
                        "to='host', or leave it out of `outputs`."
                    )
        checked = check_feeds(self._inputs, self._optional, feeds, self.pool.device)
        if self._gate is None:
            return self._run(names, checked, to)
        with self._gate.together() as crowded:
            try:
                return self._run(names, checked, to)
            except OutOfMemoryError as error:
                if not crowded():
                    raise
                error.__traceback__ = None  # it holds the session
        with self._gate.alone():  # the models of other runs were in the way
            return self._run(names, checked, to)

    def _run(self, names: list[str], checked: Mapping[str, Any], to: Place) -> dict[str, Any]:
        """One run inside the gate, with the weights there while it goes on."""
        self._begin()
        try:
            with self._waking(), self._open_holding():
                return self._run_once(names, checked, to)
        finally:
            self._end()

    def _run_once(self, names: list[str], checked: Mapping[str, Any], to: Place) -> dict[str, Any]:
        """Run on what `check_feeds` passed; the results are complete when it returns."""
        raise NotImplementedError

    def close(self) -> None:
        """Wait for runs in flight, end the session and give its weights and memory back. Closing twice is fine."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: not self._running)
            if self._ending:  # by another thread
                self._condition.wait_for(lambda: self._ended)
                return
            self._ending = True
        self._end_session()
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def _end_session(self) -> None:
        """Let go of what runs the model, once no run is in flight and none comes."""
        raise NotImplementedError

    def _begin(self) -> int:
        """Count a run. Returns a number with which a kind of model may tell runs of one state from those of another."""
        with self._condition:
            if self._closed:
                raise self._is_closed()
            self._running += 1
            self._runs += 1
            return 0

    def _end(self) -> None:
        with self._condition:
            self._running -= 1
            self._condition.notify_all()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else ", ".join(str(value) for value in self._inputs)
        return f"<Model {self.name} ({state}){', asleep' if self.suspended else ''}>"

    def _describe(self, inputs: list[Value], outputs: list[Value], optional: Iterable[Value] = ()) -> None:
        """Say what is fed and what comes out."""
        self._inputs, self._outputs, self._optional = inputs, outputs, list(optional)
        self._names = [value.name for value in outputs]
        self._known = {value.name: value for value in (*inputs, *self._optional, *outputs)}


def gpu_index(device: str) -> int:
    """N of "cuda:N"."""
    return int(device.removeprefix("cuda:"))
