"""Inspect models and packages: their weights by type and size, what is twice inside, what they share."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import TensorProto

from glake_infer.models.convert import without_weighty_functions
from glake_infer.models.graph import (
    MINIMUM_WEIGHT,
    initializers,
    lift_constants,
    make_names_unique,
    tensor_bytes,
)
from glake_infer.models.manifest import Engine, Shapes, Value, Variant
from glake_infer.models.package import Package
from glake_infer.models.source import SourceModel
from glake_infer.models.values import value_of_proto
from glake_infer.store import Store


@dataclass(frozen=True)
class InspectedWeight:
    """One weight: its name, digest, bytes, ONNX element type and shape."""

    name: str
    digest: str
    bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class InspectedEngine:
    """A TensorRT engine of a package. Sizes in bytes."""

    kind: str
    version: str
    capabilities: tuple[str, ...]
    bytes: int
    """Of the plan."""
    weights_bytes: int
    own_bytes: int
    """What the store holds for it alone or for engines of fine-tunes: the rest of the plan is weights of the model."""
    profiles: tuple[dict[str, Shapes], ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    streaming: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class InspectedModel:
    """One model or package. Sizes in bytes."""

    path: str
    kind: str
    """"onnx" or "package"."""
    weights: tuple[InspectedWeight, ...]
    """Those of the model as it was given."""
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    variants: dict[str, Variant]
    runs: int
    notes: tuple[str, ...]
    derived_bytes: int = 0
    """Distinct bytes that the store holds for a package's other variants alone."""
    engines: dict[str, InspectedEngine] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all weights, equal ones counted every time."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def distinct(self) -> dict[str, int]:
        """Digest -> bytes."""
        return {weight.digest: weight.bytes for weight in self.weights}

    @property
    def by_dtype(self) -> dict[str, tuple[int, int]]:
        """Element type -> (weights, bytes)."""
        found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for weight in self.weights:
            count, size = found[weight.dtype]
            found[weight.dtype] = (count + 1, size + weight.bytes)
        return dict(sorted(found.items(), key=lambda entry: -entry[1][1]))

    @property
    def duplicates(self) -> list[list[InspectedWeight]]:
        """Groups of weights with equal bytes, the largest waste first."""
        groups: dict[str, list[InspectedWeight]] = defaultdict(list)
        for weight in self.weights:
            groups[weight.digest].append(weight)
        return sorted((g for g in groups.values() if len(g) > 1), key=lambda g: -g[0].bytes * (len(g) - 1))


@dataclass(frozen=True)
class Inspection:
    """Several models, and what they have in common. Sizes in bytes."""

    models: tuple[InspectedModel, ...]

    @property
    def bytes(self) -> int:
        """What the models take when each keeps its own weights."""
        return sum(model.bytes for model in self.models)

    @property
    def distinct_bytes(self) -> int:
        """What they take when every distinct weight is held once."""
        return sum({d: size for model in self.models for d, size in model.distinct.items()}.values())

    def shared(self) -> dict[tuple[str, str], int]:
        """(path, path) -> bytes of the distinct weights that both have."""
        return {
            (a.path, b.path): sum(size for digest, size in a.distinct.items() if digest in b.distinct)
            for a, b in itertools.combinations(self.models, 2)
        }


def inspect(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], *, store: Store | None = None
) -> Inspection:
    """Look into ONNX models and packages without loading them into ONNX Runtime and without writing anything.

    Raises ModelError or PackageError for the first that is not sound.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    return Inspection(tuple(_package(Path(p), store) if Path(p).is_dir() else _model(Path(p)) for p in paths))


def _package(path: Path, store: Store | None) -> InspectedModel:
    package = Package(path, store)
    manifest = package.manifest
    for variant in manifest.variants:
        package.graph(variant)
    weights = tuple(
        InspectedWeight(w.name, w.digest, w.bytes, w.dtype, w.shape) for w in manifest.weights_of("onnx")
    )
    own = manifest.distinct_of("onnx")
    weighed = manifest.distinct_of_graphs
    return InspectedModel(
        str(path),
        "package",
        weights,
        manifest.inputs,
        manifest.outputs,
        dict(manifest.variants),
        len(manifest.runs),
        tuple(
            dict.fromkeys([*manifest.notes, *(note for e in manifest.engines.values() for note in e.notes)])
        ),
        sum(size for digest, size in weighed.items() if digest not in own),
        {kind: _engine(engine) for kind, engine in manifest.engines.items()},
    )


def _engine(engine: Engine) -> InspectedEngine:
    return InspectedEngine(
        kind=engine.kind,
        version=engine.version,
        capabilities=engine.capabilities,
        bytes=engine.bytes,
        weights_bytes=engine.weights_bytes,
        own_bytes=sum(engine.objects.values()),
        profiles=engine.profiles,
        inputs=engine.inputs,
        outputs=engine.outputs,
        streaming=engine.streaming,
        notes=engine.notes,
    )


def _model(path: Path) -> InspectedModel:
    with SourceModel(path) as opened:
        opened.model = without_weighty_functions(opened.model)
        model = opened.model
        lift_constants(model, MINIMUM_WEIGHT)
        make_names_unique(model)
        weights = tuple(
            InspectedWeight(
                item.tensor.name,
                opened.digest_of(item.tensor),
                tensor_bytes(item.tensor),
                TensorProto.DataType.Name(item.tensor.data_type).lower(),
                tuple(item.tensor.dims),
            )
            for item in initializers(model)
            if tensor_bytes(item.tensor) >= MINIMUM_WEIGHT
        )
        defaults = {tensor.name for tensor in model.graph.initializer}
        inputs = tuple(value_of_proto(v) for v in model.graph.input if v.name not in defaults)
        return InspectedModel(
            str(path),
            "onnx",
            weights,
            inputs,
            tuple(value_of_proto(v) for v in model.graph.output),
            {},
            0,
            (),
        )
