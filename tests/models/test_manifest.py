import json

import pytest

from glake_infer.allocators.errors import GlakeError, PackageError, UnsupportedVersionError
from glake_infer.digest import digest_of
from glake_infer.models import manifest as module
from glake_infer.models.manifest import (
    Manifest,
    Run,
    Source,
    Value,
    Variant,
    Weight,
    read_manifest,
    run_digest,
)

A, B, C, D = (digest_of(bytes([i])) for i in range(4))


def weight(name, digest=A, size=4096):
    return Weight(name=name, digest=digest, bytes=size, dtype="float", shape=(32, 32))


def run(first, *weights):
    return Run(
        first=first, count=len(weights), bytes=sum(w.bytes for w in weights), digest=run_digest(weights)
    )


WEIGHTS = (weight("a"), weight("b", B), weight("again", A))


def make(**changes):
    fields = {
        "producer": "test",
        "source": Source(name="model.onnx", digest=C),
        "inputs": (Value(name="x", dtype="float", shape=("n", None, 3)),),
        "outputs": (Value(name="y", dtype="float", shape=None),),
        "variants": {"onnx": Variant(graph="graph.onnx", digest=C, purpose="p")},
        "weights": WEIGHTS,
        "runs": (run(0, *WEIGHTS[:2]), run(2, WEIGHTS[2])),
    }
    return Manifest(**{**fields, **changes}).sealed()


def write(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )
    return folder


def resealed(content):
    return {**content, "identity": module._identity(content)}


@pytest.fixture
def content():
    return json.loads(make().to_json())


def test_a_round_trip(tmp_path):
    manifest = make()
    assert read_manifest(write(tmp_path / "p", manifest.to_json())) == manifest
    assert (manifest.weight_bytes, manifest.distinct) == (3 * 4096, {A: 4096, B: 4096})
    assert [str(v) for v in (*manifest.inputs, *manifest.outputs)] == ["x: float[n, ?, 3]", "y: float"]


def test_the_format():
    """Golden: what version 3 looks like never changes."""
    content = json.loads(make(weights=WEIGHTS[:1], runs=(run(0, WEIGHTS[0]),)).to_json())
    assert content == {
        "format": "glake-infer package",
        "version": 3,
        "producer": "test",
        "source": {"name": "model.onnx", "digest": C},
        "inputs": [{"name": "x", "dtype": "float", "shape": ["n", None, 3]}],
        "outputs": [{"name": "y", "dtype": "float", "shape": None}],
        "variants": {"onnx": {"graph": "graph.onnx", "digest": C, "purpose": "p"}},
        "weights": [
            {
                "name": "a",
                "digest": A,
                "bytes": 4096,
                "dtype": "float",
                "shape": [32, 32],
                "overridable": False,
                "variants": [],
                "pieces": "",
            }
        ],
        "runs": [{"first": 0, "count": 1, "bytes": 4096, "digest": digest_of(A.encode())}],
        "engines": {},
        "notes": [],
        "identity": content["identity"],
    }
    rest = {key: value for key, value in content.items() if key != "identity"}
    assert content["identity"] == digest_of(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


VERSION_1 = b"""{
 "format": "glake-infer package", "version": 1, "producer": "glake-infer 0.1.0",
 "source": {"name": "m.onnx", "digest": "0000000000000000000000000000000000000000000000000000000000000000"},
 "inputs": [{"name": "x", "dtype": "float", "shape": ["n", 32]}],
 "outputs": [{"name": "y", "dtype": "float", "shape": null}],
 "variants": {
  "onnx": {"graph": "graph.onnx", "purpose": "as given",
   "digest": "1111111111111111111111111111111111111111111111111111111111111111"},
  "cpu-lean": {"graph": "graph.cpu-lean.onnx", "purpose": "lean",
   "digest": "2222222222222222222222222222222222222222222222222222222222222222"}},
 "weights": [{"name": "a", "bytes": 4096, "dtype": "float", "shape": [32, 32], "overridable": false,
  "digest": "3333333333333333333333333333333333333333333333333333333333333333"}],
 "runs": [{"first": 0, "count": 1, "bytes": 4096,
  "digest": "8c54dea7ddc459b304995ac44e7660a78d69d856de9d28e9665737bbb8c6bf52"}],
 "notes": [], "identity": "b949f6d883f11ec565a235d99194b5179a84f39b49af89f24abbc9310973d76c"}
"""


def test_version_1_stays_readable(tmp_path):
    """Stored bytes: what was written before there were variants with weights of their own."""
    folder = write(tmp_path / "p", VERSION_1)
    manifest = read_manifest(folder)
    assert manifest.version == 3
    assert manifest.identity == json.loads(VERSION_1)["identity"]
    for variant in ("onnx", "cpu-lean"):
        assert [w.name for w in manifest.weights_of(variant)] == ["a"]
    assert manifest.weight_bytes == 4096
    write(tmp_path / "q", manifest.sealed().to_json())
    again = read_manifest(tmp_path / "q")
    assert again.model_copy(update={"identity": manifest.identity}) == manifest
    content = json.loads(VERSION_1)
    content["weights"][0]["pieces"] = A
    with pytest.raises(PackageError, match="fields that version 1 does not know"):
        read_manifest(write(tmp_path / "p", resealed(content)))


def test_version_2_stays_readable(tmp_path, content):
    """What was written before there were engines."""
    del content["engines"]
    content["version"] = 2
    manifest = read_manifest(write(tmp_path / "p", resealed(content)))
    assert (manifest.version, manifest.engines, manifest.weights) == (3, {}, WEIGHTS)


ENGINE = {
    "kind": "tensorrt-rtx", "version": "1.7.1.116", "capabilities": ["8.6", "8.9"], "bytes": 20000, "digest": D,
    "parts": [
        {"offset": 0, "bytes": 5000, "digest": C, "start": 0},
        {"offset": 5000, "bytes": 4096, "digest": B, "start": 0},
        {"offset": 9096, "bytes": 1024 * 10, "strands": [
            {"digest": A, "bytes": 256, "start": 0}, {"digest": C, "bytes": 512, "start": 16},
            {"digest": B, "bytes": 256, "start": 1024}]},
        {"offset": 19336, "bytes": 664, "digest": C, "start": 5000},
    ],
    "objects": {C: 700}, "compressed": {C: 6000},
    "inputs": [{"name": "x", "dtype": "float", "shape": ["n", 3]}],
    "outputs": [{"name": "y", "dtype": "float", "shape": ["n", 2]}],
    "profiles": [{"x": {"min": [1, 3], "opt": [2, 3], "max": [8, 3]}}],
    "weights_offset": 5000, "weights_bytes": 14336, "aligned": 512, "streaming": False, "notes": ["padded"],
}  # fmt: skip


def test_an_engine_round_trips(tmp_path, content):
    content["engines"] = {"tensorrt-rtx": ENGINE}
    manifest = read_manifest(write(tmp_path / "p", resealed(content)))
    assert json.loads(manifest.to_json())["engines"] == {"tensorrt-rtx": ENGINE}
    assert manifest.distinct == {A: 4096, B: 4096, C: 700}
    assert manifest.engines["tensorrt-rtx"].needed == {A, B, C}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.update(kind="tensorrt"), "calls itself 'tensorrt'"),
        (lambda e: e["parts"].pop(1), "leave a gap or overlap at byte 5000"),
        (lambda e: e["parts"].pop(), "have 19336 bytes together, the plan 20000"),
        (lambda e: e["parts"][0].update(start=1001), "goes beyond the end of its object"),
        (lambda e: e["parts"][2]["strands"][0].update(start=-1), "greater than or equal to 0"),
        (lambda e: e["parts"][2]["strands"][2].update(start=2000), "goes beyond the end of its object"),
        (lambda e: e["parts"][2]["strands"][0].update(bytes=255), "end within a row"),
        (lambda e: e["parts"][1].update(digest=D), "which is not listed"),
        (lambda e: e["parts"][1].update(bytes=0), "greater than or equal to 1"),
        (lambda e: e["objects"].update({D: 5}), "is in no part of the plan"),
        (lambda e: e["objects"].update({A: 5}), "another size"),
        (lambda e: e["compressed"].update({B: 9}), "is not listed"),
        (lambda e: e.update(weights_bytes=15001), "beyond the end of the plan"),
        (lambda e: e.update(more=1), "more"),
    ],
)
def test_an_engine_that_does_not_hold_together(tmp_path, content, change, said):
    engine = json.loads(json.dumps(ENGINE))
    change(engine)
    content["engines"] = {"tensorrt-rtx": engine}
    with pytest.raises(PackageError, match=said):
        read_manifest(write(tmp_path / "p", resealed(content)))


def test_engines_of_unknown_kinds_and_in_old_versions(tmp_path, content):
    content["engines"] = {"openvino": ENGINE}
    with pytest.raises(PackageError, match="engines"):
        read_manifest(write(tmp_path / "p", resealed(content)))
    content.update(version=2, engines={"tensorrt-rtx": ENGINE})
    with pytest.raises(PackageError, match="version 2 knows no engines"):
        read_manifest(write(tmp_path / "p", resealed(content)))


def test_the_weights_of_a_variant():
    weights = (
        weight("a"),
        Weight(**{**weight("b", B).model_dump(), "variants": ("onnx",)}),
        Weight(**{**weight("c", C, 8192).model_dump(), "variants": ("cuda",)}),
    )
    variants = {
        name: Variant(graph=f"{name}.onnx", digest=C, purpose="p") for name in ("onnx", "cpu-lean", "cuda")
    }
    manifest = make(weights=weights, variants=variants, runs=(run(0, *weights),))
    assert [w.name for w in manifest.weights_of()] == ["a", "b"]
    assert [w.name for w in manifest.weights_of("cpu-lean")] == ["a"]
    assert manifest.distinct_of("cuda") == {A: 4096, C: 8192}
    assert (manifest.weight_bytes, manifest.distinct) == (8192, {A: 4096, B: 4096, C: 8192})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("weights"), "weights: Field required"),
        (lambda c: c.update(more=1), "more: Extra inputs"),
        (lambda c: c["weights"].append(c["weights"][0]), "two weights have the same name"),
        (lambda c: c["weights"].pop(), "do not cover the weights"),
        (lambda c: c["weights"][0].update(bytes=-1), "weights.0.bytes"),
        (lambda c: c["weights"][0].update(bytes=4097), "another size"),
        (lambda c: c["weights"][0].update(digest="../../../etc/passwd"), "weights.0.digest"),
        (lambda c: c["weights"][0].update(digest=A + "\n"), "weights.0.digest"),
        (lambda c: c["weights"][0].update(digest=C), "does not fit its weights"),
        (lambda c: c["weights"][0].update(shape=[-1]), "weights.0.shape"),
        (lambda c: c["variants"]["onnx"].update(graph="../graph.onnx"), "graph"),
        (lambda c: c["variants"]["onnx"].update(graph="/etc/passwd"), "graph"),
        (lambda c: c["variants"]["onnx"].update(graph=".hidden"), "graph"),
        (lambda c: c["variants"].update(other=c["variants"].pop("onnx")), "'onnx' is missing"),
        (lambda c: c["runs"].pop(), "runs do not cover all weights"),
        (lambda c: c["runs"].reverse(), "in order"),
        (lambda c: c["runs"][0].update(count=0), "runs.0.count"),
        (lambda c: c["runs"][1].update(count=2), "in order"),
        (lambda c: c["runs"][0].update(bytes=1), "does not fit its weights"),
        (
            lambda c: c["weights"][0].update(variants=["other"]),
            "names the variant 'other', which is not there",
        ),
        (lambda c: c["weights"][0].update(variants=["onnx", "onnx"]), "names a variant twice"),
        (lambda c: c["weights"][0].update(pieces=A * 2), "pieces of weight 'a' do not fit its 4096 bytes"),
        (lambda c: c["weights"][0].update(pieces=A[:-1]), "weights.0.pieces"),
        (lambda c: c["weights"][0].update(pieces=A.upper()), "weights.0.pieces"),
        (lambda c: c["weights"][0].update(pieces=A + "\n"), "weights.0.pieces"),
        (lambda c: c.update(version="one"), "version"),
        (lambda c: c.update(version=0), "version"),
        (lambda c: c.update(inputs=None), "inputs"),
    ],
)
def test_a_damaged_manifest_says_where(tmp_path, content, change, message):
    change(content)
    with pytest.raises(PackageError, match=message):
        read_manifest(write(tmp_path / "p", resealed(content)))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["weights"][0].update(name="other"),
        lambda c: c["notes"].append("note"),
        lambda c: c.update(identity=""),
        lambda c: c.update(identity=A),
        lambda c: c.pop("identity"),
        lambda c: c["source"].update(name="x"),
    ],
)
def test_an_altered_manifest_is_noticed(tmp_path, content, change):
    change(content)
    with pytest.raises(PackageError, match="was altered after it was written"):
        read_manifest(write(tmp_path / "p", content))


def test_a_newer_version_says_so_whatever_else_is_new(tmp_path, content):
    content.update(version=4, weights="elsewhere", more=[])
    with pytest.raises(
        UnsupportedVersionError,
        match=r"format version 4; this glake-infer reads up to version 3.*pip install -U",
    ):
        read_manifest(write(tmp_path / "p", content))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[]", "'format' is not"),
        (b"null", "'format' is not"),
        (b'{"format": "zip"}', "'format' is not"),
    ],
)
def test_what_is_no_manifest(tmp_path, data, message):
    with pytest.raises(PackageError, match=message):
        read_manifest(write(tmp_path / "p", data))


def test_what_is_no_package(tmp_path):
    with pytest.raises(PackageError, match="does not exist"):
        read_manifest(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(PackageError, match="is not a package"):
        read_manifest(tmp_path / "file")
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    with pytest.raises(PackageError, match="is not a package"):
        read_manifest(tmp_path / "folder")


def test_a_huge_manifest_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAXIMUM_BYTES", 100)
    with pytest.raises(PackageError, match="not a manifest"):
        read_manifest(write(tmp_path / "p", make().to_json()))


def test_damaged_bytes_give_our_errors_only(tmp_path):
    """Every cut and 300 seeded changes of single bytes."""
    import random

    data = make().to_json()
    rng = random.Random(7)
    cases = [data[:end] for end in range(0, len(data) - 2, 7)]
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] = rng.randrange(256)
        cases.append(bytes(changed))
    passed = 0
    for case in cases:
        try:
            passed += read_manifest(write(tmp_path / "p", case)) == make()
        except GlakeError:
            continue
    assert passed < 30, "only white space may change unnoticed"
