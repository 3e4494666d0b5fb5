"""Models of a wanted size whose weights are all different, written as fast as the disk goes: ONNX with external data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from glake_infer.allocators.errors import InputError
from glake_infer.allocators.sizes import format_bytes
from glake_infer.models.graph import make_external
from glake_infer.models.progress import Progress

SMALLEST = 64 << 10
"""Bytes of the smallest chain."""

WIDEST, NARROWEST = 4096, 64
"""Columns of a chain: (w, w), (w, 4 w) and (4 w, w) are 32, 128 and 128 MiB in fp16."""

SMALL = 10 << 10
"""Bytes of each of many small weights."""

JOINED = 64
"""Small weights that one node takes."""

STAMPED = 128 << 10
"""Elements between two stamps: fewer than what is compared by pieces."""

ALIGNED = 4096
"""Bytes between the beginnings of weights, where they are so large."""


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, int]


def write_chain(path: Path, size: int, *, half: bool, progress: Progress | None = None) -> int:
    """Write a chain of MatMuls with `size` bytes of weights (up to a row less); returns the bytes.

    `half`: fp16, else fp32. Raises InputError for less than SMALLEST.
    """
    if size < SMALLEST:
        raise InputError(
            f"{format_bytes(size)} of weights are too few: expected {format_bytes(SMALLEST)} or more."
        )
    item = 2 if half else 4
    wide = WIDEST
    while wide > NARROWEST and 18 * wide * wide * item > size:
        wide //= 2
    weights: list[_Weight] = []
    rows, left = wide, size
    for number in range(size):
        columns = (wide, 4 * wide, wide)[number % 3]
        last = rows * columns * item > left
        columns = left // (rows * item) if last else columns
        if columns:
            weights.append(_Weight(f"w{number}", (rows, columns)))
        if last or not columns:
            break
        left -= rows * columns * item
        rows = columns
    names = ["x", *(f"h{number}" for number in range(len(weights) - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [names[n], weight.name], [names[n + 1]], name=f"/{n}")
        for n, weight in enumerate(weights)
    ]
    return _write(path, nodes, weights, wide, weights[-1].shape[1], "n", half, progress)


def write_small(path: Path, count: int, *, half: bool, progress: Progress | None = None) -> int:
    """Write a model with `count` weights of SMALL bytes each, all of which its answer needs; returns the bytes."""
    if count < 1:
        raise InputError(f"{count} small weights: expected one or more.")
    wide = SMALL // (2 if half else 4)
    weights = [_Weight(f"w{number}", (1, wide)) for number in range(count)]
    nodes, last = [], "x"
    for group, first in enumerate(range(0, count, JOINED)):
        names = [weight.name for weight in weights[first : first + JOINED]]
        nodes.append(helper.make_node("Concat", [last, *names], [f"c{group}"], axis=0, name=f"/c{group}"))
        last = "y" if first + JOINED >= count else f"h{group}"
        reduce = helper.make_node("ReduceMax", [f"c{group}"], [last], axes=[0], keepdims=1, name=f"/h{group}")
        nodes.append(reduce)
    return _write(path, nodes, weights, wide, wide, 1, half, progress)


def _write(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: Sequence[_Weight],
    wide: int,
    answers: int,
    rows: int | str,
    half: bool,
    progress: Progress | None,
) -> int:
    kind = np.dtype(np.float16 if half else np.float32)
    element = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    total = sum(math.prod(weight.shape) for weight in weights) * kind.itemsize
    data = path.with_name(f"{path.name}.data")
    blocks: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    tensors, place = [], 0
    with data.open("xb") as file:
        for number, weight in enumerate(weights, 1):
            block = blocks.get(weight.shape)
            if block is None:
                block = blocks[weight.shape] = _block(weight.shape, kind)
            _stamp(block, number)
            size = block.nbytes
            place = -(-place // ALIGNED) * ALIGNED if size >= ALIGNED else place
            file.seek(place)
            file.write(block.data)
            tensor = TensorProto(name=weight.name, data_type=element, dims=weight.shape)
            make_external(tensor, data.name, size, offset=str(place))
            tensors.append(tensor)
            place += size
            if progress:
                progress("making weights", place, max(place, total))
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", element, [rows, wide])],
        [helper.make_tensor_value_info("y", element, [rows, answers])],
        tensors,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(made.SerializeToString())
    return total


def _block(shape: tuple[int, int], kind: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Random numbers with which a product keeps the size of what it multiplies. Large ones repeat a random piece."""
    count = math.prod(shape)
    piece = np.random.default_rng(count).uniform(-1, 1, min(count, (1 << 22) + 1)).astype(np.float32)
    piece *= math.sqrt(3 / shape[0])
    return np.resize(piece.astype(kind), shape)


def _stamp(block: np.ndarray[Any, Any], number: int) -> None:
    """Make it different from all others: digits of `number`, which are exact in fp16 too, every STAMPED elements."""
    flat = block.reshape(-1)
    for place in range(3):
        flat[place::STAMPED] = (number >> 8 * place & 255) / 1024
