"""Weights on a GPU: one copy for all models, models that sleep, by the driver's figures."""

import gc as garbage
import random
import threading
import time

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import glake_infer as gi
from glake_infer import cuda, layout
from glake_infer.models import zoo
from glake_infer.residency import Residency, Wanted

cupy = pytest.importorskip("cupy")
from kernels import INDEX, SANITIZED  # noqa: E402

pytestmark = pytest.mark.gpu

EXACT = {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
MiB = 1 << 20
HEADS = {"a": 2, "b": 17, "c": 900}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Three encoders of one trunk of 41 MiB, as packages, and their store."""
    folder = tmp_path_factory.mktemp("family")
    store = gi.Store(folder / "store")
    for head, labels in HEADS.items():
        zoo.write(zoo.spec("bert-mini", head=head, labels=labels), folder / f"{head}.onnx")
        gi.convert(folder / f"{head}.onnx", folder / f"{head}.glake", store=store)
    return folder, store


def feeds_of(head, batch=2, length=12, seed=0):
    return zoo.feeds(zoo.spec("bert-mini", head=head, labels=HEADS[head]), seed, batch=batch, length=length)


def load(family, head, pool, **options):
    folder, store = family
    return gi.load(folder / f"{head}.glake", pool, store=store, provider_options=EXACT, **options)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def free():
    return cuda.free_memory(INDEX)


def test_fine_tunes_hold_one_copy_of_their_trunk(family, pool):
    models, weights, answers = {}, {}, {}
    for head in HEADS:
        models[head] = load(family, head, pool)
        weights[head] = pool.stats().weights
        answers[head] = models[head].run(feeds_of(head))
    residency = Residency.of(pool)
    distinct = sum(size for size, _ in residency.users().values())
    assert pool.stats().weights <= distinct * 1.02
    trunk = models["a"].memory.shared
    assert trunk > 0.9 * distinct
    for head, model in models.items():
        memory = model.memory
        assert memory.shared >= trunk
        assert memory.private < MiB, model.notes
        assert not model.notes
        assert set(memory.shared_with) == set(HEADS) - {head}
    assert weights["c"] - weights["a"] < 4 * MiB
    assert len({tuple(a.ravel()[:2]) for answer in answers.values() for a in answer.values()}) > 1
    for head, model in models.items():
        same(model.run(feeds_of(head)), answers[head])
        model.close()


def test_a_sleeping_model_holds_nothing_and_wakes_with_the_same_bytes(family, pool):
    model = load(family, "a", pool)
    feeds = feeds_of("a")
    expected = model.run(feeds)
    addresses = dict(model._holding.addresses)
    pool.trim()
    awake, before = free(), pool.stats().reserved
    for _ in range(3):
        freed = model.suspend()
        assert model.suspended
        assert freed >= 20 * MiB
        stats = pool.stats()
        assert stats.reserved < 3 * MiB  # small weights
        assert free() - awake == before - stats.reserved
        assert model.memory.asleep >= 20 * MiB
        assert "asleep" in repr(model)
        same(model.run(feeds), expected)
        assert model.memory.asleep == 0
        pool.trim()
        assert pool.stats().reserved == before
    assert model._holding.addresses == addresses
    model.suspend()
    raw = model.session.run(None, feeds)  # whoever runs the session itself wakes it too
    for ours, theirs in zip(raw, expected.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    model.suspend()
    model.resume()
    assert model.memory.asleep == 0
    assert model.memory.waking == 0
    on_device = model.run(feeds, to="device")
    model.suspend()  # results stay
    for name, array in on_device.items():
        np.testing.assert_array_equal(array.numpy(), expected[name])
    del on_device, array
    model.close()
    with pytest.raises(gi.GlakeError, match="is closed"):
        model.suspend()


@pytest.mark.parametrize("host_copy", ["store", "pinned"])
def test_the_trunk_stays_for_whoever_is_awake(family, pool, host_copy):
    one, two = (load(family, head, pool, host_copy=host_copy) for head in ("a", "b"))
    expected = one.run(feeds_of("a")), two.run(feeds_of("b"))
    assert (one.memory.pinned > 20 * MiB) == (host_copy == "pinned")
    one.suspend()
    assert pool.stats().weights > 20 * MiB
    assert one.memory.asleep < 4 * MiB
    same(two.run(feeds_of("b")), expected[1])
    two.suspend()
    assert pool.stats().weights < 3 * MiB
    same(one.run(feeds_of("a")), expected[0])
    same(two.run(feeds_of("b")), expected[1])
    one.close()
    same(two.run(feeds_of("b")), expected[1])
    two.close()


def test_a_cuda_graph_survives_suspend_and_resume(family, pool):
    folder, store = family
    model = gi.load(folder / "a.glake", pool, store=store, provider_options={**EXACT, "enable_cuda_graph": 1})
    feeds = {name: cupy.asarray(array) for name, array in feeds_of("a").items()}
    outputs = {
        v.name: cupy.empty((2, 2) if v.name == "logits" else (2, 12, 256), np.float32) for v in model.outputs
    }

    def run():
        binding = model.session.io_binding()
        for name, array in feeds.items():
            binding.bind_input(name, "cuda", INDEX, array.dtype.type, array.shape, array.data.ptr)
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", INDEX, np.float32, array.shape, array.data.ptr)
        model.session.run_with_iobinding(binding)
        found = {name: array.get() for name, array in outputs.items()}
        for array in outputs.values():
            array.fill(0)
        return found

    try:
        expected = run()
    except Exception as error:
        pytest.skip(f"ONNX Runtime captures no graph of this model: {error}")
    pool.captures_ended()
    same(run(), expected)
    for _ in range(3):
        assert model.suspend() > 20 * MiB
        same(run(), expected)
    model.close()


KINDS = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "BOOL",
         "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_type_are_injected(tmp_path, pool, kind):
    """A lookup in the weight, of which ONNX Runtime must not make a second copy."""
    number = TensorProto.DataType.Value(kind)
    values = np.arange(1024 * 4096, dtype=np.float32).reshape(1024, 4096) % 7
    if kind == "BOOL":
        values = values % 2
    weight = helper.make_tensor(
        "w", number, values.shape, values.ravel().astype(helper.tensor_dtype_to_np_dtype(number))
    )
    if kind in ("INT4", "UINT4"):
        nodes = [
            helper.make_node("DequantizeLinear", ["w", "one"], ["d"]),
            helper.make_node("Gather", ["d", "i"], ["y"]),
        ]
    elif "FLOAT8" in kind:
        nodes = [helper.make_node("Cast", ["w"], ["d"], to=1), helper.make_node("Gather", ["d", "i"], ["y"])]
    else:
        nodes = [helper.make_node("Gather", ["w", "i"], ["g"]), helper.make_node("Cast", ["g"], ["y"], to=1)]
    small = [numpy_helper.from_array(np.float32(1), "one")] if kind in ("INT4", "UINT4") else []
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4096])],
        [weight, *small],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    save(model, tmp_path / "m.onnx")
    store = gi.Store(tmp_path / "store")
    gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    # Without optimization, and lean: folding would compute all of it when it is converted, or loaded.
    loaded = gi.load(tmp_path / "m.glake", pool, store=store, optimization="disable", sharing="lean")
    rows = np.array([5, 0, 1023])
    np.testing.assert_array_equal(loaded.run({"i": rows})["y"], values[rows])
    size = loaded.package.manifest.weight_bytes
    held = pool.stats().weights
    assert held <= size * 1.02 + 2 * MiB, (kind, loaded.memory, loaded.notes)
    loaded.suspend()
    np.testing.assert_array_equal(loaded.run({"i": rows})["y"], values[rows])
    loaded.close()


def test_second_copies_are_told(tmp_path, pool):
    """A transposed weight that the session folds when it is loaded."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((1500, 1000)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1000])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1500])],
        [numpy_helper.from_array(array, "w")],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "m.onnx",
    )
    store = gi.Store(tmp_path / "store")
    gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    x = rng.standard_normal((3, 1000)).astype(np.float32)
    model = gi.load(tmp_path / "m.glake", pool, store=store, provider_options=EXACT)
    np.testing.assert_allclose(model.run({"x": x})["y"], x @ array.T, rtol=1e-4, atol=1e-3)
    # Folded when it was converted, so that there is nothing to fold at the load; else told.
    assert bool(model.notes) == (model.memory.private > 5 * MiB)
    if "cuda" in model.package.manifest.variants:
        assert model.memory.private < MiB
    model.close()


def test_parts_of_large_weights_are_shared(tmp_path, pool):
    from glake_infer.digest import digests_of_pieces

    folder = gi.Store(tmp_path).objects
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 70 * MiB, np.uint8).tobytes()
    longer = data + rng.integers(0, 256, 3 * MiB, np.uint8).tobytes()
    residency, held = Residency.of(pool), []
    for number, content in enumerate((data, longer)):
        digest, pieces, _ = digests_of_pieces([content], layout.PIECE)
        folder.add_buffer(content)
        parts = tuple(pieces[i : i + 64] for i in range(0, len(pieces), 64))
        held.append(
            (
                residency.hold([Wanted(digest, len(content), len(content), folder, None, parts)], number),
                content,
            )
        )
        with held[-1][0]:
            pass
    before = free()
    assert pool.stats().weights <= 73 * MiB + 10 * MiB
    for holding, content in held:
        with holding:
            (address,) = holding.addresses.values()
            read = np.empty(len(content), np.uint8)
            cuda.copy_to_host(INDEX, address, read)
            assert read.tobytes() == content
    held[0][0].suspend()
    assert free() - before < 8 * MiB
    held[1][0].suspend()
    assert free() - before >= 73 * MiB
    for holding, content in held:
        with holding:
            (address,) = holding.addresses.values()
            read = np.empty(len(content), np.uint8)
            cuda.copy_to_host(INDEX, address, read)
            assert read.tobytes() == content
        holding.close()


def test_weights_are_read_only_on_the_gpu(tmp_path, device):
    from tests import processes

    code = f"""
        import glake_infer as gi, numpy as np
        from glake_infer import cuda
        from glake_infer.residency import Residency, Wanted
        store = gi.Store({str(tmp_path)!r}); data = bytes(range(256)) * 8192
        digest, _ = store.objects.add_buffer(data)
        pool = gi.Pool({device!r})
        holding = Residency.of(pool).hold([Wanted(digest, len(data), len(data), store.objects)], 1)
        with holding:
            source = np.ones(16, np.uint8)
            try:
                cuda.queue_to_device({INDEX}, holding.addresses[digest], source.ctypes.data, 16, 0)
                cuda.synchronize({INDEX}, 0)
            except gi.DriverError as error:
                print("refused", str(error)[:60])
        import os; os._exit(0)
    """
    done = processes.run(code)
    assert done.stdout.startswith("refused"), done.stdout + done.stderr


def test_an_altered_weight_is_refused_before_a_session_sees_it(family, pool, tmp_path):
    import shutil

    folder, _ = family
    store = gi.Store(tmp_path / "store")
    gi.convert(folder / "a.onnx", tmp_path / "a.glake", store=store)
    model = gi.load(tmp_path / "a.glake", pool, store=store, provider_options=EXACT)
    expected = model.run(feeds_of("a"))
    largest = max(
        model.package.manifest.weights, key=lambda w: w.bytes if not w.variants or "cuda" in w.variants else 0
    )
    path = store.objects.path(largest.digest)
    data = path.read_bytes()
    model.suspend()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(gi.DigestMismatchError, match="was changed on disk"):
        model.run(feeds_of("a"))
    with pytest.raises(gi.DigestMismatchError):
        gi.load(tmp_path / "a.glake", pool, store=store)
    shutil.move(store.root, tmp_path / "away")  # the disk is gone
    with pytest.raises(gi.StoreError, match="could not be brought back and sleeps on"):
        model.run(feeds_of("a"))
    assert model.suspended
    shutil.move(tmp_path / "away", store.root)
    path.unlink()
    path.write_bytes(data)
    same(model.run(feeds_of("a")), expected)
    model.close()


@pytest.mark.skipif(SANITIZED, reason="the sanitizer takes memory of its own")
def test_memory_that_others_took_meanwhile_is_an_error_and_the_model_can_be_used_later(family, pool):
    model = load(family, "a", pool)
    expected = model.run(feeds_of("a"))
    model.suspend()
    taken = []
    size = free()
    while size > 4 * MiB:
        try:
            taken.append(cupy.cuda.runtime.malloc(size))
        except cupy.cuda.runtime.CUDARuntimeError:
            size //= 2
        size = min(size, free())
    try:
        with pytest.raises(gi.OutOfMemoryError) as caught:
            model.run(feeds_of("a"))
        assert caught.value.device_full
        assert model.memory.asleep >= 20 * MiB
    finally:
        for address in taken:
            cupy.cuda.runtime.free(address)
    same(model.run(feeds_of("a")), expected)
    model.close()


def test_suspends_during_runs_of_four_threads(family, pool):
    models = {head: load(family, head, pool) for head in HEADS}
    expected = {head: model.run(feeds_of(head)) for head, model in models.items()}
    problems, end = [], time.monotonic() + (1 if SANITIZED else 5)

    def work(number):
        chosen = random.Random(number)
        try:
            while time.monotonic() < end:
                head = chosen.choice(list(HEADS))
                for name, array in models[head].run(feeds_of(head)).items():
                    np.testing.assert_allclose(array, expected[head][name], rtol=1e-4, atol=1e-5)
                if number == 0:
                    models[chosen.choice(list(HEADS))].suspend()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    for model in models.values():
        model.close()


def test_a_runtime_holds_more_models_than_fit(tmp_path, device):
    store = gi.Store(tmp_path / "store")
    paths, feeds = [], []
    for seed in range(6):
        spec = zoo.spec("bert-mini", seed=seed)
        zoo.write(spec, tmp_path / f"{seed}.onnx")
        gi.convert(tmp_path / f"{seed}.onnx", tmp_path / f"{seed}.glake", store=store)
        paths.append(tmp_path / f"{seed}.glake")
        feeds.append(zoo.feeds(spec, 0, batch=2, length=12))
    limit = 80 * MiB
    with gi.Runtime(limit, device=device, store=store) as runtime:
        models = [runtime.load(path, provider_options=EXACT) for path in paths]
        expected = [model.run(each) for model, each in zip(models, feeds, strict=True)]
        assert runtime.models == models[::-1]
        asleep = [bool(model.memory.asleep) for model in models]
        assert asleep[0]
        assert not asleep[-1]
        problems, high = [], []

        def work(number):
            chosen = random.Random(number)
            try:
                for _ in range(5 if SANITIZED else 40):
                    index = chosen.randrange(6)
                    for name, array in models[index].run(feeds[index]).items():
                        np.testing.assert_allclose(array, expected[index][name], rtol=1e-4, atol=1e-5)
                    high.append(runtime.pool.stats().reserved)
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems, problems[0]
        assert max(high) <= limit
        models[0].run(feeds[0])
        models[0].pinned = True
        freed = runtime.suspend_idle(older_than=0)
        assert freed > 0
        assert [model.suspended for model in models] == [False] + [True] * 5
        same(models[3].run(feeds[3]), expected[3])
    garbage.collect()


def test_a_limit_below_one_model_says_what_would_do(family, device):
    folder, store = family
    with gi.Runtime("16MiB", device=device, store=store) as runtime:
        with pytest.raises(gi.OutOfMemoryError) as caught:
            runtime.load(folder / "a.glake")
        needed = caught.value.needed_limit
        garbage.collect()
        assert runtime.pool.stats().active == 0
        runtime.pool.limit = needed + 8 * MiB
        model = runtime.load(folder / "a.glake")
        model.run(feeds_of("a", batch=1, length=4))
    del model


def test_all_runs_of_a_model_may_share_a_stream(family, pool):
    stream = cupy.cuda.Stream(non_blocking=True)
    folder, store = family
    own = load(family, "a", pool, streams="one")
    plain = load(family, "a", pool)
    named = gi.load(
        folder / "a.glake", pool, store=store, provider_options={**EXACT, "user_compute_stream": stream.ptr}
    )
    options = [m.session.get_provider_options()["CUDAExecutionProvider"] for m in (own, named, plain)]
    handles = [int(o["user_compute_stream"]) for o in options]
    assert handles[1:] == [stream.ptr, 0]
    assert handles[0] not in (0, stream.ptr)
    for model in (own, named):
        same(model.run(feeds_of("a")), plain.run(feeds_of("a")))
        model.close()
    plain.close()
    with pytest.raises(gi.InputError, match="'one' or 'per run'"):
        load(family, "a", pool, streams="two")
