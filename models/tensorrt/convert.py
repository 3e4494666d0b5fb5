"""The engine of a package: the model padded and built, its plan cut into the store's objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import ModelProto, TensorProto, load_model_from_string

from glake_infer.allocators.errors import ModelError
from glake_infer.digest import digest_of
from glake_infer.models.graph import external_entries, inline_bytes, is_external, scopes
from glake_infer.models.manifest import Engine, Manifest, Value, Weight
from glake_infer.models.progress import Progress
from glake_infer.models.tensorrt.build import BuiltPlan, build_plan
from glake_infer.models.tensorrt.heads import ALIGNMENT, fill, pad_heads
from glake_infer.models.tensorrt.library import Kind, check_kind
from glake_infer.models.tensorrt.options import EMPTY_SYMBOLS, EngineOptions
from glake_infer.models.tensorrt.plan import split, weights_section
from glake_infer.models.tensorrt.search import STEP
from glake_infer.store import Store

MISREAD = frozenset(
    (TensorProto.INT16, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
     TensorProto.COMPLEX64, TensorProto.COMPLEX128)
)  # fmt: skip
"""Types that TensorRT does not have. Of weights in files its parser does not refuse them: it takes the bytes for floats,
and reads past their end."""

MOST_NAMED = 3
"""Weights that an error names."""


@dataclass(frozen=True)
class EngineReport:
    """What a conversion made of an engine. Sizes in bytes."""

    kind: Kind
    version: str
    capabilities: tuple[str, ...]
    bytes: int
    """Of the plan."""
    weights_bytes: int
    """Of its section of weights; 0 where it is not known."""
    found_bytes: int
    """Of the plan, what is in weights of the package: no bytes of its own in the store."""
    new_bytes: int
    """Bytes that it added to the store."""
    stored_bytes: int
    """Of the plan's own objects, what the store held before (of a fine-tune, say)."""
    profiles: int
    streaming: bool
    seconds: float
    """Of building and cutting."""


def make_engine(
    graph: bytes,
    weights: Sequence[Weight],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    options: EngineOptions,
    *,
    name: str,
    store: Store,
    progress: Progress | None = None,
) -> tuple[Engine, EngineReport]:
    """Build an engine of a package's serialized graph "onnx", and put its plan into the store.

    `weights`: all of the package, which the store has; the caller holds `store.using()`. Raises what `build_plan` and
    `split` do; the store may then have complete objects more, which the next gc removes.
    """
    model = load_model_from_string(graph)
    _refuse_misread(model, name)
    _forget_empty_symbols(model)
    padded = pad_heads(model, lambda tensor: _bytes_of(tensor, store))
    notes = [str(head) for head in padded]

    def build() -> BuiltPlan:
        return build_plan(
            model.SerializeToString(deterministic=True), store.root, options, inputs, outputs,
            name=name, store=store, progress=progress,
        )  # fmt: skip

    built = build()
    seconds = built.seconds
    missing = _missing(built)
    aligned = missing == 0
    if missing:
        again = _filled(model, missing, build)
        if again is None:
            notes.append(
                f"the weights of the engine lack {missing} bytes to a multiple of {ALIGNMENT}, and no "
                "output could carry them: they are shared only with those of fine-tunes that lack as many"
            )
        else:
            built, output = again
            seconds += built.seconds
            aligned = True
            notes.append(
                f"{missing} bytes were put behind the output {output!r}, and are sliced off again (a copy of it in each "
                "run): so trunks of fine-tunes lie alike in their engines"
            )
    made = split(built.plan, weights, store)
    engine = Engine(
        kind=options.kind,
        version=built.version,
        capabilities=built.capabilities,
        bytes=len(built.plan),
        digest=digest_of(built.plan),
        parts=tuple(made.parts),
        objects=made.objects,
        compressed=made.compressed,
        inputs=built.inputs,
        outputs=built.outputs,
        profiles=built.profiles,
        weights_offset=made.section[0],
        weights_bytes=made.section[1],
        aligned=ALIGNMENT if aligned else 0,
        streaming=options.streaming,
        notes=tuple(notes),
    )
    report = EngineReport(
        kind=engine.kind,
        version=engine.version,
        capabilities=engine.capabilities,
        bytes=engine.bytes,
        weights_bytes=engine.weights_bytes,
        found_bytes=made.found,
        new_bytes=made.new,
        stored_bytes=sum(made.objects.values()) - made.new,
        profiles=len(engine.profiles),
        streaming=engine.streaming,
        seconds=seconds,
    )
    return engine, report


def _filled(model: ModelProto, missing: int, build: Callable[[], BuiltPlan]) -> tuple[BuiltPlan, str] | None:
    """Build again with as many bytes more, and the output that carries them; None where that does not align the weights."""
    output = fill(model, missing)
    if output is None:
        return None
    built = build()
    return (built, output) if _missing(built) == 0 else None


def _missing(built: BuiltPlan) -> int | None:
    """Bytes that the weights lack to a multiple of ALIGNMENT; None where neither the plan nor the log tells.

    The last tensor (of the first layer) is not rounded up to STEP: what it has beyond that is equal in all fine-tunes.
    """
    section = weights_section(built.plan)
    size = section[1] if section is not None else built.weights_bytes
    return -(size // STEP * STEP) % ALIGNMENT if size else None


def _refuse_misread(model: ModelProto, name: str) -> None:
    found = [
        f"{tensor.name!r} ({TensorProto.DataType.Name(tensor.data_type).lower()})"
        for scope in scopes(model.graph)
        for tensor in scope.initializer
        if tensor.data_type in MISREAD
    ]
    if found:
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise ModelError(
            f"TensorRT cannot take {name}: it does not have the types of the weights {', '.join(found[:MOST_NAMED])}{more}. "
            "Leave --engine out: the package's ONNX graphs run it all the same. Or export the model with int32 or int64 in "
            "their place."
        )


def _forget_empty_symbols(model: ModelProto) -> None:
    """Drop names of axes that name nothing: to TensorRT, axes of one name have equal sizes."""
    for scope in scopes(model.graph):
        for value in (*scope.input, *scope.output, *scope.value_info):
            for axis in value.type.tensor_type.shape.dim:
                if axis.dim_param in EMPTY_SYMBOLS:
                    axis.ClearField("dim_param")


def _bytes_of(tensor: TensorProto, store: Store) -> bytes:
    if is_external(tensor):
        return (store.root / external_entries(tensor)["location"]).read_bytes()
    return inline_bytes(tensor)


def kept_engines(
    old: Manifest | None, graph_digest: str, weights: Sequence[Weight], rebuilt: Kind | None, store: Store
) -> tuple[dict[Kind, Engine], list[str]]:
    """Engines that a package keeps when it is converted again, and notes on those that it loses.

    An engine is of the graph "onnx", whose digest covers those of its weights: it is kept where that is the same and the
    store still has all of it.
    """
    kept: dict[Kind, Engine] = {}
    notes: list[str] = []
    mine = {weight.digest: weight.bytes for weight in weights}
    for kind, engine in old.engines.items() if old is not None else ():
        if kind == rebuilt:
            continue
        assert old is not None
        sizes = old.distinct
        if old.variants["onnx"].digest != graph_digest:
            why = "the model has changed"
        elif any(store.objects.state(digest, sizes[digest]) != "intact" for digest in engine.needed):
            why = "the store lacks parts of it"
        else:
            own = {digest: sizes[digest] for digest in sorted(engine.needed) if digest not in mine}
            kept[kind] = engine.model_copy(update={"objects": own})
            continue
        notes.append(
            f"the {kind} engine that the package had was dropped, because {why}: convert again with --engine {kind}"
        )
    return kept, notes


def options_of(engine: str | EngineOptions | None) -> EngineOptions | None:
    """The options that `convert(engine=...)` means: a kind alone, or all of them."""
    if engine is None or isinstance(engine, EngineOptions):
        return engine
    return EngineOptions(kind=check_kind(engine))
