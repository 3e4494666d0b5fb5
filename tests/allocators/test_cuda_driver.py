"""The CUDA driver as it is found and refused (cuda_driver.cpp), on machines without a GPU."""

from __future__ import annotations

import fake_cuda
import pytest

ASK = """
import sys
from glake_infer.allocators import _native, errors
for what in sys.argv[1:]:
    try:
        print(eval(what, vars(_native)))
    except errors.DriverError as error:
        print("DriverError:", error)
"""


def ask(driver, *what, **environment):
    return fake_cuda.run(driver, ASK, *what, **environment).splitlines()


def test_the_module_loads_without_a_driver_and_does_not_look_for_one(tmp_path):
    code = (
        "import glake_infer.allocators as a; from glake_infer.allocators import _native, devices; a.Pool\n"
        "print(devices.parse_device('cpu'), 'libcuda' in open('/proc/self/maps').read())\n"
    )
    driver = fake_cuda.build(tmp_path)
    assert fake_cuda.run(driver, code) == "cpu False\n"
    used = code + "_native.cuda_driver_version(); print('libcuda' in open('/proc/self/maps').read())"
    assert fake_cuda.run(driver, used).splitlines()[1] == "True"


def test_no_library(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("not a library")
    for line in ask(tmp_path, "cuda_driver_version()", "cuda_device_count()", "cuda_memory(0)"):
        assert line.startswith("DriverError: the CUDA driver's library libcuda.so.1 cannot be opened (")
        assert "Install NVIDIA's driver" in line
        assert "docker run --gpus all" in line


def test_a_driver_that_serves(tmp_path):
    driver = fake_cuda.build(tmp_path, version=12040, devices=3)
    what = ["cuda_driver_version()", "cuda_device_count()", "cuda_device_name(2)", "cuda_device_memory(2)"]
    assert ask(driver, *what) == ["12040", "3", "Fake GPU 2", str(82 << 30)]


def test_a_driver_that_is_too_old_says_so_though_symbols_are_missing_too(tmp_path):
    driver = fake_cuda.build(tmp_path, version=11080, without=["cuStreamGetId"])
    (line,) = ask(driver, "cuda_device_count()")
    assert "too old: it has version 11.8 of the driver API, and glake-infer needs 12.0 or newer" in line
    assert "Install NVIDIA driver 525 or newer" in line


@pytest.mark.parametrize("symbol", ["cuMemCreate", "cuGraphRetainUserObject", "cuMemGetInfo_v2"])
def test_a_symbol_that_is_missing_is_named(tmp_path, symbol):
    driver = fake_cuda.build(tmp_path, without=[symbol])
    (line,) = ask(driver, "cuda_device_count()")
    assert f"has no {symbol}, which glake-infer calls" in line


def test_a_library_that_is_no_driver(tmp_path):
    driver = fake_cuda.build(tmp_path, without=["cuDriverGetVersion"])
    (line,) = ask(driver, "cuda_driver_version()")
    assert "it is not NVIDIA's CUDA driver" in line


def test_no_device_is_a_count_of_none_and_an_error_for_whoever_wants_one(tmp_path):
    driver = fake_cuda.build(tmp_path, init="CUDA_ERROR_NO_DEVICE")
    count, line = ask(driver, "cuda_device_count()", "cuda_memory(0)", CUDA_VISIBLE_DEVICES="9")
    assert count == "0"
    assert "cuInit" in line
    assert "CUDA_ERROR_NO_DEVICE (100: as the fake says)" in line
    assert "CUDA_VISIBLE_DEVICES is set to '9'" in line


def test_a_failure_is_tried_again(tmp_path):
    driver = fake_cuda.build(tmp_path, init="CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
    lines = ask(driver, "cuda_device_count()", "cuda_device_count()")
    for line in lines:
        assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in line
        assert "reboot" in line
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ({"vmm": 0}, "does not support CUDA's virtual memory management"),
        ({"retain": "CUDA_ERROR_OUT_OF_MEMORY"}, "nvidia-smi"),
        ({"retain": "CUDA_ERROR_ILLEGAL_ADDRESS"}, "Restart the process"),
        ({"devices": 0}, "CUDA_ERROR_INVALID_DEVICE"),
        ({}, "cuMemGetAllocationGranularity"),  # which the fake refuses
    ],
)
def test_a_device_that_cannot_have_a_pool(tmp_path, driver, expected):
    (line,) = ask(fake_cuda.build(tmp_path, **driver), "cuda_memory(0)")
    assert line.startswith("DriverError: ")
    assert expected in line
    if driver.get("devices") != 0:
        assert "cuda:0 (Fake GPU 0)" in line


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ({"host": 0}, 'offload="none"'),
        ({"create": "CUDA_ERROR_OUT_OF_MEMORY"}, "no memory left that could be page-locked"),
        ({}, "CUDA_ERROR_NOT_SUPPORTED"),
    ],
)
def test_memory_of_the_host_that_cannot_be_had(tmp_path, driver, expected):
    folder = fake_cuda.build(tmp_path, memory="CUDA_SUCCESS", **driver)
    size, line = ask(folder, "cuda_memory(0).granularity_on_host", "cuda_memory(0).create_on_host(1 << 21)")
    assert size == ("0" if driver.get("host") == 0 else "2097152")
    assert line.startswith("DriverError: creating 2097152 bytes of host memory for cuda:0 (Fake GPU 0)")
    assert expected in line
    assert "nvidia-smi" not in line  # the device is not what is full


def test_every_function_of_the_table_is_looked_for():
    assert len(set(fake_cuda.symbols())) == len(fake_cuda.symbols()) > 40


def test_memory_that_cannot_be_page_locked_is_used_without(tmp_path):
    """As in a container whose locked memory is bounded: cuMemHostRegister refuses, and transfers go on."""
    code = """
from glake_infer.allocators import _native
engine = _native.TransferEngine.on_cuda(0, 2, 1 << 20, 8 << 20, 4096)
address, locked = engine.take_buffer(5 << 20)
engine.give_buffer(address)
engine.prepare()
memory = engine.memory()
print(locked, memory["locked"], memory["allocated"] > 0, memory["in_use"])
"""
    assert fake_cuda.run(fake_cuda.build(tmp_path), code) == "False False True 0\n"
