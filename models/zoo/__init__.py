"""Real architectures with seeded random weights, built offline at sizes from a few MB to many GB.

A `Spec` says what to build: an architecture and its sizes, a head, a seed. Models with equal sizes and seed
have a trunk of equal bytes whatever their heads: a family of fine-tunes.

    spec = zoo.spec("bert-base", head="topics", labels=14)
    zoo.write(spec, "topics.onnx")

Nothing here holds a model in memory: weights are generated as they are asked for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import onnx

from glake_infer.allocators.errors import InputError
from glake_infer.models.zoo._bert import BertConfig
from glake_infer.models.zoo._file import INLINE_LIMIT, Progress, write_model
from glake_infer.models.zoo._graph import Feeds, Graph, require
from glake_infer.models.zoo._llama import LlamaConfig
from glake_infer.models.zoo._resnet import ResNetConfig
from glake_infer.models.zoo._weights import BLOCK, Weight, Weights

if TYPE_CHECKING:
    from glake_infer.models.convert import ConvertReport
    from glake_infer.models.tensorrt.options import EngineOptions
    from glake_infer.store import Store

__all__ = [
    "BLOCK",
    "INLINE_LIMIT",
    "BertConfig",
    "Description",
    "Entry",
    "LlamaConfig",
    "ResNetConfig",
    "Spec",
    "Weight",
    "Weights",
    "build",
    "convert",
    "feeds",
    "names",
    "spec",
    "write",
]

AnyConfig = BertConfig | ResNetConfig | LlamaConfig
Dtype = Literal["float32", "float16"]


class Entry(NamedTuple):
    """One line of `names()`."""

    name: str
    description: str
    bytes: int  # of all weights, with the usual head


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to build. Raises InputError where a value is out of its range."""

    name: str  # of the ONNX graph
    config: AnyConfig
    head: str | None = "cls"  # heads of different names have different weights; None: no head
    labels: int | None = None  # outputs of the head; None: the architecture's usual
    seed: int = 0
    variant: int = 0  # which of the trunk's weights are changed, and to what
    changed: float = 0.0  # share of the trunk's bytes, 0 to 1
    dtype: Dtype = "float32"  # of weights and computation

    def __post_init__(self) -> None:
        require(
            self.dtype in get_args(Dtype), f"dtype={self.dtype!r} is not one of {', '.join(get_args(Dtype))}"
        )
        require(0 <= self.changed <= 1, f"changed={self.changed} is not a share between 0 and 1")
        require(self.labels is None or self.labels >= 1, f"labels={self.labels} must be at least 1")
        require(
            self.head is not None or self.labels is None,
            f"labels={self.labels} needs a head: name it by `head`",
        )
        require(self.head != "", "head='' is no name: name it, or pass None for a model without one")


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model in two parts: what is small, and how to make what is large."""

    spec: Spec
    proto: onnx.ModelProto
    """The model. Each of its initializers is a weight with name, data type and dims, and without data."""
    weights: Weights
    """The data: `weights.tensor(name)`, or `weights.blocks(name)` in pieces, for every initializer."""


def _bert(layers: int, hidden: int, heads: int, **sizes: int) -> BertConfig:
    return BertConfig(layers=layers, hidden=hidden, heads=heads, intermediate=4 * hidden, **sizes)


_MODELS: dict[str, tuple[str, Callable[[], AnyConfig]]] = {
    "bert-tiny": ("BERT-class encoder, 4 layers of 128", lambda: _bert(4, 128, 4, vocabulary=2048)),
    "bert-mini": ("BERT-class encoder, 4 layers of 256", lambda: _bert(4, 256, 4, vocabulary=8192)),
    "bert-small": ("BERT-small, 4 layers of 512", lambda: _bert(4, 512, 8)),
    "bert-base": ("BERT-base, 12 layers of 768", lambda: _bert(12, 768, 12)),
    "bert-large": ("BERT-large, 24 layers of 1024", lambda: _bert(24, 1024, 16)),
    "bert-xl": ("BERT-class encoder, 24 layers of 2048", lambda: _bert(24, 2048, 32)),
    "resnet-tiny": (
        "ResNet of 4 basic blocks, half width",
        lambda: ResNetConfig(depths=(1, 1, 1, 1), bottleneck=False, width=32),
    ),
    "resnet18": ("ResNet-18", lambda: ResNetConfig(depths=(2, 2, 2, 2), bottleneck=False)),
    "resnet34": ("ResNet-34", lambda: ResNetConfig(depths=(3, 4, 6, 3), bottleneck=False)),
    "resnet50": ("ResNet-50", lambda: ResNetConfig(depths=(3, 4, 6, 3))),
    "resnet101": ("ResNet-101", lambda: ResNetConfig(depths=(3, 4, 23, 3))),
    "resnet152x4": ("ResNet-152, four times as wide", lambda: ResNetConfig(depths=(3, 8, 36, 3), width=256)),
    "llama-tiny": (
        "Llama-class decoder, 4 layers of 128",
        lambda: LlamaConfig(layers=4, hidden=128, heads=4, kv_heads=2, intermediate=352, vocabulary=2048),
    ),
    "llama-125m": (
        "Llama-class decoder, 12 layers of 768",
        lambda: LlamaConfig(layers=12, hidden=768, heads=12, kv_heads=4, intermediate=2048),
    ),
    "llama-1b": ("TinyLlama-1.1B, 22 layers of 2048", LlamaConfig),
    "llama-7b": (
        "Llama-2-7B, 32 layers of 4096",
        lambda: LlamaConfig(layers=32, hidden=4096, heads=32, kv_heads=32, intermediate=11008),
    ),
}
_HALF = "-fp16"


def names() -> list[Entry]:
    """List the models that `spec` knows, each followed by its fp16 twin, with the bytes of their weights."""
    return list(_entries())


@cache
def _entries() -> Sequence[Entry]:
    entries = []
    for name, (description, _) in _MODELS.items():
        size = build(spec(name)).weights.total_bytes
        entries += [Entry(name, description, size), Entry(name + _HALF, f"{description}, fp16", size // 2)]
    return entries


def spec(
    name: str,
    *,
    head: str | None = "cls",
    labels: int | None = None,
    seed: int = 0,
    variant: int = 0,
    changed: float = 0.0,
    dtype: str | None = None,
    **config: Any,
) -> Spec:
    """Describe the model `name`, one of `names()`.

    head: what the head's weights are seeded by, beside `seed`; None leaves the head out, and the model gives
        the trunk's last values.
    labels: outputs of the head; by default 2 (bert), 1000 (resnet), the vocabulary (llama).
    seed: the weights follow from it and from their names alone.
    variant, changed: draw this share of the trunk's bytes anew, from a choice of whole weights made by
        `variant` that comes within a hundredth, unless a weight that is about half of the trunk is in the
        way (bert-small at 0.5: the embeddings are 0.54).
    dtype: "float32" or "float16"; by default what the name says.
    config: sizes that differ from the named model's, such as `layers=6`; see `BertConfig`, `ResNetConfig`,
        `LlamaConfig`.

    Raises InputError (a ValueError) for an unknown name or size, with those that are spelled like it, and
    for values out of range or at odds with each other.
    """
    base = name.removesuffix(_HALF)
    if base not in _MODELS:
        raise InputError(f"there is no model {name!r} in the zoo. {_alike(name, _known())}")
    if dtype is None:
        dtype = "float32" if base == name else "float16"
    sizes = _MODELS[base][1]()
    known = [field.name for field in fields(sizes)]
    for key in config:
        if key not in known:
            raise InputError(f"{type(sizes).__name__} has no size {key!r}. {_alike(key, known)}")
    return Spec(
        name=name,
        config=replace(sizes, **config),
        head=head,
        labels=labels,
        seed=seed,
        variant=variant,
        changed=changed,
        dtype=dtype,  # type: ignore[arg-type]  # Spec checks it
    )


def build(spec: Spec) -> Description:
    """Return the model of `spec` without its data, and the source of its data; nothing is generated yet."""
    graph = Graph(spec.name, dtype=spec.dtype)
    labels = None if spec.head is None else spec.labels or spec.config.default_labels
    spec.config.add_to(graph, labels=labels)
    weights = Weights(
        graph.weights,
        dtype=spec.dtype,
        seed=spec.seed,
        head=spec.head,
        variant=spec.variant,
        changed=spec.changed,
    )
    return Description(spec=spec, proto=graph.model(), weights=weights)


def write(
    spec: Spec,
    path: str | os.PathLike[str],
    *,
    external: bool | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model of `spec` as an ONNX file and return its path. Memory stays at a few MB.

    external: True puts every weight of 1 KiB and more into a second file beside it, `<stem>.onnx.data`, at
        multiples of 4096 bytes (of 64 below 1 MiB); False keeps all inline; None decides by `INLINE_LIMIT`.
    progress: called as `progress(done, total)`, in bytes of weights, after every piece of a few MB.

    Existing files are replaced only once the new ones are complete. Raises InputError (a ValueError) if the
    folder does not exist, if `path` is a folder, or if the model is too large to be inline; OSError if the
    disk is full; and what `progress` raises. No file of this call is left when it raises.
    """
    path = Path(path)
    description = build(spec)
    write_model(description.proto, description.weights, path, external=external, progress=progress)
    return path


def convert(
    spec: Spec,
    target: str | os.PathLike[str],
    *,
    engine: str | EngineOptions | None = None,
    store: Store | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ConvertReport:
    """Write the model of `spec` as a package, its weights generated straight into the store.

    engine: a TensorRT engine to build as well; see `glake_infer.models.convert.convert`.

    Raises and leaves what `glake_infer.models.convert.convert` does.
    """
    from glake_infer.models.zoo._package import convert_description

    return convert_description(build(spec), target, engine=engine, store=store, progress=progress)


def feeds(
    model: Spec | Description,
    rng: np.random.Generator | int,
    *,
    batch: int = 1,
    length: int | None = None,
    past: int = 0,
) -> Feeds:
    """Random inputs that the model accepts, by name.

    rng: a generator or a seed.
    length: tokens per row (bert: 16 unless given, at most its positions; llama: 8) or pixels per side of a
        square image (resnet: 64).
    past: tokens that the cache of a llama already holds; its attention mask has past + length columns.

    Raises InputError (a ValueError) for sizes that the model cannot take.
    """
    spec = model.spec if isinstance(model, Description) else model
    require(batch >= 1, f"batch={batch} must be at least 1")
    require(length is None or length >= 1, f"length={length} must be at least 1")
    require(past >= 0, f"past={past} must be at least 0")
    generator = np.random.default_rng(rng)
    return spec.config.feeds(generator, batch=batch, length=length, past=past, dtype=spec.dtype)


def _known() -> list[str]:
    return [name + suffix for name in _MODELS for suffix in ("", _HALF)]


def _alike(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=4, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(known)}."
