import building
import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from glake_infer.allocators.errors import InputError
from glake_infer.models.manifest import Value
from glake_infer.models.values import DTYPES, check_feeds, generate, value_of_argument, value_of_proto

IDS = Value(name="input_ids", dtype="int64", shape=("batch", 16))
MASK = Value(name="mask", dtype="float", shape=(None, 16))
ANY = Value(name="any", dtype="float", shape=None)


def test_protos_and_arguments_agree():
    import onnxruntime as ort

    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 3, None]),
        helper.make_tensor_value_info("b", TensorProto.INT64, []),
        helper.make_tensor_value_info("c", TensorProto.STRING, [2]),
        helper.make_tensor_value_info("d", TensorProto.FLOAT16, None),
        helper.make_tensor_sequence_value_info("e", TensorProto.FLOAT, None),
    ]
    nodes = [building.node("Identity", [value.name], [f"{value.name}_out"]) for value in inputs]
    outputs = [helper.make_value_info(f"{value.name}_out", value.type) for value in inputs]
    proto = building.model(nodes, inputs, outputs)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = [value_of_proto(value) for value in proto.graph.input]
    assert [str(value) for value in found] == [
        "a: float[n, 3, ?]",
        "b: int64[]",
        "c: string[2]",
        "d: float16",
        "e: seq(tensor(float))",
    ]
    arguments = [value_of_argument(argument) for argument in session.get_inputs()]
    assert [a for a in arguments if a.name != "d"] == [
        f for f in found if f.name != "d"
    ]  # ORT gives no rank as []


def test_other_types_have_names():
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    kinds = [
        (
            helper.make_optional_type_proto(helper.make_sequence_type_proto(tensor)),
            "optional(seq(tensor(float)))",
        ),
        (helper.make_map_type_proto(TensorProto.INT64, tensor), "map(int64,tensor(float))"),
        (helper.make_sparse_tensor_type_proto(TensorProto.DOUBLE, [2]), "sparse_tensor(double)"),
        (helper.make_tensor_type_proto(99, []), "unknown99"),
    ]
    for kind, name in kinds:
        assert value_of_proto(helper.make_value_info("v", kind)).dtype == name


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_type_of_onnx_runtime_has_its_numpy_type(dtype):
    number = getattr(TensorProto, dtype.upper())
    assert helper.tensor_dtype_to_np_dtype(number) == DTYPES[dtype]


def test_good_feeds_pass_unchanged():
    ids, mask = np.zeros((2, 16), np.int64), np.zeros((5, 16), np.float32)
    checked = check_feeds([IDS, MASK], [], {"mask": mask, "input_ids": ids})
    assert checked["input_ids"] is ids
    assert checked["mask"] is mask
    assert check_feeds([], [IDS], {}) == {}


def test_lists_and_numbers_take_the_declared_type():
    rate = Value(name="sr", dtype="int64", shape=())
    half = Value(name="half", dtype="bfloat16", shape=(2,))
    checked = check_feeds([rate, half], [], {"sr": 16000, "half": [1, 2.5]})
    assert checked["sr"].dtype == np.int64
    assert checked["sr"].shape == ()
    assert checked["half"].dtype == ml_dtypes.bfloat16
    empty = check_feeds([Value(name="e", dtype="int64", shape=(None,))], [], {"e": []})
    assert empty["e"].shape == (0,)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        (
            {"input_id": 1},
            "no input 'input_id'; its inputs are input_ids: int64.batch, 16., mask.*Did you mean 'input_ids'",
        ),
        ({"zzz": 1}, r"no input 'zzz'; its inputs are [^?]*\?, 16\]\.$"),
        ({"input_ids": np.zeros((1, 16), np.int64)}, r"the input mask: float\[\?, 16\] was not fed"),
        ({"input_ids": np.zeros((1, 16), np.int32)}, r"was fed int32\[1, 16\].*astype\('int64'\)"),
        ({"input_ids": np.zeros((1, 17), np.int64)}, r"shape \[1, 17\]: axis 1 has 17 instead of 16"),
        ({"input_ids": np.zeros((16,), np.int64)}, r"shape \[16\]: 1 axes instead of 2"),
        ({"input_ids": [["a"] * 16]}, "cannot be made from list"),
        ({"input_ids": [[1], [1, 2]]}, "cannot be made from list"),
        ({"input_ids": [[1.5] * 16]}, "cannot be made from list: it has fractions"),
        ({"input_ids": [[1 << 70] * 16]}, "cannot be made from list"),
        ({"input_ids": None}, "cannot be made from NoneType"),
        ({"input_ids": object()}, "cannot be made from object"),
    ],
)
def test_wrong_feeds_are_named(feeds, message):
    if "not fed" not in message:
        feeds = {**feeds, "mask": np.zeros((1, 16), np.float32)}
    with pytest.raises(InputError, match=message):
        check_feeds([IDS, MASK], [], feeds)


def test_what_has_no_shape_or_no_numpy_type():
    array = np.zeros((1, 2, 3), np.float32)
    assert check_feeds([ANY], [], {"any": array})["any"] is array
    sequence = Value(name="s", dtype="seq(tensor(float))", shape=None)
    assert check_feeds([sequence], [], {"s": [array]})["s"] == [array]
    text = Value(name="t", dtype="string", shape=(2,))
    assert list(check_feeds([text], [], {"t": ["a", "b"]})["t"]) == ["a", "b"]
    with pytest.raises(InputError, match="axis 0 has 3"):
        check_feeds([text], [], {"t": ["a", "b", "c"]})


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_generated_data_fits(dtype):
    value = Value(name="x", dtype=dtype, shape=("n", 3))
    for shape, expected in ((None, (1, 3)), ((4, 3), (4, 3)), ((0, 3), (0, 3))):
        data = generate(value, shape, np.random.default_rng(0))
        assert data.shape == expected
        assert check_feeds([value], [], {"x": data})["x"] is data


def test_masks_are_ones():
    assert generate(
        Value(name="attention_mask", dtype="int64", shape=(2, 2)), None, np.random.default_rng(0)
    ).all()


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (IDS, (1,), "1 axes"),
        (IDS, (1, 17), r"sizes \[1, 17\]"),
        (IDS, (-1, 16), r"sizes \[-1, 16\]"),
        (ANY, (-1,), r"sizes \[-1\]"),
        (Value(name="s", dtype="string", shape=()), None, "--input s=FILE.npy"),
    ],
)
def test_what_cannot_be_generated(value, shape, message):
    with pytest.raises(InputError, match=message):
        generate(value, shape, np.random.default_rng(0))


def test_arrays_of_the_other_byte_order_are_turned_around():
    """ONNX Runtime itself would read their bytes as other numbers."""
    value = Value(name="x", dtype="int64", shape=(2,))
    checked = check_feeds([value], [], {"x": np.array([1, 2], ">i8")})["x"]
    assert checked.dtype == np.int64
    assert checked.dtype.isnative
    np.testing.assert_array_equal(checked, [1, 2])
