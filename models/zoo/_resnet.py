"""A ResNet-class convolutional network, with batch normalization left in the graph."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from glake_infer.models.zoo._graph import Feeds, Graph, require

EXPANSION = 4  # of a bottleneck


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a ResNet. Raises InputError where they do not fit together."""

    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks per stage; each stage but the first halves the image
    bottleneck: bool = True
    width: int = 64  # channels of the first stage; doubled by each further one
    channels: int = 3  # of the image

    def __post_init__(self) -> None:
        sizes = (len(self.depths), *self.depths, self.width, self.channels)
        require(min(sizes) >= 1, f"every size of {self} must be at least 1")

    @property
    def default_labels(self) -> int:
        """As many classes as ImageNet has."""
        return 1000

    def add_to(self, graph: Graph, *, labels: int | None) -> None:
        """Add the network and its head to `graph`."""
        value = graph.input("pixel_values", ["batch", self.channels, "height", "width"])
        with graph.scope("stem"):
            value = _conv(graph, "conv1", value, self.channels, self.width, kernel=7, stride=2)
            value = graph.op("Relu", _norm(graph, "bn1", value, self.width))
            value = graph.op("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        inputs = self.width
        for stage, depth in enumerate(self.depths):
            inner = self.width << stage
            outputs = inner * (EXPANSION if self.bottleneck else 1)
            for block in range(depth):
                stride = 2 if stage and not block else 1
                with graph.scope(f"layer{stage + 1}.{block}"):
                    value = self._block(
                        graph, f"layer{stage + 1}.{block}", value, inputs, inner, outputs, stride=stride
                    )
                inputs = outputs
        with graph.scope("head"):
            features = graph.op("Flatten", graph.op("GlobalAveragePool", value))
            if labels is None:
                graph.output("features", features, ["batch", inputs])
                return
            std = 1 / math.sqrt(inputs)
            weight = graph.weight("fc.weight", labels, inputs, std=std, trunk=False)
            bias = graph.weight("fc.bias", labels, std=0.02, trunk=False)
            graph.output("logits", graph.op("Gemm", features, weight, bias, transB=1), ["batch", labels])

    def feeds(
        self, rng: np.random.Generator, *, batch: int, length: int | None, past: int, dtype: npt.DTypeLike
    ) -> Feeds:
        """Square images of `length` pixels a side, 64 unless given."""
        require(past == 0, "a convolutional network has no cache: leave `past` at 0")
        side = 64 if length is None else length
        image = rng.standard_normal((batch, self.channels, side, side), np.float32)
        return {"pixel_values": image.astype(dtype)}

    def _block(
        self, graph: Graph, name: str, value: str, inputs: int, inner: int, outputs: int, *, stride: int
    ) -> str:
        if self.bottleneck:
            steps = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        else:
            steps = [(inputs, inner, 3, stride), (inner, outputs, 3, 1)]
        branch = value
        for number, (before, after, kernel, step) in enumerate(steps, start=1):
            last = number == len(steps)
            branch = _conv(graph, f"{name}.conv{number}", branch, before, after, kernel=kernel, stride=step)
            # A small last scale keeps the sum over many blocks within fp16.
            branch = _norm(graph, f"{name}.bn{number}", branch, after, scale=0.25 if last else 1.0)
            branch = branch if last else graph.op("Relu", branch)
        if inputs != outputs or stride != 1:
            value = _conv(graph, f"{name}.downsample.0", value, inputs, outputs, kernel=1, stride=stride)
            value = _norm(graph, f"{name}.downsample.1", value, outputs)
        return graph.op("Relu", graph.op("Add", branch, value))


def _conv(graph: Graph, name: str, value: str, inputs: int, outputs: int, *, kernel: int, stride: int) -> str:
    std = math.sqrt(2 / (inputs * kernel * kernel))
    weight = graph.weight(f"{name}.weight", outputs, inputs, kernel, kernel, std=std)
    return graph.op(
        "Conv",
        value,
        weight,
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=[kernel // 2] * 4,
    )


def _norm(graph: Graph, name: str, value: str, channels: int, *, scale: float = 1.0) -> str:
    weights = [
        graph.weight(f"{name}.weight", channels, mean=scale, std=scale / 20),
        graph.weight(f"{name}.bias", channels, std=0.05),
        graph.weight(f"{name}.running_mean", channels, std=0.05),
        graph.weight(f"{name}.running_var", channels, mean=1.0, std=0.05),
    ]
    return graph.op("BatchNormalization", value, *weights, epsilon=1e-5)
