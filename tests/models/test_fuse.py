"""The `cuda` variant: what is fused, that it computes the same, and what is refused."""

import json
import subprocess

import building
import numpy as np
import onnx
import pytest
from folders import temporaries
from onnx import TensorProto, helper

import glake_infer as gi
from glake_infer.digest import digest_of, digests_of_pieces
from glake_infer.models import convert as converting
from glake_infer.models import fuse, fuse_check, fuse_child, zoo
from glake_infer.models.convert import convert
from glake_infer.models.export import export
from glake_infer.models.graph import all_nodes, initializers, is_external, scopes, tensor_bytes
from glake_infer.models.inspect import inspect
from glake_infer.models.package import Package


def operators(model):
    return [node.op_type for node in all_nodes(model)]


def session_of(model, store, **entries):
    import onnxruntime as ort

    options = fuse_check.session_options(store)
    for name, value in entries.items():
        setattr(options, name, value)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, store, feeds):
    session = session_of(model, store)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def close(package, feeds, tolerance=1e-4):
    expected, found = (run(package.graph(v), package.store, feeds) for v in ("onnx", "cuda"))
    assert list(expected) == list(found)
    for name, array in expected.items():
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(found[name], array)
            continue
        largest = np.abs(array.astype(np.float32)).max(initial=0)
        difference = np.abs(found[name].astype(np.float32) - array.astype(np.float32)).max(initial=0)
        assert difference <= tolerance * largest, name


def small(name="bert-tiny", **more):
    if name.startswith("bert"):
        more = {"layers": 2, "vocabulary": 64, "positions": 32, **more}
    if name.startswith("llama"):
        more = {"layers": 2, "vocabulary": 64, **more}
    return zoo.spec(name, **more)


def converted(tmp_path, spec, name="m"):
    report = zoo.convert(spec, tmp_path / f"{name}.glake")
    return report, Package(tmp_path / f"{name}.glake")


# What is fused


@pytest.mark.parametrize(
    ("name", "more", "fewer", "tolerance"),
    [
        ("bert-tiny", {"Attention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2}, {"Softmax", "Erf"}, 1e-5),
        (
            "bert-tiny-fp16",
            {"Attention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2},
            {"Softmax", "Erf"},
            1e-2,
        ),
        ("resnet-tiny", {"Conv": 12}, {"BatchNormalization"}, 1e-5),
        ("resnet-tiny-fp16", {"Conv": 12}, {"BatchNormalization"}, 1e-2),
        ("llama-tiny", {"SimplifiedLayerNormalization": 3}, {"Pow", "ReduceMean"}, 1e-5),
    ],
)
def test_what_is_fused_computes_the_same(store, tmp_path, name, more, fewer, tolerance):
    spec = small(name)
    report, package = converted(tmp_path, spec)
    assert report.variants[-1] == "cuda"
    assert not [note for note in report.notes if "CUDA" in note]
    list(package.verify())
    given, graph = package.graph("onnx"), package.graph("cuda")
    for kind, count in more.items():
        assert operators(graph).count(kind) == count
    assert not fewer & set(operators(graph))
    assert operators(graph).count("Cast") <= operators(given).count("Cast")
    assert list(graph.graph.input) == list(given.graph.input)
    assert list(graph.graph.output) == list(given.graph.output)
    for seed in range(3):
        feeds = zoo.feeds(spec, seed, batch=1 + seed)
        if "attention_mask" in feeds:
            mask = np.random.default_rng(seed).integers(0, 2, feeds["attention_mask"].shape)
            mask[:, 1] = 1
            feeds["attention_mask"] = mask
        close(package, feeds, tolerance)


@pytest.mark.parametrize("name", ["bert-tiny", "resnet-tiny", "llama-tiny"])
def test_a_session_makes_no_weights_of_its_own(store, tmp_path, name):
    """What ONNX Runtime's own fusions leave, at the level that CUDA has too, is all in the store."""
    import onnxruntime as ort

    _, package = converted(tmp_path, small(name))
    level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    made = {}
    for variant in ("onnx", "cuda"):
        saved = str(tmp_path / f"{variant}.onnx")
        session_of(
            package.graph(variant), store, graph_optimization_level=level, optimized_model_filepath=saved
        )
        graph = onnx.load(saved, load_external_data=False)
        made[variant] = [
            item.tensor.name
            for item in initializers(graph)
            if not is_external(item.tensor) and tensor_bytes(item.tensor) >= 1024
        ]
    assert made["cuda"] == []
    assert name != "resnet-tiny" or made["onnx"]


def test_the_weights_of_each_variant(store, tmp_path):
    report, package = converted(tmp_path, small())
    manifest = package.manifest
    names = {"Attention_0_qkv_weight", "Attention_1_qkv_weight"}
    fused = [w for w in manifest.weights if w.variants == ("cuda",)]
    assert names <= {w.name for w in fused}
    parts = [w.name for w in manifest.weights if w.variants == ("onnx",)]
    assert "encoder.layer.0.attention.self.query.weight" in parts
    common = [w for w in manifest.weights if not w.variants]
    assert len(common) + len(parts) + len(fused) == len(manifest.weights)
    assert list(manifest.weights[-len(fused) :]) == fused
    assert (report.weights, report.weight_bytes) == (len(common) + len(parts), manifest.weight_bytes)
    assert report.derived_bytes == sum({w.digest: w.bytes for w in fused}.values())
    assert report.new_bytes + report.new_derived_bytes == sum(manifest.distinct.values())
    assert (report.stored_bytes, report.new_derived_bytes) == (0, report.derived_bytes)
    model = inspect(package.path).models[0]
    assert (model.bytes, model.derived_bytes) == (report.weight_bytes, report.derived_bytes)
    exported = export(package.path, tmp_path / "out")
    assert exported.weights == report.weights
    assert exported.bytes < report.weight_bytes + report.derived_bytes
    gi.export_archive(package.path, tmp_path / "a.tar")
    taken = gi.import_archive(tmp_path / "a.tar", tmp_path / "b.glake", store=gi.Store(tmp_path / "other"))
    assert taken.variants == ("onnx", "cuda")
    assert taken.new_bytes == report.new_bytes + report.derived_bytes


def test_two_heads_share_the_fused_trunk(store, tmp_path):
    reports = []
    for head, labels in (("first", 2), ("second", 9)):
        report, _ = converted(tmp_path, small(head=head, labels=labels), head)
        reports.append(report)
    a, b = (Package(tmp_path / f"{name}.glake").manifest for name in ("first", "second"))
    of_a, of_b = (
        {w.digest: w.bytes for w in m.weights_of("cuda") if w.variants == ("cuda",)} for m in (a, b)
    )
    assert of_a == of_b
    assert of_a
    head = sum(size for digest, size in b.distinct.items() if digest not in a.distinct)
    assert reports[1].new_derived_bytes == 0
    assert reports[1].new_bytes == head < 0.2 * reports[1].weight_bytes


def test_every_process_makes_the_same_bytes(store, tmp_path, python):
    code = """
        import sys, glake_infer as gi
        from glake_infer.models import zoo
        folder, order = sys.argv[1], sys.argv[2].split(",")
        for name in order:
            sizes = {"layers": 2, "vocabulary": 64} if name.startswith("bert") else {}
            zoo.convert(zoo.spec(name, **sizes), f"{folder}/{name}.glake", store=gi.Store(folder + "/store"))
    """
    import processes

    names = ["bert-tiny", "resnet-tiny-fp16"]
    children = []
    for seed, order in (("1", names), ("2", names[::-1])):
        (tmp_path / seed).mkdir()
        env = {**processes.environment(), "PYTHONHASHSEED": seed}
        children.append(python(code, tmp_path / seed, ",".join(order), env=env))
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    for name in names:
        first, second = (
            {p.name: p.read_bytes() for p in (tmp_path / seed / f"{name}.glake").glob("graph*")}
            for seed in "12"
        )
        assert "graph.cuda.onnx" in first
        assert first == second
        one, two = (json.loads((tmp_path / s / f"{name}.glake" / "manifest.json").read_bytes()) for s in "12")
        assert one["weights"] == two["weights"]


# Any shape of model


@pytest.mark.parametrize("name", building.SHAPES)
def test_any_shape_of_model(store, tmp_path, name):
    proto = building.SHAPES[name]()
    report = convert(building.save(proto, tmp_path / "m.onnx"))
    package = Package(tmp_path / "m.glake")
    list(package.verify())
    assert not temporaries(tmp_path)
    refused = [note for note in report.notes if "CUDA" in note or "transformers" in note]
    assert bool(refused) <= (name in ("sparse",)), refused
    if "cuda" not in report.variants:
        return
    feeds = building.feeds_for(proto)
    many = [{**feeds, "flag": np.array(flag)} for flag in (True, False)] if "flag" in feeds else [feeds]
    for each in many:
        expected, found = (run(package.graph(v), store, each) for v in ("onnx", "cuda"))
        for output, array in expected.items():
            if array.dtype == object:
                np.testing.assert_array_equal(found[output], array)
            else:
                np.testing.assert_allclose(
                    found[output].astype(np.float32), array.astype(np.float32), rtol=1e-3, atol=1e-3
                )
    for scope in scopes(package.graph("cuda").graph):
        for weight in scope.initializer:
            assert is_external(weight) == (tensor_bytes(weight) >= 1024)


def folded(name="w0"):
    """x -> MatMul(Transpose(w)) -> MatMul: something is folded where w is a constant."""
    nodes = [
        building.node("Transpose", [name], ["t"]),
        building.node("MatMul", ["x", "t"], ["h"]),
        building.node("MatMul", ["h", "w1"], ["y"]),
    ]
    weights = [building.tensor(building.matrix(1), name), building.tensor(building.matrix(2), "w1")]
    return building.model(nodes, [building.floats("x")], [building.floats("y")], weights)


def test_what_the_caller_may_override_is_not_folded(store, tmp_path):
    assert "cuda" in convert(building.save(folded(), tmp_path / "m.onnx")).variants
    weights = Package(tmp_path / "m.glake").manifest.weights
    assert [(w.name, w.variants) for w in weights if w.variants] == [
        ("w0", ("onnx",)),
        (weights[-1].name, ("cuda",)),
    ]
    proto = folded()
    proto.graph.input.append(building.floats("w0", (32, 32)))
    report = convert(building.save(proto, tmp_path / "o.onnx"))
    package = Package(tmp_path / "o.glake")
    for variant in report.variants:
        x, other = building.matrix(8), building.matrix(9)
        found = run(package.graph(variant), store, {"x": x, "w0": other})["y"]
        np.testing.assert_allclose(found, x @ other.T @ building.matrix(2), rtol=1e-4, atol=1e-5)


def test_subgraphs_are_fused_too(store, tmp_path):
    def body(name, output, seed):
        nodes = [
            building.node("Transpose", [f"{name}_w"], [f"{name}_t"]),
            building.node("MatMul", ["x", f"{name}_t"], [output]),
        ]
        return building.branch(name, output, [building.tensor(building.matrix(seed), f"{name}_w")], nodes)

    proto = building.model(
        [building.if_node(body("then", "a", 1), body("other", "b", 2))],
        [building.FLAG, building.floats("x")],
        [building.floats("y")],
    )
    report = convert(building.save(proto, tmp_path / "m.onnx"))
    assert "cuda" in report.variants
    package = Package(tmp_path / "m.glake")
    assert "Transpose" not in operators(package.graph("cuda"))
    for flag, seed in ((True, 1), (False, 2)):
        x = building.matrix(5)
        found = run(package.graph("cuda"), store, {"x": x, "flag": np.array(flag)})["y"]
        np.testing.assert_allclose(found, x @ building.matrix(seed).T, rtol=1e-4, atol=1e-5)


def test_nothing_to_fuse_gives_no_variant(store, tmp_path):
    report = convert(building.save(building.inline(), tmp_path / "m.onnx"))
    assert (report.variants, report.notes, report.derived_bytes) == (("onnx",), (), 0)


def test_half_beside_a_defined_operator_keeps_it(store, tmp_path):
    """Softmax has no kernel for fp16 on the CPU: neither casts nor its definition may come in."""
    kind = TensorProto.FLOAT16
    weights = [
        building.tensor(building.matrix(1, dtype=np.float16), "w"),
        building.tensor(building.matrix(2, dtype=np.float16), "v"),
    ]
    nodes = [
        building.node("Transpose", ["w"], ["t"]),
        building.node("MatMul", ["x", "t"], ["h"]),
        building.node("Softmax", ["h"], ["s"], axis=-1),
        building.node("Relu", ["s"], ["r"]),
        building.node("MatMul", ["r", "v"], ["y"]),
        building.node("Softmax", ["y"], ["z"], axis=-1),
    ]
    outputs = [building.floats(name, kind=kind) for name in ("y", "z", "s")]
    proto = building.model(nodes, [building.floats("x", kind=kind)], outputs, weights)
    convert(building.save(proto, tmp_path / "m.onnx"))
    package = Package(tmp_path / "m.glake")
    assert sorted(operators(package.graph("cuda"))) == ["MatMul", "MatMul", "Relu", "Softmax", "Softmax"]
    close(package, {"x": building.matrix(3, (4, 32), np.float16)}, 1e-2)


# What is refused


def test_a_fusion_that_changes_results_is_refused(store, tmp_path, monkeypatch):
    def broken(*arguments):
        fused = by_python(*arguments)
        bias = next(node for node in fused.graph.node if node.op_type == "BiasGelu")
        bias.input[1] = next(n for n in fused.graph.node if n.op_type == "BiasGelu" and n is not bias).input[
            1
        ]
        return fused

    by_python = fuse._by_python
    monkeypatch.setattr(fuse, "_by_python", broken)
    report, package = converted(tmp_path, small())
    assert "cuda" not in report.variants, "without the fusions there is nothing left to gain"
    assert [note for note in report.notes if "not used for CUDA: the output logits differs by" in note]
    list(package.verify())


def test_a_mask_that_must_be_padding_is_refused(store, tmp_path, monkeypatch):
    """Attention that takes the number of ones in the mask for the length of the row: the checks' masks tell."""

    def padded(*arguments):
        fused = by_python(*arguments)
        attention = [node for node in fused.graph.node if node.op_type == "Attention"]
        mask = attention[0].input[3]
        fused.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
        fused.graph.node.append(building.node("ReduceSum", [mask, "axes"], ["length"], keepdims=0))
        for node in attention:
            node.input[3] = "length"
        return fused

    by_python = fuse._by_python
    monkeypatch.setattr(fuse, "_by_python", padded)
    report, _ = converted(tmp_path, small())
    assert "cuda" not in report.variants
    assert [note for note in report.notes if "not used for CUDA: the output logits differs by" in note]


def test_what_goes_wrong_is_a_note(store, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("the reason\nand more")

    monkeypatch.setattr(fuse, "_by_python", fails)
    report, _ = converted(tmp_path, small(), "a")
    assert report.notes == ("not fused by onnxruntime.transformers: the reason and more",)
    monkeypatch.setattr(fuse, "_basic", fails)
    report, _ = converted(tmp_path, small("resnet-tiny"), "b")
    assert report.variants == ("onnx",)
    assert report.notes == ("not optimized for CUDA by ONNX Runtime: the reason and more",)
    monkeypatch.setattr(fuse, "_fuse", fails)
    report, _ = converted(tmp_path, small(), "c")
    assert report.notes == ("not fused for CUDA: the reason and more",)
    assert not temporaries(tmp_path)


def test_the_other_process_may_fail_or_hang(store, tmp_path, monkeypatch):
    monkeypatch.setattr(fuse, "SECONDS", 0.01)
    report, _ = converted(tmp_path, small(), "a")
    assert [note for note in report.notes if "took more than" in note]
    monkeypatch.setattr(fuse, "SECONDS", 60)
    run_child = subprocess.run

    def crash(command, **more):
        return run_child([command[0], "-c", "import os; os.abort()"], **more)

    monkeypatch.setattr(fuse.subprocess, "run", crash)
    report, _ = converted(tmp_path, small(), "b")
    assert [note for note in report.notes if "it ended with -6" in note]


def test_large_models_are_not_fused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(fuse, "MAXIMUM_BYTES", 1000)
    report, _ = converted(tmp_path, small())
    assert report.variants == ("onnx",)
    assert "not fused for CUDA: the weights have more than" in report.notes[0]


def test_a_model_that_cannot_be_fed_is_refused(store, tmp_path):
    proto = folded()
    proto.graph.input.append(
        helper.make_value_info(
            "list", helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        )
    )
    proto.graph.node.append(building.node("SequenceLength", ["list"], ["count"]))
    proto.graph.output.append(helper.make_tensor_value_info("count", TensorProto.INT64, []))
    report = convert(building.save(proto, tmp_path / "m.onnx"))
    assert report.variants == ("onnx",)
    assert "cannot be checked: the input list" in report.notes[0]


# Parts


def test_unsqueezes_are_lifted_without_a_change(store):
    nodes = [
        building.node("Cast", ["mask"], ["wide"], to=TensorProto.FLOAT),
        building.node("Sub", ["one", "wide"], ["absent"]),
        building.node("Unsqueeze", ["absent", "axes"], ["four"]),
        building.node("Mul", ["four", "one"], ["y"]),
        building.node("Unsqueeze", ["mask", "axes"], ["z"]),
    ]
    weights = [
        building.tensor(np.array(3, np.float32), "one"),
        building.tensor(np.array([1, 2]), "axes"),
    ]
    kind = TensorProto.INT64
    proto = building.model(
        nodes,
        [building.floats("mask", ("b", "s"), kind)],
        [building.floats("y", ("b", 1, 1, "s")), building.floats("z", ("b", 1, 1, "s"), kind)],
        weights,
    )
    feeds = {"mask": np.random.default_rng(1).integers(0, 2, (3, 5))}
    expected = building.run_plain(proto, feeds)
    fuse_child.lift_unsqueezes(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert operators(proto) == ["Unsqueeze", "Unsqueeze", "Cast", "Sub", "Mul", "Unsqueeze", "Unsqueeze"]
    found = building.run_plain(proto, feeds)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("sizes", [[], [5], [8], [3, 5, 8], [1] * 30, [24, 1], [7, 24, 9]])
def test_digests_of_pieces(sizes):
    rng = np.random.default_rng(1)
    buffers = [rng.bytes(size) for size in sizes]
    data = b"".join(buffers)
    pieces = [digest_of(data[start : start + 8]) for start in range(0, len(data), 8)]
    assert digests_of_pieces(buffers, 8) == (digest_of(data), "".join(pieces), len(data))


def test_large_weights_have_pieces(store, tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "LARGE_WEIGHT", 1 << 20)
    weights = [np.zeros((32, 20000), np.float32), building.matrix(1, (20000, 32))]
    for name, path in {
        "inline": building.save(building.chain(*weights), tmp_path / "a.onnx"),
        "external": building.with_external(building.chain(*weights), tmp_path / "folder"),
    }.items():
        convert(path, tmp_path / f"{name}.glake")
        for weight, array in zip(Package(tmp_path / f"{name}.glake").manifest.weights, weights, strict=True):
            data = array.tobytes()
            assert weight.pieces == "".join(
                digest_of(data[start : start + (2 << 20)]) for start in range(0, len(data), 2 << 20)
            )
            assert len(weight.pieces) == 128
    report = convert(building.save(folded_large(), tmp_path / "f.onnx"))
    assert "cuda" in report.variants
    assert all(len(w.pieces) == 128 for w in Package(tmp_path / "f.glake").manifest.weights)


def folded_large():
    nodes = [building.node("Transpose", ["w"], ["t"]), building.node("MatMul", ["x", "t"], ["y"])]
    weights = [building.tensor(building.matrix(1, (20000, 32)), "w")]
    return building.model(nodes, [building.floats("x")], [building.floats("y", ("n", 20000))], weights)
