import building
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from glake_infer.models.graph import make_names_unique
from glake_infer.models.guard import guard_for_cpu


def guarded(proto):
    copy = building.edited(proto, lambda m: None)
    make_names_unique(copy)
    report = guard_for_cpu(copy)
    onnx.checker.check_model(copy)
    return copy, report


def close(proto, lean, feeds, tolerance=1e-5):
    before, after = building.run_plain(proto, feeds), building.run_plain(lean, feeds)
    for name, array in before.items():
        np.testing.assert_allclose(
            after[name].astype(np.float32), array.astype(np.float32), rtol=tolerance, atol=tolerance
        )


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (32,), (1, 32)])
def test_a_scale_moves_behind_its_matmul(scale):
    proto = building.quantized(scale)
    lean, report = guarded(proto)
    assert (report.weights, report.stored, report.folded, report.rewritten) == (
        ["w"],
        512 * 32,
        4 * 512 * 32,
        1,
    )
    assert [kind for kind in kinds(lean) if kind != "Reshape"] == ["Cast", "MatMul", "Mul"]
    close(proto, lean, building.feeds_for(proto))


@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (32,), (1, 32), (512, 1)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_scale_moves_behind_its_gather(scale, rank):
    proto = building.quantized(scale, gather=True)
    proto.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"] * rank))
    proto.graph.output[0].CopyFrom(building.floats("y", (*["n"] * rank, 32)))
    lean, report = guarded(proto)
    assert report.rewritten == 1
    assert kinds(lean)[-2:] == ["Cast", "Mul"]
    ids = np.random.default_rng(1).integers(-512, 512, (4,) * rank)
    close(proto, lean, {"ids": ids}, 0)


@pytest.mark.parametrize("scale", [(512, 1), (512, 32)])
def test_a_scale_per_row_or_element_stays_before_the_matmul(scale):
    proto = building.quantized(scale)
    lean, report = guarded(proto)
    assert (report.weights, report.rewritten) == (["w"], 0)
    assert kinds(lean) == kinds(proto)


def test_no_sum_leaves_the_range_of_fp16():
    """Unscaled, a sum of int8 products of this size is infinite in fp16."""
    proto = building.quantized(to=TensorProto.FLOAT16)
    lean, report = guarded(proto)
    assert report.rewritten == 0
    feeds = {"x": np.full((2, 512), 20, np.float16)}
    assert np.isfinite(building.run_plain(lean, feeds)["y"]).all()
    close(proto, lean, feeds, 1e-3)


def test_a_product_with_other_users_stays():
    proto = building.quantized()
    proto.graph.node.append(building.node("ReduceSum", ["real"], ["sum"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1, 1]))
    lean, report = guarded(proto)
    assert report.rewritten == 0
    close(proto, lean, building.feeds_for(proto))


def test_a_guarded_weight_is_overridable_so_nothing_folds_it():
    lean, _ = guarded(building.quantized())
    assert [value.name for value in lean.graph.input] == ["x", "w"]
    import onnxruntime as ort

    session = ort.InferenceSession(lean.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_overridable_initializers()] == ["w"]


@pytest.mark.parametrize(
    "proto",
    [building.inline(), building.raw_int4(), building.typed(TensorProto.FLOAT16), building.constants()],
)
def test_small_and_wide_weights_are_left_alone(proto):
    lean, report = guarded(proto)
    assert not report.weights
    assert lean == proto


def test_half_precision():
    proto = building.half()
    lean, report = guarded(proto)
    assert (report.weights, report.dtypes) == (["w"], {"float16"})
    close(proto, lean, building.feeds_for(proto), 1e-3)
    assert report.note().startswith("cpu-lean keeps ONNX Runtime from folding 1 float16 weights")
    only_gathered = building.edited(proto, lambda m: m.graph.node.pop())
    only_gathered.graph.node.append(building.node("Gather", ["w", "x"], ["y"]))
    only_gathered.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", TensorProto.INT64, ["n"]))
    assert not guard_for_cpu(only_gathered).weights


def test_a_cast_behind_a_transpose_counts():
    def transposed(proto):
        proto.graph.node.insert(0, building.node("Transpose", ["w"], ["t"], perm=[0, 1]))
        proto.graph.node[1].input[0] = "t"

    assert guarded(building.edited(building.quantized(), transposed))[1].weights == ["w"]


def test_weights_of_bodies_move_outwards():
    proto = building.half_beside_value()
    lean, report = guarded(proto)
    assert len(report.weights) == 1
    assert [t.name for t in lean.graph.initializer] == report.weights
    for flag in (True, False):
        close(proto, lean, {**building.feeds_for(proto), "flag": np.array(flag)})


def test_old_models_are_left_alone():
    proto = building.edited(building.quantized(), lambda m: setattr(m, "ir_version", 3))
    assert not guard_for_cpu(proto).weights
