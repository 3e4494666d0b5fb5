"""Engines built for real with TensorRT-RTX (no GPU), in packages: what is stored, shared, kept, said."""

import dataclasses
import logging
import pickle
import shutil
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from building import floats, matrix, model, save, tensor, typed
from folders import flip_bit
from onnx import TensorProto, helper

import glake_infer as gi
from glake_infer import maintenance
from glake_infer.allocators.errors import (
    DeviceNotFoundError,
    DigestMismatchError,
    InputError,
    ModelError,
    OutOfMemoryError,
    PackageError,
)
from glake_infer.models import doctor, zoo
from glake_infer.models.manifest import Woven, read_manifest
from glake_infer.models.tensorrt import build, convert, library
from glake_infer.models.tensorrt.convert import make_engine
from glake_infer.models.tensorrt.library import LOGGER
from glake_infer.models.tensorrt.plan import Plan, weights_section

RTX = "tensorrt-rtx"

pytestmark = pytest.mark.skipif(
    not any(map(library.installed, library.KINDS)), reason="no TensorRT is installed"
)


@pytest.fixture(autouse=True)
def installed(request):
    """Of tests that name no kind: with TensorRT-RTX."""
    if "tensorrt" not in request.node.keywords and not library.installed(RTX):
        pytest.skip("tensorrt-rtx is not installed")


TOKENS = ({"input_ids": ((1, 1), (1, 16), (2, 64))},)
HEADS = {"a": 2, "b": 17, "c": 1000, None: None}
OPTIONS = gi.EngineOptions(kind=RTX, profiles=TOKENS, capabilities=("8.6",))


def tiny(path, *, labels=2, changed=False):
    """A static model of two layers whose engine builds in a moment."""
    weights = {"v": matrix(9 if changed else 1), "w": matrix(2, (32, labels))}
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="second"),
    ]
    return save(
        model(
            nodes,
            [floats("x", (4, 32))],
            [floats("y", (4, labels))],
            [tensor(a, n) for n, a in weights.items()],
        ),
        path,
    )


def reader(path, store):
    package = gi.Package(path, store)
    (kind,) = package.manifest.engines
    return Plan(package, kind)


def on_disk(store):
    """Bytes that the store's folder takes, as `du` counts."""
    return sum(path.lstat().st_blocks * 512 for path in store.root.rglob("*"))


@pytest.fixture(scope="module", params=[RTX, pytest.param("tensorrt", marks=pytest.mark.tensorrt)])
def family(request, tmp_path_factory):
    """Four fine-tunes of one trunk with engines: (store, {head: package}, {head: report})."""
    if not library.installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    options = OPTIONS
    if request.param == "tensorrt":
        options = dataclasses.replace(OPTIONS, kind="tensorrt", capabilities=())
    folder = tmp_path_factory.mktemp("family")
    store = gi.Store(folder / "store")
    packages, reports = {}, {}
    for head, labels in HEADS.items():
        packages[head] = folder / f"{head}.glake"
        spec = zoo.spec("bert-mini", head=head, labels=labels)
        reports[head] = zoo.convert(spec, packages[head], store=store, engine=options)
    return store, packages, reports


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(store, package) of a tiny model with an engine. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("one")
    store = gi.Store(folder / "store")
    gi.convert(tiny(folder / "m.onnx"), folder / "m.glake", store=store, engine=RTX)
    return store, folder / "m.glake"


@pytest.fixture
def copied(one, tmp_path):
    store, package = one
    shutil.copytree(store.root, tmp_path / "store")
    shutil.copytree(package, tmp_path / "m.glake")
    return gi.Store(tmp_path / "store"), tmp_path / "m.glake"


# A family


def test_a_family_takes_hardly_more_than_its_weights(family):
    store, packages, reports = family
    distinct = {}
    for path in packages.values():
        distinct.update({weight.digest: weight.bytes for weight in read_manifest(path).weights})
    assert on_disk(store) <= 1.05 * sum(distinct.values())
    for report in reports.values():
        (engine,) = report.engines
        assert engine.found_bytes >= 0.99 * engine.weights_bytes > 20 << 20
        assert engine.new_bytes < 1 << 20


def test_every_plan_comes_back_bit_for_bit(family):
    store, packages, _ = family
    for path in packages.values():
        plan = reader(path, store)
        data = plan.to_bytes()
        assert len(data) == plan.entry.bytes
        assert weights_section(data) == (plan.entry.weights_offset, plan.entry.weights_bytes)
        middle = plan.entry.weights_offset - 1000
        assert plan.read(middle, 5000) == data[middle : middle + 5000]
        assert plan.read(112, len(data)) == data[112:]


def test_attention_is_woven_of_the_weights(family):
    store, packages, _ = family
    parts = reader(packages["a"], store).entry.parts
    weaves = [part for part in parts if isinstance(part, Woven)]
    names = {weight.digest: weight.name for weight in read_manifest(packages["a"]).weights}
    found = [sorted(names[strand.digest].split(".")[-2] for strand in weave.strands) for weave in weaves]
    assert found == [["key", "query", "value"]] * 4


def test_trunks_lie_at_the_same_distance_from_the_end(family):
    """So that memory can be shared: equal distances, and equal remainders of what TensorRT aligns its block to."""
    store, packages, _ = family
    places = {}
    for head, path in packages.items():
        entry = reader(path, store).entry
        end = entry.weights_offset + entry.weights_bytes
        assert (entry.aligned, entry.weights_bytes % 512) == (512, 0)
        names = {weight.digest: weight.name for weight in read_manifest(path).weights}
        places[head] = {
            names[part.digest]: end - part.offset
            for part in entry.parts
            if not isinstance(part, Woven) and names.get(part.digest, "").startswith(("enc", "emb"))
        }
    for head in ("b", "c"):
        assert places[head] == places["a"]
    moved = {name for name, place in places["a"].items() if places[None].get(name) != place}
    assert len(places["a"]) > 40
    assert moved <= {  # vectors of the last layer, in another order where no head follows
        f"encoder.layer.3.output.{name}" for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    }


def test_what_was_padded_is_told(family):
    _, packages, reports = family
    assert "the head 'classifier.weight' got 126 columns of zeros" in " ".join(reports["a"].notes)
    assert reports[None].notes == ()
    (entry,) = read_manifest(packages["b"]).engines.values()
    assert "got 111 columns" in entry.notes[0]


@pytest.mark.parametrize(("name", "head", "filled"), [
    ("bert-tiny-fp16", "a", True), ("bert-tiny-fp16", None, True), ("resnet-tiny", "a", True), ("llama-tiny", "a", False),
])  # fmt: skip
def test_models_of_the_zoo(tmp_path, name, head, filled):
    store = gi.Store(tmp_path / "store")
    profiles = {
        "bert": {"input_ids": ((1, 1), (1, 16), (2, 64))},
        "resnet": {"pixel_values": ((1, 3, 64, 64), (1, 3, 64, 64), (2, 3, 64, 64))},
        "llama": {
            "input_ids": ((1, 1), (1, 4), (1, 8)), "attention_mask": ((1, 5), (1, 8), (1, 16)),
            **{f"past_key_values.{n}.{kind}": ((1, 2, 4, 32), (1, 2, 4, 32), (1, 2, 8, 32))
               for n in range(4) for kind in ("key", "value")},
        },
    }[name.split("-")[0]]  # fmt: skip
    options = dataclasses.replace(OPTIONS, profiles=(profiles,))
    report = zoo.convert(zoo.spec(name, head=head), tmp_path / "p.glake", store=store, engine=options)
    plan = reader(tmp_path / "p.glake", store)
    plan.to_bytes()
    assert (plan.entry.aligned, plan.entry.weights_bytes % 512) == (512, 0)
    assert any("were put behind the output" in note for note in report.notes) == filled
    manifest = read_manifest(tmp_path / "p.glake")
    assert {value.name: value for value in plan.entry.inputs} == {
        value.name: value for value in manifest.inputs
    }
    assert [value.name for value in plan.entry.outputs] == [value.name for value in manifest.outputs]


# What is built


def test_what_the_manifest_says(one):
    store, package = one
    entry = reader(package, store).entry
    assert (entry.kind, entry.version) == (RTX, library.version(RTX))
    assert entry.capabilities == ("8.6", "8.9")
    assert (entry.profiles, entry.streaming) == ((), False)
    assert [str(v) for v in (*entry.inputs, *entry.outputs)] == ["x: float[4, 32]", "y: float[4, 2]"]


def test_profiles_cards_and_streaming(tmp_path):
    store = gi.Store(tmp_path / "store")
    profiles = ({"input_ids": ((1, 1), (1, 16), (1, 64))}, {"input_ids": ((2, 1), (8, 16), (8, 64))})
    options = gi.EngineOptions(
        kind=RTX, profiles=profiles, capabilities=("8.9", "12.0"), streaming=True, workspace=1 << 30
    )
    spec = zoo.spec("bert-tiny", layers=1)
    report = zoo.convert(spec, tmp_path / "p.glake", store=store, engine=options)
    assert (report.engines[0].profiles, report.engines[0].streaming) == (2, True)
    entry = reader(tmp_path / "p.glake", store).entry
    assert entry.capabilities == ("8.9", "12.0")
    assert [each["attention_mask"].max for each in entry.profiles] == [(1, 64), (8, 64)]
    assert entry.streaming


def test_external_weights_are_read_from_the_store(tmp_path):
    store = gi.Store(tmp_path / "store")
    spec = zoo.spec("bert-tiny", layers=1)
    path = zoo.write(spec, tmp_path / "m.onnx", external=True)
    gi.convert(path, tmp_path / "m.glake", store=store, engine=OPTIONS)
    again = zoo.convert(spec, tmp_path / "z.glake", store=store, engine=OPTIONS)
    assert (
        reader(tmp_path / "m.glake", store).entry.digest == reader(tmp_path / "z.glake", store).entry.digest
    )
    assert again.engines[0].new_bytes == 0


def test_building_twice_gives_the_same_plan(one, tmp_path):
    store, package = one
    opened = gi.Package(package, store)
    graph = (package / "graph.onnx").read_bytes()
    manifest = opened.manifest
    engine, report = make_engine(
        graph, manifest.weights, manifest.inputs, manifest.outputs,
        gi.EngineOptions(kind=RTX), name="m", store=store,
    )  # fmt: skip
    assert engine == manifest.engines[RTX]
    assert report.new_bytes == 0


def test_axes_of_no_name_need_not_be_equal(tmp_path):
    """Some exporters call every open axis "?"; to TensorRT axes of one name have one size."""
    proto = model(
        [helper.make_node("Add", ["x", "y"], ["z"])],
        [floats("x", ("?", 1)), floats("y", (1, "?"))], [floats("z", ("?", "?"))],
    )  # fmt: skip
    profile = {"x": ((2, 1), (2, 1), (4, 1)), "y": ((1, 3), (1, 5), (1, 5))}
    options = gi.EngineOptions(kind=RTX, profiles=(profile,), capabilities=("8.6",))
    seen = []
    convert._forget_empty_symbols(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        seen += [axis.dim_param for axis in value.type.tensor_type.shape.dim]
    assert seen == [""] * 6
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "?"
    store = gi.Store(tmp_path / "store")
    gi.convert(save(proto, tmp_path / "m.onnx"), store=store, engine=options)
    assert reader(tmp_path / "m.glake", store).entry.profiles[0]["y"].max == (1, 5)


# Bad input


def test_unsupported_operators_are_named_before_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_configure", None)  # it does not get there
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="the_det"),
        helper.make_node("Unique", ["x"], ["u"], name="the_unique"),
        helper.make_node("Unique", ["d"], ["v"]),
    ]
    path = save(
        model(nodes, [floats("x", (4, 4))], [floats("u", ("k",)), floats("v", ("k",))]), tmp_path / "m.onnx"
    )
    store = gi.Store(tmp_path / "store")
    with pytest.raises(ModelError) as caught:
        gi.convert(path, tmp_path / "m.glake", store=store, engine=RTX)
    text = str(caught.value)
    assert f"cannot take {path}" in text
    assert "Det (node 'the_det'): TensorRT does not have it" in text
    assert "Unique (node 'the_unique', that makes 'v'): TensorRT does not have it" in text
    assert "Leave --engine out" in text
    assert not (tmp_path / "m.glake").exists()
    gi.convert(path, tmp_path / "m.glake", store=store)


@pytest.mark.parametrize("kind", ["INT16", "UINT16", "UINT32", "UINT64"])
def test_weights_of_types_that_the_parser_would_misread(tmp_path, kind):
    """It refuses them in the model, and takes those in files for floats."""
    path = save(typed(getattr(TensorProto, kind)), tmp_path / "m.onnx")
    options = gi.EngineOptions(kind=RTX, profiles=({"x": ((1, 32),) * 3},))
    with pytest.raises(
        ModelError, match=rf"cannot take .*m\.onnx: .* the weights 'w' \({kind.lower()}\)\. Leave --en"
    ):
        gi.convert(path, store=gi.Store(tmp_path / "store"), engine=options)
    assert not (tmp_path / "m.glake").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_nodes_without_a_name_are_named_by_what_they_make(tmp_path, inside):
    """Not by a number: the model that TensorRT is given has more nodes, a head that is padded."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("NonZero", ["x"], ["n"])]
    made = helper.make_tensor_value_info("n", TensorProto.INT64, [2, "k"])
    if inside:
        flag = tensor(np.array(True), "flag")
        branches = [helper.make_graph(nodes[1:], name, [], [made]) for name in ("then", "else")]
        nodes[1] = helper.make_node("If", ["flag"], ["i"], then_branch=branches[0], else_branch=branches[1])
        made = helper.make_tensor_value_info("i", TensorProto.INT64, [2, "k"])
    weights = [tensor(matrix(2, (32, 17)), "w"), *([flag] if inside else [])]
    path = save(
        model(nodes, [floats("x", (4, 32))], [floats("y", (4, 17)), made], weights), tmp_path / "m.onnx"
    )
    where = "in the If that makes 'i'" if inside else "that makes 'n'"
    with pytest.raises(ModelError, match=rf"NonZero \(node {where}\): TensorRT does not have it\. "):
        gi.convert(path, store=gi.Store(tmp_path / "store"), engine=RTX)


def test_inputs_without_a_profile(tmp_path):
    path = zoo.write(zoo.spec("bert-tiny", layers=1), tmp_path / "m.onnx")
    with pytest.raises(
        InputError, match=r"no optimization profile was given: input_ids.*--profile input_ids=1x1:"
    ):
        gi.convert(path, store=gi.Store(tmp_path / "store"), engine=RTX)


def test_what_is_wrong_with_the_options_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path, store = tiny(tmp_path / "m.onnx"), gi.Store(tmp_path / "store")
    for engine, said in (
        ("openvino", "'openvino' is no engine"),
        (
            gi.EngineOptions(kind=RTX, capabilities=("9.0",)),
            r"cannot build for the compute capability 9\.0: it knows",
        ),
    ):
        with pytest.raises(InputError, match=said):
            gi.convert(path, store=store, engine=engine)
    fake = SimpleNamespace(__version__="10.9", IBuilderConfig=object)
    monkeypatch.setattr(library, "module", lambda kind: fake)
    monkeypatch.setattr(doctor, "find_gpus", lambda: ((), "", None))
    with pytest.raises(DeviceNotFoundError, match=r"this machine has none.*--engine tensorrt-rtx"):
        gi.convert(path, store=store, engine="tensorrt")
    gpu = doctor.Gpu(0, "H200", 1 << 37, "9.0", True)
    monkeypatch.setattr(doctor, "find_gpus", lambda: ((gpu,), "", None))
    with pytest.raises(InputError, match=r"for the GPU of this machine alone, which has .* 9\.0, not 8\.9"):
        gi.convert(path, store=store, engine=gi.EngineOptions(kind="tensorrt", capabilities=("8.9",)))
    assert build.check_options(gi.EngineOptions(kind="tensorrt")) == ("9.0",)
    assert not store.root.exists()


def test_a_build_that_fails_is_told_in_tensorrt_s_words(tmp_path):
    """An operator that parses, and that the builder cannot do."""
    nodes = [
        helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "c"], ["y"]),
    ]
    weight = np.arange(32 * 32, dtype=np.int8).reshape(32, 32)
    path = save(
        model(nodes, [floats("x", (4, 32))], [floats("y", (4, 32))], [tensor(weight, "w")]),
        tmp_path / "m.onnx",
    )
    with pytest.raises(
        ModelError, match=r"could not build .*m\.onnx: .*Quantized constant.*leave --engine out"
    ):
        gi.convert(path, store=gi.Store(tmp_path / "store"), engine=RTX)
    assert not (tmp_path / "m.glake").exists()


@pytest.mark.parametrize(
    "said",
    [
        "Error Code 2: OutOfMemory (Requested size was 68719476736 bytes.)",
        "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (no further information)",
        "Error Code 1: Cuda Runtime (out of memory)",
        "Error Code 10: Internal Error (insufficient memory on available tactics)",
        "std::bad_alloc",
    ],
)
def test_a_builder_out_of_memory(monkeypatch, one, said):
    error = build._failed("m.onnx", ["something", said], gi.EngineOptions(kind=RTX))
    assert type(error) is OutOfMemoryError
    assert said in str(error)
    assert "lower --workspace" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    refusal = OutOfMemoryError(
        requested=1, active=1, idle=0, reserved=1, limit=1, needed_limit=2, device_free=0, holders=[]
    )
    allocator = SimpleNamespace(take_error=lambda: refusal)
    options = gi.EngineOptions(kind=RTX, allocator=allocator)
    assert build._failed("m.onnx", [said], options) is refusal


def test_a_parser_without_room_for_the_weights(tmp_path):
    """To it that is an initializer of no type that it has."""
    said = [
        "WeightsContextMemoryMap.cpp:140: Failed to map file to memory: /store/objects/62/62d2",
        "In node -1",
    ]
    logger = SimpleNamespace(take_errors=lambda: said)
    parser = SimpleNamespace(parse=lambda model, path: False)
    trt = SimpleNamespace(OnnxParser=lambda network, logger: parser)
    with pytest.raises(OutOfMemoryError, match=r"map the weights of m\.onnx .*62d2.*ulimit -v unlimited"):
        build._parse(trt, None, logger, b"", tmp_path, "m.onnx")


def test_a_workspace_that_is_too_small(tmp_path):
    options = gi.EngineOptions(kind=RTX, workspace=0)
    with pytest.raises(
        InputError, match=r"with a workspace of 0 B: .*Give a larger --workspace, or leave it out"
    ):
        gi.convert(tiny(tmp_path / "m.onnx"), store=gi.Store(tmp_path / "store"), engine=options)


# Progress and interrupts


def test_progress_and_log(tmp_path, caplog):
    told = []
    with caplog.at_level(logging.INFO, LOGGER):
        gi.convert(
            tiny(tmp_path / "m.onnx"), store=gi.Store(tmp_path / "store"), engine=RTX,
            progress=lambda *step: told.append(step),
        )  # fmt: skip
    second = [record for record in caplog.records if library.SECOND_LOGGER in record.message]
    assert all(record.levelno < logging.WARNING for record in second)
    names = {name for name, _, _ in told}
    assert {"weights", "engine: building engine"} <= names
    assert all(0 <= done <= total for _, done, total in told)
    steps = [(done, total) for name, done, total in told if name == "engine: building engine"]
    (total,) = {total for _, total in steps}
    assert (steps[0], steps[-1]) == ((0, total), (total, total))
    assert {done for done, _ in steps} == set(range(total + 1))
    said = [int(found[1]) for record in caplog.records if (found := build.WEIGHTS.search(record.message))]
    assert len(said) == 2  # the second is filled up
    assert said[-1] == reader(tmp_path / "m.glake", gi.Store(tmp_path / "store")).entry.weights_bytes


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_error_of_progress_ends_the_build(tmp_path, error):
    store = gi.Store(tmp_path / "store")
    after = []

    def progress(name, done, total):
        if name == "engine: building engine":
            after.append(done)
            raise error

    with pytest.raises(error):
        gi.convert(tiny(tmp_path / "m.onnx"), store=store, engine=RTX, progress=progress)
    assert after == [0]
    assert not (tmp_path / "m.glake").exists()
    assert maintenance.gc(store).kept_objects == 0


def test_ctrl_c_ends_the_build(tmp_path):
    """Not as an exception in a callback of TensorRT, which would end the process."""
    before = signal.getsignal(signal.SIGINT)
    calls = []

    def progress(name, done, total):
        if name == "engine: building engine":
            signal.raise_signal(signal.SIGINT)
            calls.append(done)

    with pytest.raises(KeyboardInterrupt):
        gi.convert(
            tiny(tmp_path / "m.onnx"), store=gi.Store(tmp_path / "store"), engine=RTX, progress=progress
        )
    assert calls == [0]
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "m.glake").exists()


def test_engines_can_be_built_by_other_threads(tmp_path):
    store = gi.Store(tmp_path / "store")
    paths = [tiny(tmp_path / f"{n}.onnx", labels=n) for n in (2, 3)]
    threads = [
        threading.Thread(target=gi.convert, args=(p,), kwargs={"store": store, "engine": RTX}) for p in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path in paths:
        reader(path.with_suffix(".glake"), store).to_bytes()


# In a store


def test_an_archive_carries_the_engine(one, tmp_path):
    store, package = one
    gi.export_archive(package, tmp_path / "m.tar", store=store)
    other = gi.Store(tmp_path / "other")
    report = gi.import_archive(tmp_path / "m.tar", tmp_path / "m.glake", store=other)
    assert report.engines == (RTX,)
    assert report.distinct_weights == len(read_manifest(package).distinct_of("onnx"))
    assert reader(tmp_path / "m.glake", other).to_bytes() == reader(package, store).to_bytes()


def test_gc_keeps_the_parts_while_the_package_is_there(copied):
    store, package = copied
    before = {digest for digest, _ in store.objects}
    for record in store.records():
        store.forget(record.path)
    manifest = read_manifest(package)
    store.register(package, manifest.identity, manifest.distinct_of("onnx"))  # older than its engine
    assert maintenance.gc(store).objects == 0
    assert {digest for digest, _ in store.objects} == before
    reader(package, store).to_bytes()
    shutil.rmtree(package)
    assert maintenance.gc(store).kept_objects == 0


def test_verify_and_loading_name_a_damaged_part(copied):
    store, package = copied
    entry = read_manifest(package).engines[RTX]
    (digest,) = entry.compressed
    path = store.objects.path(digest)
    flip_bit(path)
    opened = gi.Package(package, store)
    with pytest.raises(
        DigestMismatchError, match=rf"a part of the {RTX} engine, {digest[:16]}, was changed on disk"
    ):
        opened.check_present()
    assert list(maintenance.verify(store, remove=True).damaged) == [digest]
    with pytest.raises(
        PackageError, match=rf"a part of the {RTX} engine.* is missing in the store.*[Cc]onvert"
    ):
        opened.check_present()
    with pytest.raises(PackageError, match="should hold"):
        reader(package, store).to_bytes()


def test_converting_again(copied, tmp_path):
    store, package = copied
    plan = reader(package, store).to_bytes()
    report = gi.convert(tiny(tmp_path / "m.onnx"), package, store=store)
    assert (report.engines, report.kept_engines, report.notes) == ((), (RTX,), ())
    assert reader(package, store).to_bytes() == plan
    report = gi.convert(tiny(tmp_path / "m.onnx", changed=True), package, store=store)
    assert report.kept_engines == ()
    assert (
        f"the {RTX} engine that the package had was dropped, because the model has changed" in report.notes[0]
    )
    assert read_manifest(package).engines == {}
    report = gi.convert(tiny(tmp_path / "m.onnx"), package, store=store, engine=RTX)
    assert (len(report.engines), report.kept_engines) == (1, ())
    assert reader(package, store).to_bytes() == plan


def test_an_engine_whose_parts_are_lost_is_dropped(copied, tmp_path):
    store, package = copied
    (digest,) = read_manifest(package).engines[RTX].compressed
    store.objects.path(digest).unlink()
    report = gi.convert(tiny(tmp_path / "m.onnx"), package, store=store)
    assert "because the store lacks parts of it: convert again with --engine" in report.notes[0]
    gi.Package(package, store).check_present()


def test_inspect_shows_the_engine(family):
    store, packages, _ = family
    (found,) = gi.inspect(packages["a"], store=store).models
    (engine,) = found.engines.values()
    (entry,) = read_manifest(packages["a"]).engines.values()
    assert (engine.version, engine.bytes, engine.weights_bytes) == (
        entry.version,
        entry.bytes,
        entry.weights_bytes,
    )
    assert engine.own_bytes == sum(entry.objects.values())
    assert found.notes == entry.notes
    assert found.derived_bytes == sum(
        w.bytes for w in {w.digest: w for w in read_manifest(packages["a"]).weights}.values()
    ) - sum(found.distinct.values())


def test_the_timing_cache_of_the_full_tensorrt_is_kept(tmp_path):
    """On a builder that stands in for it: TensorRT-RTX times nothing."""
    store = gi.Store(tmp_path / "store")
    given = []

    class Config:
        def create_timing_cache(self, data):
            given.append(bytes(data))
            return None if data == b"broken" else SimpleNamespace(serialize=lambda: bytearray(data + b"+"))

        def set_timing_cache(self, cache, ignore_mismatch):
            self.cache = cache

        def get_timing_cache(self):
            return self.cache

    trt = SimpleNamespace(__version__="10.9")
    file = build._cache_file("tensorrt", trt, store)
    assert file.parent == store.root / "tensorrt"
    assert build._cache_file(RTX, trt, store) is None
    for _ in range(2):
        with build._timing_cache(Config(), file, store):
            pass
    assert (given, file.read_bytes()) == ([b"", b"+"], b"++")
    file.write_bytes(b"broken")
    with build._timing_cache(Config(), file, store):
        pass
    assert file.read_bytes() == b"+"
    maintenance.gc(store)
    assert file.exists()
