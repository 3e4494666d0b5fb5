"""`Pool.providers_with`: what is asked of ONNX Runtime and of the packages, with none of them here. The rest: not run."""

import sys
import types
from types import SimpleNamespace

import pytest

from glake_infer.allocators import tensorrt_providers
from glake_infer.allocators.errors import (
    DeviceNotFoundError,
    GlakeError,
    InputError,
    MissingDependencyError,
)
from glake_infer.allocators.pool import Pool

ort = pytest.importorskip("onnxruntime")
RTX = "NvTensorRTRTXExecutionProvider"
BEHIND = [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """An ONNX Runtime with the providers of onnxruntime-gpu."""
    monkeypatch.setattr(
        ort,
        "get_available_providers",
        lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)


@pytest.fixture
def linked(monkeypatch, tmp_path):
    """ONNX Runtime's TensorRT provider, linked with TensorRT 10; returns what is loaded, and where pip's are."""
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi/libonnxruntime_providers_tensorrt.so").write_bytes(
        b"\x7fELF...\0libnvinfer.so.10\0libnvonnxparser.so.10\0"
    )
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    folder = tmp_path / "tensorrt_libs"
    folder.mkdir()
    loaded = []

    def load(name, mode):
        if "libnv" in name and not name.startswith(str(folder)):
            raise OSError(f"{name}: cannot open shared object file")
        loaded.append(name)

    monkeypatch.setattr(tensorrt_providers.ctypes, "CDLL", load)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(tensorrt_providers.importlib.util, "find_spec", lambda name: spec)
    return SimpleNamespace(loaded=loaded, folder=folder)


@pytest.fixture
def plugin(monkeypatch):
    """The package of TensorRT-RTX's provider; `.devices` is what ONNX Runtime finds once it is registered."""
    module = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.get_ep_name = lambda: RTX
    module.get_library_path = lambda: "/packages/libprovider.so"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = SimpleNamespace(registered=[], devices=[SimpleNamespace(ep_name=RTX)], version="0.5.0")
    cpu = SimpleNamespace(ep_name="CPUExecutionProvider")

    def register(name, path):
        state.registered.append((name, path))

    monkeypatch.setattr(ort, "register_execution_provider_library", register)
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [cpu, *(state.devices if state.registered else [])])
    monkeypatch.setattr(
        tensorrt_providers, "_version", lambda name: state.version if name.endswith("-cu13") else None
    )
    return state


def test_tensorrt_is_in_front_and_its_libraries_are_loaded_in_order(linked):
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10", "libnvinfer.so.11"):
        (linked.folder / library).touch()
    providers = tensorrt_providers.providers_with(
        "tensorrt", "cuda:1", {"trt_engine_cache_enable": True, "trt_max_workspace_size": 1 << 30}
    )
    assert providers == [
        (
            "TensorrtExecutionProvider",
            {"device_id": "1", "trt_engine_cache_enable": "1", "trt_max_workspace_size": "1073741824"},
        ),
        *BEHIND,
    ]
    assert linked.loaded == [str(linked.folder / f"lib{one}.so.10") for one in ("nvinfer", "nvonnxparser")]


def test_another_tensorrt_than_the_one_it_is_built_for_is_refused_with_the_command(linked):
    (linked.folder / "libnvinfer.so.11").touch()
    with pytest.raises(MissingDependencyError, match=r"built for TensorRT 10.*'tensorrt-cu13>=10,<11'"):
        tensorrt_providers.providers_with("tensorrt", "cuda:0", None)
    assert linked.loaded == []


def test_an_onnxruntime_without_the_provider_names_the_commands(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(
        MissingDependencyError, match=r"has no TensorrtExecutionProvider.*'glake-infer\[cuda\]'"
    ):
        tensorrt_providers.providers_with("tensorrt", "cuda:0", None)


def test_the_plugin_is_registered_once_and_takes_contexts_from_the_session(plugin):
    expected = [(RTX, {"device_id": "1", "nv_use_sync_gpu_allocator": "1"}), *BEHIND]
    assert tensorrt_providers.providers_with("tensorrt-rtx", "cuda:1", None) == expected
    assert tensorrt_providers.providers_with("tensorrt-rtx", "cuda:1", {}) == expected
    assert plugin.registered == [(RTX, "/packages/libprovider.so")]
    other = tensorrt_providers.providers_with("tensorrt-rtx", "cuda:1", {"nv_use_sync_gpu_allocator": False})
    assert other[0][1]["nv_use_sync_gpu_allocator"] == "0"


def test_a_missing_or_old_plugin_names_the_command(plugin, monkeypatch):
    plugin.version = "0.3.0"
    with pytest.raises(MissingDependencyError, match=r"0\.3\.0 is installed, and 0\.4.*pip install -U"):
        tensorrt_providers.providers_with("tensorrt-rtx", "cuda:0", None)
    plugin.version = None
    with pytest.raises(MissingDependencyError, match=r"pip install 'onnxruntime-ep-nv-tensorrt-rtx>=0\.4'"):
        tensorrt_providers.providers_with("tensorrt-rtx", "cuda:0", None)
    assert plugin.registered == []


def test_a_plugin_without_a_gpu_for_it_and_one_that_cannot_be_loaded(plugin, monkeypatch):
    plugin.devices = []
    with pytest.raises(DeviceNotFoundError, match=r"8\.6, 8\.9, and 12\.0 and newer"):
        tensorrt_providers.providers_with("tensorrt-rtx", "cuda:0", None)

    def register(name, path):
        raise RuntimeError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ort, "register_execution_provider_library", register)
    with pytest.raises(GlakeError, match=r"could not load onnxruntime-ep-nv-tensorrt-rtx 0\.5\.0: libcuda"):
        tensorrt_providers.providers_with("tensorrt-rtx", "cuda:0", None)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("trt", None, "'trt'.*expected 'tensorrt' or 'tensorrt-rtx'"),
        ("tensorrt", {"device_id": 0}, "'device_id', which the pool decides"),
        ("tensorrt", {"trt_context_memory_sharing_enable": True}, "before it queues the work"),
        (
            "tensorrt-rtx",
            {"trt_fp16_enable": True},
            "'trt_fp16_enable' is an option of TensorrtExecutionProvider",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_loaded(linked, plugin, kind, options, message):
    with pytest.raises(InputError, match=message):
        tensorrt_providers.providers_with(kind, "cuda:0", options)
    assert (linked.loaded, plugin.registered) == ([], [])


def test_a_pool_on_the_cpu_is_refused():
    with Pool("cpu") as pool, pytest.raises(InputError, match="TensorRT runs on a GPU"):
        pool.providers_with("tensorrt-rtx")
