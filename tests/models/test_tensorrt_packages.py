"""Which GPU needs which TensorRT, and what to run to have it."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from glake_infer.allocators.errors import MissingDependencyError
from glake_infer.models import doctor
from glake_infer.models.tensorrt import library, packages
from glake_infer.models.tensorrt.packages import Installed


@pytest.mark.parametrize(
    ("capability", "kinds"),
    [
        ("7.0", ()),
        ("7.5", ("tensorrt-rtx", "tensorrt")),
        ("8.0", ("tensorrt",)),  # A100
        ("8.6", ("tensorrt-rtx", "tensorrt")),  # A10, 3090
        ("8.7", ("tensorrt",)),
        ("8.9", ("tensorrt-rtx", "tensorrt")),  # L4, 4090
        ("9.0", ("tensorrt",)),  # H100, H200
        ("10.0", ("tensorrt",)),  # B200: not less than 7.5
        ("12.0", ("tensorrt-rtx", "tensorrt")),
    ],
)
def test_what_serves_a_gpu(capability, kinds):
    assert packages.kinds_for(capability) == kinds


@pytest.mark.parametrize(
    ("kind", "cuda", "command"),
    [
        ("tensorrt-rtx", None, "pip install 'glake-infer[tensorrt-rtx]'"),
        ("tensorrt-rtx", "13.2", "pip install 'glake-infer[tensorrt-rtx]'"),
        ("tensorrt", "13.0", "pip install 'glake-infer[tensorrt]'"),
        ("tensorrt", "12.8", "pip install 'tensorrt-cu12>=10.9'"),
        ("tensorrt-rtx", "12.4", "pip install 'tensorrt-rtx-cu12>=1.4'"),
    ],
)
def test_the_command(kind, cuda, command):
    assert packages.install_command(kind, cuda) == command


@pytest.mark.parametrize(
    ("kind", "cuda", "machine", "python", "reason"),
    [
        ("tensorrt-rtx", None, "x86_64", (3, 11), ""),
        ("tensorrt-rtx", "12.2", "x86_64", (3, 14), ""),
        ("tensorrt-rtx", "13.0", "aarch64", (3, 12), ""),
        ("tensorrt-rtx", "12.9", "aarch64", (3, 12), "needs a driver for CUDA 13, and this one serves 12.9"),
        ("tensorrt", "11.8", "x86_64", (3, 11), "needs a driver for CUDA 12, and this one serves 11.8"),
        ("tensorrt", None, "riscv64", (3, 11), "no packages of TensorRT for riscv64"),
        ("tensorrt", None, "x86_64", (3, 15), "up to Python 3.14, and this is 3.15"),
    ],
)
def test_what_stands_in_the_way(kind, cuda, machine, python, reason):
    told = packages.obstacle(kind, cuda, machine, python)
    assert reason in told
    assert bool(told) == bool(reason)


def test_a_gpu_that_nothing_can_be_installed_for_gets_the_reason_and_no_command():
    told = packages.need("cuda:0", "8.6", (), "12.9", machine="aarch64")
    assert (told.uses, told.command) == (None, "")
    assert "TensorRT-RTX on aarch64 needs a driver for CUDA 13" in told.detail
    assert packages.need("cuda:0", "6.1").command == ""


def test_the_better_one_of_two_that_are_installed_is_used():
    both = (Installed("tensorrt", "10.16.1.11", 12), Installed("tensorrt-rtx", "1.7.1.116"))
    assert packages.need("cuda:0", "8.6", both, "13.0").uses == "TensorRT-RTX 1.7.1.116"
    # the driver is too old for the one, so the other has to do
    assert packages.need("cuda:0", "8.6", both, "12.8").uses == "TensorRT 10.16.1.11"
    assert "12.1 (1.5 is the first" in packages.misfit(Installed("tensorrt-rtx", "1.4.0.76"), "12.1")


def test_what_is_installed_is_found_by_each_of_its_names(monkeypatch):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.importlib.metadata, "version", version)
    versions = {"tensorrt-cu12": "10.16.1.11", "tensorrt-rtx": "1.7.1.116", "tensorrt-rtx-cu13": "1.7.1.116"}
    assert packages.find_installed() == (
        Installed("tensorrt-rtx", "1.7.1.116"),
        Installed("tensorrt", "10.16.1.11", 12),
    )
    assert [found.distribution for found in packages.find_installed()] == [
        "tensorrt-rtx-cu13",
        "tensorrt-cu12",
    ]
    versions = {}
    assert packages.find_installed() == ()


def gpu(capability):
    return (doctor.Gpu(0, "a GPU", 24 << 30, capability, True),)


@pytest.mark.parametrize(
    ("kind", "gpus", "driver", "told"),
    [
        (
            "tensorrt-rtx",
            (),
            None,
            "pip install 'glake-infer[tensorrt-rtx]' (it builds engines without a GPU)",
        ),
        (
            "tensorrt",
            (),
            None,
            "no GPU, which it needs to build; TensorRT-RTX does not: pip install 'glake-infer[tens",
        ),
        (
            "tensorrt-rtx",
            gpu("8.6"),
            "13.0",
            "'glake-infer[tensorrt-rtx]' (for this machine's GPU of compute capability 8",
        ),
        ("tensorrt-rtx", gpu("8.9"), "12.8", "Install it: pip install 'tensorrt-rtx-cu12>=1.4' (for this"),
        (
            "tensorrt-rtx",
            gpu("9.0"),
            "13.0",
            "9.0, for which the engine is TensorRT: pip install 'glake-infer[tensorrt]'",
        ),
        ("tensorrt", gpu("7.0"), "12.8", "7.0, for which the engine is none"),
        (
            "tensorrt",
            gpu("9.0"),
            "11.8",
            "needs a driver for CUDA 12, and this one serves 11.8: update it; then pip inst",
        ),
    ],
)
def test_a_missing_tensorrt_is_told_with_the_command_for_this_machine(monkeypatch, kind, gpus, driver, told):
    monkeypatch.setattr(doctor, "find_gpus", lambda: (gpus, "", driver))
    monkeypatch.setattr(packages, "find_installed", lambda: ())
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(library.importlib, "import_module", broken)
    with pytest.raises(MissingDependencyError) as caught:
        library.module(kind)
    assert told in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


def test_one_that_cannot_be_imported_is_installed_again(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: (gpu("8.6"), "", "13.0"))
    monkeypatch.setattr(packages, "find_installed", lambda: (Installed("tensorrt-rtx", "1.7.1.116"),))
    monkeypatch.setattr(library.importlib, "import_module", broken)
    with pytest.raises(
        MissingDependencyError, match=r"libtensorrt.so.1: no such file.*--force-reinstall tensorrt-rtx-cu13"
    ):
        library.module("tensorrt-rtx")


def broken(name):
    raise ImportError("libtensorrt.so.1: no such file")


def test_the_bounds_are_those_of_the_extras():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for kind, oldest in packages.OLDEST.items():
        assert project["optional-dependencies"][kind] == [f"{kind}>={'.'.join(map(str, oldest))}"]
