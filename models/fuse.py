"""The `cuda` variant: a graph in which everything is fused already that makes new weights out of old ones.

ONNX Runtime folds constants, BatchNormalization and transposes into weights, and packs those of attention, when a
session is built: private copies in each. Here that is done once, at conversion, so the new weights are objects of
the store like all others, equal ones of two fine-tunes are one, and a session makes none of its own.

    1. ONNX Runtime's basic optimizations, which depend on no device
    2. the fusions of `onnxruntime.transformers` (fuse_child.py): attention, layer norms, gelu
    3. the result computes what the model computes, on generated inputs (fuse_check.py)

What cannot be done, or computes something else, is left out, and a note says why; nothing here raises.

For nodes of 16-bit floats the CPU often has no kernel, and a session puts casts around such a node, or replaces it by
the nodes that define it. ModelCompiler saves the graph before the casts come; nodes that have a definition are cut
out meanwhile, their outputs inputs of the graph, so that they come back as they were.
"""

from __future__ import annotations

import heapq
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, defs, helper

from glake_infer.digest import digest_of, is_digest
from glake_infer.models.fuse_check import Difference, compare, session_options
from glake_infer.models.graph import (
    MINIMUM_WEIGHT,
    all_nodes,
    bodies,
    external_entries,
    inline_bytes,
    is_external,
    make_external,
    make_names_unique,
    scopes,
    tensor_bytes,
    unused,
)
from glake_infer.models.manifest import Weight
from glake_infer.store import Store, storage_errors, temporary_sibling

MAXIMUM_BYTES = 2 << 30
"""Models whose weights are larger are not fused: it takes them all in memory, and time in proportion."""

SECONDS = 300
"""The most time that the fusions in Python may take."""

HALF = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
STANDARD = ("", "ai.onnx")
SIGNS = {"Softmax", "Erf", "LayerNormalization", "ReduceMean", "Tanh", "Gelu"}
"""Operators without one of which there is nothing for the fusions in Python."""

FOREIGN_DOMAINS = ("com.microsoft.nchwc", "com.ms.internal.nhwc", "com.microsoft.extensions")
"""Operators that ONNX Runtime makes for other devices than a GPU."""


class Unfit(Exception):  # noqa: N818  (no failure: the model stays as it is)
    """Why a model cannot be fused, for people."""


@dataclass(frozen=True)
class Fused:
    """The fused graph, or None where there is nothing to fuse or it could not be done.

    Its new weights of MINIMUM_WEIGHT and more are inside, under names that no weight of the model has.
    """

    model: ModelProto | None
    notes: tuple[str, ...] = ()


def fuse_for_cuda(model: ModelProto, weights: Sequence[Weight], store: Store) -> Fused:
    """Fuse a converted model, whose `weights` lie in the store. Leaves `model` alone and never raises."""
    if sum(weight.bytes for weight in weights) > MAXIMUM_BYTES:
        return Fused(
            None,
            (
                "not fused for CUDA: the weights have more than "
                f"{MAXIMUM_BYTES / 2**30:g} GiB; ONNX Runtime does it in every session, with private copies",
            ),
        )
    if model.ir_version < 4:  # every weight is an input there, and none of them may be missed
        return Fused(None)
    notes: list[str] = []
    folder = temporary_sibling(store.root / "fusing")
    try:
        with store.writing(folder), storage_errors("fusing the model for CUDA", store.root):
            try:
                folder.mkdir(parents=True)
                fused = _fuse(model, weights, store, folder, notes)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return Fused(fused, tuple(notes))
    except Exception as error:
        return Fused(None, (*notes, f"not fused for CUDA: {_short(error)}"))


def _fuse(
    model: ModelProto, weights: Sequence[Weight], store: Store, folder: Path, notes: list[str]
) -> ModelProto | None:
    candidates: list[tuple[str, ModelProto]] = []
    begun = model
    try:
        begun = _tidy(_basic(model, store, folder), model, weights, store)
        if _weights_of(begun) != _weights_of(model):  # else a session does the same without a copy
            candidates.append(("ONNX Runtime's basic optimizations", begun))
    except Exception as error:
        notes.append(f"not optimized for CUDA by ONNX Runtime: {_short(error)}")
    if any(node.op_type in SIGNS for node in all_nodes(begun)):
        try:
            more = _tidy(_by_python(begun, store, folder), model, weights, store)
            candidates.insert(0, ("the fusions of onnxruntime.transformers", more))
        except Exception as error:
            notes.append(f"not fused by onnxruntime.transformers: {_short(error)}")
    candidates = [(what, candidate) for what, candidate in candidates if not _same(candidate, model)]
    for index, (what, candidate) in enumerate(candidates):
        if index and _same(candidate, candidates[0][1]):
            return None  # it is what was refused already
        try:
            compare(model, candidate, store)
            return candidate
        except Difference as error:
            notes.append(f"{what} are not used for CUDA: {error}")
    return None


def _short(error: BaseException) -> str:
    """The first line of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# ONNX Runtime's basic optimizations


def _basic(model: ModelProto, store: Store, folder: Path) -> ModelProto:
    """What ONNX Runtime's basic level makes of a model; weights that it leaves alone stay external."""
    import onnxruntime as ort

    options = session_options(store)
    basic = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    target = folder / "basic.onnx"
    if not _has_half(model):
        options.graph_optimization_level = basic
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(target, load_external_data=False)
    if not hasattr(ort, "ModelCompiler"):
        raise Unfit("this ONNX Runtime cannot do it for 16-bit floats without casts")
    rest, removed = _without_defined(model)
    compiler = ort.ModelCompiler(
        options,
        rest.SerializeToString(),
        graph_optimization_level=basic,
        get_initializer_location_func=lambda _name, _value, place: place,
    )
    compiler.compile_to_file(str(target))
    return _with_removed(onnx.load(target, load_external_data=False), removed, model)


def _has_half(model: ModelProto) -> bool:
    for scope in scopes(model.graph):
        if any(tensor.data_type in HALF for tensor in scope.initializer):
            return True
        if any(value.type.tensor_type.elem_type in HALF for value in (*scope.input, *scope.output)):
            return True
    return any(
        attribute.t.data_type in HALF or (attribute.name in ("to", "dtype") and attribute.i in HALF)
        for node in all_nodes(model)
        for attribute in node.attribute
    )


def _without_defined(model: ModelProto) -> tuple[ModelProto, list[NodeProto]]:
    """Cut out the nodes of 16-bit floats that ONNX defines by other nodes; returns the rest and them."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    kinds = {name: value.type.tensor_type.elem_type for name, value in types.items()}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}

    def cut(node: NodeProto, known: dict[str, int]) -> bool:
        if not _is_defined(node, opsets):
            return False
        return any(known.get(name, 0) in {*HALF, 0} for name in (*node.input, *node.output) if name)

    for scope in list(scopes(model.graph))[1:]:
        if any(cut(node, {}) for node in scope.node):
            raise Unfit("a body of If, Loop or Scan computes in 16-bit floats")
    removed = [node for node in model.graph.node if cut(node, kinds)]
    rest = ModelProto()
    rest.CopyFrom(model)
    del rest.graph.node[:], rest.graph.value_info[:]
    rest.graph.node.extend(node for node in model.graph.node if not cut(node, kinds))
    made = {name for node in rest.graph.node for name in node.output}
    gone = {name for node in removed for name in node.output if name}
    outputs = [value for value in rest.graph.output if value.name not in gone]
    wanted = [n for n in dict.fromkeys(name for node in removed for name in node.input) if n in made]
    for name in [*sorted(gone), *wanted]:
        if not kinds.get(name):
            raise Unfit(f"the type of the value {name!r} is not known")
    rest.graph.input.extend(_typed(name, types) for name in sorted(gone))
    there = {value.name for value in outputs}
    outputs += [_typed(name, types) for name in wanted if name not in there]
    del rest.graph.output[:]
    rest.graph.output.extend(outputs)
    return rest, removed


def _typed(name: str, types: dict[str, ValueInfoProto]) -> ValueInfoProto:
    value = ValueInfoProto()
    value.CopyFrom(types[name])
    return value


def _is_defined(node: NodeProto, opsets: dict[str, int]) -> bool:
    if node.domain not in STANDARD:
        return True  # perhaps; and its types are not known
    try:
        schema: Any = defs.get_schema(node.op_type, opsets.get("", 1), "")
    except defs.SchemaError:
        return True
    return bool(schema.has_function or schema.has_context_dependent_function)


def _with_removed(fused: ModelProto, removed: list[NodeProto], original: ModelProto) -> ModelProto:
    """Put the nodes back that were cut out."""
    if not removed:
        return fused
    graph = fused.graph
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    there = {tensor.name for tensor in graph.initializer}
    names = dict.fromkeys(name for node in removed for name in node.input if name in weights)
    graph.initializer.extend(weights[name] for name in names if name not in there)
    nodes = [*graph.node, *removed]
    gone = {name for node in removed for name in node.output}
    wanted = [value for value in graph.input if value.name not in gone]
    del graph.input[:], graph.output[:]
    graph.input.extend(wanted)
    graph.output.extend(original.graph.output)
    ordered = in_order(nodes, graph)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)
    return fused


def in_order(nodes: Sequence[NodeProto], graph: GraphProto) -> list[NodeProto]:
    """Sort nodes so that each comes behind what it reads, otherwise as they are."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {sparse.values.name for sparse in graph.sparse_initializer} | {""}
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    missing = [
        {makers[name] for name in _read_by(node) if name in makers and name not in known} for node in nodes
    ]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, needed in enumerate(missing):
        for maker in needed:
            readers[maker].append(index)
    ready = [index for index, needed in enumerate(missing) if not needed]
    heapq.heapify(ready)
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(nodes[index])
        for reader in readers[index]:
            missing[reader].discard(index)
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(order) != len(nodes):
        raise Unfit("its nodes cannot be put in order")
    return order


def _read_by(node: NodeProto) -> Iterable[str]:
    yield from node.input
    for body in bodies(node):
        for scope in scopes(body):
            yield from (value.name for value in scope.output)
            for inner in scope.node:
                yield from inner.input


# The fusions in Python


def _by_python(model: ModelProto, store: Store, folder: Path) -> ModelProto:
    """What fuse_child.py makes of a model."""
    source, target = folder / "source.onnx", folder / "fused.onnx"
    source.write_bytes(model.SerializeToString())
    command = [sys.executable, "-P", str(Path(__file__).with_name("fuse_child.py"))]
    path = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            [*command, str(store.root), str(source), str(target)],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unfit(f"it took more than {SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise Unfit(last)
    return onnx.load(target, load_external_data=False)


# What comes out


def _tidy(fused: ModelProto, original: ModelProto, weights: Sequence[Weight], store: Store) -> ModelProto:
    """Bring a fused graph into the one form that depends on nothing but the model; checks what must hold.

    Inputs, outputs and all that is said of the model are the original's; weights that the original has are
    references to the store; others have names that it does not have.
    """
    graph = fused.graph
    inputs = {value.name for value in original.graph.input}
    found = {value.name for value in graph.input}  # one that nothing reads may be gone, and is put back
    defaults = {tensor.name for tensor in original.graph.initializer} & inputs
    if found - inputs or defaults - {t.name for t in graph.initializer} or defaults - found:
        raise Unfit("the inputs of the model changed")
    if sorted(v.name for v in graph.output) != sorted(v.name for v in original.graph.output):
        raise Unfit("the outputs of the model changed")
    given = {node.domain for node in all_nodes(original)}
    for node in all_nodes(fused):
        if node.domain in FOREIGN_DOMAINS and node.domain not in given:
            raise Unfit(f"an operator for another device came in: {node.domain}:{node.op_type}")
    casts = [sum(node.op_type == "Cast" for node in all_nodes(m)) for m in (original, fused)]
    if _has_half(original) and casts[1] > casts[0] + 1:  # one, of an attention mask, is the fusions' own
        raise Unfit("casts came in")
    result = ModelProto()
    result.CopyFrom(original)
    result.graph.CopyFrom(graph)
    del result.functions[:]
    result.functions.extend(fused.functions)
    for field in ("input", "output"):
        result.graph.ClearField(field)
        getattr(result.graph, field).extend(getattr(original.graph, field))
    result.graph.name, result.graph.doc_string = original.graph.name, original.graph.doc_string
    nodes = [NodeProto.FromString(n.SerializeToString()) for n in in_order(result.graph.node, result.graph)]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    _drop_unused(result)
    make_names_unique(result)
    _settle_weights(result, weights, store)
    for scope in scopes(result.graph):
        del scope.value_info[:]
        sorted_tensors = sorted(
            (TensorProto.FromString(t.SerializeToString()) for t in scope.initializer), key=lambda t: t.name
        )
        del scope.initializer[:]
        scope.initializer.extend(sorted_tensors)
    used = {"" if node.domain == "ai.onnx" else node.domain for node in all_nodes(result)}
    versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in fused.opset_import}
    del result.opset_import[:]
    result.opset_import.extend(helper.make_opsetid(d, versions.get(d, 1)) for d in sorted({*used, ""}))
    return result


def _drop_unused(model: ModelProto) -> None:
    """Remove initializers of the main graph that nothing reads, unless the caller may override them."""
    graph = model.graph
    read = {name for node in graph.node for name in _read_by(node)}
    read |= {value.name for value in (*graph.input, *graph.output)}
    kept = [TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _settle_weights(model: ModelProto, weights: Sequence[Weight], store: Store) -> None:
    """Make weights that the store holds external, and give the others names that no weight of `weights` has."""
    known = {weight.name: weight for weight in weights}
    lengths = {weight.digest: weight.bytes for weight in weights}
    taken = {*known, *(name for scope in scopes(model.graph) for name in _names_of(scope))}
    renames: dict[str, str] = {}
    inputs = {value.name for value in (*model.graph.input, *model.graph.output)}
    for scope in scopes(model.graph):
        for tensor in scope.initializer:
            if tensor.data_type == TensorProto.STRING:
                continue
            size = tensor_bytes(tensor)
            if is_external(tensor):
                digest = external_entries(tensor).get("location", "").rpartition("/")[2]
                if not is_digest(digest) or lengths.get(digest) != size:
                    raise Unfit(f"the weight {tensor.name!r} is not where it was")
            elif size < MINIMUM_WEIGHT:
                continue
            else:
                data = inline_bytes(tensor)
                digest = digest_of(data)
                for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                    tensor.ClearField(field)
                tensor.raw_data = data
            if digest in lengths:
                make_external(tensor, store.objects.location(digest), size)
            was = known.get(tensor.name)
            dtype = TensorProto.DataType.Name(tensor.data_type).lower()
            if was and (was.digest, was.dtype, was.shape) != (digest, dtype, tuple(tensor.dims)):
                if tensor.name in inputs:
                    raise Unfit(f"the weight {tensor.name!r} changed")
                renames[tensor.name] = tensor.name = unused(f"{tensor.name}__fused", taken)
    if renames:
        for scope in scopes(model.graph):
            for node in scope.node:
                for index, name in enumerate(node.input):
                    node.input[index] = renames.get(name, name)
            for value in scope.output:
                value.name = renames.get(value.name, value.name)
            for annotation in scope.quantization_annotation:
                annotation.tensor_name = renames.get(annotation.tensor_name, annotation.tensor_name)


def _names_of(scope: GraphProto) -> Iterable[str]:
    yield from (tensor.name for tensor in scope.initializer)
    yield from (value.name for value in (*scope.input, *scope.output))
    for node in scope.node:
        yield from node.input
        yield from node.output


def _same(one: ModelProto, other: ModelProto) -> bool:
    """Whether two graphs have the same operators (but for Constant and Identity) and the same large weights."""
    return _census(one) == _census(other)


def _census(model: ModelProto) -> tuple[Counter[tuple[str, str]], set[tuple[str, str]]]:
    operators = Counter(
        ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
        for node in all_nodes(model)
        if node.op_type not in ("Constant", "Identity")
    )
    return operators, _weights_of(model)


def _weights_of(model: ModelProto) -> set[tuple[str, str]]:
    """Name and place of each large weight; new ones have no place yet."""
    return {
        (t.name, external_entries(t).get("location", ""))
        for scope in scopes(model.graph)
        for t in scope.initializer
        if t.data_type != TensorProto.STRING and (is_external(t) or tensor_bytes(t) >= MINIMUM_WEIGHT)
    }
