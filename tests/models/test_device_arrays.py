"""Arrays of other libraries as feeds, and results that stay in the pool. On the CPU; tests/gpu has the rest."""

import gc as garbage
import os
import pickle
import threading
import weakref

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import glake_infer as gi
from glake_infer.models import interchange
from glake_infer.models import load as module
from glake_infer.residency import Residency

KINDS = {
    "float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "double": np.float64,
    "int64": np.int64, "int32": np.int32, "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip


class Foreign:
    """A library's array that knows DLPack and nothing else, over a numpy array."""

    def __init__(self, array, device=(1, 0), refuse=None):
        self.array, self.device, self.refuse, self.streams = array, device, refuse, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None):
        if self.refuse:
            raise self.refuse
        self.streams.append(stream)
        return self.array.__dlpack__()


@pytest.fixture
def pool():
    with gi.Pool(device="cpu", limit="1GiB") as pool:
        yield pool
        garbage.collect()
        pool.trim()
        assert pool.stats().reserved == 0


@pytest.fixture
def load(tmp_path, pool):
    """Make a model of `nodes` and load it: load(nodes, inputs, outputs, ...) -> Model."""
    store, opened = gi.Store(tmp_path / "store"), []

    def make(nodes, inputs, outputs, **options):
        described = [
            [
                helper.make_tensor_value_info(n, TensorProto.DataType.Value(k.upper()), s)
                for n, (k, s) in part.items()
            ]
            for part in (inputs, outputs)
        ]
        graph = helper.make_graph(nodes, "g", *described)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        save(made, tmp_path / "m.onnx")
        gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
        opened.append(gi.load(tmp_path / "m.glake", pool, store=store, **options))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


@pytest.fixture
def adder(load):
    return load(
        [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0)],
        {"x": ("float", ["n", 3])},
        {"y": ("float", ["n", 3]), "s": ("float", [])},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()])
def test_every_type_and_shape_goes_in_through_dlpack_and_stays_in_the_pool(load, pool, kind, shape):
    axes = [f"a{i}" for i in range(len(shape))]
    model = load(
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": (kind, axes)},
        {"y": (kind, axes)},
        optimization="disable",
    )
    given = (np.arange(6).reshape(2, 3) % 2 + np.zeros((2, 3))).astype(KINDS[kind])[
        : shape[0] if shape else 1
    ]
    given = given.reshape(shape) if given.size == np.prod(shape) else given.reshape(-1)[0].reshape(shape)
    before = pool.stats().active
    result = model.run({"x": given}, to="device")["y"]
    assert (result.shape, result.dtype, result.nbytes, result.ndim) == (
        shape,
        given.dtype,
        given.nbytes,
        len(shape),
    )
    assert result.device == "cpu"
    np.testing.assert_array_equal(result.numpy(), given)
    np.testing.assert_array_equal(np.asarray(result), given)
    assert not hasattr(result, "__cuda_array_interface__")
    # it goes into another run as it is
    again = model.run({"x": result}, to="device")["y"]
    np.testing.assert_array_equal(again.numpy(), given)
    if kind != "bfloat16":  # numpy cannot read that
        view = np.from_dlpack(result)
        assert (view.dtype, view.shape) == (given.dtype, shape)
        np.testing.assert_array_equal(view, given)
        if given.size:
            assert view.ctypes.data == result.address
        del view
    capsule = result.__dlpack__(stream=None, max_version=(1, 0), dl_device=(1, 0), copy=False)
    tensor = interchange.DLTensor.from_address(interchange._capsule_pointer(capsule, b"dltensor"))
    assert interchange._KINDS[tensor.code, tensor.bits] == given.dtype
    del capsule, tensor, result, again
    garbage.collect()
    assert pool.stats().active == before


def test_results_outlive_the_model_and_go_back_when_dropped(adder, pool):
    x = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    results = adder.run({"x": x}, to="device")
    assert list(results) == ["y", "s"]
    session = weakref.ref(adder.session)
    adder.close()
    garbage.collect()
    assert session() is None
    active = pool.stats().active
    assert active >= x.nbytes
    view = np.from_dlpack(results.pop("y"))
    garbage.collect()
    assert pool.stats().active == active  # the view holds it
    np.testing.assert_array_equal(view, 2 * x)
    assert float(results["s"].numpy()) == pytest.approx(float(x.sum()))
    del view, results
    garbage.collect()
    assert pool.stats().active == 0


def test_one_result_of_several_goes_back_on_its_own(adder, pool):
    results = adder.run({"x": np.ones((100_000, 3), np.float32)}, to="device")
    active = pool.stats().active
    del results["y"]
    garbage.collect()
    assert pool.stats().active <= active - 1_200_000


def test_a_result_does_not_keep_the_session(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(
        module, "maps_weights", lambda pool: False
    )  # so that the weights are the session's own
    weight = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1024])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    store = gi.Store(tmp_path / "store")
    gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    with gi.load(tmp_path / "m.glake", pool, store=store) as model:
        assert model.memory.private >= weight.nbytes
        x = np.ones((2, 1024), np.float32)
        result = model.run({"x": x}, to="device")["y"]
    garbage.collect()
    assert 0 < pool.stats().active < weight.nbytes
    np.testing.assert_allclose(result.numpy(), x @ weight, rtol=1e-3, atol=1e-3)


def test_a_host_array_is_read_in_place_and_a_strided_one_is_taken_too(adder):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    borrowed = interchange.borrow(Foreign(x), "x")
    assert (borrowed.device, borrowed.address, borrowed.shape) == ("cpu", x.ctypes.data, (4, 3))
    assert borrowed.numpy().ctypes.data == x.ctypes.data
    assert not borrowed.numpy().flags.writeable
    for given in (x, x[::2], x[::-1], np.asfortranarray(x)):
        for to in ("host", "device"):
            np.testing.assert_array_equal(np.asarray(adder.run({"x": Foreign(given)}, to=to)["y"]), 2 * given)
    assert not interchange.borrow(Foreign(x[::2]), "x").contiguous
    assert not interchange.borrow(Foreign(np.asfortranarray(x)), "x").contiguous
    assert interchange.borrow(Foreign(x[:1, :][:, :3]), "x").contiguous
    assert interchange.borrow(Foreign(x[:0, ::2]), "x").contiguous


def test_a_borrowed_array_keeps_its_owner(adder):
    def view():
        return interchange.borrow(Foreign(np.full((500, 3), 7, np.float32)), "x").numpy()

    kept = view()
    garbage.collect()
    np.testing.assert_array_equal(adder.run({"x": kept})["y"], np.full((500, 3), 14, np.float32))


def test_feeds_that_cannot_be_taken_are_named(adder, monkeypatch):
    x = np.ones((2, 3), np.float32)
    with pytest.raises(gi.InputError, match=r"'?x.*refuses to hand it out.*needs a gradient"):
        adder.run({"x": Foreign(x, refuse=BufferError("it needs a gradient"))})
    with pytest.raises(gi.InputError, match=r"neither the CPU nor an NVIDIA GPU \(DLPack's type 10\)"):
        adder.run({"x": Foreign(x, device=(10, 0))})
    with pytest.raises(gi.InputError, match="was fed float64"):
        adder.run({"x": Foreign(x.astype(np.float64))})
    with pytest.raises(gi.InputError, match="1 axes instead of 2"):
        adder.run({"x": Foreign(x[0])})
    elsewhere = Foreign(x, device=(2, 1))
    with pytest.raises(gi.InputError, match=r"lies on cuda:1, and the model runs on cpu"):
        adder.run({"x": elsewhere})
    assert elsewhere.streams == [1]  # the legacy default stream was named to the producer
    with pytest.raises(gi.InputError, match="expected 'host' or 'device'"):
        adder.run({"x": x}, to="gpu")
    for wrong in (
        x.astype(np.float64),
        np.ones((2, 4), np.float32),
    ):  # an OrtValue is ONNX Runtime's to check
        with pytest.raises(gi.InputError, match="refused while running m"):
            adder.run({"x": ort.OrtValue.ortvalue_from_numpy(wrong)}, to="device")
    masked = type(
        "Masked", (), {"__cuda_array_interface__": {"mask": x, "shape": (2, 3), "typestr": "<f4"}}
    )()
    with pytest.raises(gi.InputError, match="has a mask"):
        adder.run({"x": masked})


def test_the_cuda_array_interface_is_read_as_it_is_written(monkeypatch):
    monkeypatch.setattr(interchange.cuda, "device_of", lambda address: 3)

    def given(**entries):
        base = {"version": 3, "shape": (4, 2), "typestr": "<f2", "data": (4096, False), **entries}
        return interchange.borrow(type("Array", (), {"__cuda_array_interface__": base})(), "x")

    plain = given(stream=7)
    assert (plain.device, plain.address, plain.dtype, plain.shape) == ("cuda:3", 4096, np.float16, (4, 2))
    assert (plain.stream, plain.contiguous) == (7, True)
    assert given(stream=None).stream is None
    assert given(version=2).stream == 1  # it does not say: wait for the legacy default stream
    assert given(strides=(4, 2)).contiguous
    assert not given(strides=(2, 8)).contiguous
    with pytest.raises(gi.InputError, match="strides"):
        given(strides=(3, 2))


def test_device_inputs_are_refused_unless_contiguous_on_the_device_and_of_the_type(monkeypatch):
    """What Model.run checks on a GPU, with somebody's description of an array there (nothing is read)."""
    from glake_infer.models.manifest import Value
    from glake_infer.models.values import check_feeds

    value = Value(name="x", dtype="float", shape=("n", 3))
    x = np.ones((4, 3), np.float32)

    def check(given, device="cuda:0"):
        return check_feeds([value], [], {"x": given}, device)["x"]

    taken = check(Foreign(x, device=(2, 0)))
    assert (taken.device, taken.address, taken.stream) == ("cuda:0", x.ctypes.data, 1)
    with pytest.raises(gi.InputError, match=r"lies on cuda:1, and the model runs on cuda:0"):
        check(Foreign(x, device=(2, 1)))
    with pytest.raises(gi.InputError, match=r"strides \[6, 1\].*\.contiguous\(\)"):
        check(Foreign(x[::2], device=(2, 0)))
    with pytest.raises(gi.InputError, match="was fed float16"):
        check(Foreign(x.astype(np.float16), device=(2, 0)))
    with pytest.raises(gi.InputError, match=r"axis 1 has 2 instead of 3"):
        check(Foreign(np.ones((4, 2), np.float32), device=(2, 0)))


def test_a_result_is_no_hidden_copy(adder):
    result = adder.run({"x": np.ones((2, 3), np.float32)}, ["y"], to="device")["y"]
    assert repr(result) == "<DeviceArray float32[2, 3] on cpu>"
    assert len(result) == 2
    with pytest.raises(BufferError, match="in place"):
        result.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="only there"):
        result.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match="from_dlpack"):
        np.asarray(result, copy=False)
    with pytest.raises(gi.GlakeError, match="cannot be pickled"):
        pickle.dumps(result)
    on_gpu = type(result)(result._memory, result.dtype, "cuda:0")
    assert on_gpu.__dlpack_device__() == (2, 0)
    with pytest.raises(TypeError, match=r"\.numpy\(\)"):
        np.asarray(on_gpu)
    assert on_gpu.__cuda_array_interface__["data"] == (result.address, False)


def test_outputs_that_are_no_tensors_stay_on_the_host(load):
    model = load(
        [
            helper.make_node("Cast", ["x"], ["t"], to=TensorProto.STRING),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        {"x": ("float", ["n"])},
        {"t": ("string", ["n"]), "y": ("float", ["n"])},
    )
    x = np.ones(2, np.float32)
    with pytest.raises(gi.InputError, match=r"output t.*to='host'"):
        model.run({"x": x}, to="device")
    result = model.run({"x": x}, ["y"], to="device")["y"]
    np.testing.assert_array_equal(result.numpy(), x)
    assert model.run({"x": result})["t"].tolist() == ["1", "1"]


def test_threads_get_their_own_results(adder, pool):
    problems = []

    def work(number):
        try:
            for size in range(1, 60):
                x = np.full((size, 3), number, np.float32)
                first = adder.run({"x": Foreign(x)}, to="device")["y"]
                second = adder.run({"x": first}, to="device")["y"]
                np.testing.assert_array_equal(second.numpy(), 4 * x)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


def test_a_failed_run_with_bound_arrays_leaves_nothing(load, pool):
    model = load(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        {"a": ("float", ["n", "k"]), "b": ("float", ["m", "n"])},
        {"y": ("float", ["n", "n"])},
    )
    active = pool.stats().active
    with pytest.raises(gi.ModelError, match=r"while running m: .*MatMul"):
        model.run({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}, to="device")
    assert pool.stats().active == active
    big = np.ones((20_000, 1), np.float32)
    with pytest.raises(gi.OutOfMemoryError):
        model.run({"a": big, "b": big.T.copy()}, to="device")
    assert pool.stats().active == active


# Loading as on a GPU: weights are copied, once for all sessions, and the graph is the fused one.


@pytest.fixture
def copied(monkeypatch, pool):
    monkeypatch.setattr(module, "maps_weights", lambda pool: False)
    return Residency.of(pool, copies=True)


def plain_on(graph, store, level="all"):
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(store.root))
    if level == "disable":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("optimization", ["all", "disable"])
def test_a_session_over_copied_weights_equals_plain_onnx_runtime(tmp_path, pool, copied, optimization):
    from glake_infer.models import zoo

    store = gi.Store(tmp_path / "store")
    zoo.write(zoo.spec("bert-tiny"), tmp_path / "a.onnx")
    gi.convert(tmp_path / "a.onnx", tmp_path / "a.glake", store=store)
    feeds = zoo.feeds(zoo.spec("bert-tiny"), 0, batch=2, length=12)
    fused = gi.Package(tmp_path / "a.glake", store).graph("cuda")
    expected = plain_on(fused, store, optimization).run(None, feeds)
    given = ort.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
    with gi.load(tmp_path / "a.glake", pool, optimization=optimization, store=store) as model:
        assert not list(store.prepared_objects)
        assert (model.memory.shared, pool.stats().mapped_files) == (0, 0)
        assert model.memory.own > 2 << 20
        for _ in range(3):
            results = model.run(feeds)
            for ours, same, close in zip(results.values(), expected, given, strict=True):
                np.testing.assert_array_equal(ours, same)
                np.testing.assert_allclose(ours, close, rtol=1e-3, atol=1e-5)
            active = pool.stats().active
            assert model.suspend() >= model.memory.own
            assert pool.stats().active <= active - model.memory.own
            assert model.memory.asleep >= model.memory.own
    # and its bytes are checked, also behind an intact seal
    weight = max(gi.Package(tmp_path / "a.glake", store).manifest.weights, key=lambda w: w.bytes)
    path = store.objects.path(weight.digest)
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(gi.DigestMismatchError, match="was changed on disk"):
        gi.load(tmp_path / "a.glake", pool, optimization=optimization, store=store)
    assert pool.stats().active == 0


def test_a_refusal_says_what_would_do_for_the_session_too():
    refusal = gi.OutOfMemoryError(
        requested=10 << 20, active=25 << 20, idle=0, reserved=25 << 20, limit=30 << 20, needed_limit=35 << 20,
        device_free=0, holders=[("", "weights", 20 << 20), ("", "activations", 5 << 20)],
    )  # fmt: skip
    told = module._with_session(refusal, module.SESSION_BYTES)
    assert told.needed_limit == (35 << 20) + module.SESSION_BYTES
    assert str(told.needed_limit) in str(told)


def test_lean_says_that_it_is_the_same_where_nothing_would_be_widened(load, copied):
    model = load(
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": ("float", [1])},
        {"y": ("float", [1])},
        sharing="lean",
    )
    assert "'lean' is the same as 'fast'" in model.notes[0]


class FakePool:
    device = "cuda:0"
    providers = (("CUDAExecutionProvider", {"device_id": "0"}), "CPUExecutionProvider")


def test_provider_options_join_those_of_the_pool(load, pool):
    assert module.providers_of(FakePool(), {"use_tf32": False, "cudnn_conv_algo_search": "DEFAULT"}) == [
        ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}),
        "CPUExecutionProvider",
    ]
    assert module.providers_of(FakePool(), None) == list(FakePool.providers)
    with pytest.raises(gi.InputError, match=r"'gpu_mem_limit', which the pool decides"):
        module.providers_of(FakePool(), {"use_tf32": 0, "gpu_mem_limit": 1})
    with pytest.raises(gi.InputError, match=r"are for CUDA, and the pool is on 'cpu'"):
        module.providers_of(pool, {"use_tf32": 0})


def test_an_onnx_runtime_without_cuda_is_not_taken_silently():
    wanted = list(FakePool.providers)
    module.check_providers(["CUDAExecutionProvider", "CPUExecutionProvider"], wanted)
    with pytest.raises(gi.MissingDependencyError, match=r"glake-infer\[cuda\]"):
        module.check_providers(["CPUExecutionProvider"], wanted)
    module.check_providers(["CPUExecutionProvider"], ["CPUExecutionProvider"])


def test_the_device_is_the_pools(tmp_path, load, pool):
    store = gi.Store(tmp_path / "store")
    load([helper.make_node("Identity", ["x"], ["y"])], {"x": ("float", [1])}, {"y": ("float", [1])})
    with gi.load(tmp_path / "m.glake", device="cpu", store=store) as model:
        assert model.pool is pool
    with gi.load(tmp_path / "m.glake", pool, device="cpu", store=store) as model:
        assert model.pool is pool
    other = FakePool()
    with pytest.raises(gi.InputError, match="give one of both"):
        gi.load(tmp_path / "m.glake", other, device="cpu", store=store)
    with pytest.raises(gi.DeviceNotFoundError):
        gi.load(tmp_path / "m.glake", device="cuda:77", store=store)
