"""Write a model whose weights are generated meanwhile: no more than a block of them is ever in memory.

A protobuf message only needs the lengths of its parts before their bytes, and these are known. So the ONNX
file is the serialized graph without initializers, in a frame that announces the full length, followed by the
initializers one by one.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import StringStringEntryProto, TensorProto

from glake_infer.allocators.errors import InputError
from glake_infer.models.zoo._weights import Weights

Progress = Callable[[int, int], object]

INLINE_LIMIT = 3 << 29
"""From these bytes of weights (1.5 GiB) on, they go to a second file unless the caller says otherwise."""

PROTOBUF_LIMIT = (1 << 31) - 1
SMALL = 1 << 10  # a smaller weight stays in the ONNX file
LARGE = 1 << 20  # a weight of this size or more starts on a page
SMALL_ALIGNMENT, LARGE_ALIGNMENT = 64, 4096

# A field's tag is its number and 2, "length-delimited": onnx.proto numbers them.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = (bytes([number << 3 | 2]) for number in (7, 5, 9))


def write_model(
    proto: onnx.ModelProto,
    weights: Weights,
    path: Path,
    *,
    external: bool | None,
    progress: Progress | None,
) -> None:
    """Write `proto` with the data of `weights`; see `zoo.write`."""
    total = weights.total_bytes
    external = total >= INLINE_LIMIT if external is None else external
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder. Name a file in it.")
    done = 0

    def send(name: str, file: BinaryIO) -> None:
        nonlocal done
        for block in weights.blocks(name):
            file.write(block.data)
            done += block.nbytes
            if progress is not None:
                progress(done, total)

    data = path.with_name(f"{path.stem}.onnx.data")
    if external and data == path:
        raise InputError(f"cannot write {path}: its weights go to a file of that name. Name it *.onnx.")
    places = _places(weights) if external else {}
    messages = [_initializer(weights, name, data.name, places) for name in weights]
    skeleton, graph = _without_initializers(proto)
    lengths = [
        len(message) + (0 if name in places else weights.nbytes(name))
        for name, message in zip(weights, messages, strict=True)
    ]
    frames = [_GRAPH_INITIALIZER + _varint(length) for length in lengths]
    graph_length = len(graph) + sum(map(len, frames)) + sum(lengths)
    frame = _MODEL_GRAPH + _varint(graph_length)
    size = len(skeleton) + len(frame) + graph_length
    if size > PROTOBUF_LIMIT:
        raise InputError(
            f"cannot write {path}: with its weights inline the model has {size} bytes, and an ONNX file "
            f"holds at most {PROTOBUF_LIMIT}. Write the weights to a second file with external=True."
        )
    with _replacing(path, *([data] if external else [])) as files:
        for name, (offset, _) in places.items():
            files[1].seek(offset)
            send(name, files[1])
        files[0].write(skeleton + frame + graph)
        for name, head, message in zip(weights, frames, messages, strict=True):
            files[0].write(head + message)
            if name not in places:
                send(name, files[0])


def _places(weights: Weights) -> dict[str, tuple[int, int]]:
    """Give every weight that goes to the data file its offset and length there."""
    places, end = {}, 0
    for name in weights:
        length = weights.nbytes(name)
        if length >= SMALL:
            alignment = LARGE_ALIGNMENT if length >= LARGE else SMALL_ALIGNMENT
            start = -(-end // alignment) * alignment
            places[name] = (start, length)
            end = start + length
    return places


def _initializer(weights: Weights, name: str, location: str, places: dict[str, tuple[int, int]]) -> bytes:
    """Serialize a weight's TensorProto: all of it where its data is external, else up to the data."""
    element = onnx.helper.np_dtype_to_tensor_dtype(weights.dtype)
    tensor = TensorProto(name=name, data_type=element, dims=weights[name].shape)
    if name not in places:
        return bytes(tensor.SerializeToString()) + _TENSOR_RAW_DATA + _varint(weights.nbytes(name))
    offset, length = places[name]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.append(StringStringEntryProto(key=key, value=value))
    return bytes(tensor.SerializeToString())


def _without_initializers(proto: onnx.ModelProto) -> tuple[bytes, bytes]:
    """Serialize the model without its graph, and the graph without its initializers."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(proto)
    del skeleton.graph.initializer[:]
    graph = skeleton.graph.SerializeToString()
    skeleton.ClearField("graph")
    return skeleton.SerializeToString(), graph


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


@contextmanager
def _replacing(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Open a temporary sibling of each path, and rename them, last one first, if the body succeeds.

    On any exception the temporary files are removed, and so is what has already been renamed.
    """
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    made = [path.with_name(f".{path.name}.{tag}.tmp") for path in paths]
    files: list[BinaryIO] = []
    left = list(made)
    try:
        try:
            for temporary in made:
                files.append(temporary.open("xb"))
            yield files
        finally:
            for file in files:
                file.close()
        for temporary, path in reversed(list(zip(made, paths, strict=True))):
            temporary.replace(path)
            left[left.index(temporary)] = path
    except BaseException:
        for path in left:
            path.unlink(missing_ok=True)
        raise
