"""Load a package into a pool: a session over weights that are shared, with the options that go with the pool."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx

from glake_infer import cuda
from glake_infer.allocators.attach import Initializer, import_onnxruntime
from glake_infer.allocators.devices import parse_device
from glake_infer.allocators.errors import (
    DigestMismatchError,
    InputError,
    MissingDependencyError,
    ModelError,
    OutOfMemoryError,
    StoreError,
)
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes
from glake_infer.checking import AlteredObjectError
from glake_infer.holding import Holding, HostCopy
from glake_infer.mapped_files import Span, mappings_of
from glake_infer.models.graph import all_nodes, initializers, is_external
from glake_infer.models.kin import hints
from glake_infer.models.model import Model, Sharing, gpu_index
from glake_infer.models.offload import (
    TABLE,
    Choice,
    Offload,
    choose,
    headroom_for,
    parse_offload,
    placed_on_host,
    reads_of,
    refuse_with_broker,
)
from glake_infer.models.overlap import weights_may_come_later
from glake_infer.models.package import Package
from glake_infer.models.prepare import Prepared, PreparedWeight, forget, prepare
from glake_infer.models.session import guarded_session, session_errors
from glake_infer.models.session_memory import Before
from glake_infer.models.session_model import SessionModel
from glake_infer.models.status import monitor_if_asked
from glake_infer.models.streams import give_stream_back, take_stream
from glake_infer.models.tensorrt.graphs import CudaGraph
from glake_infer.models.tensorrt.library import Kind
from glake_infer.models.tensorrt.load import EngineSettings, engine_for, load_engine
from glake_infer.models.values import FOREIGN, value_of_argument
from glake_infer.pool import Pool as BrokeredPool
from glake_infer.residency import Wanted
from glake_infer.store import Store
from glake_infer.transfers import timeline
from glake_infer.transfers.device import Progress

if TYPE_CHECKING:
    import onnxruntime as ort

Optimization = Literal["all", "extended", "basic", "disable"]
Streams = Literal["one", "per run"]
EngineChoice = Literal["auto", "onnxruntime"] | Kind

CUDA_PROVIDER = "CUDAExecutionProvider"

_mapping = threading.Lock()
"""Held while a session that maps files by itself is built, so that it is known which mappings are its own."""

SESSION_BYTES = 1 << 20
"""What a session takes from the pool for small weights and slabs when it is built, beside the graph's own bytes."""


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
    streams: Streams = "per run",
    offload: Offload = "none",
    headroom: int | str | None = None,
    priority: int = 0,
    progress: Progress | None = None,
    engine: EngineChoice = "auto",
    concurrency: int = 1,
    cuda_graph: CudaGraph = "auto",
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
        Threads inside one run (intra-op); ONNX Runtime's default is one per core. On CUDA they sleep when they have no
        work, rather than spin as by default, unless `configure` sets `session.intra_op.allow_spinning`.
    configure
        Called with the session's fresh SessionOptions before ours are set, for anything else (logging, profiling,
        spinning, free dimensions). The prepared graph is the same for everybody: what decides how a graph is
        optimized is `optimization` alone.
    provider_options
        Options of the CUDA provider, beside those of `pool.providers`. For results that repeat, and compare
        with other sessions' bit for bit: `{"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}`. What decides
        where memory comes from (`device_id`, `gpu_mem_limit`, `gpu_external_alloc`...) is the pool's matter.
    streams
        On CUDA. "per run": runs that go on at the same time have streams of their own, as in plain ONNX Runtime. "one":
        all runs of the model are queued on one stream, which saves a cuBLAS handle (42 MiB on an H200): for many
        models that are seldom run by several threads at once. `user_compute_stream` in provider_options names one too.
    host_copy
        On CUDA, what `Model.resume` brings weights back from: "store" reads the store's files again (page cache or
        disk), and costs nothing; "pinned" keeps a page-locked copy, which takes as much memory of the host, 0.1 s for a
        GiB to make at the load, and is as fast as the links. `configure_transfers(host_cache=...)` bounds all copies
        together: then the models that came last have theirs. On the CPU both are the store's files.
    offload
        On a GPU, which weights stay in page-locked memory of the host, from where each run that needs them reads them over
        the link: 55 GB/s at PCIe 5, a fraction of the GPU's own memory. "none"; "auto": what does not fit beside the
        headroom, below the limit and in what the GPU has free, when all is given back that may be evicted; an amount
        (bytes, or "6GiB"): at least that much. Tables of which nodes look up rows go first, then weights that only bodies of
        If and Loop use, then others from the end of the graph. A weight that another model has stays where it is. The
        choice is made at the load and kept; `memory.offloaded` and `notes` tell it. Not with a broker. On the CPU it
        changes nothing: weights are the store's files, mapped.
    headroom
        What "auto" leaves free for activations: bytes, or text such as "1GiB". None: 256 MiB, or 5 % of the limit if that
        is more.
    priority
        Of loads that go on at the same time, those of higher priority have the links first. It becomes `Model.priority`.
    progress
        Called with the bytes of weights that are on the GPU, and all that have to go there; in any thread. For an engine:
        with the bytes of its plan that were read, and all. What it raises ends the load.
    engine
        "auto": on a GPU the package's TensorRT engine, where it has one (`gi.convert(..., engine=)`), else its graph with
        ONNX Runtime, as on the CPU; "onnxruntime": the graph; "tensorrt-rtx" or "tensorrt": that engine. An engine that
        was built for another GPU, or by another version, is an error. For engines `offload` is about weights that
        TensorRT streams while it runs (`--streaming` at conversion); what is ONNX Runtime's matter (`sharing`,
        `optimization`, `threads`, `configure`, `provider_options`, `streams`) is not used.
    concurrency
        Of an engine: how many runs may go on at the same time; others wait. Each has a context and a stream, and leases
        scratch memory from the pool while it runs.
    cuda_graph
        Of an engine: whether runs of equal shapes are captured into a CUDA graph, from the second one on. "auto": where
        it needs at most 64 MiB of scratch memory, which a graph keeps, as it does inputs and outputs, until the model is
        suspended.

    The first load on a machine for the CPU prepares the model (optimizing it once, some seconds for large
    models); later ones, in any process, map the result. On CUDA every weight's bytes are checked and copied to the
    GPU, unless another model has it there. Raises InputError (a wrong argument, or offload with a broker), PackageError,
    DigestMismatchError (naming every package that a changed object hurts), OutOfMemoryError (saying what limit would do,
    and offload="auto" if that would), DriverError (the GPU failed; or, offloading, the host has no memory left, or the GPU
    cannot map it), MissingDependencyError (no ONNX Runtime, none for CUDA, or no TensorRT for the engine); nothing stays
    loaded after an error.
    """
    settings = EngineSettings(
        concurrency=concurrency, cuda_graph=cuda_graph, host_copy=host_copy, offload=offload, headroom=headroom,
        priority=priority, progress=progress,
    )  # fmt: skip
    store = store or Store()
    on = pool.device if pool is not None else parse_device(device or "cpu")
    if engine != "onnxruntime" and (engine, on) != ("auto", "cpu"):
        place = _pool_for(pool, device)
        with store.using():
            found = Package(Path(path), store)
            if (kind := engine_for(found, place, engine)) is not None:
                return load_engine(found, place, kind, settings)
    runtime = import_onnxruntime()
    monitor_if_asked()
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

    if streams not in ("one", "per run"):
        raise InputError(f"streams={streams!r}: expected 'one' or 'per run'.")
    parsed = parse_offload(offload)
    place = _pool_for(pool, device)
    providers = providers_of(place, provider_options)
    if place.device != "cpu":
        lower_workspaces(gpu_index(place.device))

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

    with store.using():
        package = Package(Path(path), store)
        model = SessionModel(package, place, sharing, host_copy, maps=maps_weights(place))
        model._offload, model._headroom = parsed, headroom_for(place.limit, headroom)
        model._priority = priority
        package.check_present(package.manifest.distinct_of_graphs)
        variant = _variant(package, place, sharing)
        for attempt in itertools.count():
            prepared = _prepared(model, variant, optimization, options)

            def make_session(owner: SessionModel, prepared: Prepared = prepared) -> None:
                made = options()
                if configure:
                    configure(made)
                with place.label(owner._label):
                    _build_session(owner, prepared, made, providers, streams, progress)

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
    model: SessionModel, variant: str, optimization: str, options: Callable[[], ort.SessionOptions]
) -> Prepared:
    """The prepared graph; where this machine cannot keep one, and on a GPU, the package's own."""
    package = model.package
    if not model._maps:
        if model.sharing == "lean" and variant != "cpu-lean":
            model._notes = (
                *model._notes,
                "sharing='lean' is the same as 'fast' here: nothing would be widened",
            )
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


def builds_early(pool: Pool, prepared: Prepared, providers: list[Any]) -> bool:
    """Whether a session on this pool is built while its weights are on their way."""
    return pool.device != "cpu" and weights_may_come_later(prepared.graph, providers)


def maps_weights(pool: Pool) -> bool:
    """Whether a session on this pool uses the store's files where they are mapped; else weights are copied to it."""
    return pool.device == "cpu"


def _pool_for(pool: Pool | None, device: str | None) -> Pool:
    if pool is None:
        return Pool.current(device or "cpu") or BrokeredPool(device=device or "cpu")
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


def _build_session(
    model: SessionModel,
    prepared: Prepared,
    options: ort.SessionOptions,
    providers: list[Any],
    streams: Streams,
    progress: Progress | None,
) -> None:
    runtime = import_onnxruntime()
    check_providers(runtime.get_available_providers(), providers)
    pool, residency, number = model.pool, model._residency, model._number
    wanted = _offloaded(model, prepared, _wanted(model, prepared))
    own = len(prepared.graph) + SESSION_BYTES
    holding = residency.hold(
        wanted,
        number,
        evictable=model._evictable,
        priority=model._priority,
        host_copy=model.host_copy,
    )
    holding.progress = progress
    stream = 0
    later = builds_early(pool, prepared, providers)
    try:
        with holding.arriving() if later else holding, timeline.span("session", f"build {model.name}"):
            if prepared.optimized:
                options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(model.package.store.root)
            )
            if pool.device != "cpu":
                _stop_spinning(options)
            lean = model.sharing == "lean" and model._maps
            options.add_session_config_entry("session.disable_prepacking", "1" if lean or later else "0")
            model._captures = captures_graphs(providers)
            own_stream = streams == "one" and not model._captures and not _names_a_stream(providers)
            if pool.device != "cpu" and own_stream:
                stream = take_stream(gpu_index(pool.device))
                providers = _with_stream(providers, stream)
            before = Before(pool, model._label)
            objects = model.package.store.prepared_objects
            paths = [objects.path(w.digest) for w in prepared.weights if not w.injected]
            mapped: set[Span] = set()
            with session_errors(pool, "loading", model.name), _mapping if paths else contextlib.nullcontext():
                there = mappings_of(paths)
                values = pool.attach(
                    options, _injected(prepared, holding.addresses), cuda_graph=model._captures
                )
                try:
                    session = guarded_session(holding)(
                        prepared.graph, options, providers=providers, enable_fallback=0
                    )
                finally:
                    values.close()
                mapped = mappings_of(paths) - there
            check_providers(session.get_providers(), providers)
    except BaseException as error:
        session = None
        holding.close()
        if stream:
            give_stream_back(gpu_index(pool.device), stream)
        if isinstance(error, OutOfMemoryError) and not error.refusal:  # a broker's figures are not the pool's
            raise _with_session(error, own, _hint(model, prepared, wanted)) from error
        raise
    weakref.finalize(session, _session_ended, holding, pool.device, stream).atexit = False
    model.session = session
    model._holding = holding
    model._mapped_by_session = frozenset(mapped)
    model._private = max(0, pool.stats().active - before.active)
    model._lookups = _lookups(model, prepared, wanted)
    if pool.device != "cpu":
        model._libraries = before.libraries()
        model._copied = tuple(before.second_copies(prepared))
    weights = {weight.name for weight in model.package.manifest.weights if not weight.overridable}
    optional = model.session.get_overridable_initializers()
    model._describe(
        [value_of_argument(argument) for argument in session.get_inputs()],
        [value_of_argument(argument) for argument in session.get_outputs()],
        [value_of_argument(argument) for argument in optional if argument.name not in weights],
    )
    model._foreign = any(value.dtype in FOREIGN for value in (*model._inputs, *model._outputs))


def _wanted(model: SessionModel, prepared: Prepared) -> list[Wanted]:
    store = model.package.store
    shares = model._residency.share is not None
    found = hints(model.package, (w.digest for w in prepared.weights)) if shares or not model._maps else {}
    wanted = []
    for w in prepared.weights:
        folder = store.prepared_objects if w.derived else store.objects
        hint = found.get(w.digest)
        by_file = model._maps and not (shares and w.injected)
        item = Wanted(w.digest, w.length, w.mapped, folder, by_file=by_file)
        if hint:
            item = replace(item, group=hint.group, pieces=hint.pieces, edges=hint.edges)
        wanted.append(item)
    return wanted


def _offloaded(model: SessionModel, prepared: Prepared, wanted: list[Wanted]) -> list[Wanted]:
    """The weights, on the host those that go there; decided once per model. Raises InputError with a broker."""
    if model._on_host is None:
        model._on_host = frozenset()
        if model._offload != "none" and model._residency.share:
            needed, room = model._residency.room(wanted)
            if model._offload != "auto":
                raise refuse_with_broker(model.pool, model._offload)
            if (short := needed + model._headroom - room) > 0:
                raise refuse_with_broker(model.pool, model._offload, short)
        elif model._offload != "none" and model._maps:
            model._notes = (
                *model._notes,
                f"offload={model._offload!r} changes nothing on the CPU: weights are the store's files, mapped",
            )
        elif model._offload != "none":
            model._on_host = _choose(model, prepared, wanted, model._offload).on_host
    return placed_on_host(wanted, model._on_host)


def _choose(
    model: SessionModel, prepared: Prepared, wanted: list[Wanted], offload: Literal["auto"] | int
) -> Choice:
    names: dict[str, list[str]] = {}
    for weight in prepared.weights:
        names.setdefault(weight.digest, []).append(weight.name)
    reads = reads_of(onnx.load_model_from_string(prepared.graph))
    return choose(model._residency, wanted, names, reads, offload, model._headroom)


def _hint(model: SessionModel, prepared: Prepared, wanted: list[Wanted]) -> str:
    """What to say of offload="auto" where a load without it found no room: if it would do."""
    residency = model._residency
    if model._offload != "none" or model._maps or residency.share or not residency.offloads:
        return ""
    choice = _choose(model, prepared, wanted, "auto")
    if not choice.fits or not choice.on_host:
        return ""
    size = sum({w.digest: w.mapped for w in wanted if w.digest in choice.on_host}.values())
    far = f"keeps {format_bytes(size)} of its weights in host memory"
    return f"Or load it with offload='auto', which {far}: runs are slower."


def _lookups(model: SessionModel, prepared: Prepared, wanted: list[Wanted]) -> int:
    """Bytes on the host of tables, of which a run reads some rows."""
    there = model._residency.placed(item.digest for item in wanted)
    if not any(there.values()):
        return 0
    reads = reads_of(onnx.load_model_from_string(prepared.graph))
    tables = {w.digest for w in prepared.weights} - {
        w.digest for w in prepared.weights if reads[w.name].rank != TABLE
    }
    return sum({w.digest: w.mapped for w in wanted if there.get(w.digest) and w.digest in tables}.values())


def _session_ended(holding: Holding, device: str, stream: int) -> None:
    holding.close(wait=False)
    if stream:
        give_stream_back(gpu_index(device), stream)


def lower_workspaces(index: int) -> None:
    """Halve what each cuBLAS handle takes for its workspace on a Hopper GPU: $CUBLAS_WORKSPACE_CONFIG, where it is not set.

    Each session has a handle, and each further thread that runs it at the same time. On an H200 the default takes 72 MiB,
    one workspace of 32 MiB takes 40, and is as fast (docs/gpu.md); smaller ones are slower. Other GPUs have small ones.
    cuBLAS reads the variable when a handle is made.
    """
    if WORKSPACE not in os.environ and cuda.compute_capability(index)[0] == 9:
        os.environ[WORKSPACE] = ":32768:1"


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def _names_a_stream(providers: list[Any]) -> bool:
    return any("user_compute_stream" in entry[1] for entry in providers if not isinstance(entry, str))


def _with_stream(providers: list[Any], stream: int) -> list[Any]:
    return [
        (entry[0], {**entry[1], "user_compute_stream": str(stream)})
        if not isinstance(entry, str) and entry[0] == CUDA_PROVIDER
        else entry
        for entry in providers
    ]


def _stop_spinning(options: ort.SessionOptions) -> None:
    """Let a session's threads for nodes on the CPU sleep when they have no work, unless `configure` has said otherwise.

    A new session's spin, one on every core, for 20 ms or so: meanwhile its weights would come at a fifth of the rate.
    """
    for name in ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning"):
        try:
            options.get_session_config_entry(name)
        except Exception:  # ONNX Runtime's way to say that there is none
            options.add_session_config_entry(name, "0")


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


def _with_session(error: OutOfMemoryError, own: int, hint: str = "") -> OutOfMemoryError:
    """The pool's refusal, with a limit that would do for what the session needs beside its weights too, and a hint."""
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
        hint=hint,
    )


def has_convolutions(graph: bytes) -> bool:
    """Whether a serialized model has convolutions, in a subgraph or a function too."""
    return any("Conv" in node.op_type for node in all_nodes(onnx.load_model_from_string(graph)))
