"""Small ONNX models for the tests, by what is peculiar about their weights.

Each builder returns a ModelProto that ONNX Runtime can run; `feeds_for` makes matching feeds.
"""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

OPSET = 17
SIDE = 32  # a float32 matrix of this side has 4 KiB


def matrix(seed, shape=(SIDE, SIDE), dtype=np.float32):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) / np.sqrt(SIDE)
    return values.astype(dtype)


def tensor(array, name):
    return numpy_helper.from_array(np.asarray(array), name)


def floats(name, shape=("n", SIDE), kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, list(shape))


def model(nodes, inputs, outputs, weights=(), *, ir=10, opset=OPSET, functions=(), domains=(), **graph):
    made = helper.make_graph(
        list(nodes), "g", list(inputs), list(outputs), initializer=list(weights), **graph
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(made, ir_version=ir, opset_imports=imports, functions=list(functions))


def save(proto, path):
    path = Path(path)
    path.write_bytes(proto.SerializeToString())
    return path


def feeds_for(proto, seed=0, n=3):
    """Feeds of the inputs that have no default."""
    rng = np.random.default_rng(seed)
    defaults = {t.name for t in proto.graph.initializer} | {
        s.values.name for s in proto.graph.sparse_initializer
    }
    feeds = {}
    for value in proto.graph.input:
        if value.name in defaults:
            continue
        shape = [d.dim_value or n for d in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (
            np.ones(shape, dtype) if dtype == np.bool_ else rng.standard_normal(shape).astype(dtype)
        )
    return feeds


def run_plain(path, feeds):
    """Outputs of plain ONNX Runtime by name."""
    import onnxruntime as ort

    source = str(path) if isinstance(path, (str, os.PathLike)) else path.SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


# Ways to hold a weight


def chain(*arrays, names=None, ir=10):
    """x -> MatMul with each weight in turn."""
    names = names or [f"w{i}" for i in range(len(arrays))]
    nodes, here = [], "x"
    for index, name in enumerate(names):
        there = "y" if index == len(names) - 1 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [here, name], [there]))
        here = there
    weights = [tensor(a, n) for a, n in zip(arrays, names, strict=True)]
    inputs = [floats("x")]
    if ir < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in weights]
    return model(nodes, inputs, [floats("y")], weights, ir=ir)


def inline():
    return chain(matrix(1), matrix(2), matrix(3))


def typed(kind):
    """A weight of any element type in the typed field of its TensorProto, read through Cast."""
    name = TensorProto.DataType.Name(kind)
    count = 64 * SIDE
    rng = np.random.default_rng(5)
    weight = TensorProto(name="w", data_type=kind, dims=[64, SIDE])
    if name in ("INT4", "UINT4"):
        weight.int32_data.extend(rng.integers(0, 256, count // 2).tolist())
    elif name in ("FLOAT16", "BFLOAT16"):
        dtype = np.float16 if name == "FLOAT16" else ml_dtypes.bfloat16
        weight.int32_data.extend(
            rng.standard_normal(count).astype(dtype).view(np.uint16).astype(int).tolist()
        )
    elif name in ("INT8", "INT16", "INT32"):
        weight.int32_data.extend(rng.integers(-100, 100, count).tolist())
    elif name in ("UINT8", "UINT16"):
        weight.int32_data.extend(rng.integers(0, 200, count).tolist())
    elif name == "BOOL":
        weight.int32_data.extend(rng.integers(0, 2, count).tolist())
    elif name == "INT64":
        weight.int64_data.extend(rng.integers(-100, 100, count).tolist())
    elif name in ("UINT32", "UINT64"):
        weight.uint64_data.extend(rng.integers(0, 100, count).tolist())
    elif name == "DOUBLE":
        weight.double_data.extend(rng.standard_normal(count).tolist())
    else:
        weight.float_data.extend(rng.standard_normal(count).tolist())
    return _casted(weight)


TYPED = ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32",
         "INT64", "UINT64", "BOOL", "INT4", "UINT4"]  # fmt: skip


def raw_int4():
    packed = np.random.default_rng(6).integers(0, 256, 64 * SIDE // 2).astype(np.uint8).tobytes()
    return _casted(TensorProto(name="w", data_type=TensorProto.INT4, dims=[64, SIDE], raw_data=packed))


def _casted(weight):
    """y = x + sum over the rows of Cast(w)."""
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["wide", "axes"], ["row"], keepdims=0),
        helper.make_node("Add", ["x", "row"], ["y"]),
    ]
    return model(
        nodes, [floats("x")], [floats("y")], [weight, tensor(np.array([0], np.int64), "axes")], opset=21
    )


def constants():
    """Constant nodes: value, value_floats, value_ints, small ones and a string."""
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor(matrix(1), "ignored")),
        helper.make_node("Constant", [], ["f"], value_floats=matrix(2, (8 * SIDE,)).tolist()),
        helper.make_node("Constant", [], ["i"], value_ints=list(range(4 * SIDE))),
        helper.make_node("Constant", [], ["shape"], value_ints=[-1, SIDE]),
        helper.make_node("Constant", [], ["s"], value_string="text"),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Reshape", ["f", "shape"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["row"], axes=[0], keepdims=0),
        helper.make_node("Cast", ["i"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["wide"], ["mean"], keepdims=0),
        helper.make_node("Add", ["h", "row"], ["a"]),
        helper.make_node("Add", ["a", "mean"], ["y"]),
        helper.make_node("Identity", ["s"], ["label"]),
    ]
    return model(
        nodes, [floats("x")], [floats("y"), helper.make_tensor_value_info("label", TensorProto.STRING, [])]
    )


def branch(name, output, weights, nodes, shape=("n", SIDE)):
    return helper.make_graph(nodes, name, [], [floats(output, shape)], initializer=weights)


def if_node(then, other, output="y"):
    return helper.make_node("If", ["flag"], [output], then_branch=then, else_branch=other)


FLAG = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])


def same_names():
    """Two branches that both call their weight `w`, with different content, around an outer one."""
    then = branch("then", "a", [tensor(matrix(1), "w")], [helper.make_node("MatMul", ["x", "w"], ["a"])])
    other = branch("other", "b", [tensor(matrix(2), "w")], [helper.make_node("MatMul", ["x", "w"], ["b"])])
    return model([if_node(then, other)], [FLAG, floats("x")], [floats("y")])


def shadowing_constant():
    """A weight `w` in one branch, a small Constant `w` in the other: ORT makes an initializer of that too."""
    then = branch("then", "a", [tensor(matrix(1), "w")], [helper.make_node("MatMul", ["x", "w"], ["a"])])
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor(np.full((1, SIDE), 3, np.float32), "v")),
        helper.make_node("Mul", ["x", "w"], ["b"]),
    ]
    return model([if_node(then, branch("other", "b", [], nodes))], [FLAG, floats("x")], [floats("y")])


def half_beside_value():
    """An fp16 weight `w` in one branch (the guard moves it outwards), a computed value `w` in the other."""
    nodes = [
        helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "v"], ["a"]),
    ]
    then = branch("then", "a", [tensor(matrix(1, (SIDE, 512), np.float16), "w")], nodes, ("n", 512))
    nodes = [
        helper.make_node("Add", ["x", "x"], ["w"]),
        helper.make_node("Concat", ["w"] * 16, ["b"], axis=1),
    ]
    other = branch("other", "b", [], nodes, ("n", 512))
    return model([if_node(then, other)], [FLAG, floats("x")], [floats("y", ("n", 512))])


def nested():
    """A body within a body that reads a weight of the main graph and one of the body around it."""
    inner_then = branch(
        "inner_then",
        "p",
        [],
        [
            helper.make_node("MatMul", ["x", "outer"], ["q"]),
            helper.make_node("MatMul", ["q", "middle"], ["p"]),
        ],
    )
    inner_else = branch(
        "inner_else", "r", [tensor(matrix(3), "outer2")], [helper.make_node("MatMul", ["x", "outer2"], ["r"])]
    )
    then = branch("then", "a", [tensor(matrix(2), "middle")], [if_node(inner_then, inner_else, "a")])
    other = branch(
        "other", "b", [tensor(matrix(4), "middle")], [helper.make_node("MatMul", ["x", "middle"], ["b"])]
    )
    return model([if_node(then, other)], [FLAG, floats("x")], [floats("y")], [tensor(matrix(1), "outer")])


def loop():
    """A Loop whose body holds a weight."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["go"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("state"),
        ],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, []), floats("next")],
        initializer=[tensor(matrix(1), "w")],
    )
    weights = [
        tensor(np.array(3, np.int64), "trips"),
        tensor(np.array(True), "yes"),
        tensor(matrix(2), "w_outer"),
    ]
    nodes = [
        helper.make_node("Loop", ["trips", "yes", "x"], ["h"], body=body),
        helper.make_node("MatMul", ["h", "w_outer"], ["y"]),
    ]
    return model(nodes, [floats("x")], [floats("y")], weights)


def scan():
    """A Scan whose body holds a weight, a Constant node of 1 KiB and more, and is fed rows."""
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=tensor(matrix(2), "v")),
            helper.make_node("MatMul", ["row", "w"], ["h"]),
            helper.make_node("MatMul", ["h", "c"], ["moved"]),
            helper.make_node("Add", ["sum", "moved"], ["next"]),
            helper.make_node("Identity", ["next"], ["out"]),
        ],
        "body",
        [floats("sum", (SIDE,)), floats("row", (SIDE,))],
        [floats("next", (SIDE,)), floats("out", (SIDE,))],
        initializer=[tensor(matrix(1), "w")],
    )
    nodes = [helper.make_node("Scan", ["start", "x"], ["last", "y"], body=body, num_scan_inputs=1)]
    return model(
        nodes, [floats("x")], [floats("y"), floats("last", (SIDE,))], [tensor(matrix(3, (SIDE,)), "start")]
    )


def body_outputs():
    """Branches whose output is a Constant node itself, of 1 KiB and more."""
    then = branch(
        "then", "a", [], [helper.make_node("Constant", [], ["a"], value=tensor(matrix(1), "v"))], (SIDE, SIDE)
    )
    other = branch(
        "other",
        "b",
        [],
        [helper.make_node("Constant", [], ["b"], value=tensor(matrix(2), "v"))],
        (SIDE, SIDE),
    )
    nodes = [if_node(then, other, "w"), helper.make_node("MatMul", ["x", "w"], ["y"])]
    return model(nodes, [FLAG, floats("x")], [floats("y")])


def weight_is_output():
    """An initializer that is an output of the graph."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return model(nodes, [floats("x")], [floats("y"), floats("w", (SIDE, SIDE))], [tensor(matrix(1), "w")])


def functions(held="value"):
    """A model-local function, called twice, with a weight in a Constant or a body's initializer."""
    if held == "initializer":
        then = branch(
            "then", "p", [tensor(matrix(1), "fw")], [helper.make_node("MatMul", ["a", "fw"], ["p"])]
        )
        other = branch("other", "q", [], [helper.make_node("Neg", ["a"], ["q"])])
        nodes = [
            helper.make_node("Constant", [], ["yes"], value=tensor(np.array(True), "v")),
            helper.make_node("If", ["yes"], ["b"], then_branch=then, else_branch=other),
        ]
    elif held == "value_floats":
        nodes = [
            helper.make_node("Constant", [], ["flat"], value_floats=matrix(1).ravel().tolist()),
            helper.make_node("Constant", [], ["shape"], value_ints=[SIDE, SIDE]),
            helper.make_node("Reshape", ["flat", "shape"], ["w"]),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
        ]
    elif held == "nothing":
        nodes = [helper.make_node("Neg", ["a"], ["b"])]
    else:
        nodes = [
            helper.make_node("Constant", [], ["w"], value=tensor(matrix(1), "v")),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
        ]
    function = helper.make_function("local", "Project", ["a"], ["b"], nodes, [helper.make_opsetid("", OPSET)])
    calls = [
        helper.make_node("Project", ["x"], ["h"], domain="local"),
        helper.make_node("Project", ["h"], ["k"], domain="local"),
        helper.make_node("MatMul", ["k", "w"], ["y"]),
    ]
    return model(
        calls, [floats("x")], [floats("y")], [tensor(matrix(2), "w")], functions=[function], domains=["local"]
    )


def overridable():
    """A weight that the caller may replace: it is an input too."""
    proto = chain(matrix(1), matrix(2))
    proto.graph.input.append(floats("w0", (SIDE, SIDE)))
    return proto


def sparse():
    """A sparse initializer of many values beside a dense weight."""
    values = tensor(matrix(2, (600,)), "sparse_w")
    indices = tensor(np.arange(600, dtype=np.int64), "")
    weight = helper.make_sparse_tensor(values, indices, [SIDE, SIDE])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "sparse_w"], ["y"]),
    ]
    return model(nodes, [floats("x")], [floats("y")], [tensor(matrix(1), "w")], sparse_initializer=[weight])


def strings():
    """A string tensor of more than 1 KiB, as an initializer and as a Constant."""
    words = helper.make_tensor("words", TensorProto.STRING, [200], [f"word {i}".encode() for i in range(200)])
    constant = helper.make_tensor("v", TensorProto.STRING, [200], [b"c" * 20] * 200)
    nodes = [
        helper.make_node("Constant", [], ["more"], value=constant),
        helper.make_node("Concat", ["words", "more"], ["labels"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    labels = helper.make_tensor_value_info("labels", TensorProto.STRING, [400])
    return model(nodes, [floats("x")], [floats("y"), labels], [tensor(matrix(1), "w"), words])


def odd_sizes():
    """Weights with no elements, scalars, and twice the same content under odd names."""
    weights = [
        tensor(np.zeros((0, SIDE), np.float32), "empty"),
        tensor(np.array(2, np.float32), "scalar"),
        tensor(matrix(1), "schicht/größe:0"),
        tensor(matrix(1), "层/重み 😀"),
        tensor(matrix(1, (SIDE * SIDE,)), "flat"),
    ]
    nodes = [
        helper.make_node("Concat", ["x", "empty"], ["c"], axis=0),
        helper.make_node("Mul", ["c", "scalar"], ["d"]),
        helper.make_node("MatMul", ["d", "schicht/größe:0"], ["e"]),
        helper.make_node("MatMul", ["e", "层/重み 😀"], ["f"]),
        helper.make_node("ReduceMax", ["flat"], ["m"], keepdims=0),
        helper.make_node("Add", ["f", "m"], ["y"]),
    ]
    return model(nodes, [floats("x")], [floats("y")], weights)


def quantized(scale=(SIDE,), *, gather=False, to=TensorProto.FLOAT, rows=512, zero_size=False):
    """int8 -> Cast -> Mul(scale) -> MatMul or Gather: what ORT folds to fp32."""
    rng = np.random.default_rng(3)
    weight = tensor(rng.integers(-127, 127, (rows, SIDE)).astype(np.int8), "w")
    dtype = helper.tensor_dtype_to_np_dtype(to)
    factor = tensor((rng.random(scale, np.float32) / 100).astype(dtype), "scale")
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=to),
        helper.make_node("Mul", ["wide", "scale"], ["real"]),
    ]
    if gather:
        nodes.append(helper.make_node("Gather", ["real", "ids"], ["y"]))
        inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "m"])]
        return model(nodes, inputs, [floats("y", ("n", "m", SIDE), to)], [weight, factor])
    nodes.append(helper.make_node("MatMul", ["x", "real"], ["y"]))
    return model(nodes, [floats("x", ("n", rows), to)], [floats("y", ("n", SIDE), to)], [weight, factor])


def half(rows=512):
    """fp16 weights used by a MatMul on the CPU."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = tensor(matrix(1, (rows, SIDE), np.float16), "w")
    kind = TensorProto.FLOAT16
    return model(nodes, [floats("x", ("n", rows), kind)], [floats("y", ("n", SIDE), kind)], [weight])


SHAPES = {
    "inline": inline,
    "constants": constants,
    "same_names": same_names,
    "shadowing_constant": shadowing_constant,
    "half_beside_value": half_beside_value,
    "nested": nested,
    "loop": loop,
    "scan": scan,
    "body_outputs": body_outputs,
    "weight_is_output": weight_is_output,
    "function_value": functions,
    "function_value_floats": lambda: functions("value_floats"),
    "function_initializer": lambda: functions("initializer"),
    "function_without_weights": lambda: functions("nothing"),
    "overridable": overridable,
    "sparse": sparse,
    "strings": strings,
    "odd_sizes": odd_sizes,
    "old_ir": lambda: chain(matrix(1), matrix(2), ir=3),
    "raw_int4": raw_int4,
    "quantized": quantized,
    "half": half,
    **{f"typed_{name}": (lambda name=name: typed(getattr(TensorProto, name))) for name in TYPED},
}
"""Every shape of model that convert has to take, by name."""


# External data


def with_external(proto: ModelProto, folder, location="weights.bin", *, minimum=0, gap=64, start=128):
    """Write `folder/model.onnx` with the initializers' bytes in `location`, gaps between them."""
    proto = ModelProto.FromString(proto.SerializeToString())
    data = bytearray(b"\xee" * start)
    for weight in proto.graph.initializer:
        raw = numpy_helper.to_array(weight).tobytes() if not weight.HasField("raw_data") else weight.raw_data
        if len(raw) < minimum or weight.data_type == TensorProto.STRING:
            continue
        weight.raw_data = raw
        set_external_data(weight, location, offset=len(data), length=len(raw))
        weight.ClearField("raw_data")
        data += raw + b"\xee" * gap
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / location).write_bytes(data)
    return save(proto, folder / "model.onnx")


def edited(proto: ModelProto, change) -> ModelProto:
    """A copy of `proto` after `change(copy)`."""
    copy = ModelProto.FromString(proto.SerializeToString())
    change(copy)
    return copy


def node(*arguments, **more) -> NodeProto:
    return onnx.helper.make_node(*arguments, **more)
