"""Replays on a GPU: the pool and its twins."""

import pytest

from glake_infer.allocators import MissingDependencyError, trace, twins

pytestmark = pytest.mark.gpu

MiB = 1 << 20


@pytest.fixture
def path(tmp_path):
    steps = []
    for name in range(60):
        steps.append(("r" if name < 5 else "a", name, (name % 9 + 1) * MiB + 777 * name, name % 3 - 1))
        if name >= 20:
            steps.append(("f", name - 15, 0, -1))
    return trace.write(tmp_path / "mixed.trace", steps)


@pytest.mark.parametrize("name", twins.names("cuda"))
def test_every_twin_replays(path, name):
    try:
        report = twins.replay(path, name, "cuda:0", repeat=2)
    except MissingDependencyError as error:
        assert name in ("rmm", "torch", "torch-expandable")
        pytest.skip(str(error))
    assert report.device == "cuda:0"
    assert report.peak_requested <= report.peak_reserved < 6 * report.peak_requested
    assert report.seconds > 0
    if report.peak_active is not None:
        assert report.peak_requested <= report.peak_active * 1.001
    assert report.loop == ("python" if name in ("rmm", "torch", "torch-expandable") else "native")


def test_a_steady_state_makes_no_driver_calls(path):
    assert twins.replay(path, "glake", "cuda:0", repeat=16).last_driver_calls == 0


def test_the_modes_of_pytorch_differ(tmp_path):
    pytest.importorskip("torch")
    # 8 blocks of 30 MiB leave; one of 200 MiB fits their place only where segments grow.
    steps = [("a", n, 30 * MiB, -1) for n in range(8)]
    steps += [("f", n, 0, -1) for n in range(8)]
    steps += [("a", 8, 200 * MiB, -1)]
    path = trace.write(tmp_path / "x.trace", steps)
    plain = twins.replay(path, "torch", "cuda:0").peak_reserved
    grown = twins.replay(path, "torch-expandable", "cuda:0").peak_reserved
    assert grown < 260 * MiB < 400 * MiB < plain


def test_pairs_are_timed():
    from glake_infer.allocators.twins.pairs import time_pool

    for report in time_pool("cuda:0", sizes=(256, 4 * MiB), rounds=3):
        assert report.twin == "cuda-async"
        assert 10 < report.ours_ns < 1e6
        assert 10 < report.twin_ns < 1e6
