"""From an ONNX model to a TensorRT plan: parsed, its unsupported operators named, and built."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import NodeProto, load_model_from_string

from glake_infer.allocators.errors import (
    DeviceNotFoundError,
    GlakeError,
    InputError,
    ModelError,
    OutOfMemoryError,
)
from glake_infer.allocators.sizes import format_bytes
from glake_infer.digest import Buffer, digest_of
from glake_infer.models.manifest import Shapes, Value
from glake_infer.models.progress import Progress
from glake_infer.models.tensorrt import library
from glake_infer.models.tensorrt.library import CARDS, Kind
from glake_infer.models.tensorrt.options import EngineOptions, complete_profiles
from glake_infer.store import Store, storage_errors, write_file

CACHES = "tensorrt"
"""Folder of the store's root for what TensorRT keeps on this machine; gc leaves it alone, and it may be deleted."""

MOST_REASONS = 12
"""Operators that an error names."""

MOST_NODES = 3
"""Nodes of an operator that it names."""

OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|insufficient memory|bad_alloc|cudaErrorMemoryAllocation", re.I
)

WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")

WORKSPACE = re.compile(r"workspace", re.I)

NOT_MAPPED = "Failed to map file"
SAYS_NOTHING = ("", "false")
NO_PLUGIN = re.compile(r"Plugin not found|not found in plugin registry")

DTYPES = {
    "FLOAT": "float", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool", "FP8": "float8e4m3fn", "INT4": "int4", "FP4": "float4e2m1",
}  # fmt: skip
"""ONNX's names of TensorRT's types."""


@dataclass(frozen=True)
class BuiltPlan:
    """A plan, and what is in it. Sizes in bytes."""

    plan: Buffer
    version: str
    capabilities: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    profiles: tuple[dict[str, Shapes], ...]
    weights_bytes: int | None
    """Of the block of weights, as the builder's log says; None where it does not."""
    seconds: float


def check_options(options: EngineOptions) -> tuple[str, ...]:
    """The compute capabilities to build for. Raises before anything is read or written.

    MissingDependencyError (no TensorRT), InputError (a capability that this TensorRT cannot build for), DeviceNotFoundError
    (the full TensorRT, which builds on the GPU that it builds for, and no GPU).
    """
    trt = library.module(options.kind)
    known = getattr(trt, "ComputeCapability", None)
    if known is not None and hasattr(trt.IBuilderConfig, "set_compute_capability"):
        wanted = options.capabilities or tuple(dict.fromkeys(CARDS.values()))
        for capability in wanted:
            if not hasattr(known, f"SM{capability.replace('.', '')}"):
                names = [name[2:] for name in known.__members__ if name.startswith("SM")]
                raise InputError(
                    f"{options.kind} {trt.__version__} cannot build for the compute capability {capability}: it "
                    f"knows {', '.join(f'{name[:-1]}.{name[-1]}' for name in names)}."
                )
        return wanted
    here = library.capabilities_here()
    if not here:
        raise DeviceNotFoundError(
            f"{options.kind} builds engines on the GPU that they are for, and this machine has none that can be used "
            "(`glake-infer doctor` says why). TensorRT-RTX builds without a GPU: --engine tensorrt-rtx."
        )
    if any(capability != here[0] for capability in options.capabilities):
        raise InputError(
            f"{options.kind} builds for the GPU of this machine alone, which has the compute capability {here[0]}, not "
            f"{', '.join(options.capabilities)}. Leave --card out, or build on a machine with that card."
        )
    return (here[0],)


def build_plan(
    model: bytes,
    folder: Path,
    options: EngineOptions,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    *,
    name: str,
    store: Store,
    progress: Progress | None = None,
) -> BuiltPlan:
    """Build the serialized ONNX `model`, whose external weights lie at their locations below `folder`.

    `inputs`, `outputs`: as ONNX declares them, with symbols. `name`: for messages. TensorRT's messages go to Python's
    logging (models/tensorrt/library.py). In the main thread Ctrl-C stops the build at its next step; the same does an
    exception of `progress`, which is raised then. Raises what `check_options` does; ModelError (operators that TensorRT
    does not support, each with its reason, before the build begins; a build that failed, in TensorRT's words),
    InputError (inputs without a profile), OutOfMemoryError. Nothing stays allocated after an error.
    """
    start = time.perf_counter()
    capabilities = check_options(options)
    trt = library.module(options.kind)
    told: list[str] = []
    logger = library.make_logger(trt, lambda severity, message: told.append(message))
    with _interruptible() as interrupted:
        builder = trt.Builder(logger)
        if options.allocator is not None:
            builder.gpu_allocator = options.allocator
        network = builder.create_network(_network_flags(trt))
        _parse(trt, network, logger, model, folder, name)
        config = builder.create_builder_config()
        _configure(trt, config, options, capabilities)
        tensors = [network.get_input(index) for index in range(network.num_inputs)]
        fed = {tensor.name for tensor in tensors if tensor.is_shape_tensor}
        given = {value.name: value for value in inputs}
        values = tuple(_value(tensor, given.get(tensor.name)) for tensor in tensors)
        profiles = complete_profiles(options.profiles, values, fed)
        for profile in profiles:
            _add_profile(builder, config, profile, fed, name)
        watch = _Watch(progress, interrupted)
        config.progress_monitor = _monitor(trt, watch)
        cache = _cache_file(options.kind, trt, store)
        with _timing_cache(config, cache, store):
            logger.take_errors()
            built = builder.build_serialized_network(network, config)
        errors = logger.take_errors()
    if interrupted.is_set():
        raise KeyboardInterrupt
    if watch.error is not None:
        raise watch.error
    if built is None:
        raise _failed(name, errors, options)
    declared = {value.name: value for value in outputs}
    results = [network.get_output(index) for index in range(network.num_outputs)]
    return BuiltPlan(
        plan=memoryview(built).cast("B"),
        version=str(trt.__version__),
        capabilities=capabilities,
        inputs=values,
        outputs=tuple(_value(tensor, declared.get(tensor.name)) for tensor in results),
        profiles=profiles,
        weights_bytes=next((int(m[1]) for line in reversed(told) if (m := WEIGHTS.search(line))), None),
        seconds=time.perf_counter() - start,
    )


def _network_flags(trt: types.ModuleType) -> int:
    """Types as the model has them: the only way from TensorRT 11 on, and in TensorRT-RTX."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: types.ModuleType, network: Any, logger: Any, model: bytes, folder: Path, name: str) -> None:
    parser = trt.OnnxParser(network, logger)
    logger.take_errors()
    if parser.parse(model, str(folder / "graph.onnx")):
        return
    said = logger.take_errors()
    if unmapped := [error for error in said if NOT_MAPPED in error]:
        raise OutOfMemoryError.told(
            f"TensorRT could not map the weights of {name} into its memory: {unmapped[0]}. Close what else holds memory of "
            "this machine, or raise this process's limits (`ulimit -v unlimited`; `doctor` knows its max_map_count)."
        )
    nodes_of = load_model_from_string(model).graph.node
    reasons: dict[tuple[str, str], list[str]] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reason = error.desc().strip().rstrip(".")
        code = str(error.code()).rpartition(".")[2]
        if reason in SAYS_NOTHING or NO_PLUGIN.search(reason):
            unknown = code == "UNSUPPORTED_NODE" or NO_PLUGIN.search(reason)
            reason = "TensorRT does not have it" if unknown else code
        node = repr(error.node_name()) if error.node_name() else _place(nodes_of, error)
        reasons.setdefault((error.node_operator(), reason), []).append(node)
    lines = []
    for (operator, reason), nodes in reasons.items():
        more = f" and {len(nodes) - MOST_NODES} more" if len(nodes) > MOST_NODES else ""
        what = (
            f"{operator} (node {', '.join(nodes[:MOST_NODES])}{more})" if operator else "inputs and weights"
        )
        lines.append(f"{what}: {reason}")
    if len(lines) > MOST_REASONS:
        lines[MOST_REASONS:] = [f"and {len(lines) - MOST_REASONS} operators more"]
    raise ModelError(
        f"TensorRT {trt.__version__} cannot take {name}: {'; '.join(lines or said[-3:])}. "
        "Leave --engine out: the package's ONNX graphs run it all the same. Or export the model without these operators."
    )


def _place(nodes: Sequence[NodeProto], error: Any) -> str:
    """Where a node without a name is, by what it makes: numbers are those of the padded model."""
    if not 0 <= error.node() < len(nodes):
        return f"number {error.node()}"
    node = nodes[error.node()]
    inside = "" if node.op_type == error.node_operator() else f"in the {node.op_type} "  # of a body
    return f"{inside}that makes {', '.join(repr(name) for name in node.output if name)}"


def _configure(
    trt: types.ModuleType, config: Any, options: EngineOptions, capabilities: Sequence[str]
) -> None:
    if hasattr(trt, "ComputeCapability") and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(
                getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index
            )
    if options.streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)


def _add_profile(builder: Any, config: Any, shapes: dict[str, Shapes], fed: set[str], name: str) -> None:
    profile = builder.create_optimization_profile()
    for tensor, each in shapes.items():
        if tensor in fed:
            profile.set_shape_input(tensor, each.min, each.opt, each.max)
        else:
            profile.set_shape(tensor, each.min, each.opt, each.max)
    if config.add_optimization_profile(profile) < 0:
        said = ", ".join(f"{tensor}={each.min}:{each.opt}:{each.max}" for tensor, each in shapes.items())
        raise InputError(
            f"TensorRT refuses the optimization profile {said} for {name}: expected shapes that the model can have, the "
            "smallest, the usual and the largest. Give another --profile."
        )


def _value(tensor: Any, declared: Value | None) -> Value:
    """An input or output of the network, with the symbols that ONNX has for its axes."""
    dtype = DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower())
    try:
        axes: tuple[int, ...] | None = tuple(tensor.shape)
    except ValueError:  # of unknown rank
        axes = None
    if axes is None:
        return Value(name=tensor.name, dtype=dtype, shape=None)
    known = declared.shape if declared is not None and declared.shape is not None else ()
    if len(known) != len(axes):
        known = (None,) * len(axes)
    shape = tuple(
        axis if axis >= 0 else (symbol if isinstance(symbol, str) else None)
        for axis, symbol in zip(axes, known, strict=True)
    )
    return Value(name=tensor.name, dtype=dtype, shape=shape)


def _failed(name: str, errors: list[str], options: EngineOptions) -> GlakeError:
    said = "; ".join(errors[-4:]) or "it gave no reason (its log at DEBUG has more)"
    refusal = getattr(options.allocator, "take_error", lambda: None)()
    if isinstance(refusal, GlakeError):
        return refusal
    if any(OUT_OF_MEMORY.search(error) for error in errors):
        return OutOfMemoryError.told(
            f"TensorRT ran out of memory while it built {name}: {said}. Close what else holds memory of this machine or its "
            "GPU, lower --workspace, or give smaller shapes by --profile."
        )
    if options.workspace is not None and any(WORKSPACE.search(error) for error in errors):
        return InputError(
            f"TensorRT could not build {name} with a workspace of {format_bytes(options.workspace)}: {said}. Give a larger "
            "--workspace, or leave it out."
        )
    return ModelError(
        f"TensorRT could not build {name}: {said}. Check the profiles' shapes, or leave --engine out: the package's ONNX "
        "graphs run it all the same."
    )


# Progress and interrupts


class _Watch:
    """What the builder's steps do: tell `progress`, and say whether to go on."""

    def __init__(self, progress: Progress | None, interrupted: threading.Event) -> None:
        self._progress = progress
        self._interrupted = interrupted
        self._steps: dict[str, int] = {}
        self.error: BaseException | None = None

    def begin(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self.step(phase, -1)

    def step(self, phase: str, step: int) -> bool:
        """Whether the build goes on. Called by TensorRT, so nothing may be raised."""
        if self.error is not None or self._interrupted.is_set():
            return False
        try:
            if self._progress is not None and (total := self._steps.get(phase, 0)) > 1:
                self._progress(f"engine: {phase[:1].lower()}{phase[1:]}", min(step + 1, total), total)
        except BaseException as error:  # raised again when TensorRT has returned
            self.error = error
            return False
        return True

    def end(self, phase: str) -> None:
        total = self._steps.get(phase, 0)
        self.step(phase, total - 1)


def _monitor(trt: types.ModuleType, watch: _Watch) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            watch.begin(phase, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            return watch.step(phase, step)

        def phase_finish(self, phase: str) -> None:
            watch.end(phase)

    return Monitor()


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, instead of raising into a callback of TensorRT; only where Python would handle it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None or before in (
        signal.SIG_IGN,
        signal.SIG_DFL,
    ):  # of another language, or nobody wants to know
        yield event
        return
    signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


# What TensorRT learns about this machine's GPU


def _cache_file(kind: Kind, trt: types.ModuleType, store: Store) -> Path | None:
    """Where the timing cache lies; None for TensorRT-RTX, which times nothing when it builds."""
    if kind == "tensorrt-rtx":
        return None
    from glake_infer.models.doctor import find_gpus

    gpus, driver, _ = find_gpus()
    machine = digest_of(repr([(gpu.name, gpu.compute_capability) for gpu in gpus[:1]] + [driver]).encode())[
        :16
    ]
    return store.root / CACHES / f"{kind}-{trt.__version__}-{machine}.timing"


@contextlib.contextmanager
def _timing_cache(config: Any, file: Path | None, store: Store) -> Iterator[None]:
    """Give the builder what was timed before on this machine, and keep what it has timed.

    Of two builds at once the last one's is kept; a damaged cache is made anew.
    """
    if file is None:
        yield
        return
    known = b""
    with contextlib.suppress(OSError):
        known = file.read_bytes()
    cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    yield
    learnt = config.get_timing_cache()
    if learnt is not None:
        with contextlib.suppress(GlakeError, OSError), storage_errors("keeping a timing cache", store.root):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, bytes(learnt.serialize()))
