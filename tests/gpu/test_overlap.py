"""Sessions that are built while their weights are on their way read none of them: what was there before does not show."""

import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import glake_infer as gi
from glake_infer.models import load as loading
from glake_infer.models.overlap import weights_may_come_later
from glake_infer.transfers.device import CudaTransfers

pytest.importorskip("cupy")
from kernels import INDEX

pytestmark = pytest.mark.gpu
SETTINGS = {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}


def weight(name, *shape, dtype=np.float32):
    rng = np.random.default_rng(len(name))
    return numpy_helper.from_array((rng.standard_normal(shape) / 16).astype(dtype), name)


def model(nodes, weights, shape, domain=""):
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def dense():
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Add", ["a", "b"], ["c"]),
        node("LayerNormalization", ["c", "s", "t"], ["d"], axis=-1),
        node("Gemm", ["d", "v", "u"], ["e"]),
        node("Mul", ["e", "m"], ["f"]),
        node("PRelu", ["f", "p"], ["y"]),
    ]
    names = {
        "w": (64, 512),
        "b": (512,),
        "s": (512,),
        "t": (512,),
        "v": (512, 256),
        "u": (256,),
        "m": (256,),
        "p": (256,),
    }
    return model(nodes, [weight(n, *s) for n, s in names.items()], [4, 64])


def convolutions():
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "s", "t", "m", "v"], ["c"]),
        node("ConvTranspose", ["c", "u"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weights = [weight("w", 64, 8, 3, 3), weight("b", 64), weight("s", 64), weight("t", 64), weight("m", 64)]
    positive = numpy_helper.from_array(np.linspace(0.5, 2, 64, dtype=np.float32), "v")
    return model(nodes, [*weights, positive, weight("u", 64, 16, 2, 2)], [2, 8, 16, 16])


def lookups():
    node = helper.make_node
    cast = node("Cast", ["x"], ["i"], to=TensorProto.INT64)
    nodes = [cast, node("Gather", ["w", "i"], ["a"]), node("MatMul", ["a", "v"], ["y"])]
    return model(nodes, [weight("w", 1000, 128), weight("v", 128, 64)], [4])


def attention():
    nodes = [
        helper.make_node("Attention", ["x", "w", "b"], ["a"], domain="com.microsoft", num_heads=4),
        helper.make_node("SkipLayerNormalization", ["a", "x", "s", "t"], ["y"], domain="com.microsoft"),
    ]
    weights = [weight("w", 256, 768), weight("b", 768), weight("s", 256), weight("t", 256)]
    return model(nodes, weights, [2, 16, 256], "com.microsoft")


@pytest.mark.parametrize("make", [dense, convolutions, lookups, attention])
@pytest.mark.parametrize("optimization", ["all", "disable"])
def test_a_session_that_is_built_over_garbage(pool, tmp_path, monkeypatch, make, optimization):
    """Weights arrive only once the session is built; until then their memory holds NaN."""
    onnx.save(made := make(), tmp_path / "m.onnx")
    gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=(store := gi.Store(tmp_path / "store")))
    shape = [d.dim_value for d in made.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    feeds = {"x": np.abs(x * 100) % 900 if make is lookups else x}
    options = {"store": store, "optimization": optimization, "provider_options": SETTINGS}
    with monkeypatch.context() as patch:
        patch.setattr(loading, "weights_may_come_later", lambda *_: False)
        plain = gi.load(tmp_path / "m.glake", pool, **options)
    expected = plain.run(feeds)
    plain.close()
    pool.trim()

    built, order = threading.Event(), []
    plain_start, plain_session = CudaTransfers.start, loading.guarded_session
    transfers = CudaTransfers.of(INDEX)

    def start(self, steps, total, *, priority=0):
        """Fill the memory with NaN, and bring the weights when the session has been built."""
        steps = list(steps)
        garbage = tmp_path / "garbage"
        garbage.write_bytes(b"\xff" * max(p.size for s in steps for p in s.parts))
        spoiled = [type(s)([type(p)(garbage, 0, p.size, p.address) for p in s.parts]) for s in steps]
        plain_start(self, spoiled, total).finish()
        order.append("garbage")

        class Late:
            def finish(self, **given):
                assert built.wait(60)
                order.append("weights")
                plain_start(transfers, steps, total).finish(**given)

            def stop(self):
                pass

        return Late()

    def guarded(holding):
        make_session = plain_session(holding)

        def wrapped(*arguments, **given):
            session = make_session(*arguments, **given)
            order.append("session")
            built.set()
            return session

        return wrapped

    monkeypatch.setattr(CudaTransfers, "start", start)
    monkeypatch.setattr(loading, "guarded_session", guarded)
    late = gi.load(tmp_path / "m.glake", pool, **options)
    monkeypatch.undo()
    assert order == ["garbage", "session", "weights"]
    assert late._residency.transfers.loads > 0
    got = late.run(feeds)
    for name, array in expected.items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(got[name], array)
    late.close()


def test_what_reads_weights_early_is_built_late():
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=64, N=64, bits=4, block_size=32
        )
    ]
    made = model(nodes, [], [4, 64], "com.microsoft")
    for name in ("w", "s"):
        tensor = made.graph.initializer.add(name=name, data_type=TensorProto.UINT8, dims=[64])
        tensor.data_location = TensorProto.EXTERNAL
    assert not weights_may_come_later(made.SerializeToString(), [])
