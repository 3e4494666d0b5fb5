"""Replays on the pool and on its twins."""

import os
import random
from pathlib import Path

import numpy as np
import processes
import pytest

from glake_infer.allocators import (
    DeviceNotFoundError,
    GlakeError,
    InputError,
    MissingDependencyError,
    _native,
    trace,
    twins,
)

MiB = 1 << 20


def mixed(count=400, seed=1):
    rng = random.Random(seed)
    alive, steps = [], []
    for name in range(count):
        size = rng.choice([100, 5000, 300_000, 3 * MiB, 9 * MiB]) + rng.randrange(500)
        steps.append((rng.choice("aaar"), name, size, rng.choice([-1, 0, 1])))
        alive.append((name, size))
        while len(alive) > rng.randrange(30):
            freed, size = alive.pop(rng.randrange(len(alive)))
            steps.append(("f", freed, size, -1))
    return steps


@pytest.fixture
def path(tmp_path):
    return trace.write(tmp_path / "mixed.trace", mixed())


RECORDED = sorted((Path(__file__).parent.parent.parent / "benchmarks" / "traces").glob("*.trace.gz"))


# Where the core checks every invariant after every operation, a hundred thousand operations take too long.
unchecked = pytest.mark.skipif(
    "GLAKE_SANITIZED" in os.environ, reason="the sanitized core checks after every operation"
)


@unchecked
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.name.removesuffix(".trace.gz"))
def test_recorded_traces_take_little_more_than_was_asked_for(recorded):
    report = twins.replay(recorded, "glake", repeat=2)
    assert report.peak_requested >= 1 << 30
    assert report.peak_reserved <= 1.10 * report.peak_requested


@unchecked
@pytest.mark.parametrize("recorded", [path for path in RECORDED if "cpu-encoders" in path.name])
def test_a_load_that_repeats_makes_no_driver_calls(recorded):
    assert twins.replay(recorded, "glake", repeat=3).last_driver_calls == 0


malloc_tells = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="AddressSanitizer's malloc does not tell what it holds",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=malloc_tells if name == "malloc" else ()) for name in twins.names("cpu")],
)
def test_every_twin_replays(path, name):
    found = trace.read(path)
    report = twins.replay(path, name, repeat=3)
    assert (report.trace, report.allocator, report.device, report.repeat) == ("mixed", name, "cpu", 3)
    assert (report.events, report.allocations) == (len(found), 400)
    assert report.peak_requested == found.peak_requested
    assert report.live_bytes == found.live_bytes
    assert report.peak_reserved >= report.peak_requested * (0.99 if name == "malloc" else 1)
    assert report.peak_reserved < 8 * report.peak_requested
    assert report.ratio == report.peak_reserved / report.peak_requested
    assert 0 < report.seconds < report.all_seconds < 60
    if name != "malloc":
        assert report.peak_requested <= report.peak_active <= report.peak_reserved
        assert report.driver_calls > 0


def test_the_strategies_of_the_arena_differ(tmp_path):
    steps = [("a", n, 17 * MiB, -1) for n in range(20)]
    path = trace.write(tmp_path / "x.trace", steps)
    double = twins.replay(path, "ort-arena").peak_reserved
    same = twins.replay(path, "ort-arena-same").peak_reserved
    assert same < 20 * 17 * MiB * 1.01  # nothing more than asked for
    assert double > 1.2 * same


def run(code):
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_settings_of_an_arena_reach_onnx_runtime():
    # The environment keeps what is registered, so in a process of its own. The CPU's arena knows the keys of the CUDA
    # memory pool, and ignores them.
    found = run(
        """if True:
        from glake_infer.allocators import MissingDependencyError, _native
        from glake_infer.allocators.twins.runs import ort_allocator

        for wrong in ({"no_such_setting": 1}, {"arena_extend_strategy": 2}):
            try:
                ort_allocator("cpu", 0, wrong)
            except MissingDependencyError as error:
                print(error)
        mempool = {"use_cuda_mempool": 1, "cuda_mempool_release_threshold": 7, "cuda_mempool_bytes_to_keep_on_shrink": 0}
        address = ort_allocator("cpu", 0, {**mempool, "max_mem": 3 << 20, "arena_extend_strategy": 1})
        allocator = _native.replay_on_ort(address)
        import numpy as np
        column = np.array([ord("a")], np.uint8), np.zeros(1, np.uint32)
        for size in (2 << 20, 4 << 20):
            sizes = np.array([size], np.uint64)
            print(_native.replay(allocator, *column, sizes, -np.ones(1, np.int32), [], 1))
        """
    ).splitlines()
    unknown, wrong, fits, exceeds = found
    assert "no_such_setting" in unknown.split(":", 3)[3]
    assert wrong.endswith("Invalid configuration value was provided.")
    assert "'failed_step': 0" in fits
    assert "'failed_step': 1" in exceeds
    assert "memory" in exceeds


def test_what_an_arena_reserved_and_gave_back_counts_at_its_peak(tmp_path):
    path = trace.write(tmp_path / "x.trace", [("r", 0, 50 * MiB, -1), ("f", 0, 0, -1), ("a", 1, 1 * MiB, -1)])
    assert 50 * MiB <= twins.replay(path, "ort-arena-same").peak_reserved < 60 * MiB


@malloc_tells
def test_what_malloc_gave_back_counts_at_its_peak(tmp_path):
    path = trace.write(tmp_path / "x.trace", [("a", 0, 50 * MiB, -1), ("f", 0, 0, -1), ("a", 1, 5, -1)])
    assert 50 * MiB <= twins.replay(path, "malloc").peak_reserved < 52 * MiB


def test_the_limit_ends_a_replay_with_the_step(path):
    with pytest.raises(
        GlakeError, match=r"the replay of mixed ended at its operation \d+ of \d+, a request of"
    ):
        twins.replay(path, limit=8 * MiB)


def test_a_steady_state_makes_no_driver_calls(tmp_path):
    steps = [("a", 0, 5 * MiB, -1), ("a", 1, 3 * MiB, -1), ("f", 0, 0, -1), ("f", 1, 0, -1)]
    report = twins.replay(trace.write(tmp_path / "x.trace", steps), repeat=5)
    assert report.last_driver_calls == 0
    assert report.driver_calls > 0


def test_names_are_checked(path):
    with pytest.raises(
        InputError, match="there is no allocator 'nothing' for device 'cpu': choose from glake, ort-arena"
    ):
        twins.replay(path, "nothing")
    with pytest.raises(InputError, match="there is no allocator 'malloc' for device 'cuda:0'"):
        twins.replay(path, "malloc", "cuda:0")
    for device in ("tpu", "cpu:1", "cuda:x"):
        with pytest.raises(DeviceNotFoundError, match=f"there is no device '{device}'"):
            twins.replay(path, "glake", device)


def test_errors_of_the_process_are_ours(tmp_path, path):
    with pytest.raises(InputError, match=r"x\.trace, line 1"):
        twins.replay(trace.write(tmp_path / "x.trace", [("f", 0, 0, -1)]))
    with pytest.raises(MissingDependencyError, match="rmm"):
        twins.replay(path, "rmm", "cuda:0")


def test_a_process_that_dies_is_explained(path, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(GlakeError, match="ended with exit code 1 and no result"):
        twins.replay(path)


def replay(pool, steps, **options):
    found = trace.from_steps(steps)
    columns = (found.operations, found.slots, found.bytes, found.streams)
    return _native.replay(_native.replay_on_pool(pool), *columns, [], options.pop("repeat", 1), **options)


def test_nothing_stays_allocated():
    pool = _native.Pool(256 * MiB)
    steps = mixed()
    found = replay(pool, steps, repeat=2)
    assert (found["failed_step"], found["failure"]) == (0, "")
    stats = pool.stats()
    assert stats["active"] == 0
    assert stats["allocations"] == stats["deallocations"] == 800
    assert stats["peak_active"] >= trace.from_steps(steps).peak_requested
    pool.check_invariants()


def test_nothing_stays_allocated_after_a_failure():
    pool = _native.Pool(16 * MiB)
    found = replay(pool, [("a", 0, 4 * MiB, -1), ("a", 1, 64 * MiB, -1), ("a", 2, MiB, -1)], repeat=3)
    assert found["failed_step"] == 2
    assert "would have sufficed" in found["failure"]
    assert (pool.stats()["active"], pool.stats()["allocations"]) == (0, 1)


def test_a_call_comes_before_the_last_repetition():
    pool = _native.Pool(16 * MiB)
    calls = []
    steps = [("a", 0, MiB, -1)]
    replay(pool, steps, repeat=3, between=lambda: calls.append(pool.stats()["allocations"]))
    assert calls == [2]


def test_wrong_columns_are_refused():
    pool = _native.replay_on_pool(_native.Pool(MiB))
    one = np.zeros(1, np.uint8), np.zeros(2, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="four columns of one length"):
        _native.replay(pool, *one, [], 1)
    good = trace.from_steps([("a", 0, 5, 1), ("a", 1, 5, 2)])
    with pytest.raises(ValueError, match="a stream that was not given"):
        _native.replay(pool, good.operations, good.slots, good.bytes, good.streams, [4], 1)


def test_pairs_are_timed(pool):
    from glake_infer.allocators.twins.pairs import time_pool

    before = pool.stats().allocations
    small, large = time_pool(sizes=(256, 4 * MiB), rounds=3)
    assert (small.bytes, large.bytes, small.twin, small.device) == (256, 4 * MiB, "ort-arena", "cpu")
    for report in (small, large):
        assert 1 < report.ours_ns < 1e6
        assert 1 < report.twin_ns < 1e6
        assert report.rounds == 3
    assert pool.stats().allocations - before == 2 * (small.pairs * 3 + small.pairs // 10)
    assert pool.stats().active == 0
