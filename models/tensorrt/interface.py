"""What goes into an engine and what comes out: types, shapes, optimization profiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from glake_infer.allocators.errors import InputError, ModelError
from glake_infer.models.manifest import Value
from glake_infer.models.values import DTYPES

Shape = tuple[int, ...]

ELEMENTS = {
    "FLOAT": "float", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool", "FP8": "float8e4m3fn",
}  # fmt: skip
"""ONNX's names of the types that TensorRT's tensors have (trt.DataType)."""


@dataclass(frozen=True)
class Span:
    """What a profile takes on an input: sizes of its axes, or values where TensorRT reads them on the host."""

    least: Shape
    most: Shape

    def takes(self, sizes: Sequence[int]) -> bool:
        """Whether all of them are inside."""
        return len(sizes) == len(self.least) and all(
            low <= size <= high for low, size, high in zip(self.least, sizes, self.most, strict=True)
        )

    def __str__(self) -> str:
        return f"{list(self.least)} to {list(self.most)}"


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine."""

    name: str
    value: Value
    dtype: np.dtype[Any]
    on_host: bool
    """Whether TensorRT reads or writes it in memory of the host (shape tensors)."""
    dynamic: bool = False
    """Of an input, whether sizes of its axes are given at a run."""
    shapes: tuple[Span, ...] = ()
    """Of a dynamic input, what each profile takes."""
    values: tuple[Span | None, ...] = ()
    """Of a shape tensor, what each profile takes; None: anything."""
    alias: str | None = None
    """Of an output, the input whose memory it has to have."""


class Interface:
    """An engine's inputs and outputs, in its order."""

    def __init__(
        self, trt: ModuleType, engine: Any, inputs: Iterable[Value], outputs: Iterable[Value]
    ) -> None:
        """Read it from an engine; `inputs` and `outputs` give symbols for axes that the engine knows no size of.

        Raises ModelError where it has a type that no array here can be.
        """
        self._trt = trt
        self.profiles = int(engine.num_optimization_profiles)
        known = {value.name: value for value in (*inputs, *outputs)}
        fed: list[Tensor] = []
        made: list[Tensor] = []
        for index in range(
            int(engine.num_io_tensors)
        ):  # no comprehension: an error would keep it, and the engine
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name).name == "INPUT"
            (fed if is_input else made).append(self._tensor(engine, name, known.get(name), is_input))
        self.inputs, self.outputs = tuple(fed), tuple(made)

    def _tensor(self, engine: Any, name: str, known: Value | None, is_input: bool) -> Tensor:
        kind = engine.get_tensor_dtype(name).name
        if kind not in ELEMENTS:
            raise ModelError(
                f"the engine's tensor {name!r} has elements of TensorRT's type {kind}, which no array here can have: "
                f"expected one of {', '.join(ELEMENTS)}. Load the package with engine='onnxruntime'."
            )
        shape = tuple(int(size) for size in engine.get_tensor_shape(name))
        symbols = (
            known.shape if known is not None and known.shape and len(known.shape) == len(shape) else shape
        )
        axes = tuple(
            size if size >= 0 else None if isinstance(symbol, int) else symbol
            for size, symbol in zip(shape, symbols, strict=True)
        )
        element = ELEMENTS[kind]
        tensor = {
            "name": name,
            "value": Value(name=name, dtype=element, shape=axes),
            "dtype": DTYPES[element],
            "on_host": engine.get_tensor_location(name).name == "HOST",
        }
        if not is_input:
            alias = getattr(engine, "get_aliased_input_tensor", None)  # not in every version
            return Tensor(**tensor, alias=(alias(name) or None) if alias else None)
        dynamic = any(size < 0 for size in shape)
        spans: list[Span] = []
        values: list[Span | None] = []
        for profile in range(self.profiles):
            if dynamic:
                spans.append(_span(engine.get_tensor_profile_shape(name, profile)))
            if tensor["on_host"]:
                values.append(_profile_values(engine, name, profile))
        return Tensor(**tensor, dynamic=dynamic, shapes=tuple(spans), values=tuple(values))

    def profile_for(self, shapes: Mapping[str, Shape], values: Mapping[str, np.ndarray[Any, Any]]) -> int:
        """The optimization profile for these shapes, and values of shape tensors: the one with the smallest maximum.

        Raises InputError saying what each profile takes.
        """
        fitting = [
            profile
            for profile in range(self.profiles)
            if all(self._fits(tensor, profile, shapes, values) for tensor in self.inputs)
        ]
        if not fitting:
            raise self._outside(shapes, values)
        dynamic = [tensor for tensor in self.inputs if tensor.dynamic]
        return min(fitting, key=lambda p: (sum(math.prod(t.shapes[p].most) for t in dynamic), p))

    @staticmethod
    def _fits(
        tensor: Tensor, profile: int, shapes: Mapping[str, Shape], values: Mapping[str, np.ndarray[Any, Any]]
    ) -> bool:
        if tensor.dynamic and not tensor.shapes[profile].takes(shapes[tensor.name]):
            return False
        span = tensor.values[profile] if tensor.values else None
        return span is None or span.takes([int(each) for each in values[tensor.name].flat])

    def _outside(self, shapes: Mapping[str, Shape], values: Mapping[str, np.ndarray[Any, Any]]) -> InputError:
        def fits_none(tensor: Tensor) -> bool:
            return not any(self._fits(tensor, p, shapes, values) for p in range(self.profiles))

        wrong = [tensor for tensor in self.inputs if fits_none(tensor)]
        told = []
        blamed = wrong or [t for t in self.inputs if t.dynamic or t.values]
        for tensor in blamed:
            spans = tensor.shapes if tensor.dynamic else tensor.values
            takes = "; ".join(f"profile {p}: {span}" for p, span in enumerate(spans) if span is not None)
            fed = (
                f"the shape {list(shapes[tensor.name])}"
                if tensor.dynamic
                else f"the values {[int(each) for each in values[tensor.name].flat]}"
            )
            told.append(f"the input {tensor.value} was fed {fed}, and the engine takes {takes}")
        which = "" if wrong else " Each fits a profile, but no profile fits them all."
        return InputError(
            f"{'; '.join(told)}.{which} Feed what a profile takes, convert the model again with a wider one (--profile "
            f"{blamed[0].name}=MIN:OPT:MAX), or load it with engine='onnxruntime'."
        )


def _span(found: Sequence[Any]) -> Span:
    least, _, most = (tuple(int(size) for size in part) for part in found)
    return Span(least, most)


def _profile_values(engine: Any, name: str, profile: int) -> Span | None:
    """What a profile says of a shape tensor's values; None where it says nothing."""
    try:
        try:
            found = engine.get_tensor_profile_values(name, profile)
        except TypeError:  # the bindings of some versions take (profile, name), and document the other order
            found = engine.get_tensor_profile_values(profile, name)
    except RuntimeError:
        return None
    return _span(found) if found else None
