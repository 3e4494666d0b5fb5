"""doctor: what it finds here, and what it would say elsewhere."""

import importlib.metadata

import pytest

from glake_infer.models import doctor
from glake_infer.models.tensorrt import packages
from glake_infer.models.tensorrt.packages import Installed


def test_doctor_here(shop, fits):
    report = shop.json("doctor")
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert {
        "python",
        "glake-infer",
        "onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "tensorrt",
        "tensorrt-rtx",
        "cuda-python",
    } <= versions.keys()
    assert report["tensorrt"] == [] or report["tensorrt"][0].keys() >= {
        "device",
        "capability",
        "uses",
        "command",
    }
    assert "CPUExecutionProvider" in report["providers"]
    assert report["store"] == str(shop.store.root)
    assert report["cores"] >= 1
    assert report["memory"] > report["memory_available"] > 0
    checks = {check["name"]: check["ok"] for check in report["checks"]}
    assert checks["native core"]
    assert checks["memfd"]
    assert checks["store"]
    out, _ = shop.run("doctor")
    fits("\n".join(line for line in out.splitlines() if str(shop.folder) not in line))


def test_doctor_makes_nothing(empty_shop):
    empty_shop.run("doctor")
    assert list(empty_shop.folder.iterdir()) == []


CPU = {"onnxruntime": "1.32.0", "onnxruntime-gpu": None}
GPU = (doctor.Gpu(0, "NVIDIA A10"),)


WHOLE = (doctor.Gpu(0, "NVIDIA A10", 24 << 30, "8.6", True),)
BOTH = ("CPUExecutionProvider", "CUDAExecutionProvider")
NEW = {"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}


@pytest.mark.parametrize(
    ("versions", "gpus", "providers", "driver", "built_for", "wrong"),
    [
        (CPU, (), BOTH[:1], None, None, None),
        (NEW, WHOLE, BOTH, "13.0", "13.0", {}),
        (NEW, WHOLE, BOTH, "13.2", None, {}),
        (NEW, (), BOTH, None, "13.0", {"CUDA driver": "no GPU can be used"}),
        (NEW, WHOLE, BOTH, "12.8", "13.0", {"CUDA driver": "up to 12.8, and ONNX Runtime is built for 13.0"}),
        (NEW, WHOLE, BOTH[:1], "13.0", None, {"ONNX Runtime on CUDA": "overwrote"}),
        (CPU, WHOLE, BOTH[:1], "13.0", None, {"ONNX Runtime on CUDA": "not installed"}),
        (
            {**NEW, "onnxruntime-gpu": "1.24.4"}, WHOLE, BOTH, "13.0", "12.8",
            {"ONNX Runtime on CUDA": "1.27 or newer"},
        ),
        (
            NEW, (doctor.Gpu(0, "old", 1, "5.0", False),), BOTH, "13.0", None,
            {"stitching on cuda:0": "no virtual memory management"},
        ),
    ],
)  # fmt: skip
def test_what_doctor_checks_for_cuda(versions, gpus, providers, driver, built_for, wrong):
    checks = list(doctor.cuda_checks(versions, gpus, providers, driver, built_for))
    if wrong is None:
        assert checks == []
        return
    assert {check.name for check in checks if not check.ok} == wrong.keys()
    assert {"CUDA driver", "ONNX Runtime on CUDA"} <= {check.name for check in checks}
    for name, detail in wrong.items():
        assert detail in next(check.detail for check in checks if check.name == name)


class FakeDriver:
    """libcuda.so.1 with one GPU, or an error of cuInit."""

    def __init__(self, code=0):
        self.code = code

    def __call__(self, name):
        assert name == "libcuda.so.1"
        return self

    def cuInit(self, flags):
        return self.code

    def cuDriverGetVersion(self, version):
        version._obj.value = 13020

    def cuDeviceGetCount(self, count):
        count._obj.value = 1

    def cuDeviceGet(self, device, index):
        device._obj.value = index

    def cuDeviceGetName(self, name, size, device):
        name.value = b"NVIDIA L4"

    def cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = 24 << 30

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 9, 102: 1}[attribute]


def test_gpus_are_found_through_the_driver_and_its_errors_are_told(monkeypatch):
    monkeypatch.setattr(doctor.ctypes, "CDLL", FakeDriver())
    assert doctor.find_gpus() == ((doctor.Gpu(0, "NVIDIA L4", 24 << 30, "8.9", True),), "CUDA 13.2", "13.2")
    monkeypatch.setattr(doctor.ctypes, "CDLL", FakeDriver(100))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus, note, driver = doctor.find_gpus()
    assert (gpus, driver) == ((), "13.2")
    assert "CUDA_ERROR_NO_DEVICE" in note
    assert "CUDA_VISIBLE_DEVICES is ''" in note
    monkeypatch.setattr(doctor.ctypes, "CDLL", FakeDriver(804))
    assert "error 804" in doctor.find_gpus()[1]


@pytest.mark.parametrize(
    ("versions", "gpus", "warned", "advised"),
    [
        (CPU, (), "", ""),
        ({**CPU, "onnxruntime": None}, (), "", "'glake-infer[cpu]'"),
        ({**CPU, "onnxruntime": None}, GPU, "", "'glake-infer[cuda]'"),
        ({**CPU, "onnxruntime-gpu": "1.32.0"}, (), "overwrite each other", ""),
        (CPU, GPU, "the one for the CPU", "'glake-infer[cuda]'"),
    ],
)
def test_what_doctor_would_say(versions, gpus, warned, advised):
    warnings, advice = "\n".join(doctor._warnings(versions, gpus)), "\n".join(doctor._advice(versions, gpus))
    assert warned in warnings
    assert bool(warnings) == bool(warned) or gpus
    assert advised in advice
    assert bool(advice) == bool(advised)


RTX = Installed("tensorrt-rtx", "1.7.1.116")
FULL = Installed("tensorrt", "11.4.0.106")
OLD = Installed("tensorrt-rtx", "1.3.0.35")


@pytest.mark.parametrize(
    ("engines", "capabilities", "driver", "right", "wrong", "advised"),
    [
        # nothing is installed: the command for each GPU
        ((), (), None, {}, {}, "needs no GPU): pip install 'glake-infer[tensorrt-rtx]'"),
        ((), ("8.6",), "13.0", {}, {}, "on cuda:0: pip install 'glake-infer[tensorrt-rtx]'"),
        ((), ("9.0",), "13.0", {}, {}, "on cuda:0: pip install 'glake-infer[tensorrt]'"),
        ((), ("8.9", "8.9"), "12.8", {}, {}, "on cuda:0, cuda:1: pip install 'tensorrt-rtx-cu12>=1.4'"),
        ((), ("7.0",), "12.8", {}, {}, "no TensorRT serves compute capability 7.0"),
        # something is
        ((RTX,), (), None, {"TensorRT-RTX": "builds engines here"}, {}, ""),
        ((OLD,), (), None, {}, {"TensorRT-RTX": "1.3.0.35 is older than 1.4"}, ""),
        ((RTX,), ("8.6",), "13.0", {"TensorRT on cuda:0": "1.7.1.116 serves compute capability 8.6"}, {}, ""),
        (
            (RTX,), ("8.9", "9.0"), "13.0", {"TensorRT on cuda:0": "8.9"},
            {"TensorRT on cuda:1": "(it serves 7.5, 8.6, 8.9, 12.0, 12.1). For this GPU: "
             "pip install 'glake-infer[tensorrt]'"}, "",
        ),
        ((FULL, RTX), ("10.0",), "13.0", {"TensorRT on cuda:0": "TensorRT 11.4.0.106 serves"}, {}, ""),
        (
            (RTX,), ("8.6",), "12.8", {},
            {"TensorRT on cuda:0": "is for CUDA 13, and the driver serves 12.8. For this GPU: "
             "pip install 'tensorrt-rtx-cu12>=1.4'"}, "",
        ),
        ((FULL,), (), None, {"TensorRT": "only beside a GPU"}, {}, "'glake-infer[tensorrt-rtx]'"),
    ],
)  # fmt: skip
def test_what_doctor_says_of_tensorrt(monkeypatch, engines, capabilities, driver, right, wrong, advised):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(packages, "LAST_PYTHON", (99, 0))
    needs = tuple(
        packages.need(f"cuda:{index}", capability, engines, driver)
        for index, capability in enumerate(capabilities)
    )
    checks = list(doctor.tensorrt_checks(engines, needs))
    assert {check.name for check in checks if check.ok} == right.keys()
    assert {check.name for check in checks if not check.ok} == wrong.keys()
    for name, detail in {**right, **wrong}.items():
        assert detail in next(check.detail for check in checks if check.name == name)
    advice = list(doctor.tensorrt_advice(engines, needs, driver))
    assert advised in "\n".join(advice)
    assert bool(advice) == bool(advised)


def test_tensorrt_is_listed_whether_it_is_installed_or_not():
    lines = {line.name: line for line in doctor.tensorrt_packages((Installed("tensorrt", "10.16.1.11", 12),))}
    assert (lines["tensorrt"].version, lines["tensorrt"].detail) == ("10.16.1.11", "for CUDA 12")
    assert lines["tensorrt-rtx"].version is None
