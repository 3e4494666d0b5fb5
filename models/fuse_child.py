"""The fusions of `onnxruntime.transformers`, in a Python process of their own.

    python fuse_child.py ROOT SOURCE TARGET     SOURCE's external weights lie below ROOT

That package puts its folder on `sys.path`, where its modules have names such as `constants`, it prints, and it
wants every weight in memory: none of that should happen to the process that converts. No import of ours either.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto


class Shapes(dict[str, ValueInfoProto]):
    """What ONNX's own inference says of each value, in the form of ONNX Runtime's (which needs sympy).

    An axis is its number or its symbol; one that nothing is known of is equal to no other.
    """

    def __init__(self, model: ModelProto) -> None:
        super().__init__()
        self.known_vi_ = self
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        for value in (*graph.value_info, *graph.input, *graph.output):
            self[value.name] = value
        for tensor in graph.initializer:
            self[tensor.name] = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )

    def __missing__(self, name: str) -> ValueInfoProto:
        return ValueInfoProto(name=name)

    def get_edge_shape(self, name: str) -> list[int | str] | None:
        """The shape of a value; None where not even the rank is known."""
        kind = self[name].type.tensor_type
        if not kind.HasField("shape"):
            return None
        return [
            axis.dim_value if axis.HasField("dim_value") else axis.dim_param or f"{name}:{index}"
            for index, axis in enumerate(kind.shape.dim)
        ]

    def compare_shape(self, one: str, other: str) -> bool:
        """Whether two values have the same shape, for certain."""
        shape = self.get_edge_shape(one)
        return shape is not None and shape == self.get_edge_shape(other)


def scopes(graph: GraphProto) -> list[GraphProto]:
    """The graph and all bodies below it."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node or body.output:
                    found += scopes(body)
    return found


def load_weights(model: ModelProto, root: Path) -> dict[str, TensorProto]:
    """Bring external weights inside; returns them by name as they were."""
    outside = {}
    for scope in scopes(model.graph):
        for tensor in scope.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                outside[tensor.name] = TensorProto.FromString(tensor.SerializeToString())
                entries = {entry.key: entry.value for entry in tensor.external_data}
                data = (root / entries["location"]).read_bytes()
                del tensor.external_data[:]
                tensor.data_location = TensorProto.DEFAULT
                tensor.raw_data = data
    return outside


def put_back(model: ModelProto, outside: dict[str, TensorProto]) -> None:
    """Make the weights that are still there external again (fusions give new ones new names)."""
    for scope in scopes(model.graph):
        for tensor in scope.initializer:
            was = outside.get(tensor.name)
            if was is not None and (was.dims, was.data_type) == (tensor.dims, tensor.data_type):
                tensor.CopyFrom(was)


def lift_unsqueezes(model: ModelProto) -> None:
    """Bring the expansion of a mask into the form that attention is known by: in two steps, before the arithmetic.

        Unsqueeze(1 - Cast(mask), [1, 2])  ->  1 - Cast(Unsqueeze(Unsqueeze(mask, 1), 2))

    Exact: a cast and a number are the same for every element.
    """
    graph = model.graph
    if next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0) < 13:
        return
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    users: dict[str, int] = {}
    for scope in scopes(graph):
        for name in [n for node in scope.node for n in node.input] + [value.name for value in scope.output]:
            users[name] = users.get(name, 0) + 1
    made = {name: node for node in graph.node for name in node.output}

    def varying(node: NodeProto) -> int | None:
        """Which input of a cast, or of arithmetic with one number, is not the number."""
        if node.op_type == "Cast":
            return 0
        if node.op_type in ("Sub", "Mul", "Add"):
            fixed = [not list(numbers[n].dims) if n in numbers else False for n in node.input]
            return fixed.index(False) if sum(fixed) == 1 else None
        return None

    nodes: list[NodeProto] = []
    for node in graph.node:
        axes = numbers.get(node.input[1]) if node.op_type == "Unsqueeze" and len(node.input) == 2 else None
        if axes is None or onnx.numpy_helper.to_array(axes).tolist() != [1, 2]:
            nodes.append(node)
            continue
        above: list[tuple[NodeProto, int]] = []
        source = node.input[0]
        while (
            (maker := made.get(source)) is not None
            and users[source] == 1
            and source not in outputs
            and (index := varying(maker)) is not None
        ):
            above.insert(0, (maker, index))
            source = maker.input[index]
        result = node.output[0]
        first = f"{result}__first"
        for number in (1, 2):
            name = f"glake_axis_{number}"
            if name not in numbers:
                numbers[name] = onnx.numpy_helper.from_array(np.array([number], np.int64), name)
                graph.initializer.append(numbers[name])
        last = f"{result}__last" if above else result
        nodes.append(onnx.helper.make_node("Unsqueeze", [source, "glake_axis_1"], [first], f"{first}_node"))
        nodes.append(onnx.helper.make_node("Unsqueeze", [first, "glake_axis_2"], [last], f"{last}_node"))
        for maker, index in above:
            nodes.remove(maker)
            moved = NodeProto()
            moved.CopyFrom(maker)
            moved.input[index] = last
            if maker is above[-1][0]:
                moved.output[0] = result
            last = moved.output[0]
            nodes.append(moved)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def fuse(model: ModelProto, shapes: Shapes) -> ModelProto:
    """Layer norms, gelus, attention with its weights packed; masks may be any (`use_raw_attention_mask`).

    Embeddings are left alone: their fusion saves no weight, and their kernel trusts the ids.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

    for name, module in list(sys.modules.items()):
        if "transformers" in (getattr(module, "__file__", None) or ""):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)
    options.enable_embed_layer_norm = False
    fused: Any = BertOnnxModel(model)
    fused.infer_runtime_shape = lambda *_, **__: shapes
    fused.optimize(options)
    fused.topological_sort(is_deterministic=True)
    result: ModelProto = fused.model
    return result


def nodes_are_sound(nodes: list[NodeProto]) -> bool:
    """Whether no value is made twice."""
    made = [name for node in nodes for name in node.output if name]
    return len(made) == len(set(made))


def main(root: str, source: str, target: str) -> None:
    """Read SOURCE, write TARGET."""
    model = onnx.load(source, load_external_data=False)
    lift_unsqueezes(model)
    shapes = Shapes(model)
    outside = load_weights(model, Path(root))
    model = fuse(model, shapes)
    put_back(model, outside)
    if not nodes_are_sound(list(model.graph.node)):
        raise ValueError("a value is made twice")
    Path(target).write_bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
