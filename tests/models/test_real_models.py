"""Ten models that people use: the whole road for each, compared with plain ONNX Runtime."""

import functools
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import real_models

import glake_infer as gi
from glake_infer.allocators.errors import ModelError
from glake_infer.models.convert import convert
from glake_infer.models.export import export
from glake_infer.models.package import Package
from glake_infer.models.tensorrt import library
from glake_infer.models.tensorrt.convert import make_engine
from glake_infer.models.tensorrt.plan import Plan

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """One store for all of them, and a function that converts a model into it (once): (package, store)."""
    folder = tmp_path_factory.mktemp("real")
    store = gi.Store(folder / "store")

    @functools.cache
    def package(name):
        convert(real_models.path_of(name), folder / f"{name}.glake", store=store)
        return folder / f"{name}.glake"

    return package, store


def session(path, **entries):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session, feeds):
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def identical(expected, found):
    assert list(expected) == list(found)
    for name, array in expected.items():
        assert array.dtype == found[name].dtype, name
        assert array.tobytes() == found[name].tobytes(), (
            f"{name} differs by {np.abs(array - found[name]).max()}"
        )


SOAKING = {"ppocr-det"}
"""Convolutions of the same family as ppocr-rec's and ocr-detect's, and the slowest of all."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] * (name in SOAKING)) for name in real_models.ENTRIES]
)
def test_the_whole_road(workshop, tmp_path, name):
    make, store = workshop
    package, source = make(name), real_models.path_of(name)
    feeds = list(real_models.feeds_of(name))
    plain = session(source)
    expected = [run(plain, feed) for feed in feeds]
    del plain

    target = export(package, tmp_path / "out", store=store).target
    onnx.checker.check_model(target)
    exported = session(target)
    for feed, outputs in zip(feeds, expected, strict=True):
        identical(outputs, run(exported, feed))
    del exported

    with gi.load(package, sharing="fast", store=store) as model:
        assert {value.name for value in model.inputs} == feeds[0].keys()
        for feed, outputs in zip(feeds, expected, strict=True):
            identical(outputs, model.run(feed))

    guarded = "cpu-lean" in Package(package, store).manifest.variants
    unpacked = None if guarded else session(source, disable_prepacking="1")
    with gi.load(package, sharing="lean", store=store) as model:
        for feed, outputs in zip(feeds, expected, strict=True):
            found = model.run(feed)
            if unpacked is not None:
                identical(run(unpacked, feed), found)
            for key, array in outputs.items():
                np.testing.assert_allclose(found[key], array, rtol=1e-4, atol=1e-4)


def test_only_the_int8_model_is_guarded(workshop):
    make, store = workshop
    guarded = [
        name for name in real_models.ENTRIES if "cpu-lean" in Package(make(name), store).manifest.variants
    ]
    assert guarded == ["minilm-l6-int8"]


def test_a_model_whose_weights_are_stored_adds_none(tmp_path):
    store = gi.Store(tmp_path / "store")
    convert(real_models.path_of("silero-ifless"), tmp_path / "a.glake", store=store)
    report = convert(real_models.path_of("silero-op15"), tmp_path / "b.glake", store=store)
    assert report.weights > 0
    assert report.new_bytes == 0


def test_constants_only(workshop):
    make, store = workshop
    source = onnx.load_model(real_models.path_of("ppocr-cls"))
    assert not source.graph.initializer
    constants = [node.attribute[0].t for node in source.graph.node if node.op_type == "Constant"]
    held = [onnx.numpy_helper.to_array(tensor).tobytes() for tensor in constants]
    weights = Package(make("ppocr-cls"), store).manifest.weights_of("onnx")
    assert sorted(w.bytes for w in weights) == sorted(len(data) for data in held if len(data) >= 1024)
    assert len(weights) == 45


REFUSED_BY_TENSORRT = {
    "minilm-l6-int8": "could not build.*Quantized constant",
    "ocr-common-old": r"DynamicQuantizeLinear \(node .* and 19 more\): TensorRT does not have it; ConvInteger",
    "silero-op15": "could not build.*Assertion",  # its If
    "silero-half": "could not build.*Assertion",
}
"""Real models that TensorRT-RTX 1.7 does not take, and what it says (docs/tensorrt.md)."""


@pytest.mark.skipif(not library.installed("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize("name", real_models.ENTRIES)
def test_engines(workshop, name):
    make, store = workshop
    package = Package(make(name), store)
    manifest = package.manifest
    feeds = list(real_models.feeds_of(name))
    profile = {}
    for value in manifest.inputs:
        if any(not isinstance(axis, int) for axis in value.shape):
            axes = [*zip(*(feed[value.name].shape for feed in feeds), strict=True)]
            profile[value.name] = (tuple(map(min, axes)), tuple(map(max, axes)), tuple(map(max, axes)))
    options = gi.EngineOptions(
        kind="tensorrt-rtx", profiles=(profile,) if profile else (), capabilities=("8.6",)
    )

    def build():
        graph = package.path / manifest.variants["onnx"].graph
        return make_engine(
            graph.read_bytes(),
            manifest.weights,
            manifest.inputs,
            manifest.outputs,
            options,
            name=name,
            store=store,
        )

    with store.using():
        if name in REFUSED_BY_TENSORRT:
            with pytest.raises(ModelError, match=REFUSED_BY_TENSORRT[name]):
                build()
            return
        engine, report = build()
    assert engine.aligned == 512
    assert report.found_bytes + sum(engine.objects.values()) > 0.9 * engine.weights_bytes
    with_engine = SimpleNamespace(
        path=package.path,
        store=store,
        manifest=manifest.model_copy(update={"engines": {engine.kind: engine}}),
    )
    assert len(Plan(with_engine, engine.kind).to_bytes()) == engine.bytes
