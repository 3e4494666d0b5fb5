"""Every scene of `benchmarks.broker`, tiny and on the CPU; one of them in CI."""

import functools

import pytest
from benchmark_runs import scenes_of, soaking

RIGHT = {
    "six": {"processes": 2},
    "attach": {
        "right": True,
        "all_right": True,
        "same_as_loaded": True,
        "loaded_again": 0,
        "processes_left": 0,
        "complaints": {},
    },
    "cycles": {"wrong": {"twin": 0, "client": 0}, "processes_left": 0, "complaints": {}},
    "start": {"differ_from_without_broker": [], "complaints": {}},
    "budget": {"wrong": 0, "twin_wrong": 0, "samples_over_limit": 0, "complaints": {}},
}
KEPT = {  # bounds that hold at any size, on any machine
    "attach": ["chunks that the broker holds"],
    "cycles": ["descriptors more than after 4", "threads more than after 4"],
    "budget": ["used at the most, by the broker", "memfds at the most"],
}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A scene's line."""

    @functools.cache
    def run(scene):
        folder = tmp_path_factory.mktemp("broker")
        return scenes_of("broker", "broker-cpu.jsonl", folder, 280, "--json", "--scene", scene)[scene]

    return run


@pytest.mark.parametrize("scene", soaking(RIGHT, "attach"))
def test_scene(scene, line):
    found = line(scene)
    assert found["benchmark"] == "broker-cpu"
    assert {key: found[key] for key in RIGHT[scene]} == RIGHT[scene]
    for figure in found["figures"]:
        if "most" in figure and figure["what"] in KEPT.get(scene, []):
            assert figure.get("ratio", figure["value"]) <= figure["most"], figure


@pytest.mark.soak
def test_six_processes_answer_the_same_and_make_each_chunk_once(line):
    for case in line("six")["cases"].values():
        assert case.keys() == {"plain", "fast", "fast, broker", "lean", "lean, broker"}
        for name, found in case.items():
            assert found["memory"] > 0
            if name == "plain":
                continue
            assert found["same_as_without_broker"]
            assert found["same_as_plain"] or (name.startswith("lean") and found["difference"] < 1e-5)
            if "broker" in name:
                assert found["loads_of_chunks"] == found["chunks"] > 0
                assert found["complaints"] == {}


@pytest.mark.soak
def test_the_budget_is_one_that_binds(line):
    assert line("budget")["weights"] > line("budget")["limit"]
    assert line("budget")["evictions"] > 0
