import building
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from glake_infer.allocators.errors import ModelError
from glake_infer.models.graph import (
    all_nodes,
    external_entries,
    initializers,
    inline_bytes,
    is_external,
    lift_constants,
    make_external,
    make_names_unique,
    scopes,
    tensor_bytes,
    to_numpy,
)


def same_outputs(before, after):
    feeds = building.feeds_for(before)
    for flag in (True, False) if "flag" in feeds else (None,):
        if flag is not None:
            feeds["flag"] = np.array(flag)
        expected, found = building.run_plain(before, feeds), building.run_plain(after, feeds)
        assert list(expected) == list(found)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_scopes_and_nodes_of_all_depths():
    assert [scope.name for scope in scopes(building.nested().graph)] == [
        "g",
        "other",
        "then",
        "inner_else",
        "inner_then",
    ]
    kinds = sorted(node.op_type for node in all_nodes(building.functions("initializer")))
    assert kinds == ["Constant", "If", "MatMul", "MatMul", "Neg", "Project", "Project"]


@pytest.mark.parametrize("kind", building.TYPED)
def test_bytes_of_typed_fields_are_those_of_raw_data(kind):
    weight = building.typed(getattr(TensorProto, kind)).graph.initializer[0]
    raw = inline_bytes(weight)
    assert len(raw) == tensor_bytes(weight)
    copy = TensorProto(data_type=weight.data_type, dims=weight.dims, raw_data=raw)
    np.testing.assert_array_equal(numpy_helper.to_array(copy), numpy_helper.to_array(weight))
    np.testing.assert_array_equal(to_numpy(weight, raw), numpy_helper.to_array(weight))
    assert inline_bytes(copy) == raw


@pytest.mark.parametrize(
    ("kind", "dims", "expected"),
    [
        ("FLOAT", [], 4),
        ("FLOAT", [0, 5], 0),
        ("INT4", [3], 2),
        ("UINT4", [3, 3], 5),
        ("BOOL", [7], 7),
        ("STRING", [9], 0),
        ("FLOAT8E4M3FN", [9], 9),
        ("COMPLEX128", [2], 32),
        ("FLOAT4E2M1", [5], 3),
        ("BFLOAT16", [3], 6),
    ],
)
def test_sizes(kind, dims, expected):
    assert tensor_bytes(TensorProto(data_type=getattr(TensorProto, kind), dims=dims)) == expected


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (TensorProto(name="w", data_type=1, dims=[-1]), "'w' declares the negative dimension -1"),
        (TensorProto(name="w", data_type=99, dims=[1]), "'w' has the element type 99"),
        (TensorProto(name="w", data_type=0, dims=[1]), "'w' has the element type 0"),
        (TensorProto(name="w", data_type=1, dims=[3], raw_data=b"1234"), "'w' holds 4 bytes.* need 12"),
        (TensorProto(name="w", data_type=1, dims=[3], float_data=[1, 2]), "'w' is damaged"),
    ],
)
def test_damaged_weights_are_named(weight, message):
    with pytest.raises(ModelError, match=message):
        inline_bytes(weight)


def test_a_weight_becomes_a_reference():
    weight = building.typed(TensorProto.FLOAT16).graph.initializer[0]
    make_external(weight, "objects/ab", 4096, prepacked_0="x")
    assert is_external(weight)
    assert external_entries(weight) == {
        "location": "objects/ab",
        "offset": "0",
        "length": "4096",
        "prepacked_0": "x",
    }
    assert not weight.int32_data
    assert not weight.raw_data


def test_overridable_weights():
    assert [i.overridable for i in initializers(building.overridable())] == [True, False]
    old = building.chain(building.matrix(1), ir=3)
    assert [i.overridable for i in initializers(old)] == [False], (
        "before IR version 4 every weight is an input"
    )
    assert "words" not in [i.tensor.name for i in initializers(building.strings())]


@pytest.mark.parametrize(
    ("name", "lifted"), [("constants", 3), ("body_outputs", 2), ("scan", 1), ("strings", 0), ("loop", 0)]
)
def test_lifting_constants_keeps_the_meaning(name, lifted):
    before = building.SHAPES[name]()
    after = building.edited(before, lambda m: None)
    assert lift_constants(after, 1024) == lifted
    onnx.checker.check_model(after)
    same_outputs(before, after)


def test_what_is_lifted():
    proto = building.constants()
    assert lift_constants(proto, 1024) == 3
    names = {t.name: t for t in proto.graph.initializer}
    assert sorted(names) == ["f", "i", "w"]
    np.testing.assert_array_equal(numpy_helper.to_array(names["i"]), np.arange(128))
    assert [n.output[0] for n in proto.graph.node if n.op_type == "Constant"] == ["shape", "s"]


def test_lifting_in_an_old_model_lists_the_weight_as_an_input():
    nodes = [
        building.node("Constant", [], ["w"], value=building.tensor(building.matrix(1), "v")),
        building.node("MatMul", ["x", "w"], ["y"]),
    ]
    proto = building.model(nodes, [building.floats("x")], [building.floats("y")], ir=3)
    before = building.edited(proto, lambda m: None)
    assert lift_constants(proto, 1024) == 1
    assert [value.name for value in proto.graph.input] == ["x", "w"]
    onnx.checker.check_model(proto)
    same_outputs(before, proto)


def test_a_lifted_output_gets_a_name_that_nobody_has():
    proto = building.body_outputs()
    proto.graph.node.append(building.node("Identity", ["x"], ["a__weight"]))
    before = building.edited(proto, lambda m: None)
    lift_constants(proto, 1024)
    names = [t.name for scope in scopes(proto.graph) for t in scope.initializer]
    assert sorted(names) == ["a__weight_1", "b__weight"]
    same_outputs(before, proto)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("same_names", {"w": 2}),
        ("nested", {"middle": 2}),
        ("shadowing_constant", {"w": 2}),
        ("half_beside_value", {"w": 2}),
        ("inline", {}),
        ("loop", {}),
        ("overridable", {}),
        ("old_ir", {}),
    ],
)
def test_names_become_unique_and_the_meaning_stays(name, renamed):
    before = building.SHAPES[name]()
    after = building.edited(before, lambda m: None)
    assert make_names_unique(after) == renamed
    weights = [item.tensor.name for item in initializers(after)]
    assert len(set(weights)) == len(weights)
    produced = {out for node in all_nodes(after) for out in node.output}
    assert not produced.intersection(weights), "ONNX Runtime makes initializers of Constant nodes"
    onnx.checker.check_model(after)
    same_outputs(before, after)


def test_renaming_reaches_the_bodies_below_and_stops_where_a_name_is_taken_again():
    """`w` in both branches; a body inside the second reads it, another one inside has its own."""
    w = [building.tensor(building.matrix(seed), "w") for seed in (1, 2, 3)]
    reads = building.branch("reads", "p", [], [building.node("MatMul", ["x", "w"], ["p"])])
    owns = building.branch("owns", "q", [w[2]], [building.node("MatMul", ["x", "w"], ["q"])])
    other = building.branch(
        "other", "b", [w[1]], [building.node("If", ["inner"], ["b"], then_branch=reads, else_branch=owns)]
    )
    then = building.branch("then", "a", [w[0]], [building.node("MatMul", ["x", "w"], ["a"])])
    inner = onnx.helper.make_tensor_value_info("inner", TensorProto.BOOL, [])
    proto = building.model(
        [building.if_node(then, other)], [building.FLAG, inner, building.floats("x")], [building.floats("y")]
    )
    after = building.edited(proto, lambda m: None)
    assert make_names_unique(after) == {"w": 3}
    x = building.matrix(9)
    for inner, seed in ((True, 2), (False, 3)):
        found = building.run_plain(after, {"x": x, "flag": np.array(False), "inner": np.array(inner)})["y"]
        np.testing.assert_allclose(found, x @ building.matrix(seed), rtol=1e-4, atol=1e-5)


def test_renaming_stops_where_a_body_computes_a_value_of_that_name():
    own = [building.node("Neg", ["x"], ["w"]), building.node("Add", ["w", "w"], ["p"])]
    computes = building.branch("computes", "p", [], own)
    reads = building.branch("reads", "q", [], [building.node("MatMul", ["x", "w"], ["q"])])
    weight = building.tensor(building.matrix(1), "w")
    nodes = [building.node("If", ["flag"], ["y"], then_branch=computes, else_branch=reads)]
    proto = building.model(nodes, [building.FLAG, building.floats("x")], [building.floats("y")], [weight])
    assert make_names_unique(proto) == {"w": 2}
    assert list(computes.node) == [n for s in scopes(proto.graph) if s.name == "computes" for n in s.node]
    (reading,) = next(s for s in scopes(proto.graph) if s.name == "reads").node
    assert list(reading.input) == ["x", "w__2"] == ["x", proto.graph.initializer[0].name]


def test_a_renamed_weight_that_is_an_output_keeps_the_output():
    then = building.branch("then", "w", [building.tensor(building.matrix(1), "w")], [], (building.SIDE,) * 2)
    other = building.branch(
        "other", "w", [building.tensor(building.matrix(2), "w")], [], (building.SIDE,) * 2
    )
    proto = building.model(
        [building.if_node(then, other)], [building.FLAG], [building.floats("y", (building.SIDE,) * 2)]
    )
    make_names_unique(proto)
    for flag, seed in ((True, 1), (False, 2)):
        np.testing.assert_array_equal(
            building.run_plain(proto, {"flag": np.array(flag)})["y"], building.matrix(seed)
        )


def test_two_weights_of_one_name_in_one_scope_are_refused():
    proto = building.chain(building.matrix(1), building.matrix(2))
    proto.graph.initializer[1].name = "w0"
    with pytest.raises(ModelError, match="two weights of the graph 'g' have the name 'w0'"):
        make_names_unique(proto)


def test_quantization_annotations_follow():
    def add(graph, name):
        entry = graph.quantization_annotation.add(tensor_name=name)
        entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=name)

    proto = building.same_names()
    for scope in scopes(proto.graph):
        if scope.initializer:
            add(scope, "w")
    make_names_unique(proto)
    found = [
        (s.quantization_annotation[0].tensor_name, s.initializer[0].name)
        for s in scopes(proto.graph)
        if s.initializer
    ]
    assert found == [("w", "w"), ("w__2", "w__2")]
