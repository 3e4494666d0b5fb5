"""From a spec straight to a package: the weights are generated into the store, no ONNX file between."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from blake3 import blake3
from onnx import ModelProto, TensorProto

from glake_infer.digest import Buffer, digest_of
from glake_infer.models.convert import ConvertReport, convert_source
from glake_infer.models.graph import MINIMUM_WEIGHT, tensor_bytes
from glake_infer.models.progress import Progress
from glake_infer.models.tensorrt.options import EngineOptions
from glake_infer.models.zoo import Description
from glake_infer.store import Store


class Generated:
    """A zoo model as a source for `convert_source`: every weight is made when its bytes are asked for."""

    def __init__(self, description: Description) -> None:
        self.path = Path(f"{description.spec.name}.onnx")
        self.digest = digest_of(json.dumps(asdict(description.spec), sort_keys=True).encode())
        self.model = ModelProto()
        self.model.CopyFrom(description.proto)
        self._weights = description.weights
        for tensor in self.model.graph.initializer:
            if tensor_bytes(tensor) < MINIMUM_WEIGHT:  # stays in the graph
                tensor.raw_data = self._weights.tensor(tensor.name).tobytes()

    def check_external(self) -> None:
        """Nothing to check: there are no files."""

    def digest_of(self, tensor: TensorProto) -> str:
        """Digest of a weight's bytes."""
        state = blake3(max_threads=blake3.AUTO)
        for piece in self.pieces(tensor):
            state.update(piece)
        return state.hexdigest()

    def pieces(self, tensor: TensorProto) -> Iterator[Buffer]:
        """Yield a weight's bytes block by block."""
        for block in self._weights.blocks(tensor.name):
            yield block.data.cast("B")


def convert_description(
    description: Description,
    target: str | os.PathLike[str],
    *,
    engine: str | EngineOptions | None = None,
    store: Store | None,
    progress: Progress | None,
) -> ConvertReport:
    """See `zoo.convert`."""
    return convert_source(
        Generated(description), Path(target), engine=engine, store=store or Store(), progress=progress
    )
