"""Heads of fine-tunes, padded so that the trunk's weights lie alike in the engines of all of them.

An engine's weights are one block, last layers first, each tensor at a multiple of 128 bytes: a head of another size moves
the trunk. The pool can make up for multiples of ALIGNMENT bytes, no less. So heads get columns of zeros until a row of
their weights and their bias are multiples of it, and the columns are sliced off right behind, so that what follows sees
the true width. What is left (a pooler's bias, say) is made up for by `fill`, when the built engine has told.

The padded model computes the same numbers: a column of a product does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from glake_infer.models.graph import bodies, scopes, tensor_bytes, to_numpy, unused

ALIGNMENT = 512
"""Bytes: what TensorRT asks of the address of its block of weights."""

MOST_PADDED = 1 << 30
"""Bytes of a padded head, at most: it is in memory, and in the model that TensorRT is given."""

MINIMUM_OPSET = 10
"""Since when Slice takes its ranges as tensors."""

ZEROS_OPSET = 14
"""Since when Reshape can make axes of size 0 anywhere."""

FLOATS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}
FILLED: dict[int, int] = {**FLOATS, TensorProto.INT32: 4, TensorProto.INT64: 8}
"""Bytes of the types that `fill` adds to."""

Load = Callable[[TensorProto], bytes]
"""Gives a weight's bytes."""


@dataclass(frozen=True)
class Padded:
    """A head that got columns."""

    weight: str
    columns: int
    padded: int
    """Columns with those that were added."""
    added_bytes: int

    def __str__(self) -> str:
        return (
            f"the head {self.weight!r} got {self.padded - self.columns} columns of zeros ({self.added_bytes} bytes), which "
            "are sliced off again: so trunks of fine-tunes lie alike in their engines"
        )


def pad_heads(model: ModelProto, load: Load) -> list[Padded]:
    """Pad the last matrix before each output, with its bias; `model` is changed in place.

    A head is a MatMul or Gemm with a weight of the main graph, and the Add of a bias behind it, with no other weight between
    it and an output. Left alone are those whose columns fill ALIGNMENT already, whose weight something else uses, and
    integers.
    """
    graph = model.graph
    if _opset(model) < MINIMUM_OPSET or model.ir_version < 4:
        return []
    names = _Names(graph)
    padded = []
    for node in list(_heads(graph, names)):
        if (done := _pad(graph, names, node, load)) is not None:
            padded.append(done)
    return padded


def fill(model: ModelProto, count: int) -> str | None:
    """Add a weight of `count` bytes (a multiple of 8), last in the order of layers; returns the output that carries it.

    It is put behind an output's elements and sliced off again, which costs a copy of that output: the smallest one of
    floats, or else of integers, which may be sizes that TensorRT computes on the host, without weights. None, and no
    change, where there is no such output.
    """
    graph = model.graph
    candidates = [
        (kind not in FLOATS, _elements(value.type.tensor_type.shape) or 1 << 62, number, value)
        for number, value in enumerate(graph.output)
        if (kind := value.type.tensor_type.elem_type) in FILLED and value.type.tensor_type.HasField("shape")
    ]
    names = _Names(graph)
    candidates = [c for c in candidates if c[3].name in names.maker]
    if not candidates or _opset(model) < MINIMUM_OPSET or model.ir_version < 4:
        return None
    output = min(candidates, key=lambda candidate: candidate[:3])[3]
    kind = output.type.tensor_type.elem_type
    made = names.fresh
    inner = made(f"{output.name}__unfilled")
    maker = names.maker[output.name]
    maker.output[list(maker.output).index(output.name)] = inner
    for node in (node for scope in scopes(graph) for node in scope.node):
        for index, name in enumerate(node.input):
            if name == output.name:
                node.input[index] = inner
    numbers = np.arange(1, count // FILLED[kind] + 1)
    filling = helper.make_tensor(made("glake_fill"), kind, [len(numbers)], numbers)
    minus, zero = made("glake_fill_minus"), made("glake_fill_zero")
    graph.initializer.extend(
        [
            filling,
            numpy_helper.from_array(np.array([-1], np.int64), minus),
            numpy_helper.from_array(np.array([0], np.int64), zero),
        ]
    )
    shape, flat, longer, size, end, cut = (
        made(f"{output.name}__{part}") for part in ("shape", "flat", "longer", "size", "end", "cut")
    )
    zeros: dict[str, Any] = {"allowzero": 1} if _opset(model) >= ZEROS_OPSET else {}
    graph.node.extend(
        [
            helper.make_node("Shape", [inner], [shape]),
            helper.make_node("Reshape", [inner, minus], [flat]),
            helper.make_node("Concat", [flat, filling.name], [longer], axis=0),
            helper.make_node("Size", [inner], [size]),
            helper.make_node("Reshape", [size, minus], [end]),
            helper.make_node("Slice", [longer, zero, end], [cut]),
            helper.make_node("Reshape", [cut, shape], [output.name], **zeros),
        ]
    )
    return str(output.name)


class _Names:
    """Who makes and who uses each value of the main graph, its weights, and names that are free."""

    def __init__(self, graph: GraphProto) -> None:
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.outputs = {value.name for value in graph.output}
        self.inputs = {value.name for value in graph.input}
        self.uses: dict[str, int] = {}
        self.taken: set[str] = self.outputs | self.inputs | set(self.maker)
        for scope in scopes(graph):
            self.taken.update(tensor.name for tensor in scope.initializer)
            for node in scope.node:
                self.taken.update(node.output)
                for name in node.input:
                    self.uses[name] = self.uses.get(name, 0) + 1
        self.uses.update({name: self.uses.get(name, 0) + 1 for name in self.outputs})

    def fresh(self, name: str) -> str:
        return unused(name, self.taken)


def _opset(model: ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _elements(shape: object) -> int:
    total = 1
    for axis in shape.dim:  # type: ignore[attr-defined]
        total *= axis.dim_value or 64  # nobody knows: enough to prefer a row of scores to a sequence of them
    return total


def _heads(graph: GraphProto, names: _Names) -> Iterator[NodeProto]:
    """Yield the products with a weight behind which, on the way to an output, no other layer comes."""
    layers = [node for node in graph.node if _is_product(node, names) or _bears_weight(node, names)]
    inner = _before(layers, names, through=lambda node: True)
    outputs = [helper.make_node("Identity", [value.name], []) for value in graph.output]
    numbers = {id(layer) for layer in layers}
    last = _before(outputs, names, through=lambda node: id(node) not in numbers)
    for node in layers:
        if _is_product(node, names) and id(node) in last and id(node) not in inner:
            yield node


def _before(
    nodes: Iterable[NodeProto], names: _Names, *, through: Callable[[NodeProto], bool]
) -> dict[int, NodeProto]:
    """What makes the inputs of `nodes`, and what makes the inputs of those that `through` lets pass, by identity."""
    found: dict[int, NodeProto] = {}
    pending = [name for node in nodes for name in node.input]
    while pending:
        node = names.maker.get(pending.pop())
        if node is not None and id(node) not in found:
            found[id(node)] = node
            if through(node):
                pending += node.input
    return found


def _is_product(node: NodeProto, names: _Names) -> bool:
    return node.op_type in ("MatMul", "Gemm") and len(node.input) > 1 and node.input[1] in names.weights


def _bears_weight(node: NodeProto, names: _Names) -> bool:
    """Whether a node has a weight that makes it a layer: a vector that is added may be the bias of a product before it."""
    if any(True for _ in bodies(node)):
        return True
    if node.op_type == "Add" and any(
        (maker := names.maker.get(name)) is not None and maker.op_type == "MatMul" for name in node.input
    ):
        return False
    return any(
        name in names.weights
        and names.weights[name].data_type in FLOATS
        and tensor_bytes(names.weights[name]) > 64
        for name in node.input
    )


def _pad(graph: GraphProto, names: _Names, node: NodeProto, load: Load) -> Padded | None:
    weight = names.weights[node.input[1]]
    if weight.data_type not in FLOATS or len(weight.dims) != 2 or not _private(names, weight.name):
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    transposed = bool(attributes.get("transB", 0))
    columns = weight.dims[0 if transposed else 1]
    item = FLOATS[weight.data_type]
    wanted = -(-columns * item // ALIGNMENT) * ALIGNMENT // item
    grown = tensor_bytes(weight) // max(columns, 1) * wanted
    if not columns or wanted == columns or grown > MOST_PADDED:
        return None
    last, biases = node, []
    if node.op_type == "Gemm":
        if len(node.input) > 2 and node.input[2]:
            biases = [(node, 2)]
    elif (follower := _bias_behind(graph, names, node)) is not None:
        last, biases = follower, [(follower, 1 - list(follower.input).index(node.output[0]))]
    for user, index in biases:
        bias = names.weights.get(user.input[index])
        if bias is None or not _private(names, bias.name) or not _fits(bias, columns):
            return None
    added = grown - tensor_bytes(weight)
    _grow(weight, load, axis=0 if transposed else 1, by=wanted - columns)
    for user, index in biases:
        bias = names.weights[user.input[index]]
        if bias.dims and bias.dims[-1] == columns:  # one number for all columns stays
            added += (wanted - columns) * item
            _grow(bias, load, axis=len(bias.dims) - 1, by=wanted - columns)
    if last is not node:
        _forget(graph, node.output[0])
    _slice_off(graph, names, last, columns)
    return Padded(weight.name, columns, wanted, added)


def _private(names: _Names, weight: str) -> bool:
    return names.uses.get(weight, 0) == 1 and weight not in names.inputs


def _fits(bias: TensorProto, columns: int) -> bool:
    """Whether a bias has a number per column, or one for all."""
    *rows, width = bias.dims or (1,)
    return all(axis == 1 for axis in rows) and width in (1, columns)


def _bias_behind(graph: GraphProto, names: _Names, node: NodeProto) -> NodeProto | None:
    """The Add of a weight that alone uses a product."""
    value = node.output[0]
    if names.uses.get(value, 0) != 1 or value in names.outputs:
        return None
    for user in graph.node:
        if value in user.input:
            if user.op_type == "Add" and any(name in names.weights for name in user.input):
                return user
            return None
    return None


def _grow(tensor: TensorProto, load: Load, *, axis: int, by: int) -> None:
    """Add zeros to a weight along an axis; its bytes are in the model then."""
    array = to_numpy(tensor, load(tensor))
    widths = [(0, by if number == axis else 0) for number in range(array.ndim)]
    grown = numpy_helper.from_array(np.pad(array, widths), tensor.name)
    grown.data_type = tensor.data_type
    tensor.CopyFrom(grown)


def _forget(graph: GraphProto, value: str) -> None:
    """Drop what the model says of an inner value's shape, which is another one now."""
    for number in reversed(range(len(graph.value_info))):
        if graph.value_info[number].name == value:
            del graph.value_info[number]


def _slice_off(graph: GraphProto, names: _Names, node: NodeProto, columns: int) -> None:
    """Slice the columns that were added off the node's output, which keeps its name."""
    value = node.output[0]
    wide = names.fresh(f"{value}__padded")
    node.output[0] = wide
    parts = []
    for part, number in (("start", 0), ("end", columns), ("axis", -1)):
        parts.append(names.fresh(f"{value}__{part}"))
        graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), parts[-1]))
    cut = helper.make_node("Slice", [wide, *parts], [value], name=names.fresh(f"{value}__unpad"))
    graph.node.insert(list(graph.node).index(node) + 1, cut)
    names.maker[value], names.maker[wide] = cut, node
