"""links: what it shows of links that are made up, and without any."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glake_infer.allocators import _native
from glake_infer.cli import app
from glake_infer.models.bench import links
from glake_infer.transfers import paths
from glake_infer.transfers.paths import LinkReport


def link(device, via, *, access=True, numa=0, rates=(55e9, 54e9, 109e9, 108e9)):
    rates = rates if access else (0.0,) * 4
    return LinkReport(device, via, "NVIDIA H200", "0000:0F:06.0", "32.0 GT/s x16", numa, access, *rates)


PAIR = [
    link("cuda:0", "cuda:0", rates=(55e9, 54e9, 55e9, 54e9)),
    link("cuda:0", "cuda:1"),
    link("cuda:1", "cuda:1", numa=None, rates=(55e9, 54e9, 55e9, 54e9)),
    link("cuda:1", "cuda:0", access=False),
]


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Let GPUs have these links; returns what the command prints with more arguments."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    asked = []

    def survey(*, size, progress=None):
        asked.append(size)
        return found

    found = []
    monkeypatch.setattr(paths, "survey", survey)
    monkeypatch.setattr(links, "can_lock", lambda: False)

    def run(given, *arguments):
        found[:] = given
        monkeypatch.setattr(_native, "cuda_device_count", lambda: len({each.device for each in given}))
        done = CliRunner().invoke(app, ["links", *arguments])
        assert done.exit_code == 0, done.output
        return done.output, asked

    return run


def test_links_of_a_pair(pretend, fits):
    out, asked = pretend(PAIR, "--size", "256MiB")
    fits("\n".join(line for line in out.splitlines() if "links.json" not in line))
    assert asked == [256 << 20]
    assert "0000:0f:06.0" in out
    assert "32.0 GT/s x16" in out
    assert "109 GB/s" in out
    assert "NO: copies are slower" in out
    assert "auto (GLAKE_PATHS)" in out
    assert "none kept yet" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["to", "cuda:0", "cuda:0,", "cuda:1"] in rows
    assert ["to", "cuda:1", "cuda:1"] in rows


def test_links_as_json(pretend, tmp_path):
    (tmp_path / "glake-infer").mkdir()
    (tmp_path / "glake-infer" / "links.json").write_text("{}")
    out, _ = pretend(PAIR[:1], "--json")
    report = json.loads(out)
    assert report["links"][0]["to_device"] == 55e9
    assert (report["gpus"], report["locked"], report["size"]) == (1, False, 1 << 30)
    assert report["used"] == {"cuda:0": ["cuda:0"]}
    assert report["figures_kept"]
    assert report["in_flight_bound"] == 512 << 20


def test_no_gpu_is_said_plainly(pretend):
    out, asked = pretend([])
    assert "no GPU" in out
    assert asked == []


def test_what_settings_use():
    assert links.used_links(PAIR, "own") == {"cuda:0": ("cuda:0",), "cuda:1": ("cuda:1",)}
    assert links.used_links(PAIR, "all") == {"cuda:0": ("cuda:0", "cuda:1"), "cuda:1": ("cuda:1",)}


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a driver")
def test_no_driver_is_an_error(shop):
    assert "libcuda" in shop.error("links")


def test_sizes_are_checked(shop):
    assert "1 KiB" in shop.error("links", "--size", "1 KiB")
