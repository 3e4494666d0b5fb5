import resource
from contextlib import contextmanager

import numpy as np
import onnx
import psutil
import pytest

from glake_infer.allocators.errors import InputError
from glake_infer.models import zoo

ort = pytest.importorskip("onnxruntime")

TINY = ["bert-tiny", "resnet-tiny", "llama-tiny"]
TRUNK_OUTPUT = {
    "bert-tiny": "last_hidden_state",
    "resnet-tiny": "features",
    "llama-tiny": "last_hidden_state",
}


def session(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(session, feeds):
    outputs = session.run(None, feeds)
    return dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))


def weights(**arguments):
    return zoo.build(zoo.spec(**arguments)).weights


def same(left, right, name):
    return left.tensor(name).tobytes() == right.tensor(name).tobytes()


# What is built


@pytest.mark.parametrize("name", TINY + [f"{name}-fp16" for name in TINY])
def test_runs_at_any_shape(name, tmp_path):
    spec = zoo.spec(name, labels=7)
    path = zoo.write(spec, tmp_path / "model.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    half = np.float16 if name.endswith("-fp16") else np.float32
    model = session(path)
    for batch, length in ((1, 40), (3, 33)):
        outputs = run(model, zoo.feeds(spec, 1, batch=batch, length=length))
        logits = outputs["logits"]
        assert logits.shape == ((batch, length, 7) if "llama" in name else (batch, 7))
        assert all(output.dtype == half and np.isfinite(output).all() for output in outputs.values())
        spread = logits.astype(np.float32).std(axis=-1)
        assert (spread > 0.01).all(), "the labels must differ"
        assert (spread < 10).all()
    assert np.abs(logits[0] - logits[1]).max() > 0.01, "the rows must differ"


@pytest.mark.parametrize("name", TINY)
def test_fp16_is_the_fp32_model_rounded(name, tmp_path):
    single, half = weights(name=name), weights(name=f"{name}-fp16")
    for weight in single:
        np.testing.assert_array_equal(half.tensor(weight), single.tensor(weight).astype(np.float16))
    outputs = []
    for spec in (zoo.spec(name), zoo.spec(name, dtype="float16")):
        model = session(zoo.write(spec, tmp_path / "model.onnx"))
        outputs.append(run(model, zoo.feeds(spec, 3, batch=2))["logits"].astype(np.float32))
    np.testing.assert_allclose(*outputs, atol=0.05)


@pytest.mark.parametrize("name", TINY)
def test_a_model_without_head_gives_what_the_head_reads(name, tmp_path):
    spec = zoo.spec(name, head=None)
    path = zoo.write(spec, tmp_path / "trunk.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    assert run(session(path), zoo.feeds(spec, 0))[TRUNK_OUTPUT[name]].shape[-1] >= 128
    assert set(zoo.build(spec).weights) == set(weights(name=name).trunk)


def test_every_name_has_a_valid_graph_of_the_stated_size():
    entries = zoo.names()
    assert len({entry.name for entry in entries}) == len(entries) >= 28
    for entry in entries:
        model = zoo.build(zoo.spec(entry.name))
        assert model.weights.total_bytes == entry.bytes
        assert [tensor.name for tensor in model.proto.graph.initializer] == list(model.weights)
        assert not any(tensor.HasField("raw_data") for tensor in model.proto.graph.initializer)
        onnx.shape_inference.infer_shapes(model.proto, strict_mode=True, check_type=True)
    for kind in ("bert", "resnet", "llama"):
        sizes = [entry.bytes for entry in entries if entry.name.startswith(kind)]
        assert min(sizes) < 6e6
        assert max(sizes) > 3e9


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("bert-base", 109_483_778), ("resnet50", 25_557_032), ("llama-1b", 1_100_048_384)],
)
def test_sizes_are_those_of_the_real_models(name, parameters):
    # Batch normalization also holds the mean and variance, which the usual counts leave out.
    shapes = {key: weight.size for key, weight in weights(name=name).items()}
    assert sum(size for key, size in shapes.items() if "running" not in key) == parameters


def test_masked_tokens_change_nothing(tmp_path):
    spec = zoo.spec("bert-tiny")
    model = session(zoo.write(spec, tmp_path / "bert.onnx"))
    feeds = zoo.feeds(spec, 5, length=12)
    padded = {name: np.pad(value, ((0, 0), (0, 5))) for name, value in feeds.items()}
    padded["input_ids"][:, 12:] = 77
    expected = run(model, feeds)["logits"]
    np.testing.assert_allclose(run(model, padded)["logits"], expected, rtol=1e-4, atol=1e-4)


# The cache of the decoder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    spec = zoo.spec("llama-tiny")
    return spec, session(zoo.write(spec, tmp_path_factory.mktemp("llama") / "llama.onnx"))


def reference(spec, ids):
    """The logits of a Llama for one row of tokens, as its paper and code define it."""
    config, values = spec.config, zoo.build(spec).weights
    size, groups = config.head_size, config.heads // config.kv_heads

    def linear(value, name):
        return value @ values.tensor(f"{name}.weight")

    def norm(value, name):
        root = np.sqrt((value**2).mean(-1, keepdims=True) + config.epsilon)
        return value / root * values.tensor(f"{name}.weight")

    def heads(value, count):
        return value.reshape(len(ids), count, size).swapaxes(0, 1)

    def rotated(value):  # halves are the real and the imaginary part
        angles = np.outer(np.arange(len(ids)), config.theta ** (-np.arange(0, size, 2) / size))
        turned = (value[..., : size // 2] + 1j * value[..., size // 2 :]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    hidden = values.tensor("model.embed_tokens.weight")[ids]
    for layer in range(config.layers):
        name = f"model.layers.{layer}"
        value = norm(hidden, f"{name}.input_layernorm")
        query, key, content = (
            heads(linear(value, f"{name}.self_attn.{part}_proj"), count)
            for part, count in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
        )
        key, content = (np.repeat(value, groups, axis=0) for value in (rotated(key), content))
        scores = rotated(query) @ key.swapaxes(1, 2) / np.sqrt(size)
        shares = np.exp(np.where(np.tri(len(ids), dtype=bool), scores, -np.inf))
        context = (shares / shares.sum(-1, keepdims=True)) @ content
        hidden = hidden + linear(context.swapaxes(0, 1).reshape(len(ids), -1), f"{name}.self_attn.o_proj")
        value = norm(hidden, f"{name}.post_attention_layernorm")
        gate = linear(value, f"{name}.mlp.gate_proj")
        inner = gate / (1 + np.exp(-gate)) * linear(value, f"{name}.mlp.up_proj")
        hidden = hidden + linear(inner, f"{name}.mlp.down_proj")
    return linear(norm(hidden, "model.norm"), "lm_head")


def test_the_decoder_computes_what_a_llama_does(llama):
    spec, model = llama
    feeds = zoo.feeds(spec, 6, length=20)
    expected = reference(spec, feeds["input_ids"][0])
    np.testing.assert_allclose(run(model, feeds)["logits"][0], expected, rtol=1e-4, atol=1e-4)


def with_cache(spec, outputs, ids, mask):
    feeds = {
        f"past_key_values.{name[8:]}": value for name, value in outputs.items() if name[:8] == "present."
    }
    return {"input_ids": ids, "attention_mask": mask, **feeds}


def test_cached_steps_equal_the_whole_sequence(llama):
    spec, model = llama
    feeds = zoo.feeds(spec, 2, batch=2, length=9)
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    whole = run(model, feeds)
    outputs = run(model, {**feeds, "input_ids": ids[:, :6], "attention_mask": mask[:, :6]})
    for start, end in ((6, 8), (8, 9)):
        outputs = run(model, with_cache(spec, outputs, ids[:, start:end], mask[:, :end]))
        expected = whole["logits"][:, start:end]
        np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-4)
    assert outputs["present.0.key"].shape == (2, spec.config.kv_heads, 9, spec.config.head_size)
    np.testing.assert_allclose(outputs["present.3.value"], whole["present.3.value"], rtol=1e-4, atol=1e-4)


def test_the_cache_and_the_order_of_tokens_matter(llama):
    spec, model = llama
    feeds = zoo.feeds(spec, 2, length=4, past=5)
    expected = run(model, feeds)["logits"]
    for other in ({"past_key_values.0.value": feeds["past_key_values.0.value"][:, :, ::-1]}, None):
        changed = other or {"input_ids": feeds["input_ids"][:, [1, 0, 2, 3]]}
        assert np.abs(run(model, {**feeds, **changed})["logits"][:, -1] - expected[:, -1]).max() > 1e-2


def test_left_padding_changes_nothing(llama):
    spec, model = llama
    feeds = zoo.feeds(spec, 4, length=6)
    padded = {
        **feeds,
        "input_ids": np.pad(feeds["input_ids"], ((0, 0), (3, 0))),
        "attention_mask": np.pad(feeds["attention_mask"], ((0, 0), (3, 0))),
    }
    expected = run(model, feeds)["logits"][:, -1]
    np.testing.assert_allclose(run(model, padded)["logits"][:, -1], expected, rtol=1e-4, atol=1e-4)


# The weights


@pytest.mark.parametrize("name", TINY)
def test_heads_share_the_trunk(name):
    base, other = weights(name=name), weights(name=name, head="topics", labels=5)
    assert set(base.trunk) == set(other.trunk)
    assert all(same(base, other, weight) for weight in base.trunk)
    heads = set(base) - set(base.trunk)
    assert heads
    assert not any(same(base, other, weight) for weight in heads)


@pytest.mark.parametrize("name", TINY)
def test_seeds_differ_everywhere(name):
    base, again, other = (weights(name=name, seed=seed) for seed in (0, 0, 1))
    assert all(same(base, again, weight) for weight in base)
    assert not any(same(base, other, weight) for weight in base)


@pytest.mark.parametrize("name", TINY)
def test_no_two_weights_are_equal(name):
    values = weights(name=name)
    assert len({values.tensor(weight).tobytes() for weight in values}) == len(values)


def test_bytes_stay_what_they_are():
    """Golden values: stores and caches hold objects named by these bytes."""
    norm = weights(name="bert-tiny").tensor("embeddings.LayerNorm.weight")
    np.testing.assert_array_equal(norm[:2].view(np.uint32), GOLDEN)


GOLDEN = [1064621110, 1065614271]


def test_blocks_make_up_the_tensor():
    values = weights(name="bert-mini", dtype="float16")
    name = "embeddings.word_embeddings.weight"
    blocks = list(values.blocks(name))
    assert [block.size for block in blocks] == [zoo.BLOCK, zoo.BLOCK]
    np.testing.assert_array_equal(np.concatenate(blocks).reshape(values[name].shape), values.tensor(name))
    assert values.tensor(name).nbytes == values.nbytes(name)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_values_have_the_stated_distribution(mean):
    weight = zoo.Weight(name="w", shape=(1 << 19, 3), mean=mean, std=0.25, trunk=True)
    values = zoo.Weights({"w": weight}, dtype=np.float32).tensor("w")
    assert values.shape == weight.shape
    assert values.mean() == pytest.approx(mean, abs=1e-3)
    assert values.std() == pytest.approx(0.25, rel=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("name", [*TINY, "bert-base", "resnet50", "llama-1b"])
def test_a_variant_changes_the_given_share(name, share):
    for variant in range(4):
        values = weights(name=name, variant=variant, changed=share)
        trunk = sum(map(values.nbytes, values.trunk))
        assert sum(map(values.nbytes, values.changed)) / trunk == pytest.approx(share, abs=0.01)


def test_a_variant_can_change_a_weight_that_is_most_of_the_trunk():
    values = weights(name="bert-small", changed=0.75)
    assert "embeddings.word_embeddings.weight" in values.changed
    trunk = sum(map(values.nbytes, values.trunk))
    assert sum(map(values.nbytes, values.changed)) / trunk == pytest.approx(0.75, abs=0.01)


def test_a_variant_changes_what_it_says():
    base = weights(name="bert-tiny")
    first, again, second, wider = (
        weights(name="bert-tiny", variant=variant, changed=0.3, labels=labels)
        for variant, labels in ((1, 2), (1, 2), (2, 2), (1, 9))
    )
    assert {name for name in base if not same(base, first, name)} == first.changed
    assert first.changed <= set(base.trunk)
    assert first.changed == again.changed == wider.changed != second.changed
    assert all(same(first, again, name) for name in base)
    both = first.changed & second.changed
    assert both
    assert not any(same(first, second, name) for name in both)


# The files


def test_external_equals_inline(tmp_path):
    spec = zoo.spec("bert-mini")
    inline = zoo.write(spec, tmp_path / "inline.onnx", external=False)
    external = zoo.write(spec, tmp_path / "external.onnx", external=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "external.onnx",
        "external.onnx.data",
        "inline.onnx",
    ]
    assert external.stat().st_size < 100_000
    onnx.checker.check_model(str(external), full_check=True)
    one, two = onnx.load(inline), onnx.load(external)
    values = zoo.build(spec).weights
    for left, right in zip(one.graph.initializer, two.graph.initializer, strict=True):
        assert left.name == right.name
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(left), values.tensor(left.name))
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(right), values.tensor(left.name))
    feeds = zoo.feeds(spec, 0)
    np.testing.assert_array_equal(
        run(session(inline), feeds)["logits"], run(session(external), feeds)["logits"]
    )
    del one.graph.initializer[:], two.graph.initializer[:]
    assert one == two


def test_large_weights_start_on_a_page(tmp_path):
    path = zoo.write(zoo.spec("bert-mini"), tmp_path / "model.onnx", external=True)
    placed = []
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        size = 4 * int(np.prod(tensor.dims))
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert bool(entries) == (size >= 1024)
        if entries:
            assert entries["location"] == "model.onnx.data"
            assert int(entries["length"]) == size
            assert int(entries["offset"]) % (4096 if size >= 1 << 20 else 64) == 0
            placed.append((int(entries["offset"]), size))
    placed.sort()
    ends = [offset + size for offset, size in placed]
    assert all(end <= offset for end, (offset, _) in zip(ends, placed[1:], strict=False))
    assert (tmp_path / "model.onnx.data").stat().st_size == ends[-1]
    assert sum(size >= 1 << 20 for _, size in placed) == 9


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    spec = zoo.spec("bert-mini")
    zoo.write(spec, tmp_path / "model.onnx", progress=lambda done, total: calls.append((done, total)))
    total = zoo.build(spec).weights.total_bytes
    assert calls[-1] == (total, total)
    assert calls == sorted(set(calls))


def test_memory_does_not_grow_with_the_model(tmp_path):
    process = psutil.Process()
    zoo.write(zoo.spec("bert-tiny"), tmp_path / "small.onnx")
    before = process.memory_info().rss
    peak = 0

    def progress(done, total):
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    try:
        large = zoo.spec("bert-large", layers=19)
        zoo.write(large, tmp_path / "large.onnx", external=True, progress=progress)
        assert (tmp_path / "large.onnx.data").stat().st_size > 1 << 30
        inline = zoo.write(zoo.spec("bert-base"), tmp_path / "base.onnx", progress=progress)
        assert inline.stat().st_size > 400 << 20
    finally:
        for path in tmp_path.iterdir():
            path.unlink()
    assert peak - before < 100 << 20


# What goes wrong


@contextmanager
def largest_file(size):
    """Writing beyond `size` bytes fails, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_nothing(external, tmp_path):
    with largest_file(5 << 20), pytest.raises(OSError, match="File too large"):
        zoo.write(zoo.spec("bert-mini"), tmp_path / "model.onnx", external=external)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("external", [False, True])
def test_an_interrupted_write_keeps_the_old_files(external, tmp_path):
    path = zoo.write(zoo.spec("bert-tiny"), tmp_path / "model.onnx", external=external)
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.write(zoo.spec("bert-tiny", seed=1), path, external=external, progress=interrupt)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize("taken", ["model.onnx", "model.onnx.data"])
def test_a_failing_rename_leaves_nothing(taken, tmp_path):
    def take(done, total):
        (tmp_path / taken).mkdir(exist_ok=True)

    with pytest.raises(IsADirectoryError):
        zoo.write(zoo.spec("bert-tiny"), tmp_path / "model.onnx", external=True, progress=take)
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*missing"):
        zoo.write(zoo.spec("bert-tiny"), tmp_path / "missing" / "model.onnx")
    with pytest.raises(InputError, match="it is a folder"):
        zoo.write(zoo.spec("bert-tiny"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_large_to_be_inline(tmp_path):
    with pytest.raises(InputError, match="external=True"):
        zoo.write(zoo.spec("llama-7b"), tmp_path / "model.onnx", external=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "bert-bse"}, "Did you mean bert-base"),
        ({"name": "resnet-50"}, "Did you mean resnet50"),
        ({"name": "qqq"}, "Known are bert-tiny, bert-tiny-fp16"),
        ({"name": "bert-tiny", "layer": 3}, "Did you mean layers"),
        ({"name": "bert-tiny", "heads": 3}, "hidden=128 cannot be split over heads=3"),
        ({"name": "bert-tiny", "layers": 0}, "at least 1"),
        ({"name": "resnet-tiny", "depths": ()}, "at least 1"),
        ({"name": "llama-tiny", "kv_heads": 3}, "heads=4 cannot be split over kv_heads=3"),
        ({"name": "llama-tiny", "heads": 128, "kv_heads": 1}, "even size"),
        ({"name": "bert-tiny", "dtype": "int8"}, "float32, float16"),
        ({"name": "bert-tiny", "changed": 5}, "share between 0 and 1"),
        ({"name": "bert-tiny", "labels": 0}, "at least 1"),
        ({"name": "bert-tiny", "head": None, "labels": 3}, "needs a head"),
        ({"name": "bert-tiny", "head": ""}, "no name"),
    ],
)
def test_a_bad_spec_is_explained(arguments, message):
    with pytest.raises(InputError, match=message):
        zoo.spec(**arguments)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("bert-tiny", {"length": 513}, "512 positions"),
        ("bert-tiny", {"past": 1}, "no cache"),
        ("resnet-tiny", {"past": 1}, "no cache"),
        ("llama-tiny", {"batch": 0}, "batch=0"),
        ("llama-tiny", {"length": 0}, "length=0"),
        ("llama-tiny", {"past": -1}, "past=-1"),
    ],
)
def test_bad_sizes_of_feeds_are_explained(name, sizes, message):
    with pytest.raises(InputError, match=message):
        zoo.feeds(zoo.spec(name), 0, **sizes)
