"""How much memory a device has (devices.py); names are tested in test_pool.py."""

from __future__ import annotations

import pytest

from glake_infer.allocators import devices

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
