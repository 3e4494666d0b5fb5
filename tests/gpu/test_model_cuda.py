"""Models on a GPU: right answers, device arrays in and out without a copy, memory that comes back."""

import gc as garbage
import threading

import kernels
import numpy as np
import onnxruntime as ort
import pytest
from kernels import DEVICE, INDEX
from onnx import TensorProto, helper, numpy_helper, save

import glake_infer as gi
from glake_infer import cuda
from glake_infer.models import zoo

cupy = pytest.importorskip("cupy")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

EXACT = {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
MiB = 1 << 20


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with two small encoders of one trunk, as ONNX files and as packages, and their store."""
    folder = tmp_path_factory.mktemp("workshop")
    store = gi.Store(folder / "store")
    for head, labels in (("a", 2), ("b", 17)):
        zoo.write(zoo.spec("bert-tiny", head=head, labels=labels), folder / f"{head}.onnx")
        gi.convert(folder / f"{head}.onnx", folder / f"{head}.glake", store=store)
    return folder, store


@pytest.fixture
def load(tmp_path, pool):
    """Make a model of `nodes` and load it: load(nodes, inputs, outputs, weights={}) -> Model."""
    store, opened = gi.Store(tmp_path / "store"), []

    def make(nodes, inputs, outputs, weights=(), **options):
        described = [
            [
                helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind.upper()), shape)
                for name, (kind, shape) in part.items()
            ]
            for part in (inputs, outputs)
        ]
        held = [numpy_helper.from_array(array, name) for name, array in dict(weights).items()]
        graph = helper.make_graph(nodes, "g", *described, held)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        save(made, tmp_path / "m.onnx")
        gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
        opened.append(gi.load(tmp_path / "m.glake", pool, store=store, provider_options=EXACT, **options))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


@pytest.fixture
def adder(load):
    return load(
        [
            helper.make_node("Add", ["x", "w"], ["y"]),
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        ],
        {"x": ("float", ["n", 512])},
        {"y": ("float", ["n", 512]), "s": ("float", [])},
        {"w": np.arange(512, dtype=np.float32)},
    )


def feeds_of(head="a", batch=2, length=12, seed=0):
    return zoo.feeds(
        zoo.spec("bert-tiny", head=head, labels={"a": 2, "b": 17}[head]), seed, batch=batch, length=length
    )


def plain(path, store):
    """Plain ONNX Runtime on the graph that our session has, which reads the store's weights by itself."""
    package = gi.Package(path, store)
    variant = "cuda" if "cuda" in package.manifest.variants else "onnx"
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(store.root))
    given = {"device_id": INDEX, **{name: str(value) for name, value in EXACT.items()}}
    providers = [("CUDAExecutionProvider", given), "CPUExecutionProvider"]
    session = ort.InferenceSession(package.graph(variant).SerializeToString(), options, providers=providers)
    assert "CUDAExecutionProvider" in session.get_providers()
    return session


@pytest.mark.parametrize("sharing", ["fast", "lean"])
def test_outputs_are_bit_for_bit_those_of_plain_onnx_runtime(workshop, pool, sharing):
    folder, store = workshop
    feeds = feeds_of()
    expected = plain(folder / "a.glake", store).run(None, feeds)
    given = ort.InferenceSession(folder / "a.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
    for fused, original in zip(expected, given, strict=True):
        np.testing.assert_allclose(fused, original, rtol=1e-4, atol=1e-5)
    with gi.load(folder / "a.glake", pool, sharing=sharing, provider_options=EXACT, store=store) as model:
        for ours, theirs in zip(model.run(feeds).values(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        on_device = model.run({name: cupy.asarray(array) for name, array in feeds.items()}, to="device")
        for ours, theirs in zip(on_device.values(), expected, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs)
        assert any("the same as 'fast'" in note for note in model.notes) == (sharing == "lean")
        del on_device, ours


def test_weights_come_from_the_pool_and_go_back(workshop, pool):
    folder, store = workshop
    with gi.load(folder / "a.glake", pool, store=store) as model:
        held = model.package.manifest.weight_bytes
        memory = model.memory
        assert memory.own >= 0.9 * held
        assert (memory.shared, memory.asleep) == (0, 0)
        assert memory.private < 0.02 * held + MiB
        assert held * 0.9 <= pool.stats().weights <= held * 1.02 + MiB
        del memory
    garbage.collect()
    assert pool.stats().weights == 0
    assert pool.stats().unused_weights >= 0.9 * held  # until there is need
    pool.trim()
    assert pool.stats().reserved == 0


def test_torch_and_cupy_arrays_are_read_in_place_and_results_shared_in_place(adder, pool, monkeypatch):
    bound = []
    binding = type(adder.session.io_binding())
    real = binding.bind_input
    monkeypatch.setattr(binding, "bind_input", lambda self, *a: (bound.append(a[-1]), real(self, *a))[1])
    x = torch.rand(1000, 512, device=f"cuda:{INDEX}")
    with cupy.cuda.Device(INDEX):
        y = cupy.random.rand(1000, 512, dtype=cupy.float32)
    weight = np.arange(512, dtype=np.float32)
    for given, address, host in ((x, x.data_ptr(), x.cpu().numpy()), (y, y.data.ptr, y.get())):
        result = adder.run({"x": given}, to="device")["y"]
        assert bound.pop() == address
        assert result.device == pool.device
        for view, pointer in (
            (torch.from_dlpack(result), lambda t: t.data_ptr()),
            (cupy.from_dlpack(result), lambda t: t.data.ptr),
            (cupy.asarray(result), lambda t: t.data.ptr),  # the CUDA array interface
        ):
            assert pointer(view) == result.address
            assert tuple(view.shape) == result.shape == (1000, 512)
        np.testing.assert_array_equal(torch.from_dlpack(result).cpu().numpy(), host + weight)
        np.testing.assert_array_equal(result.numpy(), host + weight)
        np.testing.assert_array_equal(adder.run({"x": given})["y"], host + weight)
        bound.clear()
        assert np.array_equal(adder.run({"x": result})["y"], host + weight + weight)
        assert bound.pop() == result.address
        del view, result
        torch.cuda.synchronize(INDEX)


def test_work_that_makes_an_input_on_another_stream_is_waited_for(adder):
    """A long kernel on a stream of its own: reading early would give zeros."""
    with cupy.cuda.Device(INDEX):
        queue = kernels.new_stream()
        kernels.load()
    stream = torch.cuda.ExternalStream(queue.ptr, INDEX)
    for turn in range(5):
        x = torch.zeros(4096, 512, device=f"cuda:{INDEX}")
        torch.cuda.synchronize(INDEX)
        with torch.cuda.stream(stream):
            kernels.spin(queue, 0.1)
            x.fill_(turn + 1)
            got = adder.run({"x": x}, ["s"])["s"]
        assert got == pytest.approx((turn + 1) * x.numel())
    with cupy.cuda.Device(INDEX), queue:
        y = cupy.zeros((4096, 512), cupy.float32)
        queue.synchronize()
        kernels.spin(queue, 0.1)
        y.fill(3)

        class Interface:  # nothing but the CUDA array interface, with its stream
            __cuda_array_interface__ = y.__cuda_array_interface__

        assert Interface.__cuda_array_interface__["stream"] == queue.ptr
        assert adder.run({"x": Interface()}, ["s"])["s"] == pytest.approx(3 * y.size)


KINDS = {
    "float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64,
    "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), ()])
def test_every_type_goes_through_torch(load, kind, shape):
    axes = [f"a{i}" for i in range(len(shape))]
    model = load([helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, axes)}, {"y": (kind, axes)})
    x = (torch.rand(shape, device=f"cuda:{INDEX}") * 4).to(KINDS[kind])
    result = model.run({"x": x}, to="device")["y"]
    assert result.dtype.itemsize == x.element_size()
    view = torch.from_dlpack(result)
    assert (view.dtype, view.shape) == (x.dtype, x.shape)
    assert torch.equal(view, x)
    host = model.run({"x": x})["y"]
    assert host.shape == result.numpy().shape == shape
    np.testing.assert_array_equal(host, result.numpy())
    np.testing.assert_array_equal(host.astype(np.float64), x.double().cpu().numpy())
    assert hasattr(result, "__cuda_array_interface__") == (kind != "bfloat16")
    del view, result


def test_results_outlive_the_model_and_go_back_when_dropped(adder, pool):
    x = torch.rand(4000, 512, device=f"cuda:{INDEX}")
    results = adder.run({"x": x}, to="device")
    adder.close()
    garbage.collect()
    held = pool.stats().active
    assert x.nbytes <= held < x.nbytes + 4 * MiB
    view = torch.from_dlpack(results["y"])
    del results
    garbage.collect()
    assert pool.stats().active >= x.nbytes  # the view holds it
    torch.testing.assert_close(view, x + torch.arange(512, device=x.device), rtol=0, atol=0)
    torch.cuda.synchronize(INDEX)
    del view
    garbage.collect()
    assert pool.stats().active == 0


def test_active_memory_returns_to_the_earlier_value(adder, pool):
    x = torch.rand(3000, 512, device=f"cuda:{INDEX}")
    del adder.run({"x": x}, to="device")["y"]
    garbage.collect()
    before = pool.stats().active
    for _ in range(20):
        kept = [adder.run({"x": x}, to="device") for _ in range(3)]
        assert pool.stats().active >= before + 3 * x.nbytes
        del kept
        garbage.collect()
        assert pool.stats().active == before


def test_feeds_that_cannot_be_taken_are_named(adder, pool):
    x = torch.rand(8, 512, device=f"cuda:{INDEX}")
    with pytest.raises(gi.InputError, match=r"not contiguous.*strides \[1, 8\].*\.contiguous\(\)"):
        adder.run({"x": torch.rand(512, 8, device=x.device).t()})
    with pytest.raises(gi.InputError, match="was fed float16"):
        adder.run({"x": x.half()})
    with pytest.raises(gi.InputError, match="axis 1 has 100 instead of 512"):
        adder.run({"x": x[:, :100].contiguous()})
    with pytest.raises(gi.InputError, match="refuses to hand it out"):
        adder.run({"x": x.clone().requires_grad_()})
    if torch.cuda.device_count() > 1:
        other = (INDEX + 1) % torch.cuda.device_count()
        with pytest.raises(gi.InputError, match=f"lies on cuda:{other}, and the model runs on cuda:{INDEX}"):
            adder.run({"x": x.to(f"cuda:{other}")})
    # from the host: torch's, pinned, strided, lists
    host = x.cpu()
    expected = adder.run({"x": x})["y"]
    for given in (host, host.pin_memory(), host.numpy(), host.numpy().tolist(), host.t().contiguous().t()):
        np.testing.assert_array_equal(adder.run({"x": given})["y"], expected)
        result = adder.run({"x": given}, ["y"], to="device")["y"]
        np.testing.assert_array_equal(result.numpy(), expected)
        del result


def test_an_array_on_the_gpu_is_refused_by_a_model_on_the_cpu(workshop):
    folder, store = workshop
    feeds = feeds_of()
    name = next(iter(feeds))
    with gi.load(folder / "a.glake", device="cpu", store=store) as model:
        with pytest.raises(gi.InputError, match=f"lies on cuda:{INDEX}, and the model runs on cpu"):
            model.run({**feeds, name: cupy.asarray(feeds[name])})
        model.run(feeds)


def test_models_on_the_cpu_and_the_gpu_in_one_process_agree(workshop, pool):
    folder, store = workshop
    with (
        gi.load(folder / "a.glake", device="cpu", store=store) as host,
        gi.load(folder / "a.glake", device=DEVICE, store=store, provider_options=EXACT) as device,
    ):
        assert device.pool is pool
        for ours, theirs in zip(device.run(feeds_of()).values(), host.run(feeds_of()).values(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_limit_too_small_for_the_weights_says_how_much_would_do(workshop):
    folder, store = workshop
    with gi.Pool(device=DEVICE, limit="4MiB") as pool:
        with pytest.raises(gi.OutOfMemoryError) as caught:
            gi.load(folder / "a.glake", pool, store=store)
        needed = caught.value.needed_limit
        garbage.collect()
        assert pool.stats().active == 0
        pool.limit = needed + 8 * MiB  # rounding of the pool's own, and activations
        with gi.load(folder / "a.glake", pool, store=store) as model:
            model.run(feeds_of(batch=1, length=4))


def test_a_limit_too_small_for_a_run_leaves_the_model_usable(adder, pool):
    x = torch.rand(1000, 512, device=f"cuda:{INDEX}")
    expected = adder.run({"x": x})["y"]
    pool.trim()
    pool.limit = pool.stats().active + 8 * MiB
    large = torch.rand(100_000, 512, device=x.device)
    for to in ("host", "device"):
        with pytest.raises(gi.OutOfMemoryError):
            adder.run({"x": large}, to=to)
    np.testing.assert_array_equal(adder.run({"x": x})["y"], expected)


def test_four_threads_with_streams_of_their_own(workshop, pool):
    folder, store = workshop
    models = {
        head: gi.load(folder / f"{head}.glake", pool, store=store, provider_options=EXACT)
        for head in ("a", "b")
    }
    cases = []
    for head, model in models.items():
        for batch, length in ((1, 4), (2, 33), (7, 16)):
            feeds = feeds_of(head, batch, length)
            cases.append((model, feeds, model.run(feeds)))
    problems = []

    def work(number):
        try:
            rng = np.random.default_rng(number)
            stream = torch.cuda.Stream(INDEX)
            with torch.cuda.stream(stream):
                for _ in range(8 if kernels.SANITIZED else 60):
                    model, feeds, expected = cases[rng.integers(len(cases))]
                    fed = {name: torch.from_numpy(array).to(f"cuda:{INDEX}") for name, array in feeds.items()}
                    results = model.run(fed, to="device")
                    for name, array in results.items():
                        np.testing.assert_allclose(array.numpy(), expected[name], rtol=1e-4, atol=1e-5)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    for model in models.values():
        model.close()


def test_the_driver_says_whose_a_pointer_is_and_what_failed():
    with cupy.cuda.Device(INDEX):
        assert cuda.device_of(cupy.zeros(10).data.ptr) == INDEX
    with pytest.raises(gi.DriverError, match="cuPointerGetAttribute failed while asking whose"):
        cuda.device_of(64)


def test_run_reports_the_gpus_memory(workshop):
    from glake_infer.models import runner

    folder, store = workshop
    report = runner.run(
        [folder / "a.glake", folder / "b.glake"],
        repeat=3,
        threads=2,
        device="cuda" if INDEX == 0 else DEVICE,
        store=store,
    )
    assert report.device == f"cuda:{INDEX}"
    memory = report.memory
    trunk = gi.Package(folder / "a.glake", store).manifest.weight_bytes
    assert 0.9 * trunk <= memory.shared <= memory.reserved
    assert memory.own < 0.2 * trunk
    assert memory.private <= memory.reserved <= memory.peak_reserved <= memory.limit
    garbage.collect()
