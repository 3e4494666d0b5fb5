"""Padded models compute the same bits, and nothing is padded that is no head."""

import numpy as np
import onnx
import pytest
from building import floats, matrix, model, run_plain, tensor
from onnx import TensorProto, helper

from glake_infer.models import zoo
from glake_infer.models.graph import inline_bytes
from glake_infer.models.tensorrt.heads import fill, pad_heads

X = np.random.default_rng(3).standard_normal((5, 32), np.float32)


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes)


def head(*nodes, weights, outputs=("y",), kind=TensorProto.FLOAT, **more):
    shapes = [floats(name, ("n", None), kind) for name in outputs]
    return model(nodes, [floats("x", kind=kind)], shapes, [tensor(a, n) for n, a in weights.items()], **more)


def copy(proto):
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


def padded(proto):
    """The padded model and what was padded; the model must be sound."""
    made = copy(proto)
    report = pad_heads(made, inline_bytes)
    onnx.checker.check_model(made, full_check=True)
    return made, [(each.weight, each.columns, each.padded) for each in report]


def same(expected, found):
    assert list(expected) == list(found)
    for name, array in expected.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            found[name].dtype, found[name].shape, found[name].tobytes(),
        ), name  # fmt: skip


HEADS = {
    "gemm": head(node("Gemm", ["x", "w", "b"], "y"), weights={"w": matrix(1, (32, 17)), "b": matrix(2, (17,))}),
    "gemm-transposed": head(
        node("Gemm", ["x", "w", "b"], "y", transB=1, alpha=0.5, beta=2.0),
        weights={"w": matrix(1, (17, 32)), "b": matrix(2, (17,))},
    ),
    "gemm-scalar-bias": head(
        node("Gemm", ["x", "w", "b"], "y"), weights={"w": matrix(1, (32, 17)), "b": matrix(2, (1,))}
    ),
    "gemm-no-bias": head(node("Gemm", ["x", "w"], "y"), weights={"w": matrix(1, (32, 17))}),
    "matmul": head(node("MatMul", ["x", "w"], "y"), weights={"w": matrix(1, (32, 17))}),
    "matmul-add": head(
        node("MatMul", ["x", "w"], "p"), node("Add", ["b", "p"], "y"),
        weights={"w": matrix(1, (32, 17)), "b": matrix(2, (1, 17))},
    ),
    "softmax": head(
        node("MatMul", ["x", "w"], "p"), node("Add", ["p", "b"], "q"), node("Softmax", ["q"], "y", axis=-1),
        weights={"w": matrix(1, (32, 17)), "b": matrix(2, (17,))},
    ),
    "pooler": head(
        node("Gemm", ["x", "v"], "h"), node("Tanh", ["h"], "t"), node("Gemm", ["t", "w", "b"], "y"),
        weights={"v": matrix(4), "w": matrix(1, (32, 2)), "b": matrix(2, (2,))},
    ),
    "split": head(
        node("MatMul", ["x", "w"], "p"),
        helper.make_node("Split", ["p"], ["y", "z"], axis=1, name="split"),
        weights={"w": matrix(1, (32, 2))}, outputs=("y", "z"),
    ),
    "half": head(
        node("Gemm", ["x", "w", "b"], "y"), kind=TensorProto.FLOAT16,
        weights={"w": matrix(1, (32, 17), np.float16), "b": matrix(2, (17,), np.float16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_padded_head_computes_the_same_bits(name):
    proto = HEADS[name]
    made, found = padded(proto)
    columns = 2 if name in ("pooler", "split") else 17
    wide = 256 if name == "half" else 128
    assert found == [("w", columns, wide)]
    feeds = {"x": X.astype(np.float16 if name == "half" else np.float32)}
    for rows in (1, 2, 5):
        few = {"x": feeds["x"][:rows]}
        same(run_plain(proto, few), run_plain(made, few))
    sizes = {t.name: len(inline_bytes(t)) for t in made.graph.initializer if t.name in ("w", "b")}
    assert all(size % 512 == 0 for size in sizes.values() if size > 4)


@pytest.mark.parametrize("zoo_name", ["bert-tiny", "bert-tiny-fp16", "resnet-tiny", "llama-tiny"])
@pytest.mark.parametrize("labels", [1, 2, 17, 1000, 1024, None])
def test_models_of_the_zoo_compute_the_same_bits_padded_and_filled(tmp_path, zoo_name, labels):
    sizes = {} if zoo_name.startswith("resnet") else {"layers": 1}
    spec = zoo.spec(zoo_name, head="a" if labels else None, labels=labels, **sizes)
    proto = onnx.load(zoo.write(spec, tmp_path / "m.onnx"))
    made, found = padded(proto)
    assert [(a, b) for _, a, b in found] == (
        [(labels, -(-labels // 128) * 128)] if labels in (1, 2, 17) and "16" not in zoo_name
        else [(labels, -(-labels // 256) * 256)] if labels in (1, 2, 17, 1000) and "16" in zoo_name
        else [(1000, 1024)] if labels == 1000 else []
    )  # fmt: skip
    feeds = zoo.feeds(spec, 1, batch=2)
    expected = run_plain(proto, feeds)
    same(expected, run_plain(made, feeds))
    carrier = fill(made, 384)
    onnx.checker.check_model(made)
    assert carrier in expected
    same(expected, run_plain(made, feeds))
    values = [
        t for t in made.graph.initializer if t.name.startswith("glake_fill") and len(inline_bytes(t)) == 384
    ]
    assert len(values) == 1


W, B = matrix(1, (32, 17)), matrix(2, (17,))
LEFT_ALONE = {
    "full": head(node("Gemm", ["x", "w"], "y"), weights={"w": matrix(1, (32, 128))}),
    "shared-weight": head(
        node("Gemm", ["x", "w"], "y"), node("MatMul", ["x", "w"], "z"), weights={"w": W}, outputs=("y", "z")
    ),
    "weight-is-an-output": head(
        node("Gemm", ["x", "w"], "y"), node("Identity", ["w"], "z"), weights={"w": W}, outputs=("y", "z")
    ),
    "a-layer-behind": head(
        node("MatMul", ["x", "w"], "p"),
        helper.make_node("LayerNormalization", ["p", "s"], ["y"], name="norm"),
        weights={"w": W, "s": B},
    ),
    "no-weight": head(node("MatMul", ["x", "t"], "y"), node("Transpose", ["x"], "t"), weights={}),
    "bias-of-full-size": head(
        node("MatMul", ["x", "w"], "p"),
        node("Add", ["p", "b"], "y"),
        weights={"w": W, "b": matrix(2, (5, 17))},
    ),
    "old-operators": head(node("Gemm", ["x", "w", "b"], "y"), weights={"w": W, "b": B}, opset=9),
    "old-format": head(node("Gemm", ["x", "w", "b"], "y"), weights={"w": W, "b": B}, ir=3),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_no_head_is_left_alone(name):
    proto = LEFT_ALONE[name]
    made = copy(proto)
    assert pad_heads(made, inline_bytes) == []
    assert made == proto


def test_an_inner_use_of_the_product_is_sliced_too():
    """The product is an output itself, and goes on into another one."""
    proto = head(
        node("MatMul", ["x", "w"], "y"), node("Relu", ["y"], "z"), weights={"w": W}, outputs=("y", "z")
    )
    made, found = padded(proto)
    assert found == [("w", 17, 128)]
    same(run_plain(proto, {"x": X}), run_plain(made, {"x": X}))


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT16])
def test_fill_takes_outputs_of_other_types(kind):
    proto = head(node("Cast", ["x"], "y", to=kind), weights={})
    proto.graph.output[0].CopyFrom(floats("y", ("n", 32), kind))
    made = copy(proto)
    assert fill(made, 128) == "y"
    onnx.checker.check_model(made, full_check=True)
    same(run_plain(proto, {"x": X}), run_plain(made, {"x": X}))


def test_fill_prefers_the_smallest_output_and_follows_inner_uses():
    proto = model(
        [node("Relu", ["x"], "big"), node("ReduceSum", ["big"], "small", keepdims=0), node("Neg", ["small"], "n")],
        [floats("x")], [floats("big"), floats("small", ()), floats("n", ("a", "b"))],
    )  # fmt: skip
    made = copy(proto)
    assert fill(made, 256) == "small"
    same(run_plain(proto, {"x": X}), run_plain(made, {"x": X}))


def test_what_is_said_of_a_product_that_grows_is_forgotten():
    proto = copy(HEADS["matmul-add"])
    proto.graph.value_info.append(floats("p", ("n", 17)))
    made, found = padded(proto)
    assert found == [("w", 17, 128)]
    assert not made.graph.value_info


def test_fill_takes_an_output_that_is_empty():
    """Whichever of its axes has no size."""
    proto = head(
        node("Slice", ["x", "from", "to", "axis"], "y"),
        weights={"from": np.array([0]), "to": np.array([0]), "axis": np.array([1])},
    )
    proto.graph.output[0].CopyFrom(floats("y", ("n", "m")))
    made = copy(proto)
    assert fill(made, 128) == "y"
    same(run_plain(proto, {"x": X}), run_plain(made, {"x": X}))


def test_fill_takes_sizes_last():
    """TensorRT computes them on the host: they carry no weights."""
    proto = head(node("Relu", ["x"], "y"), node("Shape", ["x"], "s"), weights={})
    proto.graph.output.append(helper.make_tensor_value_info("s", TensorProto.INT64, [2]))
    assert fill(proto, 128) == "y"


def test_fill_needs_an_output_that_can_carry_it():
    for proto in (
        head(node("Cast", ["x"], "y", to=TensorProto.BOOL), weights={}),
        head(node("Relu", ["x"], "y"), weights={}, opset=9),
        head(node("Relu", ["x"], "y"), weights={}, ir=3),
    ):
        if proto.graph.node[0].op_type == "Cast":
            proto.graph.output[0].CopyFrom(floats("y", ("n", 32), TensorProto.BOOL))
        made = copy(proto)
        assert fill(made, 128) is None
        assert made == proto
