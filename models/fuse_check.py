"""Whether a fused graph computes what the model computes: both are run on the CPU, on generated inputs.

Sizes that the model leaves open are small and different from each other; masks are zeros and ones in no order, at
least a one in each row; ids are any that their table has; what is true in one round is false in the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from glake_infer.allocators.errors import InputError
from glake_infer.models.feeds import size_of
from glake_infer.models.graph import all_nodes, scopes
from glake_infer.models.manifest import Value
from glake_infer.models.values import DTYPES, FOREIGN, from_ort_value, generate, to_ort_value, value_of_proto
from glake_infer.store import Store

SIZES = (
    (2, 5, 3, 4),
    (3, 8, 6, 2),
    (1, 7, 2, 3),
    (2, 2, 2, 2),
    (1, 1, 1, 1),
    (1, 16, 32, 64),
    (2, 32, 32, 32),
    (1, 512, 2, 2),
)
"""What open axes get, in the order of their first occurrence; those of images 32 times that."""

ROUNDS = 3
"""Sizes that are tried where the model takes them."""

TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1, "double": 1e-9}
"""How much results may differ, of their largest magnitude; else FLOAT_TOLERANCE."""

FLOAT_TOLERANCE = 1e-4


class Difference(Exception):  # noqa: N818
    """What is different, or why it could not be told."""


def compare(model: ModelProto, fused: ModelProto, store: Store) -> None:
    """Raise Difference unless `fused` computes what `model` computes."""
    ours = _Runner(model, store)
    half = max((TOLERANCE[kind] for kind in _half_types(model)), default=0.0)
    fixed = not any(isinstance(a, (str, type(None))) for v in ours.inputs for a in v.shape or (None,))
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = []
    refused = ""
    for number, sizes in enumerate(SIZES[:2] if fixed else SIZES):
        if len(cases) == ROUNDS:
            break
        try:
            feeds = _feeds(model, ours.inputs, sizes, number)
            cases.append((feeds, ours.run(feeds)))
        except InputError as error:
            raise Difference(f"it cannot be checked: {error}") from error
        except Exception as error:  # sizes that the model does not take
            refused = " ".join(str(error).split())[:200]
    if not cases:
        raise Difference(f"it cannot be checked: no sizes were found that the model takes ({refused})")
    outputs = ours.outputs
    del ours  # not both in memory
    try:
        theirs = _Runner(fused, store)
        results = [theirs.run(feeds) for feeds, _ in cases]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise Difference(f"the result cannot run on the CPU: {reason}") from error
    for (_, expected), found in zip(cases, results, strict=True):
        for value in outputs:
            _check(value, expected[value.name], found[value.name], half)


def session_options(store: Store) -> Any:
    """Options of a session over the store's weights that copies and optimizes nothing."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(store.root))
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


class _Runner:
    """A session that optimizes nothing."""

    def __init__(self, model: ModelProto, store: Store) -> None:
        import onnxruntime as ort

        defaults = {tensor.name for tensor in model.graph.initializer}
        defaults |= {sparse.values.name for sparse in model.graph.sparse_initializer}
        self.inputs = [value_of_proto(v) for v in model.graph.input if v.name not in defaults]
        self.outputs = [value_of_proto(v) for v in model.graph.output]
        self._foreign = any(value.dtype in FOREIGN for value in (*self.inputs, *self.outputs))
        self._session = ort.InferenceSession(
            model.SerializeToString(), session_options(store), providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        names = [value.name for value in self.outputs]
        if not self._foreign:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        values = {value.name: to_ort_value(value, feeds[value.name]) for value in self.inputs}
        results = self._session.run_with_ort_values(names, values)
        return {v.name: from_ort_value(v, r) for v, r in zip(self.outputs, results, strict=True)}


def _half_types(model: ModelProto) -> set[str]:
    kinds = {tensor.data_type for scope in scopes(model.graph) for tensor in scope.initializer}
    kinds |= {a.i for node in all_nodes(model) for a in node.attribute if a.name == "to"}
    names = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    return {name for kind, name in names.items() if kind in kinds}


def _feeds(model: ModelProto, inputs: Sequence[Value], sizes: Sequence[int], number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    rows = _rows(model)
    symbols: dict[str, int] = {}
    for value in inputs:
        for axis, declared in enumerate(value.shape or ()):
            for part in _symbols(axis, declared):
                if part not in symbols:
                    size = sizes[len(symbols) % len(sizes)]
                    image = len(value.shape or ()) == 4 and axis >= 2 and value.dtype in ("float", "float16")
                    symbols[part] = 32 * size if image and size < 8 else size
    feeds = {}
    for value in inputs:
        shape = tuple(
            axis if isinstance(axis, int) else size_of(axis or f"?{index}", symbols)
            for index, axis in enumerate(value.shape or ())
        )
        array = generate(value, None if value.shape is None else shape, rng)
        if "mask" in value.name and shape:
            mask = rng.integers(0, 2, shape)
            if shape[-1]:
                np.put_along_axis(mask, rng.integers(0, shape[-1], (*shape[:-1], 1)), 1, axis=-1)
            array = mask.astype(array.dtype)
        elif array.dtype == np.bool_:
            array = np.full(shape, number % 2 == 0)  # both branches of an If
        elif value.name in rows and array.dtype.kind in "iu":
            array = rng.integers(0, max(1, rows[value.name]), shape).astype(array.dtype)
        feeds[value.name] = array
    return feeds


def _symbols(axis: int, declared: int | str | None) -> list[str]:
    if isinstance(declared, int):
        return []
    if declared is None:
        return [f"?{axis}"]
    return [p for part in declared.split("+") if (p := part.strip()) and not p.isdecimal()]


def _rows(model: ModelProto) -> dict[str, int]:
    """How many rows the tables have that an input chooses from."""
    tables = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in tables:
            rows = tables[node.input[0]]
            found[node.input[1]] = min(rows, found.get(node.input[1], rows))
    return found


def _check(value: Value, expected: Any, found: Any, half: float) -> None:
    if not isinstance(expected, np.ndarray) or expected.dtype == object or value.dtype not in DTYPES:
        if not _equal(expected, found):
            raise Difference(f"the output {value.name} differs")
        return
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise Difference(
            f"the output {value.name} is {found.dtype}{list(found.shape)} instead of "
            f"{expected.dtype}{list(expected.shape)}"
        )
    if expected.dtype.kind in "biu":
        if not np.array_equal(expected, found):
            raise Difference(f"the output {value.name} differs")
        return
    kind = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = expected.astype(kind), found.astype(kind)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        raise Difference(f"the output {value.name} differs in what is not finite")
    largest = float(np.abs(a[finite]).max(initial=0))
    difference = float(np.abs(a[finite] - b[finite]).max(initial=0))
    allowed = max(half, TOLERANCE.get(value.dtype, FLOAT_TOLERANCE)) * largest
    if difference > allowed:
        raise Difference(
            f"the output {value.name} differs by {difference:.2g}, and its largest magnitude is {largest:.2g}"
        )


def _equal(expected: Any, found: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return bool(np.array_equal(expected, found))
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(found) and all(_equal(a, b) for a, b in zip(expected, found, strict=True))
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(_equal(expected[k], found[k]) for k in expected)
    return bool(expected == found)
