"""Devices by name and how much memory they have (devices.py). The CUDA driver is one made here: fake_cuda.py."""

from __future__ import annotations

import json

import fake_cuda
import pytest

from glake_infer.allocators import devices
from glake_infer.allocators.errors import DeviceNotFoundError

GiB = 1 << 30


def test_the_machine_is_the_upper_bound():
    assert GiB // 8 < devices.cpu_memory() <= devices._machine_memory()


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "5\n", "a/memory.max": "max\n", "memory.max": "7\n"}, [5, 7]),
        ("0::/\n", {"memory.max": "5\n"}, [5]),
        ("0::/gone/in/this/container\n", {"memory.max": "9\n"}, [9]),
        ("0::/../outside\n", {"memory.max": "9\n"}, [9]),
        (
            "5:cpu,memory:/x\n0::/\n",
            {
                "memory/x/memory.limit_in_bytes": "3\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            [3, 9223372036854771712],
        ),
        ("3:cpu:/x\n", {"memory.max": "1\n"}, []),
        ("", {}, []),
        ("nonsense", {}, []),
    ],
)
def test_the_limits_of_control_groups(tmp_path, groups, files, limits):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert list(devices._group_limits(groups, tmp_path)) == limits


def test_the_lowest_limit_counts(monkeypatch):
    monkeypatch.setattr(devices, "_group_limits", lambda: iter([3 * GiB, GiB // 16, 2 * GiB]))
    assert devices.cpu_memory() == GiB // 16


@pytest.mark.parametrize(
    "device", ["banana", "CPU", "cuda:x", "cuda:", "cuda:-1", "cuda:1234567890", "cuda:\u0663", "", None]
)
def test_what_is_not_a_name(device):
    with pytest.raises(DeviceNotFoundError, match=r"Valid names: 'cpu', 'cuda' .* and 'cuda:N'"):
        devices.parse_device(device)


ASK = """
import json, sys
from glake_infer.allocators import devices
answers = []
for device in json.loads(sys.argv[1]):
    try:
        answers.append([devices.parse_device(device), devices.device_memory(device)])
    except devices.DeviceNotFoundError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(driver, *names, **environment):
    return json.loads(fake_cuda.run(driver, ASK, json.dumps(names), **environment))


def test_cuda_devices_have_one_name_each(tmp_path):
    driver = fake_cuda.build(tmp_path, devices=2)
    assert ask(driver, "cpu", "cuda", "cuda:0", "cuda:1", "cuda:01") == [
        ["cpu", devices.cpu_memory()],
        ["cuda:0", 80 * GiB],
        ["cuda:0", 80 * GiB],
        ["cuda:1", 81 * GiB],
        ["cuda:1", 81 * GiB],
    ]


def test_a_device_too_far_names_those_that_are_there(tmp_path):
    driver = fake_cuda.build(tmp_path, devices=2)
    (message,) = ask(driver, "cuda:2")
    assert message == "there is no device 'cuda:2'. CUDA shows 'cuda:0' (Fake GPU 0), 'cuda:1' (Fake GPU 1)."
    (message,) = ask(driver, "cuda:2", CUDA_VISIBLE_DEVICES="5,6")
    assert "CUDA_VISIBLE_DEVICES is set to '5,6'" in message


@pytest.mark.parametrize("visible", [None, "", "7"])
def test_a_driver_without_a_device(tmp_path, visible):
    driver = fake_cuda.build(tmp_path, init="CUDA_ERROR_NO_DEVICE")
    (message,) = ask(driver, "cuda:0", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert "shows no device" in message
    assert ("CUDA_VISIBLE_DEVICES" in message) is (visible is not None)
    assert "use device='cpu'" in message


def test_why_the_driver_does_not_serve_is_part_of_the_message(tmp_path):
    driver = fake_cuda.build(tmp_path, version=11080)
    (message,) = ask(driver, "cuda")
    assert message.startswith("device 'cuda' cannot be used: the CUDA driver is too old: it has version 11.8")
    assert "use device='cpu'" in message
