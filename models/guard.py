"""The `cpu-lean` variant: a graph that ONNX Runtime does not blow up when it optimizes for the CPU.

ONNX Runtime folds constants: an int8 weight that is cast and scaled becomes a private fp32 copy of four
times its size, and fp16 weights become fp32 copies because the CPU has few fp16 kernels. A weight that the
caller could override is not a constant, so nothing folds it: every weight at risk is made overridable here
(listed among the inputs; its default stays the stored weight, and nobody is asked to feed it).

That moves the cast to every run. Two rewrites take most of its cost away again, both exact up to the
rounding of one multiplication (the first is left alone in fp16, whose range the unscaled sums would leave):

    MatMul(x, Cast(W) * scale)          ->  MatMul(x, Cast(W)) * scale            scale per column, or one
    Gather(Cast(W) * scale, ids)        ->  Cast(Gather(W, ids)) * Gather(scale, ids)  scale per row, or one
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from glake_infer.models.graph import PACKED_BITS, bodies, scopes, tensor_bytes

MINIMUM_BYTES = 16 << 10
"""Smaller weights may be folded: their copies are not worth a cast at every run."""

HALF = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
NARROW = {
    TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ, *PACKED_BITS, *HALF,
}  # fmt: skip
PASSING = {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that are folded along with a cast behind them."""


@dataclass
class GuardReport:
    """What the guard did. `stored` and `folded` are bytes of the guarded weights as they are and as fp32."""

    weights: list[str] = field(default_factory=list)
    stored: int = 0
    folded: int = 0
    rewritten: int = 0
    dtypes: set[str] = field(default_factory=set)

    def note(self) -> str:
        """One sentence for people."""
        return (
            f"cpu-lean keeps ONNX Runtime from folding {len(self.weights)} {'/'.join(sorted(self.dtypes))} "
            "weights "
            f"({self.stored / 2**20:.1f} MiB) to fp32 copies ({self.folded / 2**20:.1f} MiB); "
            f"{self.rewritten} products were moved behind their MatMul or Gather"
        )


class _Scope:
    """Who makes and who uses each value of a graph (uses in a body are uses by its node)."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in {*node.input, *_names_below(node)}:
                self.users[name].append(node)
        self.outputs = {value.name for value in graph.output}


def _names_below(node: NodeProto) -> set[str]:
    names: set[str] = set()
    for body in bodies(node):
        for scope in scopes(body):
            for inner in scope.node:
                names.update(inner.input)
            names.update(value.name for value in scope.output)
    return names


def guard_for_cpu(model: ModelProto) -> GuardReport:
    """Change `model` in place into its lean form; an empty report means that nothing was at risk."""
    report = GuardReport()
    if model.ir_version < 4:  # there every initializer is an input, and still a constant
        return report
    inputs = {value.name for value in model.graph.input}
    added: list[ValueInfoProto] = []
    for graph in list(scopes(model.graph)):
        scope = _Scope(graph)
        moved: list[TensorProto] = []
        for tensor in graph.initializer:
            if tensor.name in inputs or not _at_risk(tensor, scope):
                continue
            report.weights.append(tensor.name)
            report.stored += tensor_bytes(tensor)
            count = 1
            for dimension in tensor.dims:
                count *= dimension
            report.folded += 4 * count
            report.dtypes.add(TensorProto.DataType.Name(tensor.data_type).lower())
            added.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
            if graph is not model.graph:
                moved.append(tensor)
        for tensor in moved:  # only the main graph has inputs; a body sees the names of the graphs around it
            model.graph.initializer.add().CopyFrom(tensor)
        for tensor in moved:
            graph.initializer.remove(tensor)
        report.rewritten += _move_products(scope)
    model.graph.input.extend(added)
    return report


def _at_risk(tensor: TensorProto, scope: _Scope) -> bool:
    if tensor.data_type not in NARROW or tensor_bytes(tensor) < MINIMUM_BYTES:
        return False
    users = scope.users[tensor.name]
    if tensor.data_type in HALF:
        return any(node.op_type != "Gather" for node in users)
    return any(_leads_to_cast(node, scope, 4) for node in users)


def _leads_to_cast(node: NodeProto, scope: _Scope, depth: int) -> bool:
    if node.op_type == "Cast":
        return True
    if depth and node.op_type in PASSING:
        return any(_leads_to_cast(user, scope, depth - 1) for user in scope.users[node.output[0]])
    return False


def _move_products(scope: _Scope) -> int:
    """Apply the two rewrites of this module's head wherever they fit; returns how often."""
    done: list[tuple[NodeProto, NodeProto, NodeProto, TensorProto]] = []
    for cast in scope.graph.node:
        weight = scope.weights.get(cast.input[0]) if cast.op_type == "Cast" else None
        if weight is None or len(weight.dims) != 2 or not _at_risk(weight, scope):
            continue
        user = _only_user(cast.output[0], scope)
        if user is None or user.op_type != "Mul":
            continue
        factor = user.input[1] if user.input[0] == cast.output[0] else user.input[0]
        scale = scope.weights.get(factor)
        target = _only_user(user.output[0], scope)
        if scale is None or target is None:
            continue
        done.append((cast, user, target, scale))
    before: dict[int, list[NodeProto]] = {}
    dropped: set[int] = set()
    count = 0
    for cast, product, target, scale in done:
        weight = scope.weights[cast.input[0]]
        rows, columns = weight.dims
        shape = list(scale.dims)
        result = target.output[0]
        if (
            target.op_type == "MatMul"
            and target.input[1] == product.output[0]
            and target.input[0] != product.output[0]
        ):
            if scale.data_type == TensorProto.FLOAT16 or shape not in (
                [],
                [1],
                [1, 1],
                [columns],
                [1, columns],
            ):
                continue
            target.input[1] = cast.output[0]
            target.output[0] = f"{result}__unscaled"
            factor, nodes = _flat(scale, result, scope.graph)
            before[id(target)] = [
                *nodes,
                target,
                helper.make_node("Mul", [target.output[0], factor], [result]),
            ]
        elif target.op_type == "Gather" and target.input[0] == product.output[0] and _axis(target) == 0:
            if shape not in ([], [1], [1, 1], [rows, 1], [columns], [1, columns]):
                continue
            ids, narrow, wide = target.input[1], f"{result}__narrow", f"{result}__wide"
            target.input[0], target.output[0] = weight.name, narrow
            if shape == [rows, 1]:
                factor = f"{result}__scale"
                nodes = [helper.make_node("Gather", [scale.name, ids], [factor], axis=0)]
            else:
                factor, nodes = _flat(scale, result, scope.graph)
            product_node = helper.make_node("Mul", [wide, factor], [result])
            before[id(target)] = [*nodes, target, _cast(narrow, wide, cast), product_node]
            dropped.add(id(cast))
        else:
            continue
        dropped.add(id(product))
        count += 1
    if count:
        _rebuild(scope.graph, before, dropped)
    return count


def _flat(scale: TensorProto, result: str, graph: GraphProto) -> tuple[str, list[NodeProto]]:
    """A factor of rank 1 or 0, so that multiplying behind the product never adds an axis."""
    if len(scale.dims) < 2:
        return scale.name, []
    shape = f"{result}__scale_shape"
    graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [1], [-1]))
    return f"{result}__scale", [helper.make_node("Reshape", [scale.name, shape], [f"{result}__scale"])]


def _rebuild(graph: GraphProto, replaced: dict[int, list[NodeProto]], dropped: set[int]) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        if id(node) not in dropped:
            for part in replaced.get(id(node), [node]):
                copy = NodeProto()
                copy.CopyFrom(part)
                nodes.append(copy)
    del graph.node[:]
    graph.node.extend(nodes)


def _only_user(name: str, scope: _Scope) -> NodeProto | None:
    users = scope.users[name]
    return users[0] if len(users) == 1 and name not in scope.outputs else None


def _axis(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def _cast(source: str, target: str, like: NodeProto) -> NodeProto:
    node = helper.make_node("Cast", [source], [target])
    node.attribute.extend(like.attribute)
    return node
