import json
import os
import signal
import subprocess
import textwrap

import building
import numpy as np
import onnx
import pytest
from folders import temporaries, tree

import glake_infer as gi
from glake_infer.maintenance import gc, verify
from glake_infer.models.convert import convert, without_weighty_functions
from glake_infer.models.export import export
from glake_infer.models.graph import is_external, scopes, tensor_bytes
from glake_infer.models.package import Package


def equal(expected, found):
    assert list(expected) == list(found)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def close(expected, found):
    assert list(expected) == list(found)
    for name, array in expected.items():
        if array.dtype == object:
            np.testing.assert_array_equal(found[name], array)
        else:
            np.testing.assert_allclose(
                found[name].astype(np.float32), array.astype(np.float32), rtol=1e-3, atol=1e-3
            )


def flags(feeds):
    return [{**feeds, "flag": np.array(flag)} for flag in (True, False)] if "flag" in feeds else [feeds]


# What comes out


@pytest.mark.parametrize("name", building.SHAPES)
def test_any_shape_of_model_keeps_its_meaning(store, tmp_path, name):
    proto = building.SHAPES[name]()
    path = building.save(proto, tmp_path / f"{name}.onnx")
    report = convert(path)
    package = Package(tmp_path / f"{name}.glake")
    list(package.verify())
    target = export(package.path, tmp_path / "out").target
    onnx.checker.check_model(target)
    lean = package.graph("cpu-lean") if "cpu-lean" in report.variants else None
    for feeds in flags(building.feeds_for(proto)):
        expected = building.run_plain(path, feeds)
        equal(expected, building.run_plain(target, feeds))
        if lean is not None:
            close(expected, run_from_store(lean, feeds, store))
    for scope in scopes(package.graph().graph):
        for weight in scope.initializer:
            assert is_external(weight) == (tensor_bytes(weight) >= 1024)
    assert convert(path).new_bytes == 0
    assert not temporaries(tmp_path)


def run_from_store(proto, feeds, store):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(store.root))
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize("name", building.SHAPES)
def test_any_shape_of_model_runs_on_the_pool(store, tmp_path, name):
    proto = building.SHAPES[name]()
    path = building.save(proto, tmp_path / f"{name}.onnx")
    convert(path)
    for sharing in ("fast", "lean"):
        with gi.load(path.with_suffix(".glake"), sharing=sharing, threads=1) as model:
            for feeds in flags(building.feeds_for(proto)):
                close(building.run_plain(path, feeds), model.run(feeds))


def test_what_the_report_and_the_manifest_say(store, tmp_path):
    path = building.save(building.odd_sizes(), tmp_path / "m.onnx")
    seen = []
    report = convert(path, tmp_path / "p.glake", progress=lambda *step: seen.append(step))
    assert (report.weights, report.weight_bytes, report.distinct_weights, report.distinct_bytes) == (
        3,
        12288,
        1,
        4096,
    )
    assert (report.new_bytes, report.stored_bytes, report.small_bytes, report.runs) == (4096, 0, 4, 1)
    assert (report.source, report.package, report.variants) == (
        str(path),
        str(tmp_path / "p.glake"),
        ("onnx", "cuda"),
    )
    assert seen == [("weights", done, 12288) for done in (4096, 8192, 12288)]
    manifest = Package(tmp_path / "p.glake").manifest
    assert [(w.name, w.bytes, w.dtype, w.shape) for w in manifest.weights] == [
        ("schicht/größe:0", 4096, "float", (32, 32)),
        ("层/重み 😀", 4096, "float", (32, 32)),
        ("flat", 4096, "float", (1024,)),
    ]
    again = convert(path, tmp_path / "q.glake")
    assert (again.new_bytes, again.stored_bytes) == (0, 4096)


def test_weights_of_the_same_name_and_other_content_stay_different(store, tmp_path):
    report = convert(building.save(building.same_names(), tmp_path / "m.onnx"))
    assert (report.renamed, report.distinct_weights) == (1, 2)
    assert "share a name" in report.notes[0]


def test_overridable_weights_stay_overridable(store, tmp_path):
    convert(building.save(building.overridable(), tmp_path / "m.onnx"))
    manifest = Package(tmp_path / "m.glake").manifest
    assert [(w.name, w.overridable) for w in manifest.weights] == [("w0", True), ("w1", False)]
    assert [value.name for value in manifest.inputs] == ["x"]
    x, other = building.matrix(8), building.matrix(9)
    with gi.load(tmp_path / "m.glake") as model:
        np.testing.assert_allclose(
            model.run({"x": x})["y"], x @ building.matrix(1) @ building.matrix(2), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            model.run({"x": x, "w0": other})["y"], x @ other @ building.matrix(2), rtol=1e-4, atol=1e-5
        )


def test_sparse_and_string_tensors_stay_in_the_graph(store, tmp_path):
    for name in ("sparse", "strings"):
        assert convert(building.save(building.SHAPES[name](), tmp_path / f"{name}.onnx")).weights == 1
    assert len(Package(tmp_path / "sparse.glake").graph().graph.sparse_initializer) == 1
    assert b"word 199" in Package(tmp_path / "strings.glake").graph().SerializeToString()


@pytest.mark.parametrize(
    ("held", "left"), [("value", 0), ("value_floats", 0), ("initializer", 0), ("nothing", 1)]
)
def test_functions_are_inlined_where_they_hold_weights(held, left):
    assert len(without_weighty_functions(building.functions(held)).functions) == left


def test_external_data_many_weights_in_one_file(store, tmp_path):
    proto = building.odd_sizes()
    path = building.with_external(proto, tmp_path / "m", "sub-data.bin")
    assert len(onnx.load_model(path, load_external_data=False).graph.initializer) == 5
    report = convert(path, tmp_path / "p.glake")
    assert (report.weights, report.distinct_bytes) == (3, 4096)
    feeds = building.feeds_for(proto)
    equal(
        building.run_plain(proto, feeds),
        building.run_plain(export(tmp_path / "p.glake", tmp_path / "out").target, feeds),
    )
    assert report.source == str(path)


def test_the_same_weights_from_any_representation_are_one_object(store, tmp_path):
    proto = building.inline()
    assert convert(building.save(proto, tmp_path / "raw.onnx")).new_bytes == 12288
    for name, path in {
        "external": building.with_external(proto, tmp_path / "external"),
        "typed": building.save(building.edited(proto, to_float_data), tmp_path / "typed.onnx"),
        "constants": building.save(building.edited(proto, to_constants), tmp_path / "constants.onnx"),
    }.items():
        assert convert(path, tmp_path / f"{name}.glake").new_bytes == 0, name


def to_float_data(proto):
    for weight in proto.graph.initializer:
        weight.float_data.extend(np.frombuffer(weight.raw_data, np.float32).tolist())
        weight.ClearField("raw_data")


def to_constants(proto):
    for weight in proto.graph.initializer:
        proto.graph.node.insert(0, building.node("Constant", [], [weight.name], value=weight))
    del proto.graph.initializer[:]


def test_runs_end_where_another_package_stops_being_equal(store, tmp_path):
    trunk = [building.matrix(i) for i in range(4)]
    for name, head in (("a", 10), ("b", 11)):
        convert(building.save(building.chain(*trunk, building.matrix(head)), tmp_path / f"{name}.onnx"))
    assert [run.count for run in Package(tmp_path / "a.glake").manifest.runs] == [5]
    a, b = Package(tmp_path / "a.glake").manifest, Package(tmp_path / "b.glake").manifest
    assert [run.count for run in b.runs] == [4, 1]
    convert(tmp_path / "a.onnx")
    a = Package(tmp_path / "a.glake").manifest
    assert [run.count for run in a.runs] == [4, 1]
    assert a.runs[0].digest == b.runs[0].digest
    assert a.runs[1].digest != b.runs[1].digest


def test_weights_lie_in_the_order_of_their_use(store, tmp_path):
    proto = building.edited(
        building.inline(), lambda m: m.graph.initializer.sort(key=lambda t: t.name, reverse=True)
    )
    convert(building.save(proto, tmp_path / "m.onnx"))
    assert [w.name for w in Package(tmp_path / "m.glake").manifest.weights] == ["w0", "w1", "w2"]


def test_converting_twice_gives_the_same_bytes(store, tmp_path):
    building.save(building.quantized(), tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "p.glake")
    first = tree(tmp_path / "p.glake")
    convert(tmp_path / "m.onnx", tmp_path / "p.glake")
    assert tree(tmp_path / "p.glake") == first


def test_a_damaged_object_is_mended_by_converting_again(store, tmp_path):
    convert(building.save(building.inline(), tmp_path / "m.onnx"))
    path = store.objects.path(Package(tmp_path / "m.glake").manifest.weights[0].digest)
    path.chmod(0o644)
    path.write_bytes(bytes(4096))
    assert convert(tmp_path / "m.onnx").new_bytes == 4096
    assert verify(store).ok


# When things go wrong


def test_a_full_disk_below_the_store(tmp_path, small_disk):
    store = gi.Store(small_disk / "store")
    convert(building.save(building.inline(), tmp_path / "small.onnx"), store=store)
    before = tree(tmp_path / "small.glake")
    path = building.save(
        building.chain(*(building.matrix(i, (500, 500)) for i in range(2))), tmp_path / "large.onnx"
    )
    for target in ("large.glake", "small.glake"):
        with pytest.raises(
            gi.StorageFullError, match=r"no space left on the disk of .*store.*gc.*GLAKE_STORE"
        ):
            convert(path, tmp_path / target, store=store)
    assert not (tmp_path / "large.glake").exists()
    assert tree(tmp_path / "small.glake") == before
    assert not temporaries(tmp_path)
    assert verify(store).ok
    gc(store)
    assert len(list(store.objects)) == 3


def test_a_full_disk_below_the_package(store, tmp_path, small_disk):
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - 8192))
    path = building.save(building.inline(), tmp_path / "m.onnx")
    proto = building.edited(building.inline(), lambda m: setattr(m, "doc_string", "d" * 20000))
    building.save(proto, path)
    with pytest.raises(gi.StorageFullError, match=r"writing the package"):
        convert(path, small_disk / "m.glake")
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]
    assert not temporaries(tmp_path)
    (small_disk / "ballast").unlink()
    convert(path, small_disk / "m.glake")


def test_two_converts_of_the_same_model_at_once(store, tmp_path, python):
    path = building.save(
        building.chain(*(building.matrix(i, (300, 300)) for i in range(12))), tmp_path / "m.onnx"
    )
    code = """
        import sys, glake_infer as gi
        sys.stdin.readline()
        for _ in range(5):
            print(gi.convert(sys.argv[1]).distinct_bytes)
    """
    children = [python(code, path, stdin=-1) for _ in range(3)]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        output, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        assert output.split() == ["4320000"] * 5
    list(Package(tmp_path / "m.glake").verify())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.glake", "m.onnx", "store"]
    assert not temporaries(tmp_path)


STALLED = """
    import sys, time, glake_infer as gi

    def progress(*step):
        if step[1] == step[2] or len(sys.argv) > 2:
            print("here", flush=True)
            sys.stdin.readline()

    gi.convert(sys.argv[1], progress=progress)
    print("done", flush=True)
"""


def test_gc_during_a_convert_takes_nothing_that_it_needs(store, tmp_path, python):
    path = building.save(building.inline(), tmp_path / "m.onnx")
    child = python(STALLED, path, stdin=-1)
    assert child.stdout.readline() == "here\n"  # every weight is stored, no package needs them yet
    assert len(list(store.objects)) == 3
    with pytest.raises(gi.StoreError, match="is using the store"):
        gc(store, wait=False)
    waiting = python(
        "import glake_infer as gi; from glake_infer.maintenance import gc; print(gc(gi.Store()).objects)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    child.stdin.close()
    assert waiting.communicate(timeout=30)[0] == "0\n"
    child.wait(30)
    Package(tmp_path / "m.glake").check_present()


def test_gc_during_a_load_takes_nothing_that_it_needs(store, tmp_path, python):
    path = building.save(building.inline(), tmp_path / "m.onnx")
    convert(path)
    code = """
        import sys, numpy as np, glake_infer as gi

        def stall(options):
            print("here", flush=True)
            sys.stdin.readline()

        model = gi.load(sys.argv[1], configure=stall)
        print(model.run({"x": np.ones((1, 32), np.float32)})["y"].shape)
    """
    child = python(code, tmp_path / "m.glake", stdin=-1)
    assert child.stdout.readline() == "here\n"
    for record in store.records():  # to gc it is now nobody's
        record.file.unlink()
    with pytest.raises(gi.StoreError, match="is using the store"):
        gc(store, wait=False)
    output, errors = child.communicate("\n" * 10, timeout=60)
    assert child.returncode == 0, errors
    assert output.splitlines()[-1] == "(1, 32)"
    assert gc(store, wait=False).objects >= 3


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("place", ["weights", "package"])
def test_kill_in_the_middle_of_a_convert(store, tmp_path, python, existing, place):
    path = building.save(building.inline(), tmp_path / "m.onnx")
    if existing:
        convert(
            building.save(building.chain(building.matrix(9)), tmp_path / "old.onnx"), tmp_path / "m.glake"
        )
        before = tree(tmp_path / "m.glake")
    if place == "weights":
        child = python(STALLED, path, "every", stdin=-1)
    else:  # the folder is written and registered, but not yet in its place
        child = python(
            "import glake_infer.models.package as p, sys\np._replace_folder = lambda *_: progress(0, 1, 1)\n"
            + textwrap.dedent(STALLED),
            path,
            "x",
            stdin=-1,
        )
        for _ in range(3):
            assert child.stdout.readline() == "here\n"
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    assert (tmp_path / "m.glake").exists() == existing
    if existing:
        assert tree(tmp_path / "m.glake") == before
    if place == "package":
        assert temporaries(tmp_path)
    gc(store)
    assert not temporaries(tmp_path)
    if existing:
        list(Package(tmp_path / "m.glake").verify())
    convert(path)
    list(Package(tmp_path / "m.glake").verify())
    assert not temporaries(tmp_path)
    assert json.loads((tmp_path / "m.glake" / "manifest.json").read_bytes())["source"]["name"] == "m.onnx"


def test_a_progress_callback_that_raises_leaves_nothing(store, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    path = building.save(building.inline(), tmp_path / "m.onnx")
    with pytest.raises(KeyboardInterrupt):
        convert(path, progress=stop)
    assert not (tmp_path / "m.glake").exists()
    assert not temporaries(tmp_path)
    assert gc(store).objects == 1


def test_a_model_that_changes_while_it_is_converted(store, tmp_path):
    path = building.with_external(building.inline(), tmp_path / "m")

    class Changing(gi.Store):
        pass

    changing = Changing(store.root)
    holds = changing.objects.holds

    def changed_behind_the_digest(digest, length):
        with (tmp_path / "m" / "weights.bin").open("r+b") as file:
            file.seek(200)
            file.write(os.urandom(8))
        return holds(digest, length)

    changing.objects.holds = changed_behind_the_digest
    with pytest.raises(gi.DigestMismatchError, match="source changed while it was read"):
        convert(path, store=changing)
    assert list(store.objects) == []
    assert not temporaries(tmp_path)


def test_memory_does_not_grow_with_the_model(store, tmp_path, python):
    """1 GiB of external data, all holes in the file, in two equal weights."""
    weights = [
        onnx.TensorProto(name=f"w{i}", data_type=1, dims=[4096, 32768], data_location=1) for i in range(2)
    ]
    for index, weight in enumerate(weights):
        for key, value in {"location": "w.bin", "offset": str(index << 29), "length": str(1 << 29)}.items():
            weight.external_data.add(key=key, value=value)
    nodes = [
        building.node("MatMul", ["x", "w0"], ["h"]),
        building.node("MatMul", ["x", "w1"], ["g"]),
        building.node("Add", ["h", "g"], ["y"]),
    ]
    proto = building.model(
        nodes, [building.floats("x", ("n", 4096))], [building.floats("y", ("n", 32768))], weights
    )
    building.save(proto, tmp_path / "m.onnx")
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(1 << 30)
    code = """
        import resource, sys, building
        import glake_infer as gi
        building.save(building.inline(), sys.argv[2] + "/warm.onnx")
        gi.convert(sys.argv[2] + "/warm.onnx")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report = gi.convert(sys.argv[1])
        print(report.distinct_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    child = python(code, tmp_path / "m.onnx", tmp_path)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    distinct, grown = map(int, output.split())
    assert distinct == 1 << 29
    assert grown < 200 << 10, "KiB"


def test_a_weight_that_is_an_attribute_of_a_function_call(tmp_path, store):
    """The function's Constant only refers to the attribute; every call brings a weight of its own."""
    constant = onnx.helper.make_node("Constant", [], ["k"])
    constant.attribute.add(name="value", ref_attr_name="val", type=onnx.AttributeProto.TENSOR)
    body = [constant, onnx.helper.make_node("MatMul", ["a", "k"], ["b"])]
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("my", 1)]
    function = onnx.helper.make_function("my", "F", ["a"], ["b"], body, opsets[:1], attributes=["val"])
    weights = [np.random.default_rng(seed).standard_normal((32, 32), np.float32) for seed in (1, 2)]
    calls = [
        onnx.helper.make_node("F", [a], [b], domain="my", val=onnx.numpy_helper.from_array(weight))
        for a, b, weight in zip("xt", "ty", weights, strict=True)
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        calls,
        "calls",
        [value("x", onnx.TensorProto.FLOAT, [2, 32])],
        [value("y", onnx.TensorProto.FLOAT, [2, 32])],
    )
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    report = gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    assert (report.weights, report.distinct_bytes) == (2, 8192)
    x = np.ones((2, 32), np.float32)
    with gi.Pool(device="cpu") as pool, gi.load(tmp_path / "m.glake", pool, store=store) as loaded:
        np.testing.assert_allclose(
            loaded.run({"x": x})["y"], x @ weights[0] @ weights[1], rtol=1e-4, atol=1e-4
        )


def test_a_folder_is_no_model(store):
    for name in (".", "/", ""):
        with pytest.raises(gi.ModelError, match="is not a file"):
            gi.convert(name, store=store)
