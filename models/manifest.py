"""The manifest of a package (`manifest.json`), version 2. The specification is docs/package-format.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from glake_infer.allocators.errors import PackageError, UnsupportedVersionError
from glake_infer.digest import DIGEST_LENGTH, digest_of
from glake_infer.store import MANIFEST

FORMAT = "glake-infer package"
VERSION = 2
MAXIMUM_BYTES = 256 << 20
"""A manifest above this is refused unread."""

PIECE = 2 << 20
"""Bytes of a piece of a large weight (the last may be shorter): a granule of a GPU's memory."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Digests = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})*$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Bytes = Annotated[int, Field(ge=0)]
Index = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """What was converted."""

    name: str
    digest: Digest
    """Digest of the ONNX file itself (not of its external data)."""


class Value(_Part):
    """An input or output of a model.

    `dtype` is ONNX's name in small letters ("float", "int64", ...), or the whole type of something that is no
    tensor ("seq(tensor(float))"). `shape` has a number, a symbol (equal symbols are equal sizes) or None
    (anything goes) per axis; it is None where the rank is not declared.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name}: {self.dtype}"
        axes = ", ".join("?" if axis is None else str(axis) for axis in self.shape)
        return f"{self.name}: {self.dtype}[{axes}]"


class Variant(_Part):
    """One graph over the package's weights."""

    graph: FileName
    digest: Digest
    purpose: str


class Weight(_Part):
    """A weight, by the name it has in every variant that uses it (unique in all scopes of all of them)."""

    name: str
    digest: Digest
    bytes: Bytes
    dtype: str
    shape: tuple[Index, ...]
    overridable: bool = False
    variants: tuple[str, ...] = ()
    """The variants that use it; empty: all."""
    pieces: Digests = ""
    """Of a large weight: the digests of its consecutive PIECE bytes, one after the other; else empty."""

    def used_by(self, variant: str) -> bool:
        """Whether a variant uses it."""
        return not self.variants or variant in self.variants


class Run(_Part):
    """Consecutive weights that stay together: `count` entries of `weights` from `first`.

    Runs cover all weights in order. A run ends where another package of the store stops being equal.
    """

    first: Index
    count: Annotated[int, Field(ge=1)]
    bytes: Bytes
    digest: Digest
    """Digest of the weights' digests (their 64 characters each): equal runs are equal bytes."""


class Manifest(_Part):
    """A package's table of contents."""

    format: Literal["glake-infer package"] = "glake-infer package"
    version: Literal[1, 2] = 2
    producer: str
    source: Source
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    variants: dict[str, Variant]
    weights: tuple[Weight, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    """What convert did to guard the size and the meaning, for people."""
    identity: str = ""
    """Digest of everything else in this file."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [weight.name for weight in self.weights]
        if len(set(names)) != len(names):
            raise ValueError("two weights have the same name")
        sizes: dict[str, int] = {}
        for weight in self.weights:
            if sizes.setdefault(weight.digest, weight.bytes) != weight.bytes:
                raise ValueError(
                    f"weight {weight.name!r} gives its digest another size than an earlier weight"
                )
        for weight in self.weights:
            self._check_weight(weight)
        position = 0
        for run in self.runs:
            part = self.weights[run.first : run.first + run.count]
            if run.first != position or len(part) != run.count:
                raise ValueError("runs do not cover the weights in order")
            if run.bytes != sum(weight.bytes for weight in part) or run.digest != run_digest(part):
                raise ValueError(f"the run at weight {run.first} does not fit its weights")
            position += run.count
        if position != len(self.weights):
            raise ValueError("runs do not cover all weights")
        if "onnx" not in self.variants:
            raise ValueError("the variant 'onnx' is missing")
        return self

    def _check_weight(self, weight: Weight) -> None:
        if self.version == 1 and (weight.variants or weight.pieces):
            raise ValueError(f"weight {weight.name!r} has fields that version 1 does not know")
        if len(set(weight.variants)) != len(weight.variants):
            raise ValueError(f"weight {weight.name!r} names a variant twice")
        if unknown := set(weight.variants) - self.variants.keys():
            raise ValueError(
                f"weight {weight.name!r} names the variant {sorted(unknown)[0]!r}, which is not there"
            )
        if weight.pieces and len(weight.pieces) != DIGEST_LENGTH * -(-weight.bytes // PIECE):
            raise ValueError(f"the pieces of weight {weight.name!r} do not fit its {weight.bytes} bytes")

    def weights_of(self, variant: str = "onnx") -> tuple[Weight, ...]:
        """The weights that a variant uses, in order; by default those of the model as it was given."""
        return tuple(weight for weight in self.weights if weight.used_by(variant))

    def distinct_of(self, variant: str = "onnx") -> dict[str, int]:
        """Digest -> bytes of every distinct weight of a variant."""
        return {weight.digest: weight.bytes for weight in self.weights_of(variant)}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights of the model as it was given, equal ones counted every time."""
        return sum(weight.bytes for weight in self.weights_of())

    @property
    def distinct(self) -> dict[str, int]:
        """Digest -> bytes of every distinct weight of all variants: what the package needs of the store."""
        return {weight.digest: weight.bytes for weight in self.weights}

    def sealed(self) -> Manifest:
        """This manifest with its identity filled in."""
        return self.model_copy(update={"identity": _identity(self.model_dump(mode="json"))})

    def to_json(self) -> bytes:
        """Bytes of `manifest.json`."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def run_digest(weights: tuple[Weight, ...] | list[Weight]) -> str:
    """Digest of a run; see Run.digest."""
    return digest_of("".join(weight.digest for weight in weights).encode())


def _identity(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "identity"}
    return digest_of(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(package: Path) -> Manifest:
    """Read and check `package/manifest.json`.

    One of version 1 is returned as version 2, which says the same; its identity stays that of the file. Raises
    PackageError (not a package, damaged, altered) or UnsupportedVersionError (a newer version).
    """
    path = package / MANIFEST
    if not package.exists():
        raise PackageError(
            f"{package} does not exist. `glake-infer convert MODEL.onnx -o {package}` makes it."
        )
    if not path.is_file():
        raise PackageError(
            f"{package} is not a package: it has no {MANIFEST}. Expected a folder made by `glake-infer "
            "convert`."
        )
    if path.stat().st_size > MAXIMUM_BYTES:
        raise PackageError(f"{path} is larger than {MAXIMUM_BYTES >> 20} MiB: not a manifest.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PackageError(
            f"{path} is not valid JSON ({error}): it is damaged. Convert the model again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PackageError(f"{path} is not a glake-infer manifest: its 'format' is not {FORMAT!r}.")
    version = content.get("version")
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise UnsupportedVersionError(
            f"{package} has format version {version}; this glake-infer reads up to version {VERSION}. "
            f"Upgrade with `pip install -U glake-infer`, or convert the model again with this version."
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the manifest"
        raise PackageError(f"{path} is damaged: {place}: {first['msg']}. Convert the model again.") from error
    if manifest.identity != _identity(content):
        raise PackageError(
            f"{path} was altered after it was written (its identity does not fit its content). Convert the "
            "model again."
        )
    return manifest.model_copy(update={"version": VERSION})
