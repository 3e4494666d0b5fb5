"""The manifest of a package (`manifest.json`), version 3. The specification is docs/package-format.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from glake_infer.allocators.errors import PackageError, UnsupportedVersionError
from glake_infer.digest import DIGEST_LENGTH, digest_of
from glake_infer.models.tensorrt.library import Kind
from glake_infer.store import MANIFEST

FORMAT = "glake-infer package"
VERSION = 3
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


class Part(_Part):
    """Consecutive bytes of a plan, which are those of one object from `start` on."""

    offset: Index
    """Where they begin in the plan."""
    bytes: Annotated[int, Field(ge=1)]
    digest: Digest
    start: Index = 0

    def demands(self) -> tuple[tuple[str, int], ...]:
        """(digest, bytes that the object has at least)."""
        return ((self.digest, self.start + self.bytes),)


class Strand(_Part):
    """What one object gives to each row of woven bytes: the next `bytes` of it, the first from `start` on."""

    digest: Digest
    bytes: Annotated[int, Field(ge=1)]
    start: Index = 0


class Woven(_Part):
    """Consecutive bytes of a plan, row by row: in each row the strands follow one another.

    TensorRT puts matrices that have the same input side by side into one (query, key and value of attention).
    """

    offset: Index
    bytes: Annotated[int, Field(ge=1)]
    strands: Annotated[tuple[Strand, ...], Field(min_length=1)]

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return sum(strand.bytes for strand in self.strands)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.bytes // self.width

    def demands(self) -> tuple[tuple[str, int], ...]:
        """(digest, bytes that the object has at least) of each strand."""
        return tuple((s.digest, s.start + self.rows * s.bytes) for s in self.strands)


def _form(part: Any) -> str:
    strands = part.get("strands") if isinstance(part, dict) else getattr(part, "strands", None)
    return "plain" if strands is None else "woven"


AnyPart = Annotated[Annotated[Part, Tag("plain")] | Annotated[Woven, Tag("woven")], Discriminator(_form)]


class Shapes(_Part):
    """The shapes of an input for which a profile optimizes; of a shape tensor, its values."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Engine(_Part):
    """A TensorRT engine: its plan, cut into parts of objects in the store, and for what it was built.

    `parts` cover the plan in order, without gaps. A part of a weight names the same object that the graphs use.
    """

    kind: Kind
    version: str
    """TensorRT's, as its package has it ("1.7.1.116"): the one that built it."""
    capabilities: tuple[str, ...]
    """Compute capabilities of the GPUs that it was built for ("8.6")."""
    bytes: Annotated[int, Field(ge=1)]
    digest: Digest
    """Of the whole plan."""
    parts: tuple[AnyPart, ...]
    objects: dict[Digest, Bytes]
    """Objects of the store that it needs beside the package's weights: digest -> bytes."""
    compressed: dict[Digest, Bytes] = {}
    """Those of `objects` that hold their bytes compressed (xz): digest -> bytes as the parts count them."""
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    profiles: tuple[dict[str, Shapes], ...] = ()
    """Each names every input of dynamic shape; empty where all shapes are static."""
    weights_offset: Index = 0
    """Where the section of the plan begins that becomes the engine's block of weights."""
    weights_bytes: Bytes = 0
    """Bytes of it; 0 where it is not known."""
    aligned: Bytes = 0
    """`weights_bytes`, but for the end of the last tensor, is a multiple of this: trunks of fine-tunes lie alike. 0: not."""
    streaming: bool = False
    """Whether weights can be streamed from host memory (WEIGHT_STREAMING)."""
    notes: tuple[str, ...] = ()
    """What was done to the model for it, for people."""

    @property
    def needed(self) -> set[str]:
        """Digests of every object that the plan is made of."""
        return {digest for part in self.parts for digest, _ in part.demands()}

    def check(self, weights: dict[str, int]) -> None:
        """Raise ValueError unless the parts cover the plan with objects that the package knows."""
        if extra := self.compressed.keys() - self.objects.keys():
            raise ValueError(f"the compressed object {sorted(extra)[0][:16]} is not listed")
        position = 0
        sizes = {**weights, **self.objects, **self.compressed}
        for part in self.parts:
            if part.offset != position:
                raise ValueError(f"the parts of the plan leave a gap or overlap at byte {position}")
            position += part.bytes
            if isinstance(part, Woven) and part.bytes % part.width:
                raise ValueError(f"the woven bytes at {part.offset} of the plan end within a row")
            for digest, end in part.demands():
                if digest not in sizes:
                    raise ValueError(
                        f"a part of the plan names the object {digest[:16]}, which is not listed"
                    )
                if end > sizes[digest]:
                    raise ValueError(f"a part of the plan goes beyond the end of its object {digest[:16]}")
        if position != self.bytes:
            raise ValueError(f"the parts of the plan have {position} bytes together, the plan {self.bytes}")
        if extra := self.objects.keys() - self.needed:
            raise ValueError(f"the object {sorted(extra)[0][:16]} is in no part of the plan")
        if self.weights_offset + self.weights_bytes > self.bytes:
            raise ValueError("the section of weights goes beyond the end of the plan")


class Manifest(_Part):
    """A package's table of contents."""

    format: Literal["glake-infer package"] = "glake-infer package"
    version: Literal[1, 2, 3] = 3
    producer: str
    source: Source
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    variants: dict[str, Variant]
    weights: tuple[Weight, ...]
    runs: tuple[Run, ...]
    engines: dict[Kind, Engine] = {}
    """TensorRT engines of the same model, by kind."""
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
        self._check_engines(sizes)
        return self

    def _check_engines(self, sizes: dict[str, int]) -> None:
        if self.version < 3 and self.engines:
            raise ValueError(f"version {self.version} knows no engines")
        for kind, engine in self.engines.items():
            if engine.kind != kind:
                raise ValueError(f"the engine {kind!r} calls itself {engine.kind!r}")
            for digest, size in engine.objects.items():
                if sizes.setdefault(digest, size) != size:
                    raise ValueError(f"the engine {kind!r} gives the digest {digest[:16]} another size")
            engine.check(sizes)

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
    def distinct_of_graphs(self) -> dict[str, int]:
        """Digest -> bytes of every distinct weight of all variants."""
        return {weight.digest: weight.bytes for weight in self.weights}

    @property
    def distinct(self) -> dict[str, int]:
        """Digest -> bytes of all that the package needs of the store: weights of all variants, parts of engines."""
        found = self.distinct_of_graphs
        for engine in self.engines.values():
            found.update(engine.objects)
        return found

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

    An older one is returned as version 3, which says the same; its identity stays that of the file. Raises
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
