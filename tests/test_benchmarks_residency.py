"""Every scene of `benchmarks.residency`, tiny and on the CPU; one of them in CI."""

import functools

import pytest
from benchmark_runs import scenes_of, soaking

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
def line(tmp_path_factory):
    """A scene's line."""

    @functools.cache
    def run(scene):
        folder = tmp_path_factory.mktemp("residency")
        return scenes_of("residency", "residency.jsonl", folder, 200, "--scene", scene)[scene]

    return run


@pytest.mark.parametrize("scene", soaking(RIGHT, "twenty"))
def test_scene(scene, line):
    found = line(scene)
    assert found["benchmark"] == "residency"
    assert {key: found[key] for key in RIGHT[scene]} == RIGHT[scene]
    if scene == "sleep":
        assert found["store"]["right"]
        assert found["pinned"]["right"]
    if scene == "twenty":
        assert found["wakes"] > 0
        assert found["peak_reserved"] <= found["limit"]
