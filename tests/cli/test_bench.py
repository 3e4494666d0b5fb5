"""bench: what an allocation costs, a load, and waking."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glake_infer.cli import app
from glake_infer.models.bench import links
from glake_infer.models.bench import load as bench
from glake_infer.models.bench.links import LinkRate
from glake_infer.models.bench.load import LeftOut, LoadReport


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
    assert {line["side"] for line in lines} == {
        "glake-infer",
        "onnxruntime",
        "safetensors",
        "fastsafetensors",
    }
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


def loaded(side, start, model="large", **more):
    own = side == "glake-infer"
    about = {
        "model": model,
        "side": side,
        "start": start,
        "device": "cuda:0",
        "weights": 85,
        "bytes": 8 << 30,
    }
    times = {
        "to_weights": 0.1771,
        "copying": 0.163,
        "to_session": 0.05,
        "to_answer": 0.1832,
        "rate": 46.9e9,
        "link": 55.5e9,
        "goal": 0.232,
    }
    rest = {
        "cached": 1.0,
        "disk": 6.5e9,
        "in_flight": 50 << 20,
        "in_flight_bound": 512 << 20,
        "paths": "auto",
    }
    last = {"verified": "once", "difference": 0.0007 if own else None, "turns": (0.1832,)}
    return LoadReport(**{**about, **times, **rest, **last, **more})


@pytest.mark.parametrize("models", [["large"], ["small", "large"]])
def test_bench_load_shows_a_table(monkeypatch, fits, models):
    monkeypatch.setenv("COLUMNS", "80")
    found = [
        loaded(side, start, model)
        for model in models
        for side in ("glake-infer", "onnxruntime", "fastsafetensors")
        for start in ("warm", "cold")
    ]
    asked = {}

    def bench_load(model, **options):
        asked.update(model=model, **options)
        return [*found, LeftOut("safetensors", "not installed: safetensors")]

    monkeypatch.setattr(bench, "bench_load", bench_load)
    done = CliRunner().invoke(
        app, ["bench", "load", "--small", "7", "--cold", "--trace", "t.json", "--shape", "x=1"]
    )
    assert done.exit_code == 0, done.output
    fits(done.output)
    assert (asked["small"], asked["cold_files"], asked["shapes"], asked["repeat"]) == (7, True, ["x=1"], 3)
    for shown in (
        "46.9 GB/s",
        "55.5 GB/s",
        "177 ms",
        "232 ms",
        "6.5 GB/s",
        "50.0 MiB",
        "0.0007",
        "wrote t.json",
        "Left out",
    ):
        assert shown in done.output
    assert done.output.startswith("Model" if len(models) > 1 else "Side")


def test_bench_links_shows_a_table(monkeypatch, fits):
    monkeypatch.setenv("COLUMNS", "80")
    rates = [
        LinkRate("cuda:0", 1 << 30, used, 109.6e9, 108.9e9, 1.99, 1.98, 110.7e9, 109.1e9) for used in (1, 2)
    ]
    monkeypatch.setattr(links, "bench_links", lambda device, **options: rates)
    done = CliRunner().invoke(app, ["bench", "links"])
    fits(done.output)
    assert done.output.splitlines()[2].split() == [
        "1.0",
        "GiB",
        "2",
        "110",
        "GB/s",
        "1.99",
        "111",
        "GB/s",
        "109",
        "GB/s",
        "1.98",
        "109",
        "GB/s",
    ]
    done = CliRunner().invoke(app, ["bench", "links", "--json"])
    assert [json.loads(line)["paths"] for line in done.output.splitlines()] == [1, 2]


def test_bench_resume(shop, fits, tmp_path):
    out, _ = shop.run("bench", "resume", "a.onnx", "--repeat", 2, "--trace", tmp_path / "t.json")
    fits("\n".join(line for line in out.splitlines() if "wrote" not in line))
    assert out.split()[:2] == ["Side", "Suspend"]
    for shown in (
        "glake-infer",
        "onnxruntime",
        "raw copy, one path",
        "raw copy, all paths",
        "torch",
        "pinned",
    ):
        assert shown in out
    assert ["same", "answers", "yes"] in [line.split() for line in out.splitlines()]
    names = [event["name"] for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]]
    assert {"suspend", "resume"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load"], "--bytes"),
        (["load", "missing.onnx"], "missing.onnx"),
        (["links", "--device", "cpu"], "no links"),
    ],
)
def test_bench_errors(shop, arguments, message):
    assert message in shop.error("bench", *arguments)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_bench_links_needs_a_gpu(shop):
    assert "cuda:0" in shop.error("bench", "links")
