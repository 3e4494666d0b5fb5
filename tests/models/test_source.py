import os
import random

import building
import numpy as np
import onnx
import pytest
from onnx import helper

import glake_infer as gi
from glake_infer.digest import digest_of, digest_of_file
from glake_infer.models import source as module
from glake_infer.models.convert import convert
from glake_infer.models.export import export
from glake_infer.models.graph import inline_bytes
from glake_infer.models.source import SourceModel, check_operators


def refused(path, message):
    """Convert refuses `path` with a ModelError, and leaves nothing behind."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(gi.ModelError, match=message):
        convert(path)
    if before is not None:
        assert sorted(path.parent.iterdir()) == before
    assert not list(gi.Store().objects)


@pytest.fixture
def folder(tmp_path, store):
    """Where models lie; beside the store and other things that they must not reach."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


# The file


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is text\n", "not an ONNX model"),
        (b"PK\x03\x04" + bytes(100), "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX model"),
        (bytes(1000), "not an ONNX model"),
        (b"\x08\x0a", "holds no graph"),
        (
            onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g")).SerializeToString(),
            "holds no graph",
        ),
        (
            onnx.ModelProto(ir_version=10, graph=building.inline().graph).SerializeToString(),
            "declares no opset",
        ),
    ],
)
def test_what_is_no_model(folder, data, message):
    path = folder / "model.onnx"
    path.write_bytes(data)
    refused(path, message)


def test_what_is_no_file(folder):
    refused(folder / "absent.onnx", "cannot read .*absent.onnx: No such file")
    (folder / "folder.onnx").mkdir()
    refused(folder / "folder.onnx", "is not a file")
    os.mkfifo(folder / "pipe.onnx")
    refused(folder / "pipe.onnx", "is not a file")


@pytest.mark.parametrize("part", [0.001, 0.1, 0.35, 0.5, 0.75, 0.9, 0.99, 0.999])
def test_a_truncated_file(folder, part):
    data = building.inline().SerializeToString()
    path = folder / "model.onnx"
    path.write_bytes(data[: int(len(data) * part) or 1])
    refused(path, "truncated|no graph|no opset")


def test_more_than_protobuf_can_hold(folder):
    path = folder / "model.onnx"
    with path.open("wb") as file:
        file.truncate((2 << 30) + 1)
    refused(path, "protobuf file ends at 2 GiB.*save_as_external_data")


# Opsets and operators


def test_unknown_opsets_and_operators_are_named(folder):
    def check(change, message):
        proto = building.edited(building.inline(), change)
        refused(building.save(proto, folder / "model.onnx"), message)

    def opset(domain, version):
        return lambda m: m.opset_import.append(helper.make_opsetid(domain, version))

    check(
        lambda m: setattr(m.opset_import[0], "version", 999),
        "opset 999 of the domain 'ai.onnx'.*pip install -U onnx",
    )
    check(opset("ai.onnx.ml", 99), "opset 99 of the domain 'ai.onnx.ml'")
    check(lambda m: setattr(m.graph.node[0], "op_type", "MatMull"), "unknown operator MatMull .*'h0'")
    check(lambda m: setattr(m.graph.node[0], "op_type", "Gelu"), "unknown operator Gelu .*opset 17")
    check(lambda m: setattr(m.graph.node[0], "op_type", "Upsample"), "unknown operator Upsample")
    check(lambda m: setattr(m.graph.node[0], "domain", "com.acme"), "unknown operator com.acme:MatMul")
    check(
        lambda m: setattr(m.graph.node[0], "domain", "ai.onnx.ml"),
        "imports no opset of the domain 'ai.onnx.ml'",
    )
    check(lambda m: m.graph.node[0].ClearField("output"), "operator MatMul .* 2 inputs and 0 outputs")
    check(lambda m: m.graph.node[0].ClearField("input"), "operator MatMul .* 0 inputs and 1 outputs")


def test_an_unknown_operator_in_a_body_or_a_function_is_found(folder):
    proto = building.nested()
    then = next(a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    inner = next(a.g for a in then.node[0].attribute if a.name == "then_branch")
    inner.node[0].op_type = "Nonesuch"
    refused(building.save(proto, folder / "a.onnx"), "unknown operator Nonesuch")
    proto = building.functions("initializer")
    next(a.g for a in proto.functions[0].node[1].attribute if a.name == "else_branch").node[
        0
    ].op_type = "Nonesuch"
    refused(building.save(proto, folder / "b.onnx"), "unknown operator Nonesuch")


def test_operators_of_onnx_runtime_and_of_the_model_pass():
    check_operators(building.functions("nothing"), "m")
    proto = building.inline()
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "FusedMatMul", "com.microsoft"
    check_operators(proto, "m")
    proto.graph.node[2].op_type, proto.opset_import[0].version = "LayerNormalization", 16
    check_operators(proto, "m")  # ONNX has it from opset 17 on, ONNX Runtime from 1 on
    proto.graph.node[1].domain = "ai.onnx"  # the long name of the default domain
    check_operators(proto, "m")


# External data


def test_external_bytes_are_read_where_they_lie(folder, monkeypatch):
    monkeypatch.setattr("glake_infer.digest.PIECE", 1000)
    proto = building.inline()
    path = building.with_external(proto, folder)
    with SourceModel(path) as opened:
        opened.check_external()
        assert opened.digest == digest_of_file(path)
        for tensor, original in zip(opened.model.graph.initializer, proto.graph.initializer, strict=True):
            assert b"".join(bytes(piece) for piece in opened.pieces(tensor)) == inline_bytes(original)
            assert opened.digest_of(tensor) == digest_of(inline_bytes(original))


def edit_entry(path, key, value, index=0):
    proto = onnx.load_model(path, load_external_data=False)
    weight = proto.graph.initializer[index]
    for entry in list(weight.external_data):
        if entry.key == key:
            weight.external_data.remove(entry)
    if value is not None:
        weight.external_data.add(key=key, value=value)
    return building.save(proto, path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../secret", "points to '../secret', outside the model's folder"),
        ("sub/../../secret", "outside"),
        ("{tmp}/secret", "outside"),
        ("{tmp}/models/weights.bin", "outside"),
        ("link", "points to 'link', outside"),
        ("folder-link/secret", "outside"),
        ("", "outside"),
        ("absent.bin", "'w0' cannot be read: .*absent.bin: No such file"),
        ("loop", "cannot be read: .*loop"),
        ("a\0b", "cannot be read"),
        ("x" * 300, "cannot be read"),
        ("pipe", "not an ordinary file"),
        (".", "not an ordinary file|cannot be read"),
    ],
)
def test_external_data_elsewhere_or_absent(folder, tmp_path, location, message):
    path = building.with_external(building.inline(), folder)
    (tmp_path / "secret").write_bytes(bytes(100_000))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder-link").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    refused(edit_entry(path, "location", location.format(tmp=tmp_path)), message)


def test_a_link_within_the_folder_is_fine(folder):
    path = building.with_external(building.inline(), folder)
    (folder / "weights.bin").rename(folder / "real.bin")
    (folder / "weights.bin").symlink_to("real.bin")
    assert convert(path).weights == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "many", "which are not numbers"),
        ("offset", "-1", "offset -1"),
        ("length", "5", "length 5, but its shape"),
        ("length", "9" * 5000, "not numbers"),
        ("offset", "999999", "is short: .*weights.bin ends at byte"),
        ("offset", str(1 << 70), "is short"),
    ],
)
def test_wrong_ranges(folder, key, value, message):
    refused(edit_entry(building.with_external(building.inline(), folder), key, value), message)


def test_a_range_without_offset_and_length_is_the_file(folder):
    path = building.with_external(building.chain(building.matrix(1)), folder, start=0)
    edit_entry(path, "offset", None)
    edit_entry(path, "length", None)
    assert convert(path).weight_bytes == 4096


@pytest.mark.parametrize("left", [0, 1, 5000, -65])
def test_short_external_data(folder, left):
    path = building.with_external(building.inline(), folder)
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[:left])
    refused(path, r"external data of weight 'w\d' is short.*truncated")


def test_data_that_shrinks_while_it_is_read(folder):
    path = building.with_external(building.inline(), folder)
    with SourceModel(path) as opened:
        opened.check_external()
        os.truncate(folder / "weights.bin", 5000)
        with pytest.raises(gi.ModelError, match="'w1' is short"):
            [opened.digest_of(tensor) for tensor in opened.model.graph.initializer]


def test_external_tensors_that_are_no_weights_come_into_the_graph(folder, tmp_path):
    """Attributes, small and sparse ones: a package names nothing outside the store."""
    proto = building.sparse()
    sparse = proto.graph.sparse_initializer[0]
    big = building.tensor(np.arange(300, dtype=np.int64), "v")
    proto.graph.node.append(
        building.node("Constant", [], ["s"], sparse_value=helper.make_sparse_tensor(big, big, [300]))
    )
    values = proto.graph.node[-1].attribute[0].sparse_tensor.values
    data = bytearray()
    for tensor in (sparse.values, sparse.indices, values):
        raw = tensor.raw_data
        onnx.external_data_helper.set_external_data(tensor, "weights.bin", offset=len(data), length=len(raw))
        tensor.ClearField("raw_data")
        data += raw
    (folder / "weights.bin").write_bytes(data)
    convert(building.save(proto, folder / "model.onnx"))
    graph = gi.Package(folder / "model.glake").graph()
    assert b"weights.bin" not in graph.SerializeToString()
    export(folder / "model.glake", tmp_path / "out")
    before = building.sparse()
    feeds = building.feeds_for(before)
    np.testing.assert_array_equal(
        building.run_plain(tmp_path / "out" / "model.onnx", feeds)["y"],
        building.run_plain(before, feeds)["y"],
    )


# Damage of any kind


@pytest.mark.parametrize(
    "name", ["nested", "quantized", "strings", "function_initializer", "external", "sparse"]
)
def test_damaged_bytes_give_our_errors_only(folder, name):
    """50 seeded cuts and changes of single bytes of each model."""
    rng = random.Random(name)
    if name == "external":
        path = building.with_external(building.inline(), folder)
    else:
        path = building.save(building.SHAPES[name](), folder / "model.onnx")
    data = path.read_bytes()
    weights = [
        w.raw_data for w in onnx.load_model_from_string(data).graph.initializer if len(w.raw_data) > 64
    ]
    inside = [data.index(raw) for raw in weights]
    for number in range(50):
        changed = bytearray(data)
        if number % 5 == 0:
            del changed[rng.randrange(len(data)) :]
        for _ in range(number % 3 + 1):
            place = rng.randrange(len(changed)) if changed else 0
            while any(start <= place < start + len(raw) for start, raw in zip(inside, weights, strict=True)):
                place = rng.randrange(len(data))  # a weight's own bytes may be anything
            if place < len(changed):
                changed[place] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            convert(path)
            gi.inspect([path, folder / "model.glake"])
            for variant in gi.Package(folder / "model.glake").manifest.variants:
                gi.Package(folder / "model.glake").graph(variant)
        except gi.GlakeError:
            continue


def test_without_onnx_runtime_only_known_domains_are_checked(monkeypatch):
    monkeypatch.setattr(module, "_runtime_operators", dict)
    proto = building.inline()
    proto.graph.node[0].domain = "com.acme"
    check_operators(proto, "m")
    proto.graph.node[1].op_type = "MatMull"
    with pytest.raises(gi.ModelError, match="MatMull"):
        check_operators(proto, "m")
