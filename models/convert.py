"""Convert: from an ONNX model to a package, its weights in the store once per distinct content."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, TensorProto, inliner

from glake_infer.allocators.errors import ModelError, PackageError
from glake_infer.digest import digest_of, digests_of_pieces
from glake_infer.models.fuse import fuse_for_cuda
from glake_infer.models.graph import (
    MINIMUM_WEIGHT,
    Initializer,
    all_nodes,
    bodies,
    constant_tensor,
    external_entries,
    initializers,
    inline_bytes,
    is_external,
    lift_constants,
    make_external,
    make_names_unique,
    scopes,
    tensor_bytes,
)
from glake_infer.models.guard import guard_for_cpu
from glake_infer.models.manifest import (
    PIECE,
    Manifest,
    Run,
    Source,
    Variant,
    Weight,
    read_manifest,
    run_digest,
)
from glake_infer.models.package import check_target, default_target, write_package
from glake_infer.models.progress import Progress
from glake_infer.models.source import MAXIMUM_PROTOBUF, ModelSource, SourceModel, check_operators
from glake_infer.models.tensorrt.build import check_options
from glake_infer.models.tensorrt.convert import EngineReport, kept_engines, make_engine, options_of
from glake_infer.models.tensorrt.options import EngineOptions
from glake_infer.models.values import value_of_proto
from glake_infer.store import Store
from glake_infer.version import __version__

COMPARED_PACKAGES = 64
"""How many packages of the store are compared when runs are cut."""

VARIANTS = {
    "onnx": "the model as it was given, its weights in the store",
    "cpu-lean": "for sharing='lean': nothing is folded to a wider type",
    "cuda": "for CUDA: fused, so that a session makes no weights of its own",
}
"""Graphs that a package can hold. The others exist only where they differ; "cuda" has weights of its own."""

LARGE_WEIGHT = 32 << 20
"""Bytes from which the digests of a weight's pieces are kept."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did. Sizes in bytes."""

    source: str
    package: str
    weights: int
    """Weights of the model as it was given; so are the next five."""
    weight_bytes: int
    distinct_weights: int
    distinct_bytes: int
    new_bytes: int
    """Bytes of them that this conversion added to the store."""
    stored_bytes: int
    """Distinct bytes of them that the store held before."""
    derived_bytes: int
    """Distinct bytes that the other variants need beside those."""
    new_derived_bytes: int
    """Bytes of these that this conversion added to the store."""
    small_bytes: int
    """Bytes of weights below MINIMUM_WEIGHT, which stay in the graph."""
    constants: int
    """Weights that were `Constant` nodes."""
    renamed: int
    """Weights that got a new name because another scope used theirs."""
    variants: tuple[str, ...]
    runs: int
    notes: tuple[str, ...]
    seconds: float
    engines: tuple[EngineReport, ...] = ()
    """Those that were built."""
    kept_engines: tuple[str, ...] = ()
    """Kinds of those that the package had before and keeps, as the model is the same."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    engine: str | EngineOptions | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert the ONNX model `source` into the package `target` (default: beside it, `.glake`).

    engine: also build a TensorRT engine, "tensorrt-rtx" or "tensorrt", or `EngineOptions` for more than the usual (profiles
        for inputs of dynamic shape, for which cards). An engine that the package had is kept where the model is the
        same.

    Weights of 1 KiB and more are streamed to the store, so memory grows with the graph and not with
    external data; only where something can be fused for CUDA are they all in memory for a while (models/fuse.py).
    Raises ModelError (what is wrong with the model, or what TensorRT does not support of it), InputError (the target is
    something else, inputs that lack a profile), StorageFullError or StoreError; for an engine also MissingDependencyError,
    DeviceNotFoundError and OutOfMemoryError; after any of them the target is as it was before, and at most complete
    objects, which the next gc removes, were added to the store. Safe to call from several threads and processes,
    on the same model too.
    """
    source = Path(source)
    store = store or Store()
    with SourceModel(source) as opened:
        place = Path(target) if target is not None else default_target(source)
        return convert_source(opened, place, engine=engine, store=store, progress=progress)


def convert_source(
    opened: ModelSource,
    target: Path,
    *,
    engine: str | EngineOptions | None = None,
    store: Store,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a model that is open already; see `convert`, whose file this need not be."""
    start = time.perf_counter()
    source = opened.path
    check_target(target)
    options = options_of(engine)
    if options is not None:
        check_options(options)
    opened.model = without_weighty_functions(opened.model)
    model, notes = opened.model, []
    check_operators(model, source)
    constants = lift_constants(model, MINIMUM_WEIGHT)
    _inline_external(opened)
    renamed = make_names_unique(model)
    if renamed:
        first, count = next(iter(renamed.items()))
        notes.append(
            f"{sum(n - 1 for n in renamed.values())} weights share a name with something in another scope "
            "and were "
            f"renamed (for example {first!r}, {count} times)"
        )
    opened.check_external()
    found = [
        item
        for item in initializers(model)
        if is_external(item.tensor) or tensor_bytes(item.tensor) >= MINIMUM_WEIGHT
    ]
    small = sum(tensor_bytes(i.tensor) for i in initializers(model)) - sum(
        tensor_bytes(i.tensor) for i in found
    )
    with store.using():
        weights, new_bytes = _store_weights(opened, _by_use(model, found), store, progress)
        given, new_derived = len(weights), 0
        inputs = tuple(value_of_proto(v) for v in model.graph.input if not _has_default(model, v.name))
        outputs = tuple(value_of_proto(v) for v in model.graph.output)
        graphs = {"onnx": _serialize(model, source)}
        fused = fuse_for_cuda(model, weights, store)
        guarded = guard_for_cpu(model)
        if guarded.weights:
            notes.append(guarded.note())
            graphs["cpu-lean"] = _serialize(model, source)
        notes += fused.notes
        if fused.model is not None:
            weights, new_derived = _store_fused(fused.model, weights, tuple(graphs), store)
            graphs["cuda"] = _serialize(fused.model, source)
        files, variants = {}, {}
        for name, data in graphs.items():
            file = "graph.onnx" if name == "onnx" else f"graph.{name}.onnx"
            files[file] = data
            variants[name] = Variant(graph=file, digest=digest_of(data), purpose=VARIANTS[name])
        engines, dropped = kept_engines(
            _manifest_at(target), variants["onnx"].digest, weights, options.kind if options else None, store
        )
        kept = tuple(engines)
        notes += dropped
        built: tuple[EngineReport, ...] = ()
        if options is not None:
            made, report = make_engine(
                graphs["onnx"],
                weights,
                inputs,
                outputs,
                options,
                name=str(source),
                store=store,
                progress=progress,
            )
            engines[options.kind], built = made, (report,)
            notes += made.notes
        manifest = Manifest(
            producer=f"glake-infer {__version__}",
            source=Source(name=source.name, digest=opened.digest),
            inputs=inputs,
            outputs=outputs,
            variants=variants,
            weights=tuple(weights),
            runs=cut_runs(weights, store, target, {given}),
            engines=engines,
            notes=tuple(notes),
        )
        write_package(store, target, manifest, files)
    distinct = manifest.distinct_of("onnx")
    needed = sum({weight.digest: weight.bytes for weight in weights}.values())
    return ConvertReport(
        source=str(source),
        package=str(target),
        weights=given,
        weight_bytes=manifest.weight_bytes,
        distinct_weights=len(distinct),
        distinct_bytes=sum(distinct.values()),
        new_bytes=new_bytes,
        stored_bytes=sum(distinct.values()) - new_bytes,
        derived_bytes=needed - sum(distinct.values()),
        new_derived_bytes=new_derived,
        small_bytes=small,
        constants=constants,
        renamed=sum(n - 1 for n in renamed.values()),
        variants=tuple(variants),
        runs=len(manifest.runs),
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
        engines=built,
        kept_engines=kept,
    )


def _manifest_at(target: Path) -> Manifest | None:
    """The manifest of the package that is to be replaced, where there is a sound one."""
    with contextlib.suppress(PackageError, OSError):
        return read_manifest(target)
    return None


def without_weighty_functions(model: ModelProto) -> ModelProto:
    """Inline the model-local functions where one holds a weight: functions have no initializers."""
    held: list[TensorProto] = []
    for function in model.functions:
        held += [tensor for node in function.node if (tensor := constant_tensor(node)) is not None]
        for scope in (scope for node in function.node for body in bodies(node) for scope in scopes(body)):
            held += scope.initializer
            held += [tensor for node in scope.node if (tensor := constant_tensor(node)) is not None]
    functions = {(function.domain, function.name) for function in model.functions}
    for node in all_nodes(model):  # a weight may be an attribute of the call as well
        if (node.domain, node.op_type) in functions:
            held += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
    if any(is_external(tensor) or tensor_bytes(tensor) >= MINIMUM_WEIGHT for tensor in held):
        return inliner.inline_local_functions(model)
    return model


def _inline_external(opened: ModelSource) -> None:
    """Bring external tensors that cannot be weights of a package (small, sparse, attributes) inside."""
    tensors = [
        item.tensor for item in initializers(opened.model) if tensor_bytes(item.tensor) < MINIMUM_WEIGHT
    ]
    for scope in scopes(opened.model.graph):
        tensors += [part for sparse in scope.sparse_initializer for part in (sparse.values, sparse.indices)]
    for node in all_nodes(opened.model):
        for attribute in node.attribute:
            sparse = [attribute.sparse_tensor, *attribute.sparse_tensors]
            tensors += [
                attribute.t,
                *attribute.tensors,
                *(part for s in sparse for part in (s.values, s.indices)),
            ]
    for tensor in tensors:
        if is_external(tensor):
            data = b"".join(bytes(piece) for piece in opened.pieces(tensor))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
            tensor.raw_data = data


def _by_use(model: ModelProto, found: list[Initializer]) -> list[Initializer]:
    """Order weights by their first use: what runs together lies together."""
    first: dict[str, int] = {}
    for scope in scopes(model.graph):
        for node in scope.node:
            for name in node.input:
                first.setdefault(name, len(first))
    return sorted(found, key=lambda item: first.get(item.tensor.name, len(first)))


def _store_weights(
    opened: ModelSource, found: list[Initializer], store: Store, progress: Progress | None
) -> tuple[list[Weight], int]:
    """Put every weight into the store, leaving a reference; returns the weights and the bytes added."""
    total = sum(tensor_bytes(item.tensor) for item in found)
    done = new = 0
    weights = []
    for item in found:
        tensor = item.tensor
        size = tensor_bytes(tensor)
        digest, pieces = _digests(opened, tensor, size)
        if not store.objects.holds(digest, size):
            store.objects.add(digest, size, opened.pieces(tensor))
            new += size
        weights.append(
            Weight(
                name=tensor.name,
                digest=digest,
                bytes=size,
                dtype=TensorProto.DataType.Name(tensor.data_type).lower(),
                shape=tuple(tensor.dims),
                overridable=item.overridable,
                pieces=pieces,
            )
        )
        make_external(tensor, store.objects.location(digest), size)
        done += size
        if progress:
            progress("weights", done, total)
    return weights, new


def _digests(opened: ModelSource, tensor: TensorProto, size: int) -> tuple[str, str]:
    """A weight's digest and, where it is large, those of its pieces; its bytes are read once."""
    if size < LARGE_WEIGHT:
        return opened.digest_of(tensor), ""
    digest, pieces, done = digests_of_pieces(opened.pieces(tensor), PIECE)
    if done != size:  # the source says what is wrong with it
        return opened.digest_of(tensor), ""
    return digest, pieces


def _store_fused(
    model: ModelProto, weights: list[Weight], others: tuple[str, ...], store: Store
) -> tuple[list[Weight], int]:
    """Put the fused graph's new weights into the store; returns all weights of the package and the bytes added.

    `weights` are those of the variants `others`.
    """
    known = {weight.name: weight for weight in weights}
    used: set[str] = set()
    added: list[Weight] = []
    new = 0
    found = [
        item
        for item in initializers(model)
        if is_external(item.tensor) or tensor_bytes(item.tensor) >= MINIMUM_WEIGHT
    ]
    for item in _by_use(model, found):
        tensor = item.tensor
        if tensor.name in known:
            used.add(tensor.name)
            continue
        size, pieces = tensor_bytes(tensor), ""
        if is_external(tensor):  # the bytes of a weight that is there, under another name
            digest = external_entries(tensor)["location"].rpartition("/")[2]
            pieces = next(weight.pieces for weight in weights if weight.digest == digest)
        else:
            data = inline_bytes(tensor)
            digest = digest_of(data)
            if size >= LARGE_WEIGHT:
                pieces = digests_of_pieces([data], PIECE)[1]
            new += size if store.objects.add_buffer(data, digest)[1] else 0
            make_external(tensor, store.objects.location(digest), size)
        added.append(
            Weight(
                name=tensor.name,
                digest=digest,
                bytes=size,
                dtype=TensorProto.DataType.Name(tensor.data_type).lower(),
                shape=tuple(tensor.dims),
                variants=("cuda",),
                pieces=pieces,
            )
        )
    kept = [w if w.name in used else w.model_copy(update={"variants": others}) for w in weights]
    return [*kept, *added], new


def cut_runs(
    weights: Sequence[Weight], store: Store, target: Path, cuts: Iterable[int] = ()
) -> tuple[Run, ...]:
    """Cut the weights into runs: at `cuts`, and wherever another package of the store starts or stops being equal."""
    digests = [weight.digest for weight in weights]
    mine = set(digests)
    others = sorted(
        (
            (len(mine & record.digests), str(record.path))
            for record in store.records()
            if record.path != target.absolute()
        ),
        reverse=True,
    )
    edges_within = {cut for cut in cuts if 0 < cut < len(digests)}
    for shared, path in others[:COMPARED_PACKAGES]:
        if shared:
            with contextlib.suppress(PackageError, OSError):
                edges_within |= _borders(
                    digests, [weight.digest for weight in read_manifest(Path(path)).weights]
                )
    edges = [0, *sorted(edges_within), len(digests)] if digests else [0]
    runs = []
    for first, end in itertools.pairwise(edges):
        part = tuple(weights[first:end])
        runs.append(
            Run(first=first, count=end - first, bytes=sum(w.bytes for w in part), digest=run_digest(part))
        )
    return tuple(runs)


def _borders(mine: list[str], theirs: list[str]) -> set[int]:
    """Positions in `mine` where a stretch that `theirs` holds too, in the same order, begins or ends."""
    follows = set(itertools.pairwise(theirs))
    known = set(theirs)
    borders = set()
    for index in range(1, len(mine)):
        before, after = mine[index - 1], mine[index]
        if (before in known) != (after in known) or (before in known and (before, after) not in follows):
            borders.add(index)
    return borders


def _has_default(model: ModelProto, name: str) -> bool:
    return any(tensor.name == name for tensor in model.graph.initializer) or any(
        sparse.values.name == name for sparse in model.graph.sparse_initializer
    )


def _serialize(model: ModelProto, source: Path) -> bytes:
    size = model.ByteSize()
    if size > MAXIMUM_PROTOBUF:
        raise ModelError(
            f"the graph of {source} has {size} bytes without its weights, more than the 2 GiB of a protobuf "
            "file: sparse or "
            f"string tensors stay in the graph. Split the model, or make these tensors dense."
        )
    return bytes(model.SerializeToString(deterministic=True))
