"""Weights in memory of the host that the GPU reads over its link: by the driver's figures, and bit for bit."""

import gc as garbage

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import glake_infer as gi
from glake_infer import cuda
from glake_infer.allocators import _native
from glake_infer.residency import Residency, Wanted

cupy = pytest.importorskip("cupy")
from kernels import INDEX, SANITIZED  # noqa: E402

pytestmark = pytest.mark.gpu

EXACT = {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
MiB = 1 << 20
SIDE = 2048  # a float32 matrix of this side has 16 MiB
LAYERS = 12
FEEDS = {"i": np.array([[5, 4000, 17, 9]]), "c": np.array(True)}


@pytest.fixture(autouse=True)
def supported(device):
    if not _native.cuda_memory(INDEX).granularity_on_host:
        pytest.skip("the device maps no memory of the host")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A table of 64 MiB, twelve matrices of 16, and two more in the body of an If."""
    rng = np.random.default_rng(0)

    def weight(name, rows=SIDE):
        values = rng.standard_normal((rows, SIDE), np.float32) / np.sqrt(SIDE)
        return numpy_helper.from_array(values.astype(np.float32), name)

    def floats(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "n", SIDE])

    def chain(first, names, last):
        places = [first, *(f"{last}_{name}" for name in names[:-1]), last]
        return [
            helper.make_node("MatMul", [a, name], [b])
            for a, name, b in zip(places[:-1], names, places[1:], strict=True)
        ]

    inner, layers = ["inner0", "inner1"], [f"layer{n}" for n in range(LAYERS)]
    then = helper.make_graph(
        chain("h", inner, "t"), "then", [], [floats("t")], [weight(name) for name in inner]
    )
    other = helper.make_graph([helper.make_node("Identity", ["h"], ["e"])], "else", [], [floats("e")])
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "i"], ["h"]),
            helper.make_node("If", ["c"], ["k"], then_branch=then, else_branch=other),
            *chain("k", layers, "y"),
        ],
        "g",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ["b", "n"]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [floats("y")],
        [weight("table", 4 * SIDE), *(weight(name) for name in layers)],
    )
    folder = tmp_path_factory.mktemp("offload")
    store = gi.Store(folder / "store")
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "m.onnx")
    gi.convert(folder / "m.onnx", folder / "m.glake", store=store)
    return folder, store


WHOLE = (64 + 16 * (LAYERS + 2)) * MiB


def load(workshop, pool, **options):
    folder, store = workshop
    return gi.load(folder / "m.glake", pool, store=store, provider_options=EXACT, **options)


def names_of(model):
    weights = {w.digest: w.name for w in model.package.manifest.weights}
    return {weights[d] for d, far in model._residency.placed(weights).items() if far}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def free():
    cuda.synchronize(INDEX, 0)
    return cuda.free_memory(INDEX)


@pytest.fixture
def answers(workshop, pool):
    """Of a load with nothing on the host."""
    with load(workshop, pool) as model:
        found = model.run(FEEDS)
        assert pool.stats().offloaded == 0
    del model
    garbage.collect()
    pool.trim()
    return found


def test_bytes_on_the_host_are_right_and_take_none_of_the_device(tmp_path, pool):
    folder = gi.Store(tmp_path).objects
    rng = np.random.default_rng(1)
    data = [rng.integers(0, 256, size, np.uint8).tobytes() for size in (96 * MiB + 11, 3 * MiB, 40 * MiB)]
    items = []
    for number, content in enumerate(data):
        digest, _ = folder.add_buffer(content)
        items.append(Wanted(digest, len(content), len(content), folder, number, on_host=number != 2))
    holding = Residency.of(pool).hold(items, 1)
    before = free()
    for _ in range(2):
        with holding:
            stats = pool.stats()
            assert 40 * MiB <= stats.reserved <= 42 * MiB
            assert 99 * MiB + 11 <= stats.offloaded <= 104 * MiB
            assert before - free() <= 44 * MiB
            for item, content in zip(items, data, strict=True):
                address = holding.addresses[item.digest]
                read = np.empty(len(content), np.uint8)
                cuda.copy_to_host(INDEX, address, read)
                assert read.tobytes() == content
                memory = cupy.cuda.UnownedMemory(address, len(content), None)
                view = cupy.ndarray(len(content), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
                assert (view ^ 255).get().tobytes() == (
                    ~np.frombuffer(content, np.uint8)
                ).tobytes()  # by a kernel
                del view, memory
            cupy.cuda.Device(INDEX).synchronize()
            cupy.get_default_memory_pool().free_all_blocks()
        assert holding.suspend() == stats.reserved + stats.offloaded
        assert (pool.stats().reserved, pool.stats().offloaded) == (0, 0)
        assert before - free() <= 16 * MiB  # code of CuPy's kernels
    holding.close()


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("64MiB", {"table"}),
        ("80MiB", {"table", "inner1"}),
        ("110MiB", {"table", "inner0", "inner1", "layer11"}),
        ("1TiB", {"table", "inner0", "inner1", *(f"layer{n}" for n in range(LAYERS))}),
    ],
)
def test_outputs_are_those_of_a_load_with_nothing_on_the_host(workshop, pool, answers, amount, expected):
    before = free()
    model = load(workshop, pool, offload=amount)
    assert names_of(model) == expected
    same(model.run(FEEDS), answers)
    memory, stats = model.memory, pool.stats()
    assert stats.offloaded >= memory.offloaded >= 64 * MiB
    assert stats.weights <= WHOLE - memory.offloaded + 3 * MiB
    assert memory.private < MiB, model.notes
    if not SANITIZED:
        # cuBLAS, cuDNN and kernels' code come on top; of the weights on the host nothing may.
        assert before - free() <= stats.reserved + memory.libraries + 200 * MiB
    (note,) = model.notes
    assert "stay in host memory" in note
    assert ("PCIe, about" in note) == (expected != {"table"})
    for _ in range(3):
        pool.trim()
        held, there = pool.stats(), free()
        assert model.suspend() >= WHOLE
        assert pool.stats().offloaded == 0
        assert free() - there == held.reserved - pool.stats().reserved  # none of it was the device's
        same(model.run(FEEDS), answers)
    on_device = model.run({**FEEDS, "i": cupy.asarray(FEEDS["i"])}, to="device")
    for name, array in on_device.items():
        np.testing.assert_array_equal(array.numpy(), answers[name])
    del on_device, array
    model.close()
    del model
    garbage.collect()
    assert pool.stats().offloaded == 0


def test_a_model_larger_than_the_limit_runs(workshop, pool, answers):
    pool.limit = limit = 160 * MiB
    pool._open().reset_peaks()
    with pytest.raises(gi.OutOfMemoryError, match="Or load it with offload='auto', which keeps"):
        load(workshop, pool, headroom="48MiB")
    garbage.collect()
    model = load(workshop, pool, offload="auto", headroom="48MiB")
    assert {"table", "inner0", "inner1"} < names_of(model)
    assert WHOLE - model.memory.offloaded <= 112 * MiB < WHOLE - model.memory.offloaded + 16 * MiB + 3 * MiB
    for _ in range(3):
        same(model.run(FEEDS), answers)
    assert pool.stats().peak_reserved <= limit
    same(model.run({**FEEDS, "c": np.array(False)}), model.run({**FEEDS, "c": np.array(False)}))
    model.close()


def test_auto_with_room_keeps_all_on_the_device(workshop, pool, answers):
    model = load(workshop, pool, offload="auto")
    assert model.memory.offloaded == pool.stats().offloaded == 0
    assert not model.notes
    same(model.run(FEEDS), answers)
    model.close()


def test_a_cuda_graph_reads_what_is_on_the_host_and_survives_a_suspend(tmp_path, pool):
    """It replays addresses: the same bytes have to be there again."""
    rng = np.random.default_rng(2)
    arrays = {name: rng.standard_normal((SIDE, SIDE), np.float32) / np.float32(50) for name in ("v", "w")}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, SIDE])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    store = gi.Store(tmp_path / "store")
    gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    options = {**EXACT, "enable_cuda_graph": 1}
    model = gi.load(tmp_path / "m.glake", pool, store=store, provider_options=options, offload="16MiB")
    assert names_of(model) == {"w"}
    x = cupy.asarray(rng.standard_normal((4, SIDE), np.float32))
    y = cupy.empty((4, SIDE), np.float32)

    def run():
        binding = model.session.io_binding()
        binding.bind_input("x", "cuda", INDEX, np.float32, x.shape, x.data.ptr)
        binding.bind_output("y", "cuda", INDEX, np.float32, y.shape, y.data.ptr)
        model.session.run_with_iobinding(binding)
        found = y.get()
        y.fill(0)
        cupy.cuda.Device(INDEX).synchronize()
        return found

    try:
        expected = run()
    except Exception as error:
        pytest.skip(f"ONNX Runtime captures no graph of this model: {error}")
    pool.captures_ended()
    np.testing.assert_array_equal(run(), expected)
    for _ in range(2):
        assert model.suspend() >= 32 * MiB
        np.testing.assert_array_equal(run(), expected)
    model.close()


def test_idle_models_of_a_runtime_keep_what_is_on_the_host(workshop, device):
    folder, store = workshop
    with gi.Runtime("700MiB", device=device, store=store) as runtime:
        options = {"provider_options": EXACT}
        model = runtime.load(folder / "m.glake", offload="128MiB", **options)
        expected = model.run(FEEDS)
        address = runtime.pool.allocate(600 * MiB)
        assert model.memory.asleep > 64 * MiB
        assert runtime.pool.stats().offloaded >= 128 * MiB
        runtime.pool.deallocate(address)
        same(model.run(FEEDS), expected)
    del model
    garbage.collect()


def test_more_than_the_host_has_is_an_error_that_leaves_nothing(pool):
    memory = _native.cuda_memory(INDEX)
    before = free()
    with pytest.raises(gi.DriverError, match=r"creating .* bytes of host memory for cuda:"):
        memory.create_on_host(1 << 46)
    assert free() == before
