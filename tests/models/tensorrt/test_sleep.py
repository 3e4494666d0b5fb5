"""Engines sleep and wake: weights, what contexts hold, deferred and streamed weights."""

import gc as garbage
import re
import threading

import pytest
from engine_packages import check, linear, rows, run_at_once
from folders import flip_bit

import glake_infer as gi
from glake_infer.models.tensorrt.plan import Plan

MiB = 1 << 20
BLOCK = 2 * MiB  # weights of a `linear` engine


def test_suspended_weights_come_back_by_the_next_run(tmp_path, store, load, weights, pool, trt):
    model = load(linear(tmp_path, store, weights, context=MiB))
    x = rows(2)
    model.run({"x": x})
    address = model.engine._block
    assert model.memory.own == BLOCK
    assert model.memory.private == MiB
    freed = model.suspend()
    assert freed >= BLOCK + MiB
    assert model.suspended
    assert (model.memory.asleep, model.memory.private) == (BLOCK, 0)
    assert pool.stats().reserved == 0
    garbage.collect()
    assert not trt.contexts  # it held memory
    check(model.run({"x": x}), weights, x)
    assert model.engine._block == address
    model.suspend()
    model.resume()
    assert not model.suspended
    assert not model.memory.asleep


def test_memory_that_a_context_takes_in_its_first_run_goes_too(tmp_path, store, load, weights, pool):
    model = load(linear(tmp_path, store, weights, late=MiB))
    model.run({"x": rows(1)})
    model.suspend()
    assert pool.stats().reserved == 0
    check(model.run({"x": rows(1)}), weights, rows(1))


def test_contexts_that_hold_nothing_outlive_a_suspension(model, weights, trt):
    model.run({"x": rows(1)})
    model.suspend()
    check(model.run({"x": rows(1)}), weights, rows(1))
    assert trt.events.count("context made") == 1


@pytest.mark.parametrize("deferred", [False, True])
def test_a_suspension_waits_for_runs(tmp_path, store, load, weights, pool, trt, deferred):
    trt.delay = 0.05
    model = load(linear(tmp_path, store, weights), concurrency=2, deferred=deferred)
    stop = threading.Event()

    def sleep():
        while not stop.is_set():
            model.suspend()

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    try:
        run_at_once([lambda: check(model.run({"x": rows(2)}), weights, rows(2)) for _ in range(4)])
    finally:
        stop.set()
        sleeper.join()


def test_a_weight_that_was_changed_on_disk_is_named(model, weights, store):
    model.suspend()
    part = max(Plan(model.package, "tensorrt-rtx").entry.parts, key=lambda part: part.bytes)
    path = store.objects.path(part.digest)
    flip_bit(path)
    with pytest.raises(gi.DigestMismatchError, match=re.escape(str(path))):
        model.run({"x": rows(1)})
    flip_bit(path)
    check(model.run({"x": rows(1)}), weights, rows(1))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_deferred_engine_loads_and_unloads_its_weights_by_itself(
    tmp_path, store, load, weights, pool, trt, asynchronous
):
    if not asynchronous:
        del trt.ICudaEngine.load_weights_async
    model = load(linear(tmp_path, store, weights), deferred=True)
    check(model.run({"x": rows(1)}), weights, rows(1))
    assert model.memory.own == BLOCK
    assert model.suspend() >= BLOCK
    assert not model.engine.weights_loaded
    assert pool.stats().reserved == 0
    assert model.memory.asleep == BLOCK
    check(model.run({"x": rows(1)}), weights, rows(1))
    pool.limit = pool.stats().active + MiB
    model.suspend()
    pool.limit = MiB
    with pytest.raises(gi.OutOfMemoryError):
        model.run({"x": rows(1)})
    assert model.suspended
    pool.limit = "512MiB"
    check(model.run({"x": rows(1)}), weights, rows(1))


@pytest.mark.parametrize(("offload", "budget"), [("none", BLOCK), ("auto", MiB), (BLOCK - 4096, 4096)])
def test_streamed_weights_stay_on_the_host(tmp_path, store, load, weights, pool, offload, budget):
    model = load(linear(tmp_path, store, weights, streaming=True, context=MiB), offload=offload)
    assert model.memory.offloaded == BLOCK - budget
    assert bool(model.memory.offloaded) == any("stay in host memory" in note for note in model.notes)
    assert sum(h.bytes for h in pool.holders() if h.tag == "weights") == budget
    check(model.run({"x": rows(2)}), weights, rows(2))
    model.suspend()
    assert pool.stats().reserved == 0
    check(model.run({"x": rows(2)}), weights, rows(2))
    assert model.engine.weight_streaming_budget_v2 == budget


def test_offload_of_an_engine_that_cannot_stream_is_told(tmp_path, store, load, weights):
    model = load(linear(tmp_path, store, weights), offload="auto")
    assert any("--streaming" in note for note in model.notes)
