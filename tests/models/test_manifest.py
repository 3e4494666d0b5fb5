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

A, B, C = (digest_of(bytes([i])) for i in range(3))


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
    """Golden: what version 2 looks like never changes."""
    content = json.loads(make(weights=WEIGHTS[:1], runs=(run(0, WEIGHTS[0]),)).to_json())
    assert content == {
        "format": "glake-infer package",
        "version": 2,
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
    assert manifest.version == 2
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
    content.update(version=3, weights="elsewhere", more=[])
    with pytest.raises(
        UnsupportedVersionError,
        match=r"format version 3; this glake-infer reads up to version 2.*pip install -U",
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
