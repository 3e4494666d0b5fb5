"""Sessions of ONNX Runtime as it is, over a model or over the graph that a package has of it."""

from pathlib import Path
from typing import Any

SETTINGS = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
"""Of the CUDA provider, for answers that can be compared bit for bit."""


def plain_session(options: Any, path: str, index: int | None, *, of_package: bool) -> Any:
    """A session on GPU `index`, or on the CPU. `of_package`: over a package's graph, fused for CUDA where it has one."""
    import onnxruntime

    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if index is not None:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(index), **SETTINGS}))
    source: str | bytes = path
    if of_package:  # imported here: a process that has plain sessions alone does without all of ours
        from glake_infer.models.package import Package
        from glake_infer.store import Store

        package = Package(Path(path), Store())
        variant = "cuda" if index is not None and "cuda" in package.manifest.variants else "onnx"
        source = package.graph(variant).SerializeToString()
        entry = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(entry, str(package.store.root))
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    assert index is None or session.get_providers()[0] == "CUDAExecutionProvider"
    return session
