"""Load a package's engine into a pool: the checks before, the deserialization, and what runs it afterwards."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from glake_infer.allocators.errors import DriverError, GlakeError, InputError, PackageError
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes
from glake_infer.checking import AlteredObjectError, Checker
from glake_infer.engine_weights import EngineWeights, Loading
from glake_infer.holding import HostCopy
from glake_infer.models.manifest import Engine
from glake_infer.models.offload import Offload, headroom_for, parse_offload
from glake_infer.models.package import Package
from glake_infer.models.status import monitor_if_asked
from glake_infer.models.tensorrt import graphs, holdings, library
from glake_infer.models.tensorrt.contexts import Contexts
from glake_infer.models.tensorrt.engine import EngineModel
from glake_infer.models.tensorrt.execution import Execution
from glake_infer.models.tensorrt.graphs import CudaGraph
from glake_infer.models.tensorrt.interface import Interface
from glake_infer.models.tensorrt.jit_cache import JitCache
from glake_infer.models.tensorrt.library import Kind
from glake_infer.models.tensorrt.packages import kinds_for
from glake_infer.models.tensorrt.plan import Plan
from glake_infer.models.tensorrt.reader import make_reader
from glake_infer.models.tensorrt.runtimes import EngineRuntime
from glake_infer.transfers.device import Progress

_checker = Checker()
"""What this process knows of the files of plans."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine is loaded; see `gi.load`."""

    concurrency: int = 1
    cuda_graph: CudaGraph = "auto"
    host_copy: HostCopy = "store"
    offload: Offload = "none"
    headroom: int | str | None = None
    priority: int = 0
    progress: Progress | None = None
    deferred: bool = False
    """Let TensorRT bring its weights by `load_weights`, and take them away by `unload_weights`, in place of our blocks: they
    are shared with nobody, and come from the store through TensorRT. For comparison; needs TensorRT-RTX 1.7."""

    def __post_init__(self) -> None:
        if not isinstance(self.concurrency, int) or self.concurrency < 1:
            raise InputError(f"concurrency={self.concurrency!r}: expected a number of contexts, 1 or more.")
        if self.cuda_graph not in ("auto", True, False):
            raise InputError(f"cuda_graph={self.cuda_graph!r}: expected 'auto', True or False.")
        if self.host_copy not in ("store", "pinned"):
            raise InputError(f"host_copy={self.host_copy!r}: expected 'store' or 'pinned'.")


def engine_for(package: Package, pool: Pool, asked: str) -> Kind | None:
    """Which engine of a package to run on a pool; None: its graph, with ONNX Runtime.

    `asked`: "auto", "onnxruntime", or the engine's name. "auto" takes an engine where there is one and the pool is on a
    GPU: of two the one for this GPU. Raises InputError where what is asked for is not there, or not for this device.
    """
    if asked == "onnxruntime":
        return None
    engines = package.manifest.engines
    if asked != "auto":
        if asked not in library.KINDS:
            known = ", ".join(map(repr, ("auto", "onnxruntime", *library.KINDS)))
            raise InputError(f"engine={asked!r}: expected one of {known}.")
        if pool.device == "cpu":
            raise InputError(
                f"engine={asked!r} needs a GPU, and the pool is on 'cpu'. Give a pool on 'cuda:0', or engine='onnxruntime'."
            )
        kind = library.check_kind(asked)
        Plan(package, kind)  # raises where there is none
        return kind
    if pool.device == "cpu" or not engines:
        return None
    if len(engines) == 1:
        return next(iter(engines))
    from glake_infer import cuda
    from glake_infer.models.model import gpu_index

    here = ".".join(map(str, cuda.compute_capability(gpu_index(pool.device))))
    fitting = [
        kind for kind, entry in engines.items() if here in entry.capabilities and library.installed(kind)
    ]
    best = kinds_for(here)
    return min(fitting or engines, key=lambda kind: best.index(kind) if kind in best else len(best))


def load_engine(package: Package, pool: Pool, kind: Kind, settings: EngineSettings) -> EngineModel:
    """Deserialize the package's engine of a kind into a pool, and return the model that runs it.

    The plan is read from the store in pieces, and checked meanwhile; its weights go into blocks of the pool, which are
    shared with equal ones of other engines. Raises what `gi.load` does; nothing stays loaded after an error. The caller
    holds `store.using()`.
    """
    monitor_if_asked()
    parse_offload(settings.offload)
    plan = Plan(package, kind)
    entry = plan.entry
    package.check_present({file.digest: file.length for file in plan.files().values()})
    runtime = EngineRuntime.of(pool, kind)
    _check_fit(package, entry, runtime)
    model = EngineModel(package, pool, settings.host_copy, kind)
    model._runtime = runtime
    model._priority = settings.priority
    with pool.label(model._label), runtime.device.current(), runtime.loading:
        model._notes = tuple(_check_validity(package, plan, runtime))
        try:
            _finish(model, plan, *_deserialize(model, plan, settings), settings)
        except BaseException as error:
            model.__dict__.pop("engine", None)
            # They hold the engine, and TensorRT gives its memory back with that.
            traceback.clear_frames(error.__traceback__)
            raise
    return model


def _check_fit(package: Package, entry: Engine, runtime: EngineRuntime) -> None:
    """Raise PackageError for an engine of another version or GPU."""
    again = _again(package, entry, runtime.device.capability)
    else_ = "or load it with engine='onnxruntime'"
    if entry.version != runtime.version:
        raise PackageError(
            f"the {entry.kind} engine of {package.path} was built by version {entry.version}, and {runtime.version} is "
            "installed here: plans go with the very version that built them. Install it (pip install "
            f"{entry.kind}=={entry.version}), {again}, {else_}."
        )
    if runtime.device.capability not in entry.capabilities:
        names = [name for name, capability in library.CARDS.items() if capability in entry.capabilities]
        cards = f" ({', '.join(names)})" if names else ""
        raise PackageError(
            f"the {entry.kind} engine of {package.path} was built for GPUs of compute capability "
            f"{', '.join(entry.capabilities) or 'none'}{cards}, and {runtime.device.title} has "
            f"{runtime.device.capability}. To run it here {again}, {else_}."
        )


def _again(package: Package, entry: Engine, capability: str) -> str:
    """What to convert with for a GPU: TensorRT-RTX builds for the cards that are named, TensorRT for the one at hand."""
    kinds = kinds_for(capability)
    kind = entry.kind if entry.kind in kinds or not kinds else kinds[0]
    where = f"--card {capability}" if kind == "tensorrt-rtx" else "on this machine"
    return f"convert {package.manifest.source.name} again with --engine {kind} {where}"


def _check_validity(package: Package, plan: Plan, runtime: EngineRuntime) -> Iterator[str]:
    """Ask TensorRT whether it takes the plan, by its header; yields notes. Raises PackageError."""
    ask = getattr(runtime.runtime, "get_engine_validity", None)
    if ask is None:
        return
    runtime.take_errors()
    validity, diagnostics = ask(plan.read(0, int(runtime.runtime.engine_header_size)))
    reasons = [
        member.name.lower().replace("_", " ")
        for member in runtime.module.EngineInvalidityDiagnostics.__members__.values()
        if int(diagnostics) & int(member.value)
    ]
    if validity.name == "INVALID" and reasons:  # without a reason the deserialization will tell
        raise runtime.failure(
            f"TensorRT does not take the {plan.entry.kind} engine of {package.path} on {runtime.device.title}: "
            f"{', '.join(reasons)}. Convert {package.manifest.source.name} again with --engine {plan.entry.kind}, or load "
            "it with engine='onnxruntime'",
            PackageError,
        )
    if validity.name == "SUBOPTIMAL":
        yield f"TensorRT runs this engine here, but not at its best: {', '.join(reasons) or 'it gives no reason'}"


def _deserialize(model: EngineModel, plan: Plan, settings: EngineSettings) -> tuple[Any, Loading | None]:
    """The ICudaEngine, and what became of its block of weights."""
    runtime, entry = model._runtime, plan.entry
    weights = EngineWeights.of(model.pool)
    files = list(plan.files().values())
    made: list[Any] = []

    def read(failed: Callable[[], bool]) -> None:
        made.clear()  # the file changed meanwhile
        runtime.take_errors()
        made.append(_read_plan(model, plan, failed, settings.progress))

    loading = None
    with _altered(model):
        if settings.deferred or entry.streaming:
            if settings.deferred and not hasattr(runtime.runtime, "defer_weights_loading"):
                raise InputError(
                    f"{entry.kind} {runtime.version} cannot load weights later. Leave `deferred` out."
                )
            if settings.deferred:
                runtime.runtime.defer_weights_loading = True
            try:
                _checker.beside(files, read)
            finally:
                if settings.deferred:
                    runtime.runtime.defer_weights_loading = False
        else:
            with weights.loading(
                runtime.allocator,
                user=model._number,
                plan_bytes=entry.bytes,
                stretches=plan.stretches(),
                evictable=False,
                priority=settings.priority,
                host_copy=settings.host_copy,
            ) as loading:
                _checker.beside(files, read)
    return made.pop(), loading


def _read_plan(model: EngineModel, plan: Plan, failed: Callable[[], bool], progress: Progress | None) -> Any:
    """Deserialize once. Raises OutOfMemoryError, PackageError, or what reading the plan, or `progress`, does."""
    runtime, entry = model._runtime, plan.entry
    reader = None
    with runtime.allocator.tagged("weights"):
        if hasattr(runtime.module, "IStreamReaderV2"):
            try:
                reader = make_reader(runtime.module, plan, entry.bytes, lambda: not failed(), progress)
            except RuntimeError as error:
                raise DriverError(
                    f"{entry.kind} {runtime.version} cannot read a plan here: {error}. It needs NVIDIA's driver; "
                    "`glake-infer doctor` says what this machine has."
                ) from error
            engine = runtime.runtime.deserialize_cuda_engine(reader)
        else:
            engine = runtime.runtime.deserialize_cuda_engine(plan.to_bytes())
    if reader is not None and reader.error is not None:
        raise reader.error
    if engine is None:
        raise runtime.failure(
            f"the {entry.kind} engine of {model.package.path} could not be loaded on {runtime.device.title}. Convert "
            f"{model.package.manifest.source.name} again with --engine {entry.kind}, or load it with engine='onnxruntime'",
            PackageError,
        )
    if progress is not None:
        progress(entry.bytes, entry.bytes)
    return engine


def _finish(
    model: EngineModel, plan: Plan, engine: Any, loading: Loading | None, settings: EngineSettings
) -> None:
    """Make what runs the engine, and what holds its weights."""
    runtime, entry, pool = model._runtime, plan.entry, model.pool
    interface = Interface(runtime.module, engine, entry.inputs, entry.outputs)
    jit = None
    if hasattr(runtime.module, "IRuntimeCache"):
        jit = JitCache(model.package.store, entry.digest, runtime.version, runtime.device.title)
    contexts = Contexts(runtime, engine, pool, settings.concurrency, jit)
    streamable = int(getattr(engine, "streamable_weights_size", 0))
    holding: Any = loading.holding if loading is not None else None
    streaming = False
    if loading is not None:
        model.report = loading.report
    if streamable and not settings.deferred:
        budget = _budget(engine, pool, settings)
        with runtime.allocator.tagged("weights"):
            runtime.take_errors()
            _set_budget(runtime, engine, budget)
        streaming = budget < streamable
        holding = holdings.streamed(engine, budget, lambda: contexts.sleep(everything=True))
    elif settings.offload != "none":
        model._notes += (
            f"offload={settings.offload!r} changes nothing: the engine was built without weight streaming. Convert the "
            "model again with --streaming",
        )
    if settings.deferred:
        bring = _bringer(model, plan, engine)
        bring()
        holding = holdings.deferred(entry.weights_bytes, bring, engine)
    elif holding is None:  # an engine without weights
        holding = holdings.OwnWeights(0, lambda: None, lambda: None)
    why_not = graphs.wanted(settings.cuda_graph, interface, engine, runtime.device, streaming=streaming)
    if why_not and settings.cuda_graph is True:
        model._notes += (f"cuda_graph=True changes nothing: {why_not}",)
    model.engine = engine
    model._contexts, model._jit = contexts, jit
    model._execution = Execution(contexts, interface, pool, streaming=streaming, graphs=not why_not)
    model._describe([t.value for t in interface.inputs], [t.value for t in interface.outputs])
    model._notes += tuple(_sharing_notes(model))
    model._holding = holding
    model._set_policy()


def _sharing_notes(model: EngineModel) -> Iterator[str]:
    report = model.report
    if report is None:
        return
    if report.shared_bytes:
        yield (
            f"{format_bytes(report.shared_bytes)} of {format_bytes(report.block_bytes)} of weights are those of other "
            "engines"
        )
    if report.lost_bytes:
        yield (
            f"{format_bytes(report.lost_bytes)} of weights are equal to other engines' and in memory of their own all the "
            "same: they lie elsewhere in their granules"
        )
    if not report.source_known:
        yield "a part of the weights was not found in the plan, and stays in memory when the model is suspended"


def _budget(engine: Any, pool: Pool, settings: EngineSettings) -> int:
    """Bytes of streamable weights that are to be on the device."""
    size = int(engine.streamable_weights_size)
    offload = parse_offload(settings.offload)
    if offload == "none":
        return size
    if offload == "auto":
        stats = pool.stats()
        room = stats.limit - stats.active - headroom_for(pool.limit, settings.headroom)
        return max(0, min(size, room, int(engine.get_weight_streaming_automatic_budget())))
    return max(0, size - offload)


def _set_budget(runtime: EngineRuntime, engine: Any, budget: int) -> None:
    try:
        holdings.set_budget(engine, budget)
    except GlakeError as error:
        refusal = runtime.allocator.take_error()
        raise refusal or error from error


def _bringer(model: EngineModel, plan: Plan, engine: Any) -> Callable[[], None]:
    """What brings the weights of a deferred engine."""
    runtime = model._runtime

    def bring() -> None:
        with runtime.device.current(), model.pool.label(model._label), runtime.allocator.tagged("weights"):
            runtime.take_errors()
            if hasattr(engine, "load_weights_async"):
                stream = runtime.device.take_stream()
                try:
                    reader = make_reader(runtime.module, plan, plan.entry.bytes)
                    done = engine.load_weights_async(reader, stream)
                    runtime.device.synchronize(stream)
                finally:
                    runtime.device.give_stream_back(stream)
                if reader.error is not None:
                    raise reader.error
            else:
                done = engine.load_weights(plan.to_bytes())
            if not done:
                raise runtime.failure(f"the weights of {model.name} could not be loaded")

    return bring


@contextlib.contextmanager
def _altered(model: EngineModel) -> Iterator[None]:
    """Say whom an object hurts that was changed."""
    try:
        yield
    except AlteredObjectError as error:
        if not error.unreadable:
            raise model.package.damaged(error.digest) from error
        raise model.package.unusable(error.digest, "unreadable") from error
