"""bench: what an allocation costs."""

import json


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
