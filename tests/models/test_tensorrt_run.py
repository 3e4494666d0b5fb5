"""Engines run: with a library that stands in for TensorRT, on the CPU's pool. What is TensorRT's own was not run."""

import ctypes
import gc as garbage
import itertools
import re
import sys
import threading
import types

import numpy as np
import pytest
import standin_tensorrt as standin
from engine_packages import SIDE, expected, linear, matrices, package, small_graph

import glake_infer as gi
from glake_infer.models.interchange import Borrowed
from glake_infer.models.tensorrt import runtimes
from glake_infer.models.tensorrt.device import HostDevice
from glake_infer.models.tensorrt.load import EngineSettings, engine_for, load_engine
from glake_infer.models.tensorrt.plan import Plan
from glake_infer.models.tensorrt.scratch import Scratch
from glake_infer.models.tensorrt.weights_manager import Chunk, map_chunks
from glake_infer.residency import Residency

MiB = 1 << 20
BLOCK = 2 * MiB  # weights of a `linear` engine


class CapturingDevice(HostDevice):
    """A device whose graphs are lists of runs of the stand-in."""

    captures = True

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.graphs = {}
        self.numbers = itertools.count(1)

    def begin_capture(self, stream):
        self.module.capture = []

    def end_capture(self, stream, *, keep=True):
        runs, self.module.capture = self.module.capture, None
        if not keep:
            return 0
        self.graphs[number := next(self.numbers)] = runs
        return number

    def launch(self, graph, stream):
        self.module.events.append("launch")
        for run in self.graphs[graph]:
            assert run()

    def destroy(self, graph):
        self.module.events.append("destroy")
        del self.graphs[graph]


@pytest.fixture(params=["tensorrt-rtx"])
def trt(request, monkeypatch):
    module = standin.make(request.param)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def pool():
    with gi.Pool("cpu", "512MiB") as pool:
        yield pool
        garbage.collect()
        Residency.settle(pool)
        pool.check_invariants()
        pool.trim()
        assert pool.stats().reserved == 0


@pytest.fixture
def load(trt, pool, store):
    opened = []

    def make(path, kind="tensorrt-rtx", **settings):
        with store.using():
            opened.append(load_engine(gi.Package(path, store), pool, kind, EngineSettings(**settings)))
        return opened[-1]

    yield make
    for model in opened:
        model.close()
    opened.clear()
    garbage.collect()
    assert not trt.engines
    assert not trt.contexts


@pytest.fixture
def graphs(trt, monkeypatch):
    """Runs may go into CUDA graphs."""
    device = CapturingDevice(trt)
    monkeypatch.setattr(runtimes, "device_of", lambda pool: device)
    return device


def rows(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, SIDE), np.float32)


def check(results, weights, x):
    for name, array in expected(weights, x).items():
        if name in results:
            np.testing.assert_array_equal(results[name], array)


@pytest.fixture
def weights():
    return matrices(0)


@pytest.fixture
def model(tmp_path, store, load, weights):
    return load(linear(tmp_path, store, weights))


def test_results_are_those_of_the_engine_and_the_callers_own(model, weights, pool):
    x = rows(3)
    results = model.run({"x": x})
    check(results, weights, x)
    assert list(results) == ["y", "hidden"]
    assert list(model.run({"x": x}, ["hidden"])) == ["hidden"]
    assert [str(value) for value in (*model.inputs, *model.outputs)] == [
        "x: float[n, 512]", "y: float[n, 512]", "hidden: float[n, 512]",
    ]  # fmt: skip
    assert model.runs == 2
    model.close()
    check(results, weights, x)


def test_inputs_are_taken_as_models_of_onnx_runtime_take_them(model, weights, pool):
    x = rows(2)
    check(model.run({"x": x.tolist()}), weights, x)
    check(model.run({"x": x[::-1][::-1]}), weights, x)
    strided = np.empty((2, 2 * SIDE), np.float32)
    strided[:, ::2] = x
    check(model.run({"x": strided[:, ::2]}), weights, x)
    on_device = model.run({"x": x}, ["hidden"], to="device")["hidden"]
    check(model.run({"x": on_device}, ["y"]), weights, on_device.numpy())


@pytest.mark.parametrize("offset", [0, 64])
def test_what_lies_on_the_device_is_read_in_place_if_it_is_aligned(model, weights, pool, offset, monkeypatch):
    x = rows(2)
    address = pool.allocate(x.nbytes + offset) + offset
    ctypes.memmove(address, x.ctypes.data, x.nbytes)
    copies, copy = [], HostDevice.queue_within
    monkeypatch.setattr(HostDevice, "queue_within", lambda self, *a: (copies.append(a), copy(self, *a)))
    borrowed = Borrowed("cpu", address, x.dtype, x.shape, (SIDE, 1), None)
    check(model._execution.run(["y"], {"x": borrowed}, "host"), weights, x)
    assert len(copies) == bool(offset)
    pool.deallocate(address - offset)


def test_results_stay_on_the_device_and_outlive_the_model(model, weights, pool):
    x = rows(4)
    result = model.run({"x": x}, ["y"], to="device")["y"]
    assert (result.shape, result.dtype, result.device) == ((4, SIDE), np.float32, "cpu")
    assert [h.bytes for h in pool.holders() if h.tag == "outputs"] == [x.nbytes]
    model.close()
    garbage.collect()
    check({"y": result.numpy()}, weights, x)
    shared = np.from_dlpack(result)
    del result
    garbage.collect()
    check({"y": shared}, weights, x)
    del shared
    garbage.collect()
    assert pool.stats().active == 0


def test_a_dlpack_capsule_that_nobody_takes_frees_the_memory(model, pool):
    result = model.run({"x": rows(1)}, ["y"], to="device")["y"]
    capsule = result.__dlpack__()
    del result
    assert [h.tag for h in pool.holders() if h.tag == "outputs"]
    del capsule
    assert not [h.tag for h in pool.holders() if h.tag == "outputs"]


def test_a_model_that_is_closed_is_gone(model, pool, trt):
    model.run({"x": rows(1)})
    model.close()
    garbage.collect()
    assert not trt.engines
    with pytest.raises(gi.GlakeError, match="is closed"):
        model.run({"x": rows(1)})


@pytest.mark.parametrize(
    ("fed", "says"),
    [
        ({"x": np.zeros((2, SIDE))}, r"was fed float64"),
        ({"x": np.zeros((2, 3), np.float32)}, r"axis 1 has 3 instead of 512"),
        ({"z": rows(1)}, r"no input 'z'"),
        ({}, r"x: float\[n, 512\] was not fed"),
        (
            {"x": rows(9)},
            r"x: float\[n, 512\] was fed the shape \[9, 512\].*\[1, 512\] to \[8, 512\].*--profile x=",
        ),
        ({"x": rows(0)}, r"was fed the shape \[0, 512\]"),
    ],
)
def test_wrong_inputs_are_told_with_what_was_expected(model, weights, fed, says):
    with pytest.raises(gi.InputError, match=says):
        model.run(fed)
    check(model.run({"x": rows(1)}), weights, rows(1))


def test_the_profile_with_the_smallest_maximum_is_taken(tmp_path, store, load, weights):
    model = load(linear(tmp_path, store, weights, rows=((1, 4, 16), (1, 2, 4), (32, 64, 64))))
    context = None
    for n, profile in ((3, 1), (4, 1), (5, 0), (1, 1), (40, 2)):
        check(model.run({"x": rows(n)}), weights, rows(n))
        (slot,) = model._contexts._slots
        assert slot.context.active_optimization_profile == profile
        assert slot.context is (context := context or slot.context)
    with pytest.raises(
        gi.InputError, match=r"profile 0: \[1, 512\] to \[16, 512\].*profile 2: \[32, 512\] to"
    ):
        model.run({"x": rows(20)})


def test_outputs_whose_size_depends_on_the_data(tmp_path, store, load, pool):
    graph = small_graph({"x": ("float", ["n"])}, {"indices": ("int64", ["found"])})
    tensors = [
        standin.tensor("x", "FLOAT", (-1,)),
        standin.tensor("indices", "INT64", (-1, 1), mode="OUTPUT"),
    ]
    level = {"level": np.array([0.5], np.float32)}
    plan = standin.plan("nonzero", tensors, level, profiles=[{"x": [(1,), (8,), (100_000,)]}])
    model = load(package(tmp_path, store, graph, plan))
    for x in ([0, 1, 0, 2], [1] * 7, [0, 0], [1] * 90_000, [3]):
        array = np.array(x, np.float32)
        found = model.run({"x": array})["indices"]
        assert found.tolist() == np.argwhere(array > 0.5).tolist()
    kept = model.run({"x": [1.0, 2.0]}, to="device")["indices"]
    model.run({"x": [0.0, 2.0, 3.0]})
    assert kept.numpy().tolist() == [[0], [1]]
    allocators = {id(slot.outputs) for slot in model._contexts._slots}
    assert len(allocators) == 1  # the bindings keep every one that they are given
    pool.limit = pool.stats().active + MiB + (1 << 19)
    with pytest.raises(gi.OutOfMemoryError):
        model.run({"x": np.ones(100_000, np.float32)})
    pool.limit = "512MiB"
    assert len(model.run({"x": np.ones(100_000, np.float32)})["indices"]) == 100_000


def test_shape_tensors_are_read_on_the_host(tmp_path, store, load):
    graph = small_graph(
        {"x": ("float", ["n"]), "sizes": ("int64", [2])}, {"y": ("float", ["a"]), "rank": ("int64", ["b"])}
    )
    tensors = [
        standin.tensor("x", "FLOAT", (-1,)), standin.tensor("sizes", "INT64", (2,), host=True),
        standin.tensor("y", "FLOAT", (-1, -1), mode="OUTPUT"),
        standin.tensor("rank", "INT64", (1,), mode="OUTPUT", host=True),
    ]  # fmt: skip
    profiles = [{"x": [(1,), (4,), (8,)], "values of sizes": [(1, 1), (2, 2), (4, 4)]}]
    model = load(package(tmp_path, store, graph, standin.plan("resize", tensors, {}, profiles=profiles)))
    x = np.arange(4, dtype=np.float32)
    results = model.run({"x": x, "sizes": [2, 3]})
    assert results["y"].tolist() == [[0, 1, 2], [3, 0, 1]]
    assert results["rank"].tolist() == [2]
    assert model.run({"x": x, "sizes": [1, 1]}, ["rank"], to="device")["rank"].numpy().tolist() == [2]
    with pytest.raises(
        gi.InputError, match=r"sizes: int64\[2\] was fed the values \[5, 1\].*\[1, 1\] to \[4, 4\]"
    ):
        model.run({"x": x, "sizes": [5, 1]})


def test_an_output_in_an_inputs_memory_leaves_the_callers_array_alone(tmp_path, store, load, pool):
    graph = small_graph({"cache": ("float", ["n"]), "x": ("float", ["n"])}, {"updated": ("float", ["n"])})
    tensors = [
        standin.tensor("cache", "FLOAT", (4,)), standin.tensor("x", "FLOAT", (4,)),
        standin.tensor("updated", "FLOAT", (4,), mode="OUTPUT", alias="cache"),
    ]  # fmt: skip
    model = load(package(tmp_path, store, graph, standin.plan("update", tensors, {})))
    cache, one = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    first = model.run({"cache": cache, "x": one}, to="device")["updated"]
    second = model.run({"cache": first, "x": one}, to="device")["updated"]
    assert cache.tolist() == [0, 1, 2, 3]
    assert first.numpy().tolist() == [1, 2, 3, 4]
    assert second.numpy().tolist() == [2, 3, 4, 5]


# Scratch memory and concurrency.


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


def run_at_once(runs):
    errors, start = [], threading.Barrier(len(runs))

    def work(run):
        try:
            start.wait()
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


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
    monkeypatch.undo()
    check(model.run({"x": rows(1)}), weights, rows(1))


# Suspend and resume.


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


def test_contexts_that_hold_nothing_outlive_a_suspension(model, weights, trt):
    model.run({"x": rows(1)})
    model.suspend()
    check(model.run({"x": rows(1)}), weights, rows(1))
    assert trt.events.count("context made") == 1


def test_a_suspension_waits_for_runs(tmp_path, store, load, weights, pool, trt):
    trt.delay = 0.1
    model = load(linear(tmp_path, store, weights), concurrency=2)
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
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(gi.DigestMismatchError, match=re.escape(str(path))):
        model.run({"x": rows(1)})
    data[100] ^= 1
    path.write_bytes(data)
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


def test_chunks_of_ours_become_the_weights_of_a_stripped_engine(model, trt, monkeypatch):
    with pytest.raises(gi.InputError, match="STRIP_PLAN"):
        map_chunks(model._runtime, model.engine, [], 4096, 1)
    manager = trt.IWeightsManager(12288)
    monkeypatch.setattr(trt.ICudaEngine, "create_weights_manager", lambda self: manager)
    chunks = [Chunk(7, 0, 4096), Chunk(9, 4096, 8192)]
    assert map_chunks(model._runtime, model.engine, chunks, 4096, 3) is manager
    assert manager._mapped == [(7, 0, 4096, 3), (9, 4096, 8192, 3)]
    del manager._mapped[:]
    for wrong in ([Chunk(7, 0, 4096)], [Chunk(7, 0, 8192), Chunk(9, 4096, 8192)], [Chunk(7, 0, 12288 - 1)]):
        with pytest.raises(gi.InputError, match="bytes"):
            map_chunks(model._runtime, model.engine, wrong, 4096, 3)
    assert not manager._mapped
    with pytest.raises(gi.ModelError, match="did not map"):
        map_chunks(model._runtime, model.engine, [Chunk(0, 0, 12288)], 4096, 3)


# CUDA graphs.


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


# Loading.


def test_what_was_compiled_is_kept_and_taken_again(tmp_path, store, load, weights, trt):
    path = linear(tmp_path, store, weights)
    model = load(path)
    model.run({"x": rows(1)})
    (file,) = (store.root / "tensorrt" / "jit").iterdir()
    assert file.read_bytes()[64:] == b"cache of 1 contexts"
    model.close()
    again = load(path)
    again.run({"x": rows(1)})
    assert trt.events.count("cache taken") == 1
    again.close()
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    load(path).run({"x": rows(1)})
    assert trt.events.count("cache taken") == 1  # it was damaged
    assert file.read_bytes()[64:].startswith(b"cache of")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"version": "1.6.0.1"},
            r"built by version 1.6.0.1, and 1.7.1.116 is installed.*pip install tensorrt-rtx==1.6.0.1",
        ),
        ({"capabilities": ("8.9",)}, r"capability 8.9 \(l4, 4090\), and memory of the host.* has 8.6"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_refused_before_it_is_read(
    tmp_path, store, load, weights, pool, change, says
):
    path = linear(tmp_path, store, weights)
    opened = gi.Package(path, store)
    engines = {"tensorrt-rtx": opened.manifest.engines["tensorrt-rtx"].model_copy(update=change)}
    opened.manifest = opened.manifest.model_copy(update={"engines": engines})
    with store.using(), pytest.raises(gi.PackageError, match=says) as caught:
        load_engine(opened, pool, "tensorrt-rtx", EngineSettings())
    assert "engine='onnxruntime'" in str(caught.value)
    assert pool.stats().active == 0


def test_a_plan_that_tensorrt_refuses_quotes_it(tmp_path, store, load, weights, pool):
    path = linear(tmp_path, store, weights, refuse="Myelin: unsupported SM")
    with pytest.raises(gi.PackageError, match="says: Myelin: unsupported SM"):
        load(path)
    assert pool.stats().active == 0


def test_tensorrts_own_verdict_is_told(tmp_path, store, load, weights, pool, trt, monkeypatch):
    path = linear(tmp_path, store, weights)
    verdicts = trt.EngineValidity
    monkeypatch.setattr(trt.Runtime, "get_engine_validity", lambda self, buffer: (verdicts.INVALID, 3))
    with pytest.raises(gi.PackageError, match=r"does not take.*: version mismatch, unsupported cc\. Convert"):
        load(path)
    monkeypatch.setattr(trt.Runtime, "get_engine_validity", lambda self, buffer: (verdicts.SUBOPTIMAL, 2))
    assert any("not at its best: unsupported cc" in note for note in load(path).notes)
    monkeypatch.setattr(trt.Runtime, "get_engine_validity", lambda self, buffer: (verdicts.INVALID, 0))
    check(load(path).run({"x": rows(1)}), weights, rows(1))  # no reason: the deserialization decides


def test_an_engine_without_room_is_told_with_the_pools_figures(tmp_path, store, load, weights, pool):
    path = linear(tmp_path, store, weights)
    pool.limit = MiB
    with pytest.raises(gi.OutOfMemoryError) as caught:
        load(path)
    assert caught.value.limit == MiB
    assert pool.stats().active == 0
    pool.limit = "512MiB"
    check(load(path).run({"x": rows(1)}), weights, rows(1))


def test_a_truncated_part_of_a_plan_is_named(tmp_path, store, load, weights, pool):
    path = linear(tmp_path, store, weights)
    entry = gi.Package(path, store).manifest.engines["tensorrt-rtx"]
    file = store.objects.path(max(entry.parts, key=lambda part: part.bytes).digest)
    file.chmod(0o644)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(gi.PackageError, match=re.escape(str(file))):
        load(path)
    file.write_bytes(data[:-1] + b"!")
    with pytest.raises(gi.DigestMismatchError, match=re.escape(str(file))):
        load(path)
    assert pool.stats().active == 0


def test_the_plan_is_read_in_pieces(tmp_path, store, load, weights, monkeypatch):
    from glake_infer.models.tensorrt import reader

    monkeypatch.setattr(reader, "PIECE", 100_000)
    sizes, read = [], Plan.read
    monkeypatch.setattr(Plan, "read", lambda self, o, n: (sizes.append(n), read(self, o, n))[1])
    model = load(linear(tmp_path, store, weights))
    assert max(sizes) == 100_000
    check(model.run({"x": rows(1)}), weights, rows(1))


def test_an_error_while_the_plan_is_read_is_raised_as_it_is(
    tmp_path, store, load, weights, pool, monkeypatch
):
    path = linear(tmp_path, store, weights)
    read = Plan.read

    def broken(self, offset, size):
        if offset > 100:
            raise gi.StoreError("the disk went away")
        return read(self, offset, size)

    monkeypatch.setattr(Plan, "read", broken)
    with pytest.raises(gi.StoreError, match="the disk went away"):
        load(path)
    assert pool.stats().active == 0


def test_without_tensorrt_the_error_says_what_to_install(tmp_path, store, weights, pool, monkeypatch):
    path = linear(tmp_path, store, weights)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with store.using(), pytest.raises(gi.MissingDependencyError, match="pip install"):
        load_engine(gi.Package(path, store), pool, "tensorrt-rtx", EngineSettings())


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"cuda_graph": "yes"}, {"host_copy": "disk"}])
def test_settings_are_checked(settings):
    with pytest.raises(gi.InputError, match=next(iter(settings))):
        EngineSettings(**settings)


def test_which_engine_is_taken(tmp_path, store, weights, pool, monkeypatch):
    path = linear(tmp_path, store, weights)
    opened = gi.Package(path, store)
    gpu = types.SimpleNamespace(device="cuda:0")
    assert engine_for(opened, pool, "auto") is None  # the CPU runs the graph
    assert engine_for(opened, gpu, "auto") == "tensorrt-rtx"
    assert engine_for(opened, gpu, "onnxruntime") is None
    assert engine_for(opened, gpu, "tensorrt-rtx") == "tensorrt-rtx"
    with pytest.raises(gi.InputError, match="has no tensorrt engine"):
        engine_for(opened, gpu, "tensorrt")
    with pytest.raises(gi.InputError, match="expected one of 'auto'"):
        engine_for(opened, gpu, "tensor")
    with pytest.raises(gi.InputError, match="needs a GPU"):
        gi.load(path, pool, store=store, engine="tensorrt-rtx")
    entry = opened.manifest.engines["tensorrt-rtx"]
    both = {"tensorrt": entry.model_copy(update={"kind": "tensorrt"}), "tensorrt-rtx": entry}
    opened.manifest = opened.manifest.model_copy(update={"engines": both})
    monkeypatch.setattr("glake_infer.cuda.compute_capability", lambda index: (8, 6))
    assert engine_for(opened, gpu, "auto") == "tensorrt-rtx"


def test_on_the_cpu_a_package_with_an_engine_runs_its_graph(tmp_path, store, weights, pool):
    with gi.load(linear(tmp_path, store, weights), pool, store=store) as model:
        results = model.run({"x": rows(2)})
        np.testing.assert_allclose(results["y"], expected(weights, rows(2))["y"], rtol=1e-3, atol=1e-4)
        assert model.session


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`gi.load` takes engines on the CPU's pool, too."""
    from glake_infer.models import load as module

    def engine_for(package, pool, asked):
        return None if asked == "onnxruntime" else next(iter(package.manifest.engines), None)

    monkeypatch.setattr(module, "engine_for", engine_for)
    monkeypatch.setattr(module, "parse_device", lambda device: "cuda:0")


def test_gi_load_and_a_runtime_take_engines(tmp_path, store, weights, pool, trt, as_on_a_gpu):
    path = linear(tmp_path, store, weights)
    with gi.Runtime(pool=pool, store=store) as runtime:
        model = runtime.load(path, engine="tensorrt-rtx", concurrency=2, priority=3)
        assert isinstance(model, gi.EngineModel)
        assert (model.kind, model.priority, model.pinned) == ("tensorrt-rtx", 3, False)
        check(model.run({"x": rows(1)}), weights, rows(1))
        assert runtime.suspend_idle() >= BLOCK
        check(model.run({"x": rows(1)}), weights, rows(1))
        assert runtime.models == [model]
    assert model.closed
    del model
    with gi.load(path, pool, store=store, engine="onnxruntime") as model:
        assert not isinstance(model, gi.EngineModel)


def test_run_takes_packages_with_engines(tmp_path, store, weights, trt, as_on_a_gpu):
    from glake_infer.models import runner

    other = {**weights, "w2": matrices(5, 16)["w2"]}
    paths = [linear(tmp_path, store, weights, "one"), linear(tmp_path, store, other, "two")]
    trt.delay = 0.01
    report = runner.run(
        paths,
        shapes=["x=3,512"],
        repeat=4,
        threads=2,
        engine="tensorrt-rtx",
        save=tmp_path / "out",
        store=store,
    )
    assert [(m.name, m.runs, m.outputs[0].shape) for m in report.models] == [
        ("one", 4, (3, 512)), ("two", 4, (3, 16)),
    ]  # fmt: skip
    assert report.memory.shared >= MiB
    assert any("are those of other engines" in note for note in report.models[1].notes)
    saved = np.load(tmp_path / "out" / "two.npz")
    assert saved["y"].shape == (3, 16)
    garbage.collect()
    assert not trt.engines


def test_the_status_shows_engines(model):
    from glake_infer.models import status

    model.run({"x": rows(1)})
    (process,) = status.process_statuses()
    (shown,) = process.models
    assert (shown.name, shown.state, shown.own, shown.runs) == ("model", "awake", BLOCK, 1)
    model.suspend()
    ((shown,),) = (process.models for process in status.process_statuses())
    assert (shown.state, shown.asleep) == ("suspended", BLOCK)


def test_engines_give_way_in_a_runtime(tmp_path, store, load, pool, weights, trt):
    from glake_infer.models.gate import Gate

    models = {seed: load(linear(tmp_path, store, matrices(seed), f"m{seed}")) for seed in range(3)}
    gate = Gate()
    for model in models.values():
        model._join(gate, pin=False, priority=0)
    pool.trim()
    pool.limit = 6 * MiB + (1 << 19)  # two of them, with scratch and what a run takes
    for _ in range(2):
        for seed, model in models.items():
            check(model.run({"x": rows(1)}), matrices(seed), rows(1))
    assert sum(model.memory.asleep for model in models.values())
    models[0].pinned = True


def test_loads_in_a_row_leave_nothing(tmp_path, store, load, weights, pool):
    path = linear(tmp_path, store, weights, context=4096)
    for _ in range(30):
        model = load(path)
        model.run({"x": rows(1)})
        model.close()
    garbage.collect()
    assert pool.stats().active == 0
