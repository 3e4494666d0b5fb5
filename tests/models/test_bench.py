"""The parts of the benchmarks: models that are made, files in the page cache, sides, curves."""

import json
import struct

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from glake_infer.allocators import _native
from glake_infer.allocators.errors import GlakeError, InputError, MissingDependencyError
from glake_infer.models import load as loading
from glake_infer.models.bench import child, files, links, made, processes
from glake_infer.models.bench import load as bench
from glake_infer.models.convert import convert
from glake_infer.models.package import Package
from glake_infer.models.runner import run


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [made.SMALLEST, (1 << 20) + 12345, 5 << 20])
def test_a_chain_has_the_size_that_was_asked_for(tmp_path, size, half):
    path = tmp_path / "m.onnx"
    written = made.write_chain(path, size, half=half)
    assert size - 4 * 4096 < written <= size
    model = onnx.load(path)
    onnx.checker.check_model(model)
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert sum(weight.nbytes for weight in weights) == written
    assert {weight.dtype for weight in weights} == {np.dtype(np.float16 if half else np.float32)}
    assert len({weight.tobytes() for weight in weights}) == len(weights)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    x = np.random.default_rng(0).standard_normal((2, given.shape[1])).astype(weights[0].dtype)
    (y,) = session.run(None, {"x": x})
    assert np.isfinite(y).all()
    assert 1e-3 < np.abs(y).max() < 1e3


def test_small_weights_are_all_needed(tmp_path):
    path = tmp_path / "m.onnx"
    assert made.write_small(path, 130, half=False) == 130 * made.SMALL
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.full((1, made.SMALL // 4), -9, np.float32)
    model = onnx.load(path)
    weights = np.concatenate([numpy_helper.to_array(tensor) for tensor in model.graph.initializer])
    assert len(np.unique(weights, axis=0)) == 130
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], weights.max(axis=0, keepdims=True))
    with pytest.raises(InputError):
        made.write_small(tmp_path / "none.onnx", 0, half=False)


@pytest.fixture
def package(store, tmp_path):
    made.write_chain(tmp_path / "m.onnx", 1 << 20, half=False)
    convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    return tmp_path / "m.glake"


def test_safetensors_of_a_package(package, store, tmp_path):
    opened = Package(package, store)
    files.write_safetensors(opened, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 4096 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.keys() == opened.manifest.distinct_of("onnx").keys()
    for digest, entry in header.items():
        first, end = entry["data_offsets"]
        assert entry["shape"] == [end - first]
        assert data[8 + length + first : 8 + length + end] == store.objects.path(digest).read_bytes()


def test_files_enter_and_leave_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * ((1 << 20) + 5))
    empty = tmp_path / "empty"
    empty.touch()
    assert files.read_all([path, empty]) > 0
    assert files.cached([path, empty]) == (1 << 20) + 5
    files.drop([path, empty])
    assert files.cached([path, empty]) <= (1 << 20) + 5  # 0, but not on every file system


def request(package, store, **more):
    shared = {"device": "cpu", "path": str(package), "store": str(store.root), "shapes": []}
    return {"task": "load", "side": "glake-infer", "start": "warm", **shared, **more}


def test_a_trace_has_rows_for_readers_and_the_session(package, store, tmp_path, monkeypatch):
    """Weights are copied, as on a GPU, by the engine whose device is the host's memory."""
    monkeypatch.setattr(loading, "maps_weights", lambda pool: False)
    told = []
    trace = tmp_path / "trace.json"
    warming = {"warming": str(package), "warming_store": str(store.root)}

    class Cold(child.Ours):
        def load(self, path, request, progress=None):
            model = super().load(path, request, progress)
            if progress is None:
                model.close()  # else the weights would be there already
            return model

        def run(self, model, feeds):
            return [] if model.closed else super().run(model, feeds)

        def feeds(self, model, shapes):
            return {} if model.closed else super().feeds(model, shapes)

    monkeypatch.setitem(child.SESSIONS, "glake-infer", Cold)
    asked = request(package, store, trace=str(trace), **warming)
    answer = child.load_session(asked, told.append)
    assert 0 < answer["to_weights"] < 60
    assert 0 < answer["to_session"] <= answer["to_answer"] < 60
    assert any("progress" in line for line in told)
    found = json.loads(trace.read_text())
    events = found["traceEvents"]
    assert found["displayTimeUnit"] == "ms"
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    for event in events:
        assert event["ph"] in ("M", "X")
        assert {"pid", "tid", "name"} <= event.keys()
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert event["tid"] in rows
    assert "session" in rows.values()
    assert any(row.startswith("reader ") for row in rows.values())
    read = sum(event["args"]["bytes"] for event in events if rows[event["tid"]].startswith("reader ") and "args" in event)
    assert read >= 1 << 20


def test_a_run_tells_the_bytes_of_weights(package, store, monkeypatch):
    monkeypatch.setattr(loading, "maps_weights", lambda pool: False)
    told = []
    run([package], store=store, progress=lambda *each: told.append(each))
    bars = [(done, total) for name, done, total in told if name == "loading m"]
    assert bars[-1][0] == bars[-1][1] >= 1 << 20


def test_a_side_that_fails_says_why(package, store):
    with pytest.raises(InputError, match="no such input"):
        processes.ask(request(package, store, start="cold", shapes=["nope=1"]))
    with pytest.raises(GlakeError, match=r"exit code 1 and no answer.*KeyError"):
        processes.ask({"task": "nothing", "side": "x"})


def test_twins_without_their_packages(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingDependencyError, match="PyTorch"):
        child.load_tensors({"side": "safetensors", "device": "cpu"}, print)


def test_differences_of_answers():
    nan = float("nan")
    assert bench._difference([[1.0, 2.0]], [[1.0, 2.0]]) == 0
    assert bench._difference([[1.0, 3.0]], [[1.0, 2.0]]) == 0.5
    assert bench._difference([[nan, 1.0]], [[nan, 1.0]]) == 0
    assert bench._difference([[nan, 1.0]], [[0.0, 1.0]]) == float("inf")


def test_a_curve_over_paths():
    size = 8 << 20
    engine = _native.TransferEngine.on_host(1, 1 << 20, 1 << 20, 0)
    for name in "ab":
        engine.add_host_path(0, name, 1e9)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    memory = (source.ctypes.data, target.ctypes.data)
    found = links.curve(
        "cuda:0", engine, 0, memory, [1 << 20, size], 2, 2, lambda size, used, down: size / (1e9 * used)
    )
    assert [(each.bytes, each.paths) for each in found] == [(1 << 20, 1), (1 << 20, 2), (size, 1), (size, 2)]
    assert found[0].ratio_to_device == found[0].ratio_to_host == 1
    assert found[3].raw_to_device == pytest.approx(2e9)
    assert found[3].ratio_to_device > 1.2
    assert target.all()
