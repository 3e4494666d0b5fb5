"""Every scene of `benchmarks.residency`, tiny and on the CPU."""

import pytest
from benchmark_runs import scenes_of

RIGHT = {
    "family": {"difference": 0.0, "bit_for_bit_same_graph": True},
    "decoder": {
        "same_in_turn": True,
        "same_at_once": True,
        "same_after_sleep": True,
        "variants_differ": True,
        "bit_for_bit_same_graph": True,
    },
    "sleep": {},
    "twenty": {"wrong": 0, "samples_over_limit": 0},
    "cycles": {"wrong": 0, "cycles": 20},
    "fixed": {"sessions": 2},
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return scenes_of("residency", "residency.jsonl", tmp_path_factory.mktemp("residency"), 200)


@pytest.mark.parametrize("scene", RIGHT)
def test_scene(scene, lines):
    found = lines[scene]
    assert found["benchmark"] == "residency"
    assert {key: found[key] for key in RIGHT[scene]} == RIGHT[scene]
    if scene == "sleep":
        assert found["store"]["right"]
        assert found["pinned"]["right"]
    if scene == "twenty":
        assert found["wakes"] > 0
        assert found["peak_reserved"] <= found["limit"]
