"""CUDA graphs of engines."""

import pytest
from engine_packages import check, linear, rows

MiB = 1 << 20
BLOCK = 2 * MiB  # weights of a `linear` engine


def test_rtx_captures_by_itself_at_addresses_that_stay(tmp_path, store, load, weights, pool, trt, graphs):
    model = load(linear(tmp_path, store, weights))
    for seed in range(4):
        check(model.run({"x": rows(2, seed)}), weights, rows(2, seed))
    assert trt.events.count("context with graphs") == 1
    (slot,) = model._contexts._slots
    (graph,) = slot.graphs.values()
    addresses = dict(graph.context._addresses)
    result = model.run({"x": rows(2, 9)}, ["y"], to="device")["y"]
    model.run({"x": rows(2, 8)})
    check({"y": result.numpy()}, weights, rows(2, 9))  # no later run writes to it
    assert graph.context._addresses == addresses
    assert "launch" not in trt.events
    assert model.memory.private == graph.bytes > 0
    model.suspend()
    assert pool.stats().reserved > 0  # the result
    del result, graph, slot
    assert pool.stats().active == 0


@pytest.mark.parametrize("trt", ["tensorrt"], indirect=True)
def test_the_full_tensorrt_is_captured_from_the_third_run_on(
    tmp_path, store, load, weights, pool, trt, graphs
):
    model = load(linear(tmp_path, store, weights, kind="tensorrt"), "tensorrt")
    for seed in range(5):
        x = rows(3, seed)
        check(model.run({"x": x}), weights, x)
    assert trt.events == ["context made", "run", "context made", "run", "launch", "launch", "launch"]
    before = len(trt.events)
    check(model.run({"x": rows(2)}), weights, rows(2))  # another shape: not captured yet
    check(model.run({"x": rows(3)}), weights, rows(3))
    assert trt.events[before:] == ["run", "launch"]
    for n in (4, 5, 6, 7):  # more than are kept
        for _ in range(3):
            check(model.run({"x": rows(n)}), weights, rows(n))
    assert len(graphs.graphs) == 4
    model.suspend()
    assert not graphs.graphs
    assert pool.stats().active == 0
    check(model.run({"x": rows(3)}), weights, rows(3))


@pytest.mark.parametrize("trt", ["tensorrt"], indirect=True)
def test_a_capture_that_fails_is_done_without(tmp_path, store, load, weights, trt, graphs, monkeypatch):
    monkeypatch.setattr(trt.IExecutionContext, "is_stream_capturable", lambda self, stream: False)
    model = load(linear(tmp_path, store, weights, kind="tensorrt"), "tensorrt")
    for _ in range(4):
        check(model.run({"x": rows(3)}), weights, rows(3))
    assert "launch" not in trt.events


def test_graphs_make_room_for_a_run(tmp_path, store, load, weights, pool, trt, graphs):
    small = load(linear(tmp_path, store, weights, scratch=(0, 4 * MiB)))
    for _ in range(2):
        small.run({"x": rows(1)})
    assert small.memory.private > 4 * MiB
    pool.limit = pool.stats().active + 20 * MiB
    check(small.run({"x": rows(6)}), weights, rows(6))  # 24 MiB
    assert small.memory.private == 0


def test_auto_leaves_large_engines_without_graphs(tmp_path, store, load, weights, graphs, trt):
    path = linear(tmp_path, store, weights, scratch=(65 * MiB, 0))
    for choice in ("auto", False, True):
        model = load(path, cuda_graph=choice)
        for _ in range(2):
            model.run({"x": rows(1)})
        assert ("context with graphs" in trt.events) == (choice is True)
        model.close()


def test_graphs_that_cannot_be_are_told(tmp_path, store, load, weights):
    assert any(
        "cuda_graph=True" in note for note in load(linear(tmp_path, store, weights), cuda_graph=True).notes
    )
