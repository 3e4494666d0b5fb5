"""Scratch memory of engines, and runs that go on at the same time."""

import pytest
from engine_packages import check, linear, matrices, rows, run_at_once

import glake_infer as gi
from glake_infer.models.tensorrt.scratch import Scratch

MiB = 1 << 20
BLOCK = 2 * MiB  # weights of a `linear` engine


def test_engines_that_run_in_turn_need_the_scratch_of_the_largest(tmp_path, store, load, weights, pool):
    sizes = [16 * MiB, 32 * MiB, 8 * MiB]
    paths = [linear(tmp_path, store, weights, f"m{s}", scratch=(s, 0)) for s in sizes]
    models = [load(path) for path in paths]
    before = pool.stats().active
    for _ in range(2):
        for model in models:
            check(model.run({"x": rows(1)}), weights, rows(1))
    assert not Scratch.of(pool).held
    assert Scratch.of(pool).most == max(sizes)
    assert pool.stats().reserved - before < max(sizes) + 4 * MiB
    assert pool.stats().active == before  # in between nothing is held


def test_scratch_is_as_large_as_the_shapes_need(tmp_path, store, load, weights, pool):
    model = load(linear(tmp_path, store, weights, scratch=(1024, 4 * MiB)))
    model.run({"x": rows(1)})
    assert Scratch.of(pool).most == 4 * MiB + 1024
    model.run({"x": rows(3)})
    assert Scratch.of(pool).most == 12 * MiB + 1024


def test_scratch_is_that_of_the_profile_where_a_library_cannot_tell_more(
    tmp_path, store, load, weights, pool, trt
):
    del trt.IExecutionContext.update_device_memory_size_for_shapes
    model = load(linear(tmp_path, store, weights, scratch=(0, MiB), rows=((1, 2, 8), (1, 2, 4))))
    check(model.run({"x": rows(3)}), weights, rows(3))
    assert Scratch.of(pool).most == 4 * MiB


def test_as_many_runs_go_on_at_once_as_there_are_contexts(tmp_path, store, load, weights, pool, trt):
    trt.delay = 0.02
    path = linear(tmp_path, store, weights, scratch=(4 * MiB, 0))
    model = load(path, concurrency=3)

    def many(seed):
        for n in range(3):
            x = rows(1 + n, seed)
            check(model.run({"x": x}), weights, x)

    run_at_once([lambda seed=seed: many(seed) for seed in range(5)])
    assert len(trt.contexts) == 3
    assert Scratch.of(pool).most == 12 * MiB
    model.close()
    again = load(path)
    run_at_once([lambda: again.run({"x": rows(2)}) for _ in range(3)])
    assert len(trt.contexts) == 1


def test_two_engines_share_their_weights_and_run_at_once(tmp_path, store, load, weights, pool, trt):
    trt.delay = 0.01
    other = {**weights, "w2": matrices(5, 16)["w2"]}
    one, two = (load(linear(tmp_path, store, w, name)) for name, w in (("one", weights), ("two", other)))
    assert one.memory.shared
    assert one.memory.shared_with.keys() == {"two"}
    assert any("are those of other engines" in note for note in two.notes)
    x = rows(2)
    run_at_once([lambda: check(one.run({"x": x}), weights, x), lambda: check(two.run({"x": x}), other, x)])


def test_a_run_without_room_says_so_and_leaves_nothing(tmp_path, store, load, weights, pool):
    model = load(linear(tmp_path, store, weights, scratch=(64 * MiB, 0)))
    before = pool.stats().active
    pool.limit = before + 16 * MiB
    with pytest.raises(gi.OutOfMemoryError) as caught:
        model.run({"x": rows(1)})
    assert caught.value.requested == 64 * MiB
    assert pool.stats().active == before
    pool.limit = "512MiB"
    check(model.run({"x": rows(1)}), weights, rows(1))


def test_a_run_that_tensorrt_refuses_quotes_it_and_leaves_nothing(model, weights, pool, trt, monkeypatch):
    model.run({"x": rows(1)})
    before = pool.stats().active
    monkeypatch.setattr(
        trt.IExecutionContext, "execute_async_v3", lambda self, stream: self._fail("myelin: broken")
    )
    with pytest.raises(gi.ModelError, match=r"could not be run.*tensorrt-rtx 1.7.1.116 says: myelin: broken"):
        model.run({"x": rows(1)})
    assert pool.stats().active == before
    with pytest.raises(gi.ModelError) as kept:
        model.run({"x": rows(1)})
    monkeypatch.undo()
    check(model.run({"x": rows(1)}), weights, rows(1))
    model.close()
    assert not trt.engines  # an error that is kept keeps none
    assert kept.value
