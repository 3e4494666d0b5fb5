"""Walking ONNX graphs: every scope, every weight in it, names that are unique in all of them.

A scope is the main graph or the body of an If, Loop, Scan or any other node with a graph attribute.
Source: the ONNX IR specification, https://github.com/onnx/onnx/blob/main/docs/IR.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from glake_infer.allocators.errors import ModelError

MINIMUM_WEIGHT = 1024
"""Bytes from which a weight goes to the store; smaller ones stay in the graph."""

PACKED_BITS = {
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4,
    getattr(TensorProto, "INT2", -1): 2, getattr(TensorProto, "UINT2", -2): 2,
}  # fmt: skip
"""Bits of the element types that ONNX packs several to a byte."""


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs that a node holds."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def scopes(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield `graph` and every graph below it, outer ones first, in the order of their nodes."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from scopes(body)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Yield every node of every scope and of every model-local function."""
    for graph in scopes(model.graph):
        yield from graph.node
    for function in model.functions:
        pending = list(function.node)
        while pending:
            node = pending.pop()
            yield node
            for body in bodies(node):
                for inner in scopes(body):
                    pending.extend(inner.node)


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a dense tensor's content as `raw_data` would hold it; 0 for strings."""
    if tensor.data_type == TensorProto.STRING:
        return 0
    count = 1
    for dimension in tensor.dims:
        if dimension < 0:
            raise ModelError(
                f"weight {tensor.name!r} declares the negative dimension {dimension}: the model is damaged."
            )
        count *= dimension
    if bits := PACKED_BITS.get(tensor.data_type):
        return (count * bits + 7) // 8
    try:
        return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError):
        raise ModelError(
            f"weight {tensor.name!r} has the element type {tensor.data_type}, which this version of onnx "
            "does not "
            f"know. Install a newer onnx (`pip install -U onnx`), or export the model with a supported type."
        ) from None


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor's bytes lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def inline_bytes(tensor: TensorProto) -> bytes:
    """Raw little-endian bytes of a tensor in the model; raises ModelError where they do not fit its shape."""
    expected = tensor_bytes(tensor)
    data = tensor.raw_data if tensor.HasField("raw_data") else None
    if data is None:
        try:
            data = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"weight {tensor.name!r} is damaged: {error}. Export the model again."
            ) from error
    if len(data) != expected:
        raise ModelError(
            f"weight {tensor.name!r} holds {len(data)} bytes, but its shape {list(tensor.dims)} and type "
            f"{TensorProto.DataType.Name(tensor.data_type)} need {expected}. The model is damaged; export it "
            "again."
        )
    return bytes(data)


def external_entries(tensor: TensorProto) -> dict[str, str]:
    """The `external_data` keys of a tensor."""
    return {entry.key: entry.value for entry in tensor.external_data}


def make_external(tensor: TensorProto, location: str, length: int, **more: str) -> None:
    """Turn `tensor` into a reference to `length` bytes at the start of `location`."""
    for field in (
        "raw_data",
        "float_data",
        "int32_data",
        "int64_data",
        "double_data",
        "uint64_data",
        "string_data",
    ):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": location, "offset": "0", "length": str(length), **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def to_numpy(tensor: TensorProto, data: bytes | memoryview) -> np.ndarray:
    """View raw bytes as the array that `tensor` declares (numpy or ml_dtypes element type)."""
    copy = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=bytes(data))
    return numpy_helper.to_array(copy)


@dataclass(frozen=True)
class Initializer:
    """A weight in its scope."""

    scope: GraphProto
    tensor: TensorProto
    overridable: bool


def initializers(model: ModelProto) -> Iterator[Initializer]:
    """Yield the dense, non-string initializers of every scope.

    One that is an input of the main graph too may be overridden by the caller, from IR version 4 on.
    """
    inputs = {value.name for value in model.graph.input} if model.ir_version >= 4 else set()
    for scope in scopes(model.graph):
        for tensor in scope.initializer:
            if tensor.data_type != TensorProto.STRING:
                yield Initializer(scope, tensor, scope is model.graph and tensor.name in inputs)


def lift_constants(model: ModelProto, minimum: int) -> int:
    """Turn `Constant` nodes of at least `minimum` bytes into initializers of their scope; returns how many.

    A constant that is an output of a subgraph keeps a node (Identity), because a body's outputs must be
    made by nodes. Models older than IR version 4 require every initializer to be an input: theirs are
    lifted in the main graph only and listed as inputs.
    """
    lifted = 0
    old = model.ir_version < 4
    taken = _all_names(model)
    for scope in scopes(model.graph):
        if old and scope is not model.graph:
            continue
        outputs = {value.name for value in scope.output}
        for index in reversed(range(len(scope.node))):
            node = scope.node[index]
            tensor = constant_tensor(node)
            if tensor is None or tensor_bytes(tensor) < minimum:
                continue
            lifted += 1
            name = node.output[0]
            weight = scope.initializer.add()
            weight.CopyFrom(tensor)
            weight.name = name
            if name in outputs:
                weight.name = unused(f"{name}__weight", taken)
                node.CopyFrom(helper.make_node("Identity", [weight.name], [name], name=node.name))
            else:
                del scope.node[index]
            if old:
                scope.input.append(
                    helper.make_tensor_value_info(weight.name, tensor.data_type, list(tensor.dims))
                )
    return lifted


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """The numbers that a `Constant` node stands for; None for strings and for every other node."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for attribute in node.attribute:
        if attribute.ref_attr_name:  # inside a function: whoever calls it says what the value is
            return None
        if attribute.name == "value" and attribute.t.data_type != TensorProto.STRING:
            return attribute.t
        if attribute.name == "value_floats":
            return numpy_helper.from_array(np.array(attribute.floats, np.float32))
        if attribute.name == "value_ints":
            return numpy_helper.from_array(np.array(attribute.ints, np.int64))
    return None


def make_names_unique(model: ModelProto) -> dict[str, int]:
    """Rename initializers so that nothing else in any scope has their names; returns {name: times found}.

    ONNX Runtime's AddInitializer matches by name in every scope at once, so two branches that both call a
    weight `w` would silently get the same one. ORT also makes initializers of `Constant` nodes and of sparse
    tensors, and the guard moves weights to the main graph, so the names of all values count. The first weight
    keeps its name (inputs can never be renamed: they are in the main graph, which comes first). Raises
    ModelError where one scope has two weights of one name.
    """
    taken = _all_names(model)
    seen: set[str] = set()
    for scope in scopes(model.graph):
        seen.update(out for node in scope.node for out in node.output)
        seen.update(sparse.values.name for sparse in scope.sparse_initializer)
        seen.update(value.name for value in scope.input)
    repeated: dict[str, int] = {}
    _rename_scope(model.graph, {}, seen, taken, repeated)
    return repeated


def unused(name: str, taken: set[str]) -> str:
    """`name`, with something behind it where it is in `taken`, which then holds it."""
    new = next(
        new for number in itertools.count() if (new := f"{name}_{number}" if number else name) not in taken
    )
    taken.add(new)
    return new


def _all_names(model: ModelProto) -> set[str]:
    names: set[str] = set()
    for scope in scopes(model.graph):
        names.update(value.name for value in (*scope.input, *scope.output))
        names.update(tensor.name for tensor in scope.initializer)
        names.update(sparse.values.name for sparse in scope.sparse_initializer)
        for node in scope.node:
            names.update(node.input)
            names.update(node.output)
    return names


def _rename_scope(
    scope: GraphProto, outer: dict[str, str], seen: set[str], taken: set[str], repeated: dict[str, int]
) -> None:
    own = {value.name for value in scope.input} | {out for node in scope.node for out in node.output}
    own |= {tensor.name for tensor in scope.initializer} | {s.values.name for s in scope.sparse_initializer}
    renames = {old: new for old, new in outer.items() if old not in own}
    inputs = {value.name for value in scope.input}
    outputs = {value.name for value in scope.output}
    here: set[str] = set()
    for tensor in scope.initializer:
        if tensor.name in here:
            raise ModelError(
                f"two weights of the graph {scope.name!r} have the name {tensor.name!r}, so it is not clear "
                f"which one is meant. The model is damaged; export it again."
            )
        here.add(tensor.name)
        if tensor.name not in seen or tensor.name in inputs:
            seen.add(tensor.name)
            continue
        old = tensor.name
        repeated[old] = repeated.get(old, 1) + 1
        new = unused(f"{old}__{repeated[old]}", taken)
        seen.add(new)
        tensor.name = new
        renames[old] = new
        if old in outputs:  # the output keeps its name for whoever reads it
            scope.node.append(helper.make_node("Identity", [new], [old]))
        for info in scope.value_info:
            if info.name == old:
                info.name = new
    for annotation in scope.quantization_annotation:
        annotation.tensor_name = renames.get(annotation.tensor_name, annotation.tensor_name)
        for entry in annotation.quant_parameter_tensor_names:
            entry.value = renames.get(entry.value, entry.value)
    for node in scope.node:
        if renames and not (node.op_type == "Identity" and node.output[0] in renames):
            for index, name in enumerate(node.input):
                if name in renames:
                    node.input[index] = renames[name]
        for body in bodies(node):
            _rename_scope(body, renames, seen, taken, repeated)
