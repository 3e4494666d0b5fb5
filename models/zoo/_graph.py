"""A small builder of ONNX graphs whose weights are placeholders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from glake_infer.allocators.errors import InputError
from glake_infer.models.zoo._weights import Weight

OPSET = 17
IR_VERSION = 8

Dimensions = Sequence[int | str]
Feeds = dict[str, npt.NDArray[Any]]


class Config(Protocol):
    """One architecture's sizes, and what follows from them."""

    @property
    def default_labels(self) -> int:
        """Size of the head's output where the caller names none."""

    def add_to(self, graph: "Graph", *, labels: int | None) -> None:
        """Add inputs, nodes, weights and outputs to `graph`; `labels` None leaves the head out."""

    def feeds(
        self, rng: np.random.Generator, *, batch: int, length: int | None, past: int, dtype: npt.DTypeLike
    ) -> Feeds:
        """Random inputs; see `zoo.feeds`."""


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


class Graph:
    """Collects nodes in order; every method that adds one returns the name of its output."""

    def __init__(self, name: str, *, dtype: npt.DTypeLike) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.weights: dict[str, Weight] = {}
        self._element = helper.np_dtype_to_tensor_dtype(self.dtype)
        self._name = name
        self._scopes: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._node_names: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes (not of the weights) added inside."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def input(self, name: str, dimensions: Dimensions, *, element: int | None = None) -> str:
        """Declare an input; its element type is the graph's dtype unless given."""
        self._inputs.append(helper.make_tensor_value_info(name, element or self._element, dimensions))
        return name

    def output(self, name: str, value: str, dimensions: Dimensions) -> None:
        """Declare `value` an output of the graph's dtype called `name`."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"/{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, self._element, dimensions))

    def weight(self, name: str, *shape: int, std: float, mean: float = 0.0, trunk: bool = True) -> str:
        """Add a weight; its initializer carries no data."""
        self.weights[name] = Weight(name=name, shape=shape, mean=mean, std=std, trunk=trunk)
        return name

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> str:
        """Add a small constant, of the graph's dtype unless given; equal ones are one `Constant` node."""
        array = np.asarray(value, dtype or self.dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"/Constant_{len(self._constants)}"
            tensor = numpy_helper.from_array(array, f"{name}_value")
            node = helper.make_node("Constant", [], [f"{name}_output_0"], name=name, value=tensor)
            self._nodes.append(node)
            self._constants[key] = node.output[0]
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """Add a constant int64 vector."""
        return self.constant(values, np.int64)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        return self.ops(1, kind, *inputs, **attributes)[0]

    def ops(self, outputs: int, kind: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        base = "/" + "/".join([*self._scopes, kind])
        number = self._node_names[base] = self._node_names.get(base, -1) + 1
        name = f"{base}_{number}" if number else base
        results = [f"{name}_output_{index}" for index in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        return results

    def cast(self, value: str, *, to: npt.DTypeLike | None = None) -> str:
        """Cast to a dtype, the graph's unless given."""
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(to or self.dtype)))

    def widened(self, value: str) -> str:
        """Cast `value`, of the graph's dtype, to fp32."""
        return value if self.dtype == np.float32 else self.cast(value, to=np.float32)

    def narrowed(self, value: str) -> str:
        """Cast `value`, fp32, to the graph's dtype."""
        return value if self.dtype == np.float32 else self.cast(value)

    def model(self) -> onnx.ModelProto:
        """Make the model; its initializers have a name, a data type and dims, and no data."""
        placeholders = [
            TensorProto(name=weight.name, data_type=self._element, dims=weight.shape)
            for weight in self.weights.values()
        ]
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, placeholders)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="glake-infer zoo",
        )
