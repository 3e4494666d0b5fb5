"""Whether a session can be built while its weights are still on their way to the GPU.

ONNX Runtime's CUDA kernels of some operators read weights when a session is built, to repack them (`PrePack`: quantized
matrix products, convolutions in NHWC, mixtures of experts). Those named here do not (ONNX Runtime 1.31;
tests/gpu/test_overlap.py builds sessions over garbage that becomes the weights afterwards); a model whose weights go to
any other operator is built once they are there.
"""

from __future__ import annotations

from typing import Any

import onnx

from glake_infer.models.graph import initializers, is_external, scopes

READ_WHEN_RUN = {
    "Add", "Attention", "BatchNormalization", "BiasGelu", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "Div",
    "EmbedLayerNormalization", "Equal", "Expand", "FastGelu", "FusedGemm", "FusedMatMul", "Gather", "Gemm",
    "Identity", "InstanceNormalization", "LayerNormalization", "MatMul", "Mul", "MultiHeadAttention", "PRelu", "Pow",
    "Reshape", "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Slice", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
DOMAINS = {"", "ai.onnx", "com.microsoft"}
"""Whose operators those are; a function of a model's own may have any name."""
IN_NHWC = {"Conv", "ConvTranspose"}
"""Operators whose kernels repack with the provider option `prefer_nhwc`."""


def weights_may_come_later(graph: bytes, providers: list[Any]) -> bool:
    """Whether no kernel of a serialized model reads external weights before its first run."""
    model = onnx.load_model_from_string(graph)
    weights = {item.tensor.name for item in initializers(model) if is_external(item.tensor)}
    options = [given[1] for given in providers if not isinstance(given, str)]
    nhwc = any(str(each.get("prefer_nhwc", "0")).lower() not in ("0", "false") for each in options)
    allowed = READ_WHEN_RUN - IN_NHWC if nhwc else READ_WHEN_RUN
    return all(
        node.op_type in allowed and node.domain in DOMAINS
        for scope in scopes(model.graph)
        for node in scope.node
        if not weights.isdisjoint(node.input)
    )
