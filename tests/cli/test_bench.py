"""bench: what an allocation costs, a load, and waking."""

import json
from pathlib import Path

import pytest


def test_bench_pool_prints_one_line_per_size(shop):
    out, err = shop.run("bench", "pool", "--json")
    assert err == ""
    reports = [json.loads(line) for line in out.splitlines()]
    assert [r["bytes"] for r in reports] == [256, 64 << 10, 4 << 20, 64 << 20]
    for report in reports:
        assert (report["device"], report["twin"]) == ("cpu", "ort-arena")
        assert 1 < report["ours_ns"] < 1e6
        assert 1 < report["twin_ns"] < 1e6


def test_bench_pool_shows_a_table(shop, fits):
    out, _ = shop.run("bench", "pool")
    fits(out)
    assert out.split()[:3] == ["Size", "Pool", "Twin"]
    assert len(out.splitlines()) == 5


def test_bench_pool_knows_its_devices(shop):
    assert "there is no device 'tpu'" in shop.error("bench", "pool", "--device", "tpu")


def test_bench_load_prints_one_line_per_side_and_a_trace(shop, tmp_path):
    out, err = shop.run(
        "bench", "load", "--bytes", "256KiB", "--repeat", 1, "--trace", tmp_path / "trace.json", "--folder", tmp_path,
        "--json",
    )  # fmt: skip
    assert err == ""
    lines = [json.loads(line) for line in out.splitlines()]
    loads = [line for line in lines if "reason" not in line]
    sides = [(line["side"], line["start"]) for line in loads if not line["side"].endswith("safetensors")]
    assert sides == [
        ("glake-infer", "warm"), ("glake-infer", "cold"), ("onnxruntime", "warm"), ("onnxruntime", "cold"),
    ]  # fmt: skip
    assert {line["side"] for line in lines} == {"glake-infer", "onnxruntime", "safetensors", "fastsafetensors"}
    for line in loads[:4]:
        assert line["bytes"] == 256 << 10
        assert 0 < line["to_session"] <= line["to_answer"] < 60
        assert line["rate"] == line["bytes"] / line["to_answer"]
        assert line["turns"] == [line["to_answer"]]
        assert line["link"] > 1e6
        assert line["cached"] == 1
    ours = loads[0]
    assert ours["difference"] == 0
    assert (ours["verified"], ours["in_flight_bound"]) == ("once", 512 << 20)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"} >= {"session"}
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_bench_load_of_small_weights_shows_a_table(shop, fits):
    out, err = shop.run("bench", "load", "--small", 40, "--repeat", 1)
    fits(out)
    assert err == ""
    assert out.split()[:3] == ["Model", "Side", "Start"]
    assert "40 weights, 400.0 KiB on cpu" in out


def test_bench_load_of_a_package_from_disk(shop, fits):
    out, _ = shop.run("bench", "load", "a.glake", "--repeat", 1, "--cold", "--shape", "input_ids=2,8")
    fits(out)
    assert "disk" in out


def test_bench_resume(shop, fits):
    out, _ = shop.run("bench", "resume", "a.onnx", "--repeat", 2, "--json")
    lines = {line["side"]: line for line in map(json.loads, out.splitlines())}
    assert list(lines)[:2] == ["glake-infer", "onnxruntime"]
    assert {"raw copy, one path", "raw copy, all paths", "torch"} <= lines.keys()
    ours = lines["glake-infer"]
    assert ours["right"]
    assert ours["bytes"] > 1 << 20
    assert len(ours["turns"]) == 2
    assert (ours["host_copy"], ours["used_paths"]) == ("pinned", "own")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load"], "--bytes"),
        (["load", "a.glake", "--bytes", "1MiB"], "expected one of"),
        (["load", "missing.glake"], "does not exist"),
        (["load", "missing.onnx"], "missing.onnx"),
        (["load", "--bytes", "1KiB"], "64.0 KiB or more"),
        (["load", "--bytes", "80TiB"], "free"),
        (["load", "--bytes", "much"], "'4GiB'"),
        (["load", "--bytes", "1MiB", "--folder", "nowhere"], "nowhere"),
        (["load", "--bytes", "1MiB", "--trace", "nowhere/t.json"], "nowhere/t.json"),
        (["load", "a.glake", "--shape", "nope=1,2"], "input_ids"),
        (["resume", "--bytes", "1MiB", "--device", "tpu"], "'cpu'"),
        (["links", "--device", "cpu"], "no links"),
    ],
)
def test_bench_errors(shop, arguments, message):
    assert message in shop.error("bench", *arguments)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_bench_links_needs_a_gpu(shop):
    assert "cuda:0" in shop.error("bench", "links")
