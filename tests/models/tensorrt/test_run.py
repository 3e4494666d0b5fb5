"""Engines run: inputs, outputs, profiles. What is TensorRT's own was not run: a library stands in for it."""

import ctypes
import gc as garbage

import numpy as np
import pytest
import standin_tensorrt as standin
from engine_packages import SIDE, check, linear, package, rows, small_graph

import glake_infer as gi
from glake_infer.models.interchange import Borrowed
from glake_infer.models.tensorrt.device import HostDevice

MiB = 1 << 20
BLOCK = 2 * MiB  # weights of a `linear` engine


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


def test_results_are_read_once_the_stream_has_passed(model, trt, monkeypatch):
    wait, read = HostDevice.synchronize, HostDevice.to_host
    monkeypatch.setattr(HostDevice, "synchronize", lambda *a: (trt.events.append("wait"), wait(*a)))
    monkeypatch.setattr(HostDevice, "to_host", lambda *a: (trt.events.append("read"), read(*a)))
    model.run({"x": rows(1)})
    model.run({"x": rows(1)}, to="device")
    assert trt.events[1:] == ["run", "wait", "read", "read", "run", "wait"]


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


def test_values_of_which_each_fits_another_profile(tmp_path, store, load):
    graph = small_graph(
        {"x": ("float", [4]), "sizes": ("int64", [2]), "b": ("int64", [2])}, {"y": ("float", ["a"])}
    )
    tensors = [
        standin.tensor("x", "FLOAT", (4,)), standin.tensor("sizes", "INT64", (2,), host=True),
        standin.tensor("b", "INT64", (2,), host=True), standin.tensor("y", "FLOAT", (-1, -1), mode="OUTPUT"),
    ]  # fmt: skip
    small, large = [(1, 1), (2, 2), (4, 4)], [(5, 5), (6, 6), (8, 8)]
    profiles = [{f"values of {name}": shapes for name in ("sizes", "b")} for shapes in (small, large)]
    model = load(package(tmp_path, store, graph, standin.plan("resize", tensors, {}, profiles=profiles)))
    feeds = {"x": np.ones(4, np.float32), "sizes": [1, 1], "b": [5, 5]}
    with pytest.raises(gi.InputError, match=r"no profile fits them all\. Feed .*--profile sizes=MIN:OPT:MAX"):
        model.run(feeds)


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
    lent = Borrowed("cpu", second.address, second.dtype, (4,), (1,), second)
    third = model._execution.run(["updated"], {"cache": lent, "x": one}, "host")["updated"]
    assert third.tolist() == [3, 4, 5, 6]
    assert cache.tolist() == [0, 1, 2, 3]
    assert first.numpy().tolist() == [1, 2, 3, 4]
    assert second.numpy().tolist() == [2, 3, 4, 5]
