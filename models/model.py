"""Load a package into a pool and run it."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx

from glake_infer.allocators.attach import Initializer, import_onnxruntime
from glake_infer.allocators.errors import (
    DigestMismatchError,
    GlakeError,
    InputError,
    ModelError,
    OutOfMemoryError,
    StoreError,
)
from glake_infer.allocators.pool import Pool
from glake_infer.models.graph import initializers, is_external
from glake_infer.models.manifest import Value
from glake_infer.models.package import Package
from glake_infer.models.prepare import Prepared, PreparedWeight, forget, padded, prepare
from glake_infer.models.values import FOREIGN, check_feeds, from_ort_value, to_ort_value, value_of_argument
from glake_infer.residency import AlteredObjectError, Residency, Wanted
from glake_infer.store import Store

if TYPE_CHECKING:
    import onnxruntime as ort

Sharing = Literal["fast", "lean"]
Optimization = Literal["all", "extended", "basic", "disable"]

SESSION_BYTES = 1 << 20
"""What a session takes from the pool for small weights and slabs when it is built, beside the graph's own bytes."""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class ModelMemory:
    """Where a model's weights are, in bytes. Other models may hold what is shared."""

    shared: int
    """Weights that another loaded model uses too, held once for all of them."""
    own: int
    """Weights that only this model uses, mapped from the store."""
    private: int
    """Copies that the session made for itself in the pool (small weights, and what could not be shared)."""


class Model:
    """A loaded package: an ONNX Runtime session whose weights are shared and whose memory is the pool's.

    `run` may be called from several threads at once. Use as a context manager, or call `close()`.
    """

    name: str
    """The package's folder name without `.glake`."""
    session: ort.InferenceSession
    """The session. Whoever keeps a reference beyond `close()` keeps the weights mapped."""

    def __init__(self, package: Package, pool: Pool, sharing: Sharing) -> None:
        """Use `load`; this only makes the empty shell."""
        self.package = package
        self.pool = pool
        self.sharing = sharing
        self.notes: tuple[str, ...] = ()
        self.name = package.name
        self._number = next(_numbers)
        self._residency = Residency.of(pool)
        self._held: tuple[str, ...] = ()
        self._private = 0
        self._running = 0
        self._closed = False
        self._condition = threading.Condition()

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
    def memory(self) -> ModelMemory:
        """Where this model's weights are now."""
        users = self._residency.users()
        shared = own = 0
        for size, models in (users[digest] for digest in self._held if digest in users):
            if len(models) > 1:
                shared += size
            else:
                own += size
        return ModelMemory(shared, own, self._private)

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run the model on `feeds` (name -> array) and return name -> array, in the order of `outputs`.

        The arrays are yours: they hold none of the pool's memory and outlive the model.
        Raises InputError (a wrong name, dtype or shape), OutOfMemoryError (the pool's limit; the model stays
        usable), ModelError (ONNX Runtime failed inside the model), or GlakeError after `close()`.
        """
        names = self._names if outputs is None else list(outputs)
        if unknown := set(names).difference(self._names):
            raise InputError(
                f"the model has no output {sorted(unknown)[0]!r}; its outputs are {', '.join(map(str, self._outputs))}."
            )
        checked = check_feeds(self._inputs, self._optional, feeds)
        self._begin()
        try:
            with session_errors(self.pool, "running", self.name):
                results = (
                    self._run_foreign(names, checked) if self._foreign else self.session.run(names, checked)
                )
        finally:
            self._end()
        # ONNX Runtime's arrays lie in the pool: they would count against its limit for as long as they live.
        return {name: _own(result) for name, result in zip(names, results, strict=True)}

    def _run_foreign(self, names: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run with OrtValues: ONNX Runtime's plain run knows numpy's own types alone, not bfloat16 or float8."""
        known = {value.name: value for value in (*self._inputs, *self._optional, *self._outputs)}
        values = {name: to_ort_value(known[name], array) for name, array in feeds.items()}
        results = self.session.run_with_ort_values(names, values)
        return [from_ort_value(known[name], result) for name, result in zip(names, results, strict=True)]

    def close(self) -> None:
        """Wait for runs in flight, end the session and give its weights and memory back. Closing twice is fine."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.wait_for(lambda: not self._running)
        del self.session  # its finalizer gives the weights back, once nobody else holds the session either

    def _begin(self) -> None:
        with self._condition:
            if self._closed:
                raise GlakeError(
                    f"the model {self.name} is closed. Load it again with gi.load({str(self.package.path)!r}, pool)."
                )
            self._running += 1

    def _end(self) -> None:
        with self._condition:
            self._running -= 1
            if self._closed:
                self._condition.notify_all()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else ", ".join(str(value) for value in self._inputs)
        return f"<Model {self.name} ({state})>"

    # Filled by load.
    _names: list[str]
    _foreign: bool
    _inputs: list[Value]
    _outputs: list[Value]
    _optional: list[Value]


def load(
    path: str | os.PathLike[str],
    pool: Pool | None = None,
    *,
    sharing: Sharing = "fast",
    optimization: Optimization = "all",
    threads: int | None = None,
    configure: Callable[[ort.SessionOptions], None] | None = None,
    store: Store | None = None,
) -> Model:
    """Load the package at `path` into `pool` (by default the process's CPU pool) and return a Model.

    sharing
        "fast": weights as ONNX Runtime computes with them (fused, folded, prepacked), derived once per machine
        and then mapped by every session of every process. "lean": weights as they are in the store, nothing
        derived that would be larger; int8 and fp16 models stay small, and runs are slower.
    optimization
        ONNX Runtime's graph optimization level.
    threads
        Threads inside one run (intra-op); ONNX Runtime's default is one per core.
    configure
        Called with the session's fresh SessionOptions before ours are set, for anything else (logging, profiling,
        spinning, free dimensions). The prepared graph is the same for everybody: what decides how a graph is
        optimized is `optimization` alone.

    The first load on a machine prepares the model (optimizing it once, some seconds for large models); later
    ones, in any process, map the result. Raises PackageError, DigestMismatchError (naming every package that
    a changed object hurts), OutOfMemoryError (saying what limit would do), MissingDependencyError; nothing
    stays loaded after an error.
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

    def options() -> ort.SessionOptions:
        made: ort.SessionOptions = runtime.SessionOptions()
        if threads is not None:
            made.intra_op_num_threads = threads
        made.graph_optimization_level = levels[optimization]
        if sharing == "lean":
            # A weight is cast right before its use, not all of them at the start (34 -> 6 MiB on an int8 MiniLM).
            made.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
            made.log_severity_level = 3  # ORT warns of each weight that the lean variant made overridable
        return made

    store = store or Store()
    with store.using():
        package = Package(Path(path), store)
        pool = pool or Pool.current("cpu") or Pool(device="cpu")
        model = Model(package, pool, sharing)
        package.check_present()
        variant = "cpu-lean" if sharing == "lean" and "cpu-lean" in package.manifest.variants else "onnx"
        for attempt in itertools.count():
            prepared = _prepared(model, variant, optimization, options)
            try:
                made = options()
                if configure:
                    configure(made)
                _build_session(model, prepared, made)
            except AlteredObjectError as error:
                if attempt < 2 and forget(package, error.digest):
                    continue  # a derived object: made again from the stored weights
                if error.digest in package.manifest.distinct:
                    raise package.damaged(error.digest) from error
                raise StoreError(
                    f"{error} It was derived on this machine and is damaged again and again. Check the disk of {store.root}."
                ) from error
            return model
    raise AssertionError("unreachable")


def _prepared(
    model: Model, variant: str, optimization: str, options: Callable[[], ort.SessionOptions]
) -> Prepared:
    """The prepared graph; where this machine cannot keep one, the package's own with the weights as they are."""
    package = model.package
    try:
        with session_errors(model.pool, "preparing", model.name):
            return prepare(
                package, variant, prepack=model.sharing == "fast", level=optimization, session_options=options
            )
    except DigestMismatchError:
        raise
    except (ModelError, StoreError) as error:
        # A full or read-only disk, or a graph that ORT cannot save (sparse).
        model.notes = (
            *model.notes,
            f"not prepared, so ONNX Runtime keeps private copies of what it derives: {error}",
        )
    graph = package.graph(variant)
    digests = {weight.name: weight for weight in package.manifest.weights}
    weights = tuple(
        PreparedWeight(w.name, w.digest, w.bytes, w.bytes, derived=False, injected=True)
        for w in (digests[item.tensor.name] for item in initializers(graph) if is_external(item.tensor))
    )
    return Prepared(graph.SerializeToString(), weights, optimized=False)


def _own(result: Any) -> Any:
    """A copy outside the pool of an array, or of the arrays in a sequence or map."""
    if isinstance(result, np.ndarray):
        return result.copy()
    if isinstance(result, list):
        return [_own(part) for part in result]
    if isinstance(result, dict):
        return {key: _own(part) for key, part in result.items()}
    return result


def _build_session(model: Model, prepared: Prepared, options: ort.SessionOptions) -> None:
    runtime = import_onnxruntime()
    store = model.package.store
    wanted = [
        Wanted(w.digest, w.length, w.mapped, store.prepared_objects if w.derived else store.objects)
        for w in prepared.weights
    ]
    pool, residency, number = model.pool, model._residency, model._number
    check_limit(pool, residency, wanted, len(prepared.graph) + SESSION_BYTES)
    addresses = residency.acquire(pool, wanted, number)
    give_back = functools.partial(residency.release, pool, tuple(addresses), number)
    try:
        graph = onnx.load_model_from_string(prepared.graph)
        tensors = {item.tensor.name: item.tensor for item in initializers(graph)}
        injected = [
            Initializer(
                w.name, addresses[w.digest], w.length, tensors[w.name].data_type, tuple(tensors[w.name].dims)
            )
            for w in prepared.weights
            if w.injected
        ]
        if prepared.optimized:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(store.root)
        )
        options.add_session_config_entry(
            "session.disable_prepacking", "1" if model.sharing == "lean" else "0"
        )
        before = pool.stats().active
        with session_errors(pool, "loading", model.name):
            values = pool.attach(options, injected)
            model.session = runtime.InferenceSession(prepared.graph, options, providers=pool.providers)
            values.close()
    except BaseException:
        give_back()
        raise
    weakref.finalize(model.session, give_back).atexit = False
    model._held = tuple(addresses)
    model._private = max(0, pool.stats().active - before)
    model._inputs = [value_of_argument(argument) for argument in model.session.get_inputs()]
    model._outputs = [value_of_argument(argument) for argument in model.session.get_outputs()]
    model._names = [value.name for value in model._outputs]
    weights = {weight.name for weight in model.package.manifest.weights if not weight.overridable}
    optional = model.session.get_overridable_initializers()
    model._optional = [value_of_argument(argument) for argument in optional if argument.name not in weights]
    model._foreign = any(value.dtype in FOREIGN for value in (*model._inputs, *model._outputs))


def check_limit(pool: Pool, residency: Residency, wanted: Sequence[Wanted], own: int) -> None:
    """Raise OutOfMemoryError, saying how much would do, before anything is mapped that cannot all fit.

    `own` is what the session needs beside its weights while it is built.
    """
    resident = residency.users()
    sizes = {w.digest: padded(w.mapped) for w in wanted if w.digest not in resident}
    missing = sum(sizes.values()) + own
    stats = pool.stats()
    if stats.active + missing > stats.limit:
        raise OutOfMemoryError(
            requested=missing,
            active=stats.active,
            idle=stats.idle,
            reserved=stats.reserved,
            limit=stats.limit,
            needed_limit=stats.active + missing,
            device_free=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
            holders={"weights": stats.weights, "activations": stats.active - stats.weights},
        )


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
        if kind is None or error is None or not kind.__module__.startswith("onnxruntime"):
            return
        error.__traceback__ = None
        text = str(error).strip()
        if refusal := self._pool.explain(error):
            raise refusal from error
        wrong_feeds = self._what[0] == "running" and kind.__name__ == "InvalidArgument"
        ours = InputError if wrong_feeds else ModelError
        raise ours(f"ONNX Runtime refused while {' '.join(self._what)}: {text}") from error
