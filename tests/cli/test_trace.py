"""trace: replays and pictures."""

import json

import pytest

from glake_infer.allocators import trace

MiB = 1 << 20
STEPS = [("r", 0, 6 * MiB, -1), ("a", 1, 3 * MiB, 4), ("f", 1, 0, -1), ("a", 2, 2 * MiB + 1, 4)]


@pytest.fixture
def path(tmp_path):
    return trace.write(tmp_path / "small.trace.gz", STEPS)


def test_replay_prints_one_line_per_trace_and_allocator(shop, path, tmp_path):
    other = trace.write(tmp_path / "other.trace", STEPS[:1])
    out, err = shop.run(
        "trace", "replay", path, other, "--allocator", "glake,malloc", "--repeat", "2", "--json"
    )
    assert err == ""
    reports = [json.loads(line) for line in out.splitlines()]
    assert [(r["trace"], r["allocator"]) for r in reports] == [
        ("small", "glake"), ("small", "malloc"), ("other", "glake"), ("other", "malloc"),
    ]  # fmt: skip
    first = reports[0]
    assert first["peak_requested"] == 9 * MiB
    assert first["live_bytes"] == 8 * MiB + 1
    assert first["peak_requested"] <= first["peak_active"] <= first["peak_reserved"]
    assert first["ratio"] == first["peak_reserved"] / first["peak_requested"]
    assert first["seconds"] > 0
    assert (first["device"], first["repeat"], first["last_driver_calls"]) == ("cpu", 2, 0)


def test_replay_shows_a_table(shop, path, fits):
    out, err = shop.run("trace", "replay", path)
    assert err == ""
    fits(out)
    assert out.split()[:3] == ["Trace", "Allocator", "Requested"]
    assert "9.0 MiB" in out


def test_replay_explains_what_is_wrong(shop, path, tmp_path):
    bad = tmp_path / "bad.trace"
    bad.write_text("a 0 5 -1\nq 1 2 3\n")
    assert "bad.trace, line 2: there is no operation 'q'" in shop.error("trace", "replay", bad)
    assert "there is no trace" in shop.error("trace", "replay", tmp_path / "none")
    assert "choose from glake" in shop.error("trace", "replay", path, "--allocator", "glake,best")
    assert "--allocator names none" in shop.error("trace", "replay", path, "--allocator", ",")
    assert "there is no device 'tpu'" in shop.error("trace", "replay", path, "--device", "tpu")
    assert "ended at its operation 1 of 4" in shop.error("trace", "replay", path, "--limit", "4MiB")
    assert "is not an amount of memory" in shop.error("trace", "replay", path, "--limit", "much")


def test_plot_checks_the_format_first(shop, path, tmp_path):
    message = shop.error("trace", "plot", path, "-o", tmp_path / "x.doc")
    assert "'x.doc' cannot be drawn: expected a name that ends with .png, .svg, .pdf" in message
    assert "only glake can be drawn" in shop.error(
        "trace", "plot", path, "-o", tmp_path / "x.png", "--allocator", "malloc"
    )


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_draws(shop, path, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    target = tmp_path / f"picture{suffix}"
    report = shop.json("trace", "plot", path, "-o", target)
    assert report["peak_requested"] == 9 * MiB
    assert report["peak_call"] == 2
    assert report["segments"] >= 1
    head = target.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in head
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"picture{suffix}", "small.trace.gz"]


def test_plot_says_what_to_install(shop, path, tmp_path):
    (tmp_path / "hide" / "matplotlib").mkdir(parents=True)
    (tmp_path / "hide" / "matplotlib" / "__init__.py").write_text("raise ImportError('hidden')")
    message = shop.error(
        "trace", "plot", path, "-o", tmp_path / "x.png", env={"PYTHONPATH": str(tmp_path / "hide")}
    )
    assert "pip install 'glake-infer[plot]'" in message
