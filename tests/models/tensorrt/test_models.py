"""Models with engines beside others: gi.load, Runtimes, run, status."""

import gc as garbage
import types

import numpy as np
import pytest
from engine_packages import check, expected, linear, matrices, rows

import glake_infer as gi
from glake_infer.models.tensorrt.load import engine_for

MiB = 1 << 20
BLOCK = 2 * MiB  # weights of a `linear` engine


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
