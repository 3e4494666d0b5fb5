"""Models that run engines, on a GPU, with TensorRT-RTX. What executes is skipped where the capability is a pretence.

TensorRT-RTX deserializes on the GPUs that it has kernels for alone; elsewhere these tests are skipped.
"""

from __future__ import annotations

import gc
import os
import threading

import numpy as np
import pytest
from kernels import INDEX

import glake_infer as gi
from glake_infer import cuda
from glake_infer.models import zoo
from glake_infer.models.tensorrt.load import EngineSettings, load_engine

tensorrt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

pytestmark = pytest.mark.gpu

MiB = 1 << 20
SHAPES = dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), ((1, 8), (2, 16), (4, 32)))

executes = pytest.mark.skipif(
    "GLAKE_TEST_NO_EXECUTION" in os.environ,
    reason="the GPU cannot execute these engines, by $GLAKE_TEST_NO_EXECUTION",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A store with two fine-tunes of a small BERT, and one whose weights can be streamed."""
    major, minor = cuda.compute_capability(INDEX)
    if f"SM{major}{minor}" not in tensorrt.ComputeCapability.__members__:
        pytest.skip(f"TensorRT-RTX has no kernels for a GPU of compute capability {major}.{minor}")
    folder = tmp_path_factory.mktemp("workshop")
    store = gi.Store(folder / "store")
    for name, labels, streaming in (("two", 2, False), ("many", 100, False), ("streamed", 2, True)):
        options = gi.EngineOptions(
            kind="tensorrt-rtx", profiles=(SHAPES,), capabilities=(f"{major}.{minor}",), streaming=streaming
        )
        spec = zoo.spec("bert-mini", labels=labels)
        zoo.convert(spec, folder / f"{name}.glake", engine=options, store=store)
    return folder, store


@pytest.fixture
def load(workshop, pool):
    folder, store = workshop
    opened = []

    def make(name, **options):
        settings = {k: options.pop(k) for k in ("deferred",) if k in options}
        if settings:
            with store.using():
                package = gi.Package(folder / f"{name}.glake", store)
                opened.append(load_engine(package, pool, "tensorrt-rtx", EngineSettings(**settings)))
        else:
            opened.append(gi.load(folder / f"{name}.glake", pool, store=store, **options))
        return opened[-1]

    yield make
    for model in opened:
        model.close()
    opened.clear()
    gc.collect()
    assert pool.stats().active == 0


def feeds(labels=2, seed=0, batch=2, length=12):
    return zoo.feeds(zoo.spec("bert-mini", labels=labels), seed, batch=batch, length=length)


def read(model):
    (block,) = model._holding.blocks
    data = np.empty(block.size, np.uint8)
    cuda.copy_to_host(INDEX, block.address, data)
    return block.address, data


def test_gi_load_takes_the_engine_of_a_package(load, pool):
    model = load("two")
    assert isinstance(model, gi.EngineModel)
    assert {value.name for value in model.inputs} == SHAPES.keys()
    assert all(isinstance(axis, str) for value in model.inputs for axis in value.shape)
    assert model.memory.own == model.report.block_bytes
    assert model.report.source_known
    model.close()
    pool.trim()
    assert pool.stats().reserved == 0


def test_a_shape_outside_the_profile_is_told(load):
    with pytest.raises(gi.InputError, match=r"was fed the shape \[5, 12\].*\[1, 8\] to \[4, 32\]"):
        load("two").run(feeds(batch=5))


def test_suspend_and_resume(load, pool):
    one, other = load("two"), load("many")
    assert one.memory.shared
    before = read(one), read(other)
    one.suspend()
    other.suspend()
    assert pool.stats().reserved == 0
    assert one.memory.asleep
    one.resume()
    other.resume()
    for model, (address, data) in zip((one, other), before, strict=True):
        assert read(model)[0] == address
        assert np.array_equal(read(model)[1], data)


def test_a_deferred_engine_gives_its_weights_back_and_takes_them_again(load, pool):
    model = load("two", deferred=True)
    assert model.engine.weights_loaded
    held = pool.stats().active
    assert model.suspend() > 0
    assert pool.stats().active == 0
    model.resume()
    assert model.engine.weights_loaded
    assert pool.stats().active == held


@pytest.mark.parametrize("offload", ["none", "auto", "1MiB"])
def test_a_streamed_engine_has_the_budget_that_was_asked_for(load, pool, offload):
    model = load("streamed", offload=offload)
    budget = model.engine.weight_streaming_budget_v2
    assert model.memory.offloaded == model.engine.streamable_weights_size - budget
    if offload == "none":
        assert not model.memory.offloaded
    elif offload == "1MiB":
        assert model.memory.offloaded >= MiB
    model.suspend()
    assert model.engine.weight_streaming_budget_v2 == 0
    model.resume()
    assert model.engine.weight_streaming_budget_v2 == budget


def test_loads_in_a_row_leave_nothing(load, pool):
    for _ in range(10):
        load("two").close()
    gc.collect()
    assert pool.stats().active == 0


@executes
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("name", ["two", "many", "streamed"])
def test_results_are_those_of_onnx_runtime(workshop, load, name, cuda_graph):
    labels = {"many": 100}.get(name, 2)
    folder, store = workshop
    engine = load(name, cuda_graph=cuda_graph, offload="1MiB" if name == "streamed" else "none")
    with gi.load(folder / f"{name}.glake", device="cpu", store=store, engine="onnxruntime") as plain:
        for seed in range(4):
            for shape in ({}, {"batch": 4, "length": 32}):
                given = feeds(labels, seed, **shape)
                expected = plain.run(given)
                for results in (engine.run(given), engine.run(given, to="device")):
                    for output, array in expected.items():
                        got = results[output]
                        got = got if isinstance(got, np.ndarray) else got.numpy()
                        np.testing.assert_allclose(got, array, rtol=1e-2, atol=1e-2)
            if seed == 1:
                engine.suspend()


@executes
def test_threads_run_one_engine_at_once(load):
    model = load("two", concurrency=3)
    expected = {seed: model.run(feeds(seed=seed)) for seed in range(3)}
    errors = []

    def work(seed):
        try:
            for _ in range(20):
                for name, array in model.run(feeds(seed=seed)).items():
                    np.testing.assert_allclose(array, expected[seed][name], rtol=1e-3, atol=1e-3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed % 3,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
