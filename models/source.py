"""Reading an ONNX model that somebody hands us: every way it can be bad gets its own words.

Nothing here trusts the file: external data must lie inside the model's folder, be an ordinary file and be
long enough, and every operator must be one that the standard, ONNX Runtime or the model itself defines.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto, defs

from glake_infer.allocators.errors import ModelError
from glake_infer.digest import Buffer, digest_of, digest_of_file, digest_of_range, pieces_of
from glake_infer.models.graph import (
    all_nodes,
    external_entries,
    inline_bytes,
    is_external,
    scopes,
    tensor_bytes,
)

STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training")
MAXIMUM_PROTOBUF = (1 << 31) - 1
_NAMES_AND_PARTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)


class ModelSource(Protocol):
    """What convert needs of a model: a graph that it may change, and the bytes of each initializer."""

    path: Path
    model: ModelProto
    digest: str

    def check_external(self) -> None:
        """Raise ModelError unless all bytes can be had."""

    def digest_of(self, tensor: TensorProto) -> str:
        """Digest of a weight's bytes."""

    def pieces(self, tensor: TensorProto) -> Iterator[Buffer]:
        """Yield a weight's bytes piece by piece."""


class SourceModel:
    """An ONNX model on disk: its graph in memory, its external data still in its files.

    Use as a context manager: it keeps the external files open. Not thread-safe.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the graph; raises ModelError with the reason where it is not a usable model."""
        self.path = Path(path)
        self.model = _parse(self.path)
        self.digest = digest_of_file(self.path)
        self._folder = self.path.absolute().parent.resolve()
        self._files: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> SourceModel:
        return self

    def __exit__(self, *_: object) -> None:
        for fd, _size in self._files.values():
            os.close(fd)
        self._files.clear()

    def check_external(self) -> None:
        """Check that all external data is there, before anything is written."""
        for scope in scopes(self.model.graph):
            for tensor in scope.initializer:
                if is_external(tensor):
                    self._range(tensor)

    def digest_of(self, tensor: TensorProto) -> str:
        """Digest of a weight's bytes, wherever they lie."""
        if not is_external(tensor):
            return digest_of(inline_bytes(tensor))
        fd, offset, length = self._range(tensor)
        digest, done = digest_of_range(fd, offset, length)
        if done != length:
            raise self._short(tensor, offset, length, offset + done)
        return digest

    def pieces(self, tensor: TensorProto) -> Iterator[Buffer]:
        """Yield a weight's bytes piece by piece; each piece is valid until the next."""
        if is_external(tensor):
            yield from pieces_of(*self._range(tensor))
        else:
            yield inline_bytes(tensor)

    def _short(self, tensor: TensorProto, offset: int, length: int, end: int) -> ModelError:
        location = external_entries(tensor)["location"]
        return ModelError(
            f"external data of weight {tensor.name!r} is short: {self._folder / location} ends at byte "
            f"{end}, but the weight "
            f"needs bytes {offset} to {offset + length}. The file is truncated; copy or download it again."
        )

    def _range(self, tensor: TensorProto) -> tuple[int, int, int]:
        """(descriptor, offset, length) of a weight's bytes in its external file."""
        entries = external_entries(tensor)
        location = entries.get("location", "")
        expected = tensor_bytes(tensor)
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", "") or expected)
        except ValueError:
            raise ModelError(
                f"external data of weight {tensor.name!r} has offset {entries.get('offset')!r} and length "
                f"{entries.get('length')!r}, which are not numbers. The model is damaged; export it again."
            ) from None
        if offset < 0 or length != expected:
            raise ModelError(
                f"external data of weight {tensor.name!r} has offset {offset} and length {length}, but its "
                "shape "
                f"{list(tensor.dims)} needs {expected} bytes. The model is damaged; export it again."
            )
        if location not in self._files:
            self._files[location] = self._open(tensor, location)
        fd, size = self._files[location]
        if offset + length > size:
            raise self._short(tensor, offset, length, size)
        return fd, offset, length

    def _open(self, tensor: TensorProto, location: str) -> tuple[int, int]:
        path = self._folder / location
        try:
            resolved = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # an endless link, a name with a zero byte
            raise ModelError(
                f"external data of weight {tensor.name!r} cannot be read: {location!r}: {error}."
            ) from error
        if not location or Path(location).is_absolute() or not resolved.is_relative_to(self._folder):
            raise ModelError(
                f"external data of weight {tensor.name!r} points to {location!r}, outside the model's folder "
                f"{self._folder}. Refused for safety: put the data beside the model and use a relative "
                "location."
            )
        try:
            fd = os.open(resolved, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ModelError(
                f"external data of weight {tensor.name!r} cannot be read: {path}: {error.strerror}. "
                f"The model needs this file beside it; copy it there."
            ) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ModelError(f"external data of weight {tensor.name!r}, {path}, is not an ordinary file.")
        return fd, status.st_size


def _parse(path: Path) -> ModelProto:
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}. Expected an ONNX model file.") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a file. Expected an ONNX model file (.onnx).")
    if status.st_size == 0:
        raise ModelError(f"{path} is empty. Expected an ONNX model; the download or export may have failed.")
    if status.st_size > MAXIMUM_PROTOBUF:
        raise ModelError(
            f"{path} has {status.st_size} bytes, but a protobuf file ends at 2 GiB: it is not a valid ONNX "
            "model. Save it "
            f"with external data (`onnx.save_model(..., save_as_external_data=True)`)."
        )
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path} is not an ONNX model, or it is truncated ({str(error) or type(error).__name__}). "
            f"Check its size against the original and copy or download it again."
        ) from error
    if not model.HasField("graph") or (not model.graph.node and not model.graph.output):
        raise ModelError(
            f"{path} holds no graph: it is not an ONNX model, or it is truncated. Copy or download it again."
        )
    if not model.opset_import:
        raise ModelError(
            f"{path} declares no opset: it is not an ONNX model, or it is damaged. Export it again."
        )
    _check_text(model, path)
    return model


def _check_text(model: ModelProto, path: Path) -> None:
    """Raise ModelError where a name is not UTF-8: protobuf hands it out as bytes."""
    pending: list[Message] = [model]
    while pending:
        message = pending.pop()
        if isinstance(message, TensorProto):  # not through ListFields, which would copy the weight
            fields: list[tuple[str, Any]] = [("name", message.name), ("external_data", message.external_data)]
        else:
            fields = [
                (field.name, value) for field, value in message.ListFields() if field.type in _NAMES_AND_PARTS
            ]
        for name, value in fields:
            if name in ("doc_string", "metadata_props"):
                continue
            for part in [value] if isinstance(value, (str, bytes, Message)) else value:
                if isinstance(part, Message):
                    pending.append(part)
                elif isinstance(part, bytes):
                    raise ModelError(
                        f"{path} holds the text {part[:80]!r} ({name}), which is not UTF-8: the model is "
                        "damaged. Copy or "
                        f"download it again."
                    )


def check_operators(model: ModelProto, path: Path) -> None:
    """Raise ModelError naming the first opset or operator that nobody here can run.

    Knows the operators of ONNX, those of the ONNX Runtime that is installed, and the model's own functions.
    """
    opsets = {_canonical(entry.domain): entry.version for entry in model.opset_import}
    for domain, (_, newest) in defs.C.schema_version_map().items():
        if opsets.get(domain, 1) > newest:
            raise ModelError(
                f"{path} uses opset {opsets[domain]} of the domain {domain or 'ai.onnx'!r}; the onnx "
                f"{onnx.__version__} installed "
                f"here knows up to {newest}. Upgrade with `pip install -U onnx onnxruntime`, or export the "
                "model with an older opset."
            )
    own = {(_canonical(function.domain), function.name) for function in model.functions}
    runtime = _runtime_operators()
    for node in all_nodes(model):
        domain = _canonical(node.domain)
        if (domain, node.op_type) in own:
            continue
        name = f"{domain}:{node.op_type}" if domain else node.op_type
        where = f"operator {name} (node {node.name or ', '.join(node.output)!r})"
        declared = opsets.get(domain) or max(
            (f.version for fn in model.functions for f in fn.opset_import if _canonical(f.domain) == domain),
            default=0,
        )
        if domain in STANDARD_DOMAINS:
            if not declared:
                raise ModelError(
                    f"{path} uses {where}, but imports no opset of the domain {domain!r}. Export it again."
                )
            schema = _schema(node.op_type, declared, domain)
            if schema is not None and not schema.deprecated:
                if len(node.input) < schema.min_input or len(node.output) < schema.min_output:
                    raise ModelError(
                        f"{path} uses {where} with {len(node.input)} inputs and {len(node.output)} outputs; "
                        "it has at least "
                        f"{schema.min_input} and {schema.min_output}. The model is damaged; export it again."
                    )
            elif schema is not None or runtime.get((domain, node.op_type), declared + 1) > declared:
                raise ModelError(
                    f"{path} uses the unknown {where}: opset {declared} of the domain "
                    f"{domain or 'ai.onnx'!r} has no such operator. "
                    f"Check the spelling, or export the model with another opset."
                )
        elif runtime and (domain, node.op_type) not in runtime:
            raise ModelError(
                f"{path} uses the unknown {where}: neither ONNX nor the ONNX Runtime installed here has it. "
                "A custom operator "
                "cannot be converted yet; a contributed one may need a newer version (`pip install -U "
                "onnxruntime`)."
            )


def _schema(op_type: str, version: int, domain: str) -> defs.OpSchema | None:
    with contextlib.suppress(defs.SchemaError):
        return defs.get_schema(op_type, version, domain)
    return None


def _canonical(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _runtime_operators() -> dict[tuple[str, str], int]:
    """(domain, operator) of the installed ONNX Runtime -> its first opset; empty where none is installed."""
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError:
        return {}
    first: dict[tuple[str, str], int] = {}
    for schema in get_all_operator_schema():
        name = (_canonical(schema.domain), schema.name)
        first[name] = min(first.get(name, schema.since_version), schema.since_version)
    return first
