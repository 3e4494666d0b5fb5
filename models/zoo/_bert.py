"""A BERT-class encoder: a trunk and, per fine-tune, a classifier on its first token."""

import math
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from glake_infer.models.zoo._graph import Feeds, Graph, require

EPSILON = 1e-12
MASKED = -1e4  # added to a masked score: the softmax gives 0, and fp16 can hold it


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT-class encoder. Raises InputError where they do not fit together."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 30522
    positions: int = 512  # longest sequence
    types: int = 2

    def __post_init__(self) -> None:
        require(min(astuple(self)) >= 1, f"every size of {self} must be at least 1")
        require(
            self.hidden % self.heads == 0,
            f"hidden={self.hidden} cannot be split over heads={self.heads}: choose a multiple of it",
        )

    @property
    def default_labels(self) -> int:
        """Two: a binary classifier."""
        return 2

    def add_to(self, graph: Graph, *, labels: int | None) -> None:
        """Add the encoder and its head to `graph`."""
        ids = graph.input("input_ids", ["batch", "sequence"], element=TensorProto.INT64)
        mask = graph.input("attention_mask", ["batch", "sequence"], element=TensorProto.INT64)
        types = graph.input("token_type_ids", ["batch", "sequence"], element=TensorProto.INT64)
        with graph.scope("embeddings"):
            hidden = self._embeddings(graph, ids, types)
        with graph.scope("attention_mask"):
            absent = graph.op("Sub", graph.constant(1.0), graph.cast(mask))
            bias = graph.op(
                "Mul", graph.op("Unsqueeze", absent, graph.integers(1, 2)), graph.constant(MASKED)
            )
        for layer in range(self.layers):
            with graph.scope(f"encoder/layer.{layer}"):
                hidden = self._layer(graph, f"encoder.layer.{layer}", hidden, bias)
        if labels is None:
            graph.output("last_hidden_state", hidden, ["batch", "sequence", self.hidden])
        else:
            graph.output("logits", self._head(graph, hidden, labels), ["batch", labels])

    def feeds(
        self, rng: np.random.Generator, *, batch: int, length: int | None, past: int, dtype: npt.DTypeLike
    ) -> Feeds:
        """Token ids in two segments; every row but the first may be padded at its end."""
        length = min(16, self.positions) if length is None else length
        require(past == 0, "an encoder has no cache: leave `past` at 0")
        require(length <= self.positions, f"length={length} is above the model's {self.positions} positions")
        places = np.arange(length)
        lengths = rng.integers(1, length + 1, (batch, 1))
        lengths[:1] = length
        segments = rng.integers(0, length + 1, (batch, 1))
        return {
            "input_ids": rng.integers(0, self.vocabulary, (batch, length)),
            "attention_mask": (places < lengths).astype(np.int64),
            "token_type_ids": np.minimum(places >= segments, self.types - 1).astype(np.int64),
        }

    def _embeddings(self, graph: Graph, ids: str, types: str) -> str:
        name = "embeddings"
        words = graph.weight(f"{name}.word_embeddings.weight", self.vocabulary, self.hidden, std=0.02)
        places = graph.weight(f"{name}.position_embeddings.weight", self.positions, self.hidden, std=0.02)
        kinds = graph.weight(f"{name}.token_type_embeddings.weight", self.types, self.hidden, std=0.02)
        length = graph.op("Shape", ids, start=1, end=2)
        total = graph.op("Add", graph.op("Gather", words, ids), graph.op("Gather", kinds, types))
        total = graph.op(
            "Add", total, graph.op("Slice", places, graph.integers(0), length, graph.integers(0))
        )
        return self._norm(graph, f"{name}.LayerNorm", total)

    def _layer(self, graph: Graph, name: str, hidden: str, bias: str) -> str:
        with graph.scope("attention"):
            context = self._attention(graph, f"{name}.attention.self", hidden, bias)
            context = self._linear(
                graph,
                f"{name}.attention.output.dense",
                context,
                self.hidden,
                self.hidden,
                depth=2 * self.layers,
            )
            hidden = self._norm(graph, f"{name}.attention.output.LayerNorm", graph.op("Add", context, hidden))
        with graph.scope("feed_forward"):
            inner = self._linear(graph, f"{name}.intermediate.dense", hidden, self.hidden, self.intermediate)
            outer = self._linear(
                graph,
                f"{name}.output.dense",
                _gelu(graph, inner),
                self.intermediate,
                self.hidden,
                depth=2 * self.layers,
            )
            return self._norm(graph, f"{name}.output.LayerNorm", graph.op("Add", outer, hidden))

    def _attention(self, graph: Graph, name: str, hidden: str, bias: str) -> str:
        size = self.hidden // self.heads
        split = graph.integers(0, 0, self.heads, size)

        def heads(part: str, order: list[int]) -> str:
            value = self._linear(graph, f"{name}.{part}", hidden, self.hidden, self.hidden)
            return graph.op("Transpose", graph.op("Reshape", value, split), perm=order)

        query, key = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
        value = heads("value", [0, 2, 1, 3])
        scores = graph.op("Div", graph.op("MatMul", query, key), graph.constant(math.sqrt(size)))
        shares = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        context = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        return graph.op("Reshape", context, graph.integers(0, 0, self.hidden))

    def _head(self, graph: Graph, hidden: str, labels: int) -> str:
        def dense(name: str, value: str, outputs: int) -> str:
            std = 1 / math.sqrt(self.hidden)
            weight = graph.weight(f"{name}.weight", outputs, self.hidden, std=std, trunk=False)
            bias = graph.weight(f"{name}.bias", outputs, std=0.02, trunk=False)
            return graph.op("Gemm", value, weight, bias, transB=1)

        with graph.scope("head"):
            first = graph.op("Gather", hidden, graph.constant(0, np.int64), axis=1)
            pooled = graph.op("Tanh", dense("pooler.dense", first, self.hidden))
            return dense("classifier", pooled, labels)

    def _linear(
        self, graph: Graph, name: str, value: str, inputs: int, outputs: int, *, depth: int = 1
    ) -> str:
        weight = graph.weight(f"{name}.weight", inputs, outputs, std=1 / math.sqrt(inputs * depth))
        bias = graph.weight(f"{name}.bias", outputs, std=0.02)
        return graph.op("Add", graph.op("MatMul", value, weight), bias)

    def _norm(self, graph: Graph, name: str, value: str) -> str:
        scale = graph.weight(f"{name}.weight", self.hidden, mean=1.0, std=0.05)
        bias = graph.weight(f"{name}.bias", self.hidden, std=0.02)
        return graph.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=EPSILON)


def _gelu(graph: Graph, value: str) -> str:
    error = graph.op("Erf", graph.op("Div", value, graph.constant(math.sqrt(2))))
    product = graph.op("Mul", value, graph.op("Add", error, graph.constant(1.0)))
    return graph.op("Mul", product, graph.constant(0.5))
