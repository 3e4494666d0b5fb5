"""The demo, with four tiny models."""

import json

import pytest

SMALL = """
import sys
from glake_infer.models import demo
whole = demo.demo
demo.demo = lambda **given: whole(scale=demo.Scale("bert-tiny", layers=2, length=8, rounds=2), **given)
from glake_infer.cli import main
sys.argv = ["glake-infer", "demo", *sys.argv[1:]]
main()
"""


def test_demo_measures_both_sides(python, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = python(SMALL, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""
    report = json.loads(out)
    assert [side["name"] for side in report["sides"]] == ["plain", "fast", "lean"]
    assert len(report["models"]) == 4
    assert report["distinct_bytes"] < 0.4 * report["weight_bytes"]
    for side in report["sides"]:
        assert side["memory"] > 0
        assert side["latency"] > 0
        assert side["difference"] < 1e-4
    assert report["sides"][1]["pool"]["weights"] > 0.9 * report["distinct_bytes"]
    assert not list(tmp_path.glob("glake-*"))


def test_demo_prints_a_table_and_keeps_what_it_made(python, tmp_path, fits, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    process = python(SMALL, "--keep", tmp_path / "kept")
    out, err = process.communicate()
    assert process.returncode == 0, err
    fits("\n".join(line for line in out.splitlines() if str(tmp_path) not in line))
    assert "plain ORT  glake fast  glake lean" in out
    assert len(list((tmp_path / "kept").glob("*.glake"))) == 4
    process = python(SMALL, "--keep", tmp_path / "kept")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "new or an empty folder" in err


@pytest.mark.soak
def test_the_real_demo_takes_under_90_seconds(shop):
    report = shop.json("demo")
    assert report["seconds"] < 90
    plain, fast, lean = report["sides"]
    assert plain["memory"] > 3.5 * report["distinct_bytes"]
    assert lean["memory"] < 1.15 * report["distinct_bytes"]
    assert fast["memory"] < 1.25 * report["distinct_bytes"]
