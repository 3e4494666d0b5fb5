"""The parts of the benchmarks: models that are made, files in the page cache, sides, curves."""

import gc as garbage
import json
import struct
import sys
import tempfile
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from glake_infer.allocators import Pool, _native
from glake_infer.allocators.errors import (
    DeviceNotFoundError,
    GlakeError,
    InputError,
    MissingDependencyError,
    ModelError,
    PackageError,
    StorageFullError,
)
from glake_infer.models import load as loading
from glake_infer.models.bench import child, files, links, made, processes
from glake_infer.models.bench import load as bench
from glake_infer.models.bench.resume import bench_resume
from glake_infer.models.convert import convert
from glake_infer.models.package import Package
from glake_infer.models.runner import run
from glake_infer.residency import Residency


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


@pytest.fixture
def copied(monkeypatch):
    """Weights are copied, as on a GPU, by the engine whose device is the host's memory."""
    original = Residency.__init__
    monkeypatch.setattr(loading, "maps_weights", lambda pool: False)
    monkeypatch.setattr(
        Residency, "__init__", lambda self, pool, copies, share=None: original(self, pool, True, share)
    )
    yield
    garbage.collect()
    if pool := Pool.current("cpu"):
        pool.close()


def test_a_trace_has_rows_for_readers_and_the_session(package, store, tmp_path, copied):
    told = []
    trace = tmp_path / "trace.json"
    made.write_small(tmp_path / "tiny.onnx", 3, half=False)
    convert(tmp_path / "tiny.onnx", tmp_path / "tiny.glake", store=store)
    warming = {"warming": str(tmp_path / "tiny.glake"), "warming_store": str(store.root)}
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
    read = sum(
        event["args"]["bytes"]
        for event in events
        if event["ph"] == "X" and rows[event["tid"]].startswith("reader ")
    )
    assert read >= 1 << 20


def test_a_run_tells_the_bytes_of_weights(package, store, copied):
    told = []
    run([package], store=store, progress=lambda *each: told.append(each))
    bars = [(done, total) for name, done, total in told if name == "loading m"]
    assert bars[-1][0] == bars[-1][1] >= 1 << 20


def test_a_side_that_fails_says_why(package, store):
    with pytest.raises(InputError, match="no such input"):
        processes.ask(request(package, store, start="cold", shapes=["nope=1"]))
    with pytest.raises(GlakeError, match=r"(?s)exit code 1 and no answer.*KeyError"):
        processes.ask({"task": "nothing", "side": "x"})


class FakeTorch:
    """As much of PyTorch, safetensors and fastsafetensors as the sides use, on numpy."""

    uint8 = np.uint8
    ones = staticmethod(
        lambda count, device: SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: count))
    )

    class Tensor:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, key):
            return FakeTorch.Tensor(self.array[key])

        def copy_(self, other, non_blocking):
            self.array[:] = other.array

    @staticmethod
    def zeros(size, dtype):
        return FakeTorch.Tensor(np.zeros(size, dtype))

    @staticmethod
    def empty(size, dtype, device):
        return FakeTorch.Tensor(np.ones(size, dtype))

    class Loader:
        def __init__(self, *, pg, device, nogds):
            assert nogds

        def add_filenames(self, files):
            ((self.path,),) = files.values()

        def copy_files_to_device(self):
            FakeTorch.loaded.append(self.path)
            return SimpleNamespace(key_to_rank_lidx={"a": 0}, get_tensor=lambda name: name)

    loaded: ClassVar[list[str]] = []


def test_the_copies_of_others(monkeypatch):
    fakes = {
        "torch": FakeTorch,
        "safetensors": SimpleNamespace(),
        "safetensors.torch": SimpleNamespace(load_file=lambda path, device: FakeTorch.loaded.append(path)),
        "fastsafetensors": SimpleNamespace(SafeTensorsFileLoader=FakeTorch.Loader, SingleGroup=object),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    asked = {"device": "cpu", "warming": "tiny", "path": "large"}
    for side in ("safetensors", "fastsafetensors"):
        FakeTorch.loaded.clear()
        assert child.load_tensors({**asked, "side": side}, print)["to_weights"] > 0
        assert FakeTorch.loaded == ["tiny", "large"]
    found = child.copy_tensors({**asked, "bytes": 1000, "repeat": 2}, print)
    assert len(found["resumes"]) == 2


def test_twins_without_their_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match="PyTorch"):
        child.load_tensors({"side": "safetensors", "device": "cpu"}, print)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InputError, "--bytes"),
        ({"model": "a.glake", "size": "1MiB"}, InputError, "expected one of"),
        ({"model": "missing.glake"}, PackageError, "does not exist"),
        ({"model": "missing.onnx"}, ModelError, r"missing\.onnx"),
        ({"size": "1KiB"}, InputError, r"64\.0 KiB or more"),
        ({"size": "80TiB"}, StorageFullError, "free"),
        ({"size": "much"}, InputError, "4GiB"),
        ({"size": "1MiB", "folder": "nowhere"}, InputError, "nowhere"),
        ({"size": "1MiB", "trace": "nowhere/t.json"}, InputError, "nowhere/t.json"),
        ({"size": "1MiB", "device": "tpu"}, DeviceNotFoundError, "'cpu'"),
        ({"size": "1MiB", "repeat": 0}, InputError, "repeat=0"),
    ],
)
def test_what_cannot_be_measured(store, tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(error, match=message):
        bench.bench_load(**arguments)
    if "trace" not in arguments:
        with pytest.raises(error, match=message):
            bench_resume(**arguments)
    assert not list(tmp_path.glob("glake-bench-*"))


def test_sides_take_turns_and_figures_are_medians(tmp_path, monkeypatch):
    """Of a GPU, with processes that are made up."""
    asked = []
    seconds = iter([9.0, 1.0, 3.0, 2.0, 8.0, 5.0, 4.0, 4.0, 1.0] * 4)

    def ask(request, environment=None, progress=None):
        asked.append((request["task"], request["side"]))
        if request["task"] == "raw":
            return {"to_device": 1e6}
        if request["side"] == "fastsafetensors":
            raise MissingDependencyError("PyTorch has no CUDA here")
        took = next(seconds)
        common = {"to_weights": took, "to_session": took, "to_answer": took, "outputs": [[1.0, took]]}
        ours = {"in_flight": 5, "in_flight_bound": 7, "paths": "own", "verified": "once"}
        return {**common, **ours, "files": [str(tmp_path / "f")]}

    (tmp_path / "f").write_bytes(b"x" * 10)
    monkeypatch.setattr(bench, "ask", ask)
    monkeypatch.setattr(
        bench, "missing", lambda *names: "not installed: it" if "safetensors" in names else ""
    )
    found = bench.bench_load(small=8, repeat=3, folder=tmp_path)
    small, large, lost = found[:2], found[2:4], found[4:]
    sides = [("load", "glake-infer"), ("load", "onnxruntime"), ("tensors", "fastsafetensors")]
    assert asked[:8] == [sides[0], ("raw", "raw"), *sides, ("raw", "raw"), *sides[:2]]
    assert {(each.model, each.bytes, each.side) for each in found[:4]} == {
        (model, 8 * made.SMALL, side)
        for model in ("small", "large")
        for side in ("glake-infer", "onnxruntime")
    }
    for report in (*small, *large):
        assert report.to_answer == sorted(report.turns)[1]
        assert report.rate == report.bytes / report.to_answer
        assert (report.link, report.goal, len(report.turns)) == (1e6, None, 3)
    assert {(each.side, each.reason) for each in lost} == {
        ("safetensors", "not installed: it"), ("fastsafetensors", "PyTorch has no CUDA here")
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


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
