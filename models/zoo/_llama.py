"""A Llama-class decoder with its key-value cache as inputs and outputs, in primitive operators only.

Normalization and rotary angles are computed in fp32 in fp16 models too, as their training code does: squares
overflow fp16, and so do the larger positions' angles.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from glake_infer.models.zoo._graph import Feeds, Graph, require

MASKED = -1e4  # replaces a masked score: the softmax gives 0, and fp16 can hold it


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama-class decoder. Raises InputError where they do not fit together."""

    hidden: int = 2048
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4  # each serves heads / kv_heads query heads
    intermediate: int = 5632
    vocabulary: int = 32000
    theta: float = 10000.0  # base of the rotary wavelengths
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.layers, self.heads, self.kv_heads, self.intermediate, self.vocabulary)
        require(min(sizes) >= 1, f"every size of {self} must be at least 1")
        require(self.theta > 1 and self.epsilon > 0, f"{self} needs theta above 1 and epsilon above 0")
        require(
            self.hidden % (2 * self.heads) == 0,
            f"hidden={self.hidden} cannot be split over heads={self.heads} of an even size",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} cannot be split over kv_heads={self.kv_heads}: choose a divisor",
        )

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return self.hidden // self.heads

    @property
    def default_labels(self) -> int:
        """The vocabulary: logits of the next token."""
        return self.vocabulary

    def add_to(self, graph: Graph, *, labels: int | None) -> None:
        """Add the decoder and its head to `graph`."""
        ids = graph.input("input_ids", ["batch", "sequence"], element=TensorProto.INT64)
        mask = graph.input("attention_mask", ["batch", "past + sequence"], element=TensorProto.INT64)
        cached: list[int | str] = ["batch", self.kv_heads, "past", self.head_size]
        caches = [
            (graph.input(f"{name}.key", cached), graph.input(f"{name}.value", cached))
            for name in (f"past_key_values.{layer}" for layer in range(self.layers))
        ]
        shared = self._shared(graph, ids, mask, caches[0][0])
        table = graph.weight("model.embed_tokens.weight", self.vocabulary, self.hidden, std=1.0)
        hidden = graph.op("Gather", table, ids)
        grown: list[tuple[str, str]] = []
        for layer, cache in enumerate(caches):
            with graph.scope(f"layers.{layer}"):
                hidden, cache = self._layer(graph, f"model.layers.{layer}", hidden, cache, shared)
                grown.append(cache)
        hidden = self._norm(graph, "model.norm", hidden)
        if labels is None:
            graph.output("last_hidden_state", hidden, ["batch", "sequence", self.hidden])
        else:
            std = 1 / math.sqrt(self.hidden)
            weight = graph.weight("lm_head.weight", self.hidden, labels, std=std, trunk=False)
            graph.output("logits", graph.op("MatMul", hidden, weight), ["batch", "sequence", labels])
        cached[2] = "past + sequence"
        for layer, (key, value) in enumerate(grown):
            graph.output(f"present.{layer}.key", key, cached)
            graph.output(f"present.{layer}.value", value, cached)

    def feeds(
        self, rng: np.random.Generator, *, batch: int, length: int | None, past: int, dtype: npt.DTypeLike
    ) -> Feeds:
        """`length` new tokens (8 unless given) after a random cache of `past` ones, nothing padded."""
        length = 8 if length is None else length
        feeds: Feeds = {
            "input_ids": rng.integers(0, self.vocabulary, (batch, length)),
            "attention_mask": np.ones((batch, past + length), np.int64),
        }
        shape = (batch, self.kv_heads, past, self.head_size)
        for layer in range(self.layers):
            for part in ("key", "value"):
                cache = rng.standard_normal(shape, np.float32).astype(dtype)
                feeds[f"past_key_values.{layer}.{part}"] = cache
        return feeds

    def _shared(self, graph: Graph, ids: str, mask: str, cache: str) -> "_Shared":
        """Compute what all layers use: which positions each token sees, and its rotary angles."""
        with graph.scope("positions"):
            zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
            first = graph.integers(0)
            past = graph.op("Squeeze", graph.op("Shape", cache, start=2, end=3), first)
            total = graph.op("Add", past, graph.op("Squeeze", graph.op("Shape", ids, start=1, end=2), first))
            columns = graph.op("Range", zero, total, one)
            rows = graph.op("Unsqueeze", graph.op("Range", past, total, one), graph.integers(1))
            causal = graph.op("LessOrEqual", columns, rows)
            present = graph.op("Unsqueeze", graph.cast(mask, to=np.bool_), graph.integers(1, 2, 3))
            visible = graph.op("And", present, causal)  # batch, 1, 1, sequence, past + sequence

            # Positions count what is not padding, so that a batch may be padded on the left.
            counted = graph.op("Sub", graph.op("CumSum", mask, one), one)
            ends = graph.integers(np.iinfo(np.int64).max)
            start = graph.op("Unsqueeze", past, first)
            places = graph.op("Slice", counted, start, ends, graph.integers(1))
            places = graph.op("Cast", graph.op("Max", places, zero), to=TensorProto.FLOAT)
            exponents = np.arange(0, self.head_size, 2) / self.head_size
            angles = graph.op(
                "Mul",
                graph.op("Unsqueeze", places, graph.integers(1, 3)),
                graph.constant(self.theta**-exponents, np.float32),
            )
            cosine, sine = (graph.narrowed(graph.op(kind, angles)) for kind in ("Cos", "Sin"))
        return _Shared(visible, cosine, sine)

    def _layer(
        self, graph: Graph, name: str, hidden: str, cache: tuple[str, str], shared: "_Shared"
    ) -> tuple[str, tuple[str, str]]:
        deep = 2 * self.layers
        with graph.scope("self_attn"):
            value = self._norm(graph, f"{name}.input_layernorm", hidden)
            context, cache = self._attention(graph, f"{name}.self_attn", value, cache, shared)
            context = _linear(
                graph, f"{name}.self_attn.o_proj", context, self.hidden, self.hidden, depth=deep
            )
            hidden = graph.op("Add", hidden, context)
        with graph.scope("mlp"):
            value = self._norm(graph, f"{name}.post_attention_layernorm", hidden)
            gate = _linear(graph, f"{name}.mlp.gate_proj", value, self.hidden, self.intermediate)
            up = _linear(graph, f"{name}.mlp.up_proj", value, self.hidden, self.intermediate)
            swish = graph.op("Mul", gate, graph.op("Sigmoid", gate))
            inner = graph.op("Mul", swish, up)
            down = _linear(graph, f"{name}.mlp.down_proj", inner, self.intermediate, self.hidden, depth=deep)
            return graph.op("Add", hidden, down), cache

    def _attention(
        self, graph: Graph, name: str, hidden: str, cache: tuple[str, str], shared: "_Shared"
    ) -> tuple[str, tuple[str, str]]:
        size, groups = self.head_size, self.heads // self.kv_heads

        def heads(part: str, count: int) -> str:
            value = _linear(graph, f"{name}.{part}", hidden, self.hidden, count * size)
            value = graph.op("Reshape", value, graph.integers(0, 0, count, size))
            return graph.op("Transpose", value, perm=[0, 2, 1, 3])

        query = _rotated(graph, heads("q_proj", self.heads), size, shared)
        key = _rotated(graph, heads("k_proj", self.kv_heads), size, shared)
        key = graph.op("Concat", cache[0], key, axis=2)
        value = graph.op("Concat", cache[1], heads("v_proj", self.kv_heads), axis=2)

        # Each key and value head serves a group of queries: by broadcasting, not by copies.
        query = graph.op("Reshape", query, graph.integers(0, self.kv_heads, groups, -1, size))
        group = graph.integers(2)
        keys = graph.op("Transpose", graph.op("Unsqueeze", key, group), perm=[0, 1, 2, 4, 3])
        scores = graph.op("Div", graph.op("MatMul", query, keys), graph.constant(math.sqrt(size)))
        scores = graph.op("Where", shared.visible, scores, graph.constant(MASKED))
        shares = graph.op("Softmax", scores, axis=-1)
        context = graph.op("MatMul", shares, graph.op("Unsqueeze", value, group))
        context = graph.op("Reshape", context, graph.integers(0, self.heads, -1, size))
        context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
        return graph.op("Reshape", context, graph.integers(0, 0, self.hidden)), (key, value)

    def _norm(self, graph: Graph, name: str, value: str) -> str:
        scale = graph.weight(f"{name}.weight", self.hidden, mean=1.0, std=0.05)
        wide = graph.widened(value)
        square = graph.op("Pow", wide, graph.constant(2.0, np.float32))
        mean = graph.op("ReduceMean", square, axes=[-1], keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(self.epsilon, np.float32)))
        return graph.op("Mul", graph.narrowed(graph.op("Div", wide, root)), scale)


class _Shared(NamedTuple):
    visible: str  # bool: batch, 1, 1, sequence, past + sequence
    cosine: str  # batch, 1, sequence, head_size / 2
    sine: str


def _linear(graph: Graph, name: str, value: str, inputs: int, outputs: int, *, depth: int = 1) -> str:
    weight = graph.weight(f"{name}.weight", inputs, outputs, std=1 / math.sqrt(inputs * depth))
    return graph.op("MatMul", value, weight)


def _rotated(graph: Graph, value: str, size: int, shared: _Shared) -> str:
    left, right = graph.ops(2, "Split", value, graph.integers(size // 2, size // 2), axis=-1)

    def product(half: str, angle: str) -> str:
        return graph.op("Mul", half, angle)

    turned = [
        graph.op("Sub", product(left, shared.cosine), product(right, shared.sine)),
        graph.op("Add", product(right, shared.cosine), product(left, shared.sine)),
    ]
    return graph.op("Concat", *turned, axis=-1)
