"""Inputs and outputs of a session: their declared types and shapes, checking what is fed, generating data."""

from __future__ import annotations

import ctypes
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, TensorShapeProto, TypeProto, ValueInfoProto

from glake_infer.allocators.errors import InputError
from glake_infer.models.device_array import DeviceArray
from glake_infer.models.interchange import Borrowed, borrow, is_foreign
from glake_infer.models.manifest import Value

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "float": np.float32, "double": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
        "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
        "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
        "bool": np.bool_, "complex64": np.complex64, "complex128": np.complex128,
        "float8e4m3fn": ml_dtypes.float8_e4m3fn, "float8e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8e5m2": ml_dtypes.float8_e5m2, "float8e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    }.items()
}  # fmt: skip
"""numpy's types by ONNX Runtime's spelling ("tensor(float)" without "tensor()")."""


FOREIGN: dict[str, tuple[type[Any], int]] = {
    "bfloat16": (np.uint16, TensorProto.BFLOAT16),
    "float8e4m3fn": (np.uint8, TensorProto.FLOAT8E4M3FN),
    "float8e4m3fnuz": (np.uint8, TensorProto.FLOAT8E4M3FNUZ),
    "float8e5m2": (np.uint8, TensorProto.FLOAT8E5M2),
    "float8e5m2fnuz": (np.uint8, TensorProto.FLOAT8E5M2FNUZ),
}
"""Types that numpy lacks: the type that carries their bits to ONNX Runtime, and ONNX's number for them."""


def to_ort_value(value: Value, array: Any) -> Any:
    """Wrap an array that `check_feeds` passed as an OrtValue, whatever its type. The array must outlive it."""
    from onnxruntime import OrtValue

    if value.dtype not in FOREIGN or not isinstance(array, np.ndarray):
        return (
            array
            if not isinstance(array, np.ndarray)
            else OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
        )
    carrier, number = FOREIGN[value.dtype]
    return OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(array, order="C").view(carrier), number)


def from_ort_value(value: Value, result: Any) -> np.ndarray[Any, Any]:
    """Copy a tensor out of an OrtValue, whatever its type."""
    if value.dtype not in FOREIGN:
        return np.array(result.numpy())
    raw = ctypes.string_at(result.data_ptr(), result.tensor_size_in_bytes())
    return np.frombuffer(bytearray(raw), DTYPES[value.dtype]).reshape(result.shape())


def element_number(value: Value) -> int:
    """ONNX's number of a tensor's element type."""
    return int(TensorProto.DataType.Value(value.dtype.upper()))


def value_of_argument(argument: Any) -> Value:
    """Describe one of ONNX Runtime's NodeArg objects."""
    kind = str(argument.type)
    if not kind.startswith("tensor("):
        return Value(name=argument.name, dtype=kind, shape=None)
    shape = tuple(
        axis if isinstance(axis, str) or (axis is not None and axis >= 0) else None for axis in argument.shape
    )
    return Value(name=argument.name, dtype=kind[len("tensor(") : -1], shape=shape)


def value_of_proto(value: ValueInfoProto) -> Value:
    """Describe an input or output of an ONNX graph."""
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type":
        return Value(name=value.name, dtype=_type_name(value.type), shape=None)
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(_axis(dimension) for dimension in tensor.shape.dim)
    return Value(name=value.name, dtype=_element_name(tensor.elem_type), shape=shape)


def _element_name(number: int) -> str:
    try:
        return str(TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return f"unknown{number}"


def _type_name(kind: TypeProto) -> str:
    """A type in ONNX Runtime's spelling, such as "seq(tensor(float))"."""
    match kind.WhichOneof("value"):
        case "tensor_type":
            return f"tensor({_element_name(kind.tensor_type.elem_type)})"
        case "sparse_tensor_type":
            return f"sparse_tensor({_element_name(kind.sparse_tensor_type.elem_type)})"
        case "sequence_type":
            return f"seq({_type_name(kind.sequence_type.elem_type)})"
        case "optional_type":
            return f"optional({_type_name(kind.optional_type.elem_type)})"
        case "map_type":
            return f"map({_element_name(kind.map_type.key_type)},{_type_name(kind.map_type.value_type)})"
    return "unknown"


def _axis(dimension: TensorShapeProto.Dimension) -> int | str | None:
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value) if dimension.dim_value >= 0 else None
    return dimension.dim_param or None


def check_feeds(
    inputs: Sequence[Value], optional: Sequence[Value], feeds: Mapping[str, Any], device: str = "cpu"
) -> dict[str, Any]:
    """Return `feeds` as ONNX Runtime takes them; raises InputError saying what came for which input.

    Lists and numbers become arrays of the declared type; arrays must have it already. Arrays of other libraries
    (DLPack, `__cuda_array_interface__`) are taken in place: those on the host as numpy arrays, those on `device`
    as Borrowed.
    """
    if not isinstance(feeds, Mapping):
        raise InputError(
            f"feeds are a mapping of names to arrays, and {type(feeds).__name__} came. Inputs: {_listed(inputs)}."
        )
    known = {value.name: value for value in (*inputs, *optional)}
    for name in feeds:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"the model has no input {name!r}; its inputs are {_listed(inputs)}.{hint}")
    if missing := [value for value in inputs if value.name not in feeds]:
        raise InputError(f"the input {missing[0]} was not fed; the model needs {_listed(inputs)}.")
    checked: dict[str, Any] = {}
    for name, given in feeds.items():
        value = known[name]
        if value.shape is None and value.dtype not in DTYPES:
            checked[name] = given
        elif isinstance(given, DeviceArray) or is_foreign(given):
            checked[name] = _checked_foreign(value, given, device)
        else:
            checked[name] = _checked(value, given)
    return checked


def _checked_foreign(value: Value, given: Any, device: str) -> Any:
    what = f"the array fed to the input {value}"
    array = given.borrowed() if isinstance(given, DeviceArray) else borrow(given, what)
    if array.device == "cpu":
        return _checked(value, array.numpy())
    if array.device != device:
        raise InputError(
            f"{what} lies on {array.device}, and the model runs on {device}. Copy it there, or to the host."
        )
    _check_type(value, array)
    _check_shape(value, array.shape)
    if not array.contiguous:
        raise InputError(
            f"{what} is not contiguous: shape {list(array.shape)}, strides {list(array.strides)} (in elements). Feed "
            f"`x.contiguous()` (PyTorch) or `cupy.ascontiguousarray(x)`."
        )
    return array


def _checked(value: Value, given: Any) -> Any:
    expected = DTYPES.get(value.dtype)
    if isinstance(given, np.ndarray) and given.dtype == expected and given.shape == value.shape:
        return given
    if type(given).__name__ == "OrtValue":
        return given
    if expected is not None and not hasattr(given, "dtype"):
        try:
            if expected.kind in "iu" and np.asarray(given).dtype.kind == "f" and np.size(given):
                raise TypeError("it has fractions")
            given = np.asarray(given, expected)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(
                f"the input {value} cannot be made from {type(given).__name__}: {error}."
            ) from error
    array = np.asarray(given)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    _check_type(value, array)
    _check_shape(value, array.shape)
    return array


def _check_type(value: Value, array: np.ndarray[Any, Any] | Borrowed) -> None:
    expected = DTYPES.get(value.dtype)
    if expected is not None and array.dtype != expected:
        raise InputError(
            f"the input {value} was fed {array.dtype}{list(array.shape)}. Convert it with "
            f"`.astype({expected.name!r})` if that "
            f"is what you mean."
        )


def _check_shape(value: Value, shape: Sequence[int]) -> None:
    if value.shape is None:
        return
    if len(shape) != len(value.shape):
        raise InputError(
            f"the input {value} was fed the shape {list(shape)}: {len(shape)} axes instead of "
            f"{len(value.shape)}."
        )
    for axis, (size, declared) in enumerate(zip(shape, value.shape, strict=True)):
        if isinstance(declared, int) and size != declared:
            raise InputError(
                f"the input {value} was fed the shape {list(shape)}: axis {axis} has {size} instead of "
                f"{declared}."
            )


def _listed(values: Sequence[Value]) -> str:
    return ", ".join(str(value) for value in values) or "none"


def generate(value: Value, shape: Sequence[int] | None, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Make data for an input: normal numbers, small non-negative integers, True.

    `shape` gives the sizes; without it, undeclared axes are 1. Raises InputError for what is no
    tensor or does not fit the declared shape.
    """
    dtype = DTYPES.get(value.dtype)
    if dtype is None:
        raise InputError(
            f"the input {value} cannot be generated; feed it with --input {value.name}=FILE.npy."
        )
    sizes = (
        tuple(shape)
        if shape is not None
        else tuple(a if isinstance(a, int) else 1 for a in value.shape or ())
    )
    if value.shape is not None and len(sizes) != len(value.shape):
        raise InputError(f"--shape gives {value.name!r} {len(sizes)} axes, but the model declares {value}.")
    if any(
        s < 0 or (isinstance(a, int) and s != a) for s, a in zip(sizes, value.shape or sizes, strict=True)
    ):
        raise InputError(
            f"--shape gives {value.name!r} the sizes {list(sizes)}, but the model declares {value}."
        )
    if dtype == np.bool_:
        return np.ones(sizes, dtype)
    if dtype.kind in "iu":
        return np.full(sizes, 1, dtype) if "mask" in value.name else rng.integers(0, 2, sizes).astype(dtype)
    return rng.standard_normal(sizes, np.float32).astype(dtype)
