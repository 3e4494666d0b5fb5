"""doctor: what it finds here, and what it would say elsewhere."""

import importlib.metadata

import pytest

from glake_infer.models import doctor


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
        "cuda-python",
    } <= versions.keys()
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


CPU = {"onnxruntime": "1.32.0", "onnxruntime-gpu": None, "tensorrt": None, "tensorrt-rtx": "1.7"}
GPU = (doctor.Gpu(0, "NVIDIA A10"),)


@pytest.mark.parametrize(
    ("versions", "gpus", "warned", "advised"),
    [
        (CPU, (), "", ""),
        ({**CPU, "tensorrt-rtx": None}, (), "", "'glake-infer[tensorrt-rtx]'"),
        ({**CPU, "onnxruntime": None}, (), "", "'glake-infer[cpu]'"),
        ({**CPU, "onnxruntime": None}, GPU, "", "'glake-infer[cuda]'"),
        ({**CPU, "onnxruntime-gpu": "1.32.0"}, (), "overwrite each other", ""),
        (CPU, GPU, "the one for the CPU", "'glake-infer[cuda]'"),
        (CPU, GPU, "", "'glake-infer[tensorrt]'"),
    ],
)
def test_what_doctor_would_say(versions, gpus, warned, advised):
    warnings, advice = "\n".join(doctor._warnings(versions, gpus)), "\n".join(doctor._advice(versions, gpus))
    assert warned in warnings
    assert bool(warnings) == bool(warned) or gpus
    assert advised in advice
    assert bool(advice) == bool(advised)
