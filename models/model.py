"""Load a package into a pool and run it."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import onnx

from glake_infer import cuda
from glake_infer.allocators.attach import Initializer, import_onnxruntime
from glake_infer.allocators.devices import parse_device
from glake_infer.allocators.errors import (
    DigestMismatchError,
    GlakeError,
    InputError,
    MissingDependencyError,
    ModelError,
    OutOfMemoryError,
    StoreError,
)
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes
from glake_infer.allocators.snapshot import Range
from glake_infer.models.device_array import DeviceArray
from glake_infer.models.gate import Gate
from glake_infer.models.graph import all_nodes, initializers, is_external
from glake_infer.models.interchange import Borrowed
from glake_infer.models.kin import hints
from glake_infer.models.manifest import Value
from glake_infer.models.package import Package
from glake_infer.models.prepare import Prepared, PreparedWeight, forget, prepare
from glake_infer.models.session import guarded_session
from glake_infer.models.values import (
    DTYPES,
    FOREIGN,
    check_feeds,
    element_number,
    from_ort_value,
    to_ort_value,
    value_of_argument,
)
from glake_infer.residency import AlteredObjectError, Holding, HostCopy, Residency, Wanted, drop_pages
from glake_infer.store import Store

if TYPE_CHECKING:
    import onnxruntime as ort

Sharing = Literal["fast", "lean"]
Optimization = Literal["all", "extended", "basic", "disable"]
Place = Literal["host", "device"]

CUDA_PROVIDER = "CUDAExecutionProvider"

SESSION_BYTES = 1 << 20
"""What a session takes from the pool for small weights and slabs when it is built, beside the graph's own bytes."""

_numbers = itertools.count(1)
_by_number: weakref.WeakValueDictionary[int, Model] = weakref.WeakValueDictionary()


def _is_awake(number: int) -> bool:
    model = _by_number.get(number)
    return model is not None and model._holding is not None and not model._closed and not model.suspended


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


class Model:
    """A loaded package: an ONNX Runtime session whose weights are shared and whose memory is the pool's.

    `run` may be called from several threads at once. Use as a context manager, or call `close()`.
    """

    name: str
    """The package's folder name without `.glake`."""
    session: ort.InferenceSession
    """The session. Whoever keeps a reference beyond `close()` keeps the weights. Its `run` methods wake a model that
    sleeps, as ours do; code that goes around them (`session._sess`, a C++ library) must not run while it does."""

    def __init__(self, package: Package, pool: Pool, sharing: Sharing, host_copy: HostCopy = "store") -> None:
        """Use `load`; this only makes the empty shell."""
        self.package = package
        self.pool = pool
        self.sharing = sharing
        self.host_copy: HostCopy = host_copy
        self._notes: tuple[str, ...] = ()
        self.name = package.name
        self._label = self.name or "model"  # a package may be called just ".glake"
        self._number = next(_numbers)
        self._maps = maps_weights(pool)
        self._residency = Residency.of(pool)
        self._holding: Holding | None = None
        self._evictable = False
        self._priority = 0
        self._gate: Gate | None = None
        self._mapped_by_session: dict[str, Path] = {}  # objects that ONNX Runtime maps by itself
        self._private = 0
        self._libraries = 0
        _by_number[self._number] = self
        self._running = 0
        self._closed = False
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
        that is awake uses stays. Weights that together take less than half a granule of the device (1 MiB on CUDA),
        what the session holds for itself, and what CUDA's libraries hold stay too.

        Raises GlakeError after `close()`, DriverError (the GPU failed; the model stays awake).
        """
        holding = self._open_holding()
        freed = holding.suspend()
        if self._mapped_by_session:
            drop_pages(
                path
                for digest, path in self._mapped_by_session.items()
                if not any(_is_awake(number) for number in self._residency.users_of(digest))
            )
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
            raise GlakeError(
                f"the model {self.name} is closed. Load it again with gi.load({str(self.package.path)!r}, pool)."
            )
        return self._holding

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
                with self._waking():
                    results = self._run_once(names, checked, to)
            except OutOfMemoryError:
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
            cuda.synchronize(_index(device), stream)
        for name, array in feeds.items():
            if isinstance(array, Borrowed):
                number = element_number(self._known[name])
                binding.bind_input(name, "cuda", _index(array.device), number, array.shape, array.address)
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
                binding.bind_output(name, "cuda", _index(self.pool.device))
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
            if self._closed:
                return
            self._closed = True
            self._condition.wait_for(lambda: not self._running)
        self.__dict__.pop(
            "session", None
        )  # its finalizer gives the weights back, once nobody else holds the session either

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
                raise GlakeError(
                    f"the model {self.name} is closed. Load it again with gi.load({str(self.package.path)!r}, pool)."
                )
            self._running += 1
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


def load(
    path: str | os.PathLike[str],
    pool: Pool | None = None,
    *,
    device: str | None = None,
    sharing: Sharing = "fast",
    optimization: Optimization = "all",
    threads: int | None = None,
    configure: Callable[[ort.SessionOptions], None] | None = None,
    provider_options: Mapping[str, Any] | None = None,
    store: Store | None = None,
    host_copy: HostCopy = "store",
) -> Model:
    """Load the package at `path` into a pool and return a Model that runs on the pool's device.

    pool, device
        The pool decides the device. Without one, the process's pool on `device` ("cpu" unless said; "cuda:0") is
        used, and made without a limit where there is none. With both, they must agree.
    sharing
        "fast": weights as ONNX Runtime computes with them (fused, folded, prepacked), derived once per machine
        and then mapped by every session of every process. "lean": weights as they are in the store, nothing
        derived that would be larger; int8 and fp16 models stay small, and runs are slower. On CUDA "fast" takes the
        package's `cuda` variant, fused at conversion, and "lean" is the same unless weights would be widened. Either
        way there is one copy of each weight in the pool, whatever number of models has it.
    optimization
        ONNX Runtime's graph optimization level.
    threads
        Threads inside one run (intra-op); ONNX Runtime's default is one per core.
    configure
        Called with the session's fresh SessionOptions before ours are set, for anything else (logging, profiling,
        spinning, free dimensions). The prepared graph is the same for everybody: what decides how a graph is
        optimized is `optimization` alone.
    provider_options
        Options of the CUDA provider, beside those of `pool.providers`. For results that repeat, and compare
        with other sessions' bit for bit: `{"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}`. What decides
        where memory comes from (`device_id`, `gpu_mem_limit`, `gpu_external_alloc`...) is the pool's matter.
        A session has one stream of its own, on which all its runs are, unless `user_compute_stream` names another:
        ONNX Runtime's own way, a stream and two cuBLAS handles for each run that goes on at once, costs 75 MiB more.
    host_copy
        On CUDA, what `Model.resume` brings weights back from: "store" reads the store's files again (page cache or
        disk), and costs nothing; "pinned" keeps a page-locked copy, which takes as much memory of the host, 0.6 s for a
        GiB to make at the load, and is as fast as the link. On the CPU both are the store's files.

    The first load on a machine for the CPU prepares the model (optimizing it once, some seconds for large
    models); later ones, in any process, map the result. On CUDA every weight's bytes are checked and copied to the
    GPU, unless another model has it there. Raises InputError, PackageError, DigestMismatchError (naming every package that
    a changed object hurts), OutOfMemoryError (saying what limit would do), MissingDependencyError (no ONNX
    Runtime, or none for CUDA); nothing stays loaded after an error.
    """
    runtime = import_onnxruntime()
    if sharing not in ("fast", "lean"):
        raise InputError(f"sharing={sharing!r}: expected 'fast' or 'lean'.")
    levels = {
        "all": runtime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "extended": runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "basic": runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "disable": runtime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    if optimization not in levels:
        raise InputError(f"optimization={optimization!r}: expected one of {', '.join(map(repr, levels))}.")

    if host_copy not in ("store", "pinned"):
        raise InputError(f"host_copy={host_copy!r}: expected 'store' or 'pinned'.")
    place = _pool_for(pool, device)
    providers = providers_of(place, provider_options)

    def options() -> ort.SessionOptions:
        made: ort.SessionOptions = runtime.SessionOptions()
        if threads is not None:
            made.intra_op_num_threads = threads
        made.graph_optimization_level = levels[optimization]
        if sharing == "lean" and maps_weights(place):
            # A weight is cast right before its use, not all of them at the start (34 -> 6 MiB on an int8 MiniLM).
            made.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
            made.log_severity_level = 3  # ORT warns of each weight that the lean variant made overridable
        return made

    store = store or Store()
    with store.using():
        package = Package(Path(path), store)
        model = Model(package, place, sharing, host_copy)
        package.check_present()
        variant = _variant(package, place, sharing)
        for attempt in itertools.count():
            prepared = _prepared(model, variant, optimization, options)

            def make_session(owner: Model, prepared: Prepared = prepared) -> None:
                made = options()
                if configure:
                    configure(made)
                with place.label(owner._label):
                    _build_session(owner, prepared, made, providers)

            try:
                make_session(model)
            except AlteredObjectError as error:
                if attempt < 2 and forget(package, error.digest):
                    continue  # a derived object: made again from the stored weights
                if error.digest in package.manifest.distinct:
                    raise package.damaged(error.digest) from error
                raise StoreError(
                    f"{error} It was derived on this machine and is damaged again and again. Check the disk of {store.root}."
                ) from error
            model._make_session = make_session
            model._convolutions = place.device != "cpu" and has_convolutions(prepared.graph)
            return model
    raise AssertionError("unreachable")


def _variant(package: Package, pool: Pool, sharing: Sharing) -> str:
    """The package's graph for this device and way of sharing."""
    wanted = ["cpu-lean"] if sharing == "lean" else []
    if not maps_weights(pool):
        wanted.append("cuda")
    return next((name for name in wanted if name in package.manifest.variants), "onnx")


def _prepared(
    model: Model, variant: str, optimization: str, options: Callable[[], ort.SessionOptions]
) -> Prepared:
    """The prepared graph; where this machine cannot keep one, and on a GPU, the package's own."""
    package = model.package
    if not model._maps:
        if model.sharing == "lean" and variant != "cpu-lean":
            model._notes = (*model._notes, "sharing='lean' is the same as 'fast' here: nothing would be widened")
        return _as_given(package, variant)
    try:
        with session_errors(model.pool, "preparing", model.name):
            return prepare(
                package, variant, prepack=model.sharing == "fast", level=optimization, session_options=options
            )
    except DigestMismatchError:
        raise
    except (ModelError, StoreError) as error:
        # A full or read-only disk, or a graph that ORT cannot save (sparse).
        model._notes = (
            *model._notes,
            f"not prepared, so ONNX Runtime keeps private copies of what it derives: {error}",
        )
    return _as_given(package, variant)


def _as_given(package: Package, variant: str) -> Prepared:
    """A variant as it is in the package, to be optimized by the session."""
    graph = package.graph(variant)
    digests = {weight.name: weight for weight in package.manifest.weights}
    weights = tuple(
        PreparedWeight(w.name, w.digest, w.bytes, w.bytes, derived=False, injected=True)
        for w in (digests[item.tensor.name] for item in initializers(graph) if is_external(item.tensor))
    )
    return Prepared(graph.SerializeToString(), weights, optimized=False)


def maps_weights(pool: Pool) -> bool:
    """Whether a session on this pool uses the store's files where they are mapped; else weights are copied to it."""
    return pool.device == "cpu"


def _pool_for(pool: Pool | None, device: str | None) -> Pool:
    if pool is None:
        return Pool.current(device or "cpu") or Pool(device=device or "cpu")
    if device is not None and parse_device(device) != pool.device:
        raise InputError(
            f"device={device!r} was given with a pool on {pool.device!r}. A model runs on its pool's device: give "
            "one of both."
        )
    return pool


_OF_THE_POOL = {
    "device_id", "gpu_mem_limit", "arena_extend_strategy", "gpu_external_alloc", "gpu_external_free",
    "gpu_external_empty_cache", "default_memory_arena_cfg",
}  # fmt: skip
"""Options of the CUDA provider that the pool decides, or that would go around it."""


def providers_of(pool: Pool, options: Mapping[str, Any] | None) -> list[Any]:
    """The pool's execution providers, with more options for the CUDA one. Raises InputError."""
    providers: list[Any] = list(pool.providers)
    if not options:
        return providers
    if taken := sorted(_OF_THE_POOL.intersection(options)):
        raise InputError(
            f"provider_options has {taken[0]!r}, which the pool decides: make the Pool on the device, and with the "
            "limit, that you want."
        )
    names = [entry if isinstance(entry, str) else entry[0] for entry in providers]
    if CUDA_PROVIDER not in names:
        raise InputError(
            f"provider_options ({', '.join(options)}) are for CUDA, and the pool is on {pool.device!r}."
        )
    more = {name: str(int(v) if isinstance(v, bool) else v) for name, v in options.items()}
    place = names.index(CUDA_PROVIDER)
    given = {} if isinstance(providers[place], str) else dict(providers[place][1])
    providers[place] = (CUDA_PROVIDER, {**given, **more})
    return providers


def captures_graphs(providers: list[Any]) -> bool:
    """Whether sessions of these providers capture a CUDA graph."""
    options = [entry[1] for entry in providers if not isinstance(entry, str)]
    return any(str(given.get("enable_cuda_graph", "0")).lower() not in ("0", "false") for given in options)


def _index(device: str) -> int:
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


def _build_session(
    model: Model, prepared: Prepared, options: ort.SessionOptions, providers: list[Any]
) -> None:
    runtime = import_onnxruntime()
    check_providers(runtime.get_available_providers(), providers)
    pool, residency, number = model.pool, model._residency, model._number
    wanted = _wanted(model, prepared)
    own = len(prepared.graph) + SESSION_BYTES
    holding = residency.hold(
        wanted,
        number,
        evictable=model._evictable,
        priority=model._priority,
        host_copy=model.host_copy,
    )
    stream = 0
    try:
        with holding:
            if prepared.optimized:
                options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(model.package.store.root)
            )
            lean = model.sharing == "lean" and model._maps
            options.add_session_config_entry("session.disable_prepacking", "1" if lean else "0")
            model._captures = captures_graphs(providers)
            if pool.device != "cpu" and not model._captures and not _names_a_stream(providers):
                stream = _take_stream(_index(pool.device))
                providers = _with_stream(providers, stream)
            before = _Before(pool, model._label)
            with session_errors(pool, "loading", model.name):
                values = pool.attach(
                    options, _injected(prepared, holding.addresses), cuda_graph=model._captures
                )
                try:
                    session = guarded_session(holding)(
                        prepared.graph, options, providers=providers, enable_fallback=0
                    )
                finally:
                    values.close()
            check_providers(session.get_providers(), providers)
    except BaseException as error:
        session = None
        holding.close()
        if stream:
            _give_stream_back(_index(pool.device), stream)
        if isinstance(error, OutOfMemoryError):
            raise _with_session(error, own) from error
        raise
    weakref.finalize(session, _session_ended, holding, pool.device, stream).atexit = False
    model.session = session
    model._holding = holding
    model._mapped_by_session = {
        w.digest: store_path
        for w, store_path in (
            (
                w,
                (model.package.store.prepared_objects if w.derived else model.package.store.objects).path(
                    w.digest
                ),
            )
            for w in prepared.weights
        )
        if not w.injected
    }
    model._private = max(0, pool.stats().active - before.active)
    if pool.device != "cpu":
        model._libraries = before.libraries()
        model._copied = tuple(before.second_copies(prepared))
    model._inputs = [value_of_argument(argument) for argument in model.session.get_inputs()]
    model._outputs = [value_of_argument(argument) for argument in model.session.get_outputs()]
    model._names = [value.name for value in model._outputs]
    weights = {weight.name for weight in model.package.manifest.weights if not weight.overridable}
    optional = model.session.get_overridable_initializers()
    model._optional = [value_of_argument(argument) for argument in optional if argument.name not in weights]
    model._known = {value.name: value for value in (*model._inputs, *model._optional, *model._outputs)}
    model._foreign = any(value.dtype in FOREIGN for value in (*model._inputs, *model._outputs))


def _wanted(model: Model, prepared: Prepared) -> list[Wanted]:
    store = model.package.store
    found = {} if model._maps else hints(model.package, (w.digest for w in prepared.weights))
    wanted = []
    for w in prepared.weights:
        folder = store.prepared_objects if w.derived else store.objects
        hint = found.get(w.digest)
        more = (hint.group, hint.pieces, hint.edges) if hint else ()
        wanted.append(Wanted(w.digest, w.length, w.mapped, folder, *more))
    return wanted


def _session_ended(holding: Holding, device: str, stream: int) -> None:
    holding.close()
    if stream:
        _give_stream_back(_index(device), stream)


_streams: dict[int, list[int]] = {}
"""Streams of sessions that are gone, by GPU, for the next ones: a session may still end while its stream is free."""


def _take_stream(index: int) -> int:
    try:
        return _streams[index].pop()
    except (KeyError, IndexError):
        return cuda.new_stream(index)


def _give_stream_back(index: int, stream: int) -> None:
    _streams.setdefault(index, []).append(stream)


def _names_a_stream(providers: list[Any]) -> bool:
    return any("user_compute_stream" in entry[1] for entry in providers if not isinstance(entry, str))


def _with_stream(providers: list[Any], stream: int) -> list[Any]:
    return [
        (entry[0], {**entry[1], "user_compute_stream": str(stream)})
        if not isinstance(entry, str) and entry[0] == CUDA_PROVIDER
        else entry
        for entry in providers
    ]


class _Before:
    """What the pool and the GPU hold before a session is built, to tell what it takes."""

    def __init__(self, pool: Pool, label: str) -> None:
        self._pool = pool
        self._label = label
        stats = pool.stats()
        self.active = stats.active
        self._reserved = stats.reserved
        self._free = 0 if pool.device == "cpu" else cuda.free_memory(_index(pool.device))
        self._weights = self._own_weights()
        self._known = {held.address for held in self._ranges()} if self._free else set()

    def _ranges(self) -> list[Range]:
        segments = self._pool.snapshot().segments
        return [r for s in segments for r in s.ranges if r.state == "active" and r.tag == "weights"]

    def libraries(self) -> int:
        """Bytes of the GPU that are gone, and not in the pool."""
        gone = self._free - cuda.free_memory(_index(self._pool.device))
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


SECOND_COPIES = 1 << 20
"""Bytes of weights of a session's own that are worth a note."""


def _injected(prepared: Prepared, addresses: Mapping[str, int]) -> list[Initializer]:
    """What `pool.attach` gives to the session in the place of the graph's weights."""
    if not any(weight.injected for weight in prepared.weights):
        return []
    graph = onnx.load_model_from_string(prepared.graph)
    tensors = {item.tensor.name: item.tensor for item in initializers(graph)}
    return [
        Initializer(
            w.name, addresses[w.digest], w.length, tensors[w.name].data_type, tuple(tensors[w.name].dims)
        )
        for w in prepared.weights
        if w.injected
    ]


def check_providers(got: Sequence[str], wanted: Sequence[Any]) -> None:
    """Raise MissingDependencyError where ONNX Runtime leaves the CUDA provider out: it only prints a line and goes on."""
    names = [entry if isinstance(entry, str) else entry[0] for entry in wanted]
    if CUDA_PROVIDER in names and CUDA_PROVIDER not in got:
        raise MissingDependencyError(
            f"ONNX Runtime cannot run on CUDA here: of the providers {', '.join(names)} it took {', '.join(got)}. Install "
            "onnxruntime-gpu and its CUDA libraries with: pip uninstall -y onnxruntime onnxruntime-gpu && pip install "
            "'glake-infer[cuda]' (`glake-infer doctor` says what is missing)."
        )


def _with_session(error: OutOfMemoryError, own: int) -> OutOfMemoryError:
    """The pool's refusal, with a limit that would do for what the session needs beside its weights too."""
    return OutOfMemoryError(
        requested=error.requested,
        active=error.active,
        idle=error.idle,
        reserved=error.reserved,
        limit=error.limit,
        needed_limit=error.needed_limit + own,
        device_free=error.device_free,
        holders=error.holders,
        device_full=error.device_full,
    )


def has_convolutions(graph: bytes) -> bool:
    """Whether a serialized model has convolutions, in a subgraph or a function too."""
    return any("Conv" in node.op_type for node in all_nodes(onnx.load_model_from_string(graph)))


_WRONG_FEEDS = ("Got invalid dimensions for input", "Invalid rank for input", "Unexpected input data type")
"""What says, in the plain RuntimeError of a run with an IOBinding, that the feeds were wrong."""


class session_errors:  # noqa: N801  (reads as a verb phrase: with session_errors(pool, "running", "x"))
    """Turn ONNX Runtime's exceptions into ours; a request that our pool refused becomes the pool's own error.

    No generator: the traceback would be kept by its frames, the traceback keeps the session, and the session its
    weights, for as long as somebody keeps the error.
    """

    def __init__(self, pool: Pool, action: str, model: str) -> None:
        self._pool = pool
        self._what = (action, model)

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del trace
        if kind is None or error is None:
            return
        # A refusal is known by its number: an IOBinding that copies an input to the device raises a MemoryError with it.
        refusal = self._pool.explain(error)
        # A run with an IOBinding raises a plain RuntimeError.
        if refusal is None and kind is not RuntimeError and not kind.__module__.startswith("onnxruntime"):
            return
        error.__traceback__ = None
        if refusal is not None:
            raise refusal from error
        text = str(error).strip()
        wrong_feeds = self._what[0] == "running" and (
            kind.__name__ == "InvalidArgument" or any(hint in text for hint in _WRONG_FEEDS)
        )
        ours = InputError if wrong_feeds else ModelError
        raise ours(f"ONNX Runtime refused while {' '.join(self._what)}: {text}") from error
