"""The links and the benchmarks of transfers, briefly, on a GPU."""

import json

import pytest

from glake_infer.models.bench.links import bench_links, examine_links
from glake_infer.models.bench.load import LeftOut, bench_load
from glake_infer.models.bench.resume import bench_resume

pytestmark = pytest.mark.gpu

MIB = 1 << 20


def test_links_are_measured(device):
    report = examine_links(size=64 * MIB)
    assert report.gpus >= 1
    assert report.locked is not None
    assert len(report.links) == report.gpus**2
    own = [link for link in report.links if link.via == link.device]
    assert [link.device for link in own] == [f"cuda:{index}" for index in range(report.gpus)]
    assert all(link.to_device > 1e9 and link.to_host > 1e9 for link in own)
    assert all(link.via in report.used[link.device] for link in own)


def test_a_curve(device):
    found = bench_links(device, sizes=(MIB, 64 * MIB), repeat=2)
    assert [each.bytes for each in found if each.paths == 1] == [MIB, 64 * MIB]
    for each in found:
        assert min(each.to_device, each.to_host, each.raw_to_device, each.raw_to_host) > 1e8


def test_a_load(device, tmp_path):
    trace = tmp_path / "trace.json"
    found = bench_load(size=256 * MIB, device=device, repeat=1, trace=trace, folder=tmp_path)
    loads = {(each.side, each.start): each for each in found if not isinstance(each, LeftOut)}
    warm = loads["glake-infer", "warm"]
    assert 0 < warm.to_weights <= warm.to_answer < loads["glake-infer", "cold"].to_answer
    assert warm.difference < 0.05
    assert 0 < warm.in_flight <= warm.in_flight_bound
    assert warm.goal > 256 * MIB / warm.link
    assert ("onnxruntime", "warm") in loads
    rows = {e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "M"}
    assert "session" in rows
    assert any(row.startswith("reader ") for row in rows)
    assert any(row.startswith("link ") for row in rows)


@pytest.mark.parametrize("host_copy", ["pinned", "store"])
def test_waking(device, tmp_path, host_copy):
    found = bench_resume(size=256 * MIB, device=device, host_copy=host_copy, repeat=2, folder=tmp_path)
    sides = {each.side: each for each in found if not isinstance(each, LeftOut)}
    ours = sides["glake-infer"]
    assert ours.right
    assert ours.bytes >= 250 * MIB
    assert (ours.pinned > 0) == (host_copy == "pinned")
    assert sides["raw copy, one path"].rate > 1e9
    assert sides["onnxruntime"].resume > 0
