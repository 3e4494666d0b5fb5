"""A loaded package: run it, put it to sleep, close it. models/load.py makes it."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from glake_infer import cuda
from glake_infer.allocators.errors import (
    GlakeError,
    InputError,
    InvalidPointerError,
    OutOfMemoryError,
    StoreError,
)
from glake_infer.allocators.pool import Pool
from glake_infer.checking import AlteredObjectError
from glake_infer.holding import Holding, HostCopy
from glake_infer.mapped_files import Span, drop_pages
from glake_infer.models.device_array import DeviceArray
from glake_infer.models.gate import Gate
from glake_infer.models.interchange import Borrowed
from glake_infer.models.manifest import Value
from glake_infer.models.package import Package
from glake_infer.models.session import session_errors
from glake_infer.models.values import (
    DTYPES,
    check_feeds,
    element_number,
    from_ort_value,
    to_ort_value,
)
from glake_infer.residency import Residency

if TYPE_CHECKING:
    import onnxruntime as ort

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
    """A loaded package: an ONNX Runtime session whose weights are shared and whose memory is the pool's.

    `run` may be called from several threads at once. Use as a context manager, or call `close()`.
    """

    name: str
    """The package's folder name without `.glake`."""
    session: ort.InferenceSession
    """The session. Whoever keeps a reference beyond `close()` keeps the weights. Its `run` methods wake a model that
    sleeps, as ours do; code that goes around them (`session._sess`, a C++ library) must not run while it does."""

    def __init__(
        self, package: Package, pool: Pool, sharing: Sharing, host_copy: HostCopy, *, maps: bool
    ) -> None:
        """Use `load`; this only makes the empty shell."""
        self.package = package
        self.pool = pool
        self.sharing = sharing
        self.host_copy: HostCopy = host_copy
        self._notes: tuple[str, ...] = ()
        self.name = package.name
        self._label = self.name or "model"  # a package may be called just ".glake"
        self._number = next(_numbers)
        self._maps = maps  # weights are the store's files, mapped
        self._residency = Residency.of(pool)
        self._holding: Holding | None = None
        self._evictable = False
        self._priority = 0
        self._gate: Gate | None = None
        self._mapped_by_session: frozenset[Span] = frozenset()  # files that ONNX Runtime has mapped by itself
        self._private = 0
        self._libraries = 0
        _by_number[self._number] = self
        self._running = 0
        self._runs = 0
        self._closed = False
        self._ending = self._ended = False  # the session, by close()
        self._spoiled = 0  # how many times a refused request left the session in disorder
        self._renewed = 0  # the value of _spoiled that the session was last made anew for
        self._condition = threading.Condition()
        self._copied: tuple[str, ...] = ()

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
        return (*self._notes, *self._copied)

    @property
    def memory(self) -> ModelMemory:
        """Where this model's weights are now."""
        if self._holding is None or self._closed:
            return ModelMemory(0, 0, 0)
        weighed = self._holding.weigh()
        rate = self._residency.rate
        names: dict[str, int] = {}
        for number, size in weighed.shared_with.items():
            other = _by_number.get(number)
            name = other.name if other else "a model that is being closed"
            names[name] = max(size, names.get(name, 0))
        return ModelMemory(
            shared=weighed.shared,
            own=weighed.own,
            private=self._private,
            asleep=weighed.asleep,
            waking=0.0 if not weighed.asleep else weighed.asleep / rate if rate else None,
            pinned=weighed.pinned,
            libraries=self._libraries,
            shared_with=dict(sorted(names.items())),
        )

    @property
    def suspended(self) -> bool:
        """Whether the model sleeps by `suspend`. What a Runtime took from it is in `memory.asleep`."""
        return self._holding is not None and not self._closed and self._holding.suspended

    def suspend(self) -> int:
        """Give the memory of the weights back, and the pool's idle memory; return the bytes.

        The session stays alive and every address as it is; `resume`, or the next run, brings the same bytes back from
        the store's files or from a page-locked copy (`host_copy`). Runs in progress are waited for. What another model
        that is awake uses stays, and with it the granules (2 MiB on CUDA) in which both have weights. So does what the
        session holds for itself, and what CUDA's libraries hold.

        Raises GlakeError after `close()`, DriverError (the GPU failed; the model stays awake).
        """
        holding = self._open_holding()
        session = self.__dict__.get("session")  # its mappings stay while somebody has it
        try:
            freed = holding.suspend()
        except InvalidPointerError:
            self._open_holding()  # closed meanwhile
            raise
        if session is not None and self._mapped_by_session:
            drop_pages(self._mapped_by_session)
        return freed + self.pool.trim()

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
            return self._run_until_sound(names, checked, to)
        with self._gate.together() as crowded:
            try:
                return self._run_until_sound(names, checked, to)
            except OutOfMemoryError as error:
                if not crowded():
                    raise
                error.__traceback__ = None  # it holds the session
        with self._gate.alone():  # the models of other runs were in the way
            return self._run_until_sound(names, checked, to)

    def _run_until_sound(self, names: list[str], checked: Mapping[str, Any], to: Place) -> dict[str, Any]:
        while True:
            begun = self._begin()
            try:
                with self._waking(), self._open_holding():
                    try:
                        results = self._run_once(names, checked, to)
                    except OutOfMemoryError:  # in the run, not in waking
                        self._spoil()
                        raise
            finally:
                if self._captures:
                    self.pool.captures_ended()
                self._end()
            if begun == self._spoiled:
                return results
            # Another run was refused meanwhile and may have spoiled this one: once more, with a new session.

    def _run_once(self, names: list[str], checked: Mapping[str, Any], to: Place) -> dict[str, Any]:
        with self.pool.label(self._label), session_errors(self.pool, "running", self.name):
            if (
                to == "device"
                or (self._foreign and not self._maps)
                or any(isinstance(array, Borrowed) for array in checked.values())
            ):
                return self._run_bound(names, checked, to)
            if self._foreign:
                return self._run_foreign(names, checked)
            results = self.session.run(names, checked)
        # ONNX Runtime's arrays lie in the pool: they would count against its limit for as long as they live.
        return {name: _own(result) for name, result in zip(names, results, strict=True)}

    def _run_foreign(self, names: list[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run with OrtValues: ONNX Runtime's plain run knows numpy's own types alone, not bfloat16 or float8."""
        values = {name: to_ort_value(self._known[name], array) for name, array in feeds.items()}
        results = self.session.run_with_ort_values(names, values)
        return {
            name: from_ort_value(self._known[name], result)
            for name, result in zip(names, results, strict=True)
        }

    def _run_bound(self, names: list[str], feeds: Mapping[str, Any], to: Place) -> dict[str, Any]:
        """Run with addresses: inputs are read where they are, outputs of to="device" stay where they were made.

        ONNX Runtime runs on streams of its own, which wait for nobody's work, and waits for them at the end of a
        run: so the inputs are complete before it begins, and the outputs when it returns.
        """
        binding = self.session.io_binding()
        values = []  # the binding holds pointers alone
        streams = {
            (array.device, array.stream)
            for array in feeds.values()
            if isinstance(array, Borrowed) and array.stream is not None
        }
        for device, stream in streams:
            cuda.synchronize(gpu_index(device), stream)
        for name, array in feeds.items():
            if isinstance(array, Borrowed):
                number = element_number(self._known[name])
                binding.bind_input(name, "cuda", gpu_index(array.device), number, array.shape, array.address)
                continue
            value = to_ort_value(self._known[name], array)
            if not hasattr(value, "_ortvalue"):
                raise InputError(
                    f"the input {self._known[name]} is no tensor, and goes with arrays on the host alone: feed the "
                    "others from the host too, and take results with to='host'."
                )
            binding.bind_ortvalue_input(name, value)
            values.append(value)
        names = list(dict.fromkeys(names))
        for name in names:
            if to == "device" and self.pool.device != "cpu":
                binding.bind_output(name, "cuda", gpu_index(self.pool.device))
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(names, binding.get_outputs(), strict=True))
        if to == "device":
            return {
                name: DeviceArray(_alone(result), DTYPES[self._known[name].dtype], self.pool.device)
                for name, result in results.items()
            }
        if all(self._known[name].dtype in DTYPES for name in names):
            return {name: from_ort_value(self._known[name], result) for name, result in results.items()}
        return {name: _own(r) for name, r in zip(names, binding.copy_outputs_to_cpu(), strict=True)}

    def close(self) -> None:
        """Wait for runs in flight, end the session and give its weights and memory back. Closing twice is fine."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: not self._running)
            if self._ending:  # by another thread
                self._condition.wait_for(lambda: self._ended)
                return
            self._ending = True
        self.__dict__.pop(
            "session", None
        )  # its finalizer gives the weights back, once nobody else holds the session either
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def _spoil(self) -> None:
        """Note that a request was refused in a run. The session is made anew before the next one, if need be.

        ONNX Runtime's convolution on CUDA (onnxruntime/core/providers/cuda/nn/conv.cc, UpdateState) notes the shape of
        its input before it allocates the output: after a refusal it takes the plan for another shape.
        """
        if not self._convolutions:
            return
        with self._condition:
            self._spoiled += 1

    def _begin(self) -> int:
        with self._condition:
            # Another thread may make the session anew while this one waits, and run again by then.
            self._condition.wait_for(
                lambda: self._spoiled == self._renewed or not self._running or self._closed
            )
            if self._spoiled != self._renewed and not self._closed:
                spoiled = self._spoiled
                self.__dict__.pop("session", None)
                self._make_session(self)
                self._renewed = spoiled
            if self._closed:
                raise self._is_closed()
            self._running += 1
            self._runs += 1
            return self._spoiled

    def _end(self) -> None:
        with self._condition:
            self._running -= 1
            if self._closed or self._spoiled != self._renewed:
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

    # Filled by load.
    _make_session: Callable[[Model], None]
    _convolutions: bool = False
    _captures: bool = False  # its sessions capture CUDA graphs
    _names: list[str]
    _known: dict[str, Value]
    _foreign: bool
    _inputs: list[Value]
    _outputs: list[Value]
    _optional: list[Value]


def gpu_index(device: str) -> int:
    """N of "cuda:N"."""
    return int(device.removeprefix("cuda:"))


def _alone(result: ort.OrtValue) -> ort.OrtValue:
    """The same value on its own: as part of a binding's results it would keep all of them and the session."""
    from onnxruntime import OrtValue
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

    holder = OrtValueVector()
    holder.push_back(result._ortvalue)
    return OrtValue(holder[0])


def _own(result: Any) -> Any:
    """A copy outside the pool of an array, or of the arrays in a sequence or map."""
    if isinstance(result, np.ndarray):
        return result.copy()
    if isinstance(result, list):
        return [_own(part) for part in result]
    if isinstance(result, dict):
        return {key: _own(part) for key, part in result.items()}
    return result
