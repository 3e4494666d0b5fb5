"""Engines are loaded: what is checked before, what is told, what is left after an error."""

import gc as garbage
import re
import shutil
import sys

import numpy as np
import pytest
import standin_tensorrt as standin
from engine_packages import check, linear, matrices, package, rows, small_graph
from folders import flip_bit

import glake_infer as gi
from glake_infer.maintenance import gc
from glake_infer.models.package import write_package
from glake_infer.models.tensorrt.device import HostDevice
from glake_infer.models.tensorrt.load import EngineSettings, load_engine
from glake_infer.models.tensorrt.plan import Plan

MiB = 1 << 20
BLOCK = 2 * MiB  # weights of a `linear` engine


def test_what_was_compiled_is_kept_and_taken_again(tmp_path, store, load, weights, trt):
    path = linear(tmp_path, store, weights)
    model = load(path)
    model.run({"x": rows(1)})
    (file,) = store.compiled.glob("*/*")
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


def test_what_was_compiled_goes_with_the_engine(tmp_path, store, load, weights):
    first, second = linear(tmp_path, store, weights), linear(tmp_path, store, matrices(1), "second")
    for path in (first, second):
        load(path).run({"x": rows(1)})
    kept, gone = (
        store.compiled / gi.Package(p, store).manifest.engines["tensorrt-rtx"].digest for p in (first, second)
    )
    assert kept.is_dir()
    (kept / ".x.1.tmp").write_bytes(b"half")
    assert (gc(store).compiled, gone.is_dir()) == (0, True)
    assert len(list(kept.iterdir())) == 1
    shutil.rmtree(second)
    assert (gc(store, dry_run=True).compiled, gone.is_dir()) == (1, True)
    assert (gc(store).compiled, gone.exists(), kept.is_dir()) == (1, False, True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"version": "1.6.0.1"},
            r"built by version 1.6.0.1, and 1.7.1.116 is installed.*pip install tensorrt-rtx==1.6.0.1",
        ),
        (
            {"capabilities": ("8.9",)},
            r"capability 8.9 \(l4, 4090\), and memory of the host.* has 8.6.*again with --engine tensorrt-rtx --card 8.6,",
        ),
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


def test_an_engine_for_another_gpu_says_what_builds_one_for_this(
    tmp_path, store, load, weights, pool, monkeypatch
):
    """Without --card it would be for the same GPUs again."""
    path = linear(tmp_path, store, weights)
    for capability, says in [
        ("12.0", "again with --engine tensorrt-rtx --card 12.0, or"),
        ("9.0", "again with --engine tensorrt on this machine, or"),  # TensorRT-RTX does not serve it
    ]:
        monkeypatch.setattr(HostDevice, "capability", capability)
        with pytest.raises(gi.PackageError, match=says):
            load(path)
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


def test_an_engine_with_a_type_that_no_array_has_is_refused_and_gone(tmp_path, store, load, pool, trt):
    graph = small_graph({"x": ("float", [4])}, {"indices": ("int64", [4])})
    tensors = [standin.tensor("x", "INT4", (4,)), standin.tensor("indices", "INT64", (4, 1), mode="OUTPUT")]
    path = package(
        tmp_path, store, graph, standin.plan("nonzero", tensors, {"level": np.zeros(9, np.float32)})
    )
    with pytest.raises(gi.ModelError, match="'x' has elements of TensorRT's type INT4") as kept:
        load(path)
    assert not trt.engines  # while the error lives
    assert pool.stats().active == 0
    assert kept.value


def test_live_engines_end_before_python_does(tmp_path, store, weights, python):
    path = linear(tmp_path, store, weights)
    code = """
        import sys
        import standin_tensorrt
        trt = sys.modules["tensorrt_rtx"] = standin_tensorrt.make()
        end = trt.ICudaEngine.__del__
        trt.ICudaEngine.__del__ = lambda self: print("ends in", sys.is_finalizing() or "time", end(self))
        import numpy as np
        import glake_infer as gi
        from glake_infer.models.tensorrt.load import EngineSettings, load_engine
        pool, store = gi.Pool("cpu"), gi.Store()
        with store.using():
            model = load_engine(gi.Package(sys.argv[1], store), pool, "tensorrt-rtx", EngineSettings())
        kept = model.run({"x": np.ones((1, 512), np.float32)}, to="device")
        print("done")
    """
    out, err = python(code, path).communicate(timeout=60)
    assert (out, err) == ("done\nends in time None\n", "")


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


def test_progress_is_told_of_all_that_is_read(tmp_path, store, load, weights):
    told = []
    model = load(linear(tmp_path, store, weights), progress=lambda done, total: told.append((done, total)))
    (size,) = {total for _, total in told}
    assert size == model.package.manifest.engines["tensorrt-rtx"].bytes
    done = [each for each, _ in told]
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == size


@pytest.mark.parametrize("at", [0, 0.9, 1])
def test_what_progress_raises_ends_the_load(at, tmp_path, store, load, weights, trt, pool):
    def stop(done, total):
        if done >= at * total:
            raise KeyboardInterrupt

    path = linear(tmp_path, store, weights)
    with pytest.raises(KeyboardInterrupt):
        load(path, progress=stop)
    garbage.collect()
    assert not trt.engines
    assert pool.stats().active == 0


def test_a_damaged_part_stops_only_what_needs_it(tmp_path, store, load, weights, pool):
    path = linear(tmp_path, store, weights)
    opened = gi.Package(path, store)
    part = next(iter(opened.manifest.engines["tensorrt-rtx"].objects))
    flip_bit(store.objects.path(part))
    with pytest.raises(gi.DigestMismatchError, match=r"Until then engine='onnxruntime' runs the graph"):
        load(path)
    with gi.load(path, pool, store=store, engine="onnxruntime") as model:
        assert model.run({"x": rows(1)})["y"].shape == (1, 512)
    assert gi.export(path, tmp_path / "out", store=store).bytes
    store.objects.path(part).unlink()
    with pytest.raises(gi.PackageError, match=r"missing.*Until then engine='onnxruntime' runs the graph"):
        load(path)
    gi.load(path, pool, store=store, engine="onnxruntime").close()
    with pytest.raises(gi.PackageError, match="missing"):
        list(opened.verify())


def test_a_damaged_weight_that_the_engine_does_not_need(tmp_path, store, load, weights, pool):
    path, other = linear(tmp_path, store, matrices(1)), linear(tmp_path, store, weights, "other")
    manifest, donor = gi.Package(path, store).manifest, gi.Package(other, store).manifest
    engine = donor.engines["tensorrt-rtx"]
    engine = engine.model_copy(update={"objects": donor.distinct})
    files = {v.graph: (path / v.graph).read_bytes() for v in manifest.variants.values()}
    with store.using():
        write_package(store, path, manifest.model_copy(update={"engines": {engine.kind: engine}}), files)
    hurt = manifest.weights[0].digest
    assert hurt not in engine.needed
    flip_bit(store.objects.path(hurt))
    check(load(path).run({"x": rows(1)}), weights, rows(1))
    with pytest.raises(gi.DigestMismatchError, match="the weight"):
        gi.load(path, pool, store=store, engine="onnxruntime")
