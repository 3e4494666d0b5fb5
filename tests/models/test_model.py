"""Loading and running packages: right answers, one copy of every weight, errors that leave nothing behind."""

import contextlib
import gc as garbage
import os
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import processes
import pytest

import glake_infer as gi
from glake_infer import maintenance
from glake_infer.allocators import _native
from glake_infer.models import zoo
from glake_infer.models.load import captures_graphs, has_convolutions
from glake_infer.models.session import session_errors
from glake_infer.process_memory import measure, release_unused_heap

FAMILY = [("a", 2), ("b", 17), ("c", 100), ("d", 5)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A store with a family of four small encoders, their ONNX files beside them."""
    folder = tmp_path_factory.mktemp("workshop")
    store = gi.Store(folder / "store")
    for head, labels in FAMILY:
        spec = zoo.spec("bert-tiny", head=head, labels=labels)
        zoo.write(spec, folder / f"{head}.onnx")
        gi.convert(folder / f"{head}.onnx", folder / f"{head}.glake", store=store)
    return folder, store


@pytest.fixture
def pool():
    """The CPU pool; the test must leave it empty."""
    with gi.Pool(device="cpu", limit="2GiB") as pool:
        yield pool
        garbage.collect()
        pool.trim()
        assert pool.stats().reserved == 0


def feeds_of(head="a", batch=2, length=12, seed=0):
    labels = dict(FAMILY)[head]
    return zoo.feeds(zoo.spec("bert-tiny", head=head, labels=labels), seed, batch=batch, length=length)


def mappings_of(digest):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if digest in line]


def plain(path, feeds, *, prepack=True):
    options = ort.SessionOptions()
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize("sharing", ["fast", "lean"])
@pytest.mark.parametrize("optimization", ["all", "extended", "basic", "disable"])
def test_outputs_are_bit_for_bit_those_of_plain_onnx_runtime(workshop, pool, sharing, optimization):
    folder, store = workshop
    feeds = feeds_of()
    options = ort.SessionOptions()
    levels = {
        "all": "ENABLE_ALL",
        "extended": "ENABLE_EXTENDED",
        "basic": "ENABLE_BASIC",
        "disable": "DISABLE_ALL",
    }
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{levels[optimization]}")
    if sharing == "lean":
        options.add_session_config_entry("session.disable_prepacking", "1")
    expected = ort.InferenceSession(str(folder / "a.onnx"), options).run(None, feeds)
    with gi.load(folder / "a.glake", pool, sharing=sharing, optimization=optimization, store=store) as model:
        results = model.run(feeds)
    assert list(results) == [value.name for value in model.outputs]
    for ours, theirs in zip(results.values(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sharing", ["fast", "lean"])
def test_a_family_holds_its_trunk_once(workshop, pool, sharing):
    folder, store = workshop
    models = [gi.load(folder / f"{head}.glake", pool, sharing=sharing, store=store) for head, _ in FAMILY]
    distinct = {d: size for m in models for d, size in m.package.manifest.distinct.items()}
    stats = pool.stats()
    assert stats.mapped_files <= 1.25 * sum(distinct.values())  # pages of small weights
    for model in models:
        assert model.memory.shared > 0.8 * model.package.manifest.weight_bytes
        assert model.memory.private < 1 << 20
    for model in models:
        model.close()
    assert models[0].pool.stats().weights == 0


def test_equal_weights_are_one_mapping_for_the_operating_system(workshop, pool):
    folder, store = workshop
    models = [gi.load(folder / f"{head}.glake", pool, sharing="lean", store=store) for head, _ in FAMILY]
    largest = max(models[0].package.manifest.weights, key=lambda weight: weight.bytes)
    maps = mappings_of(largest.digest)
    assert len(maps) == 1
    assert maps[0].split()[1] == "r--s"
    for model in models:
        model.close()
    assert not mappings_of(largest.digest)


def test_results_outlive_the_model_and_hold_none_of_the_pool(workshop, pool):
    folder, store = workshop
    with gi.load(folder / "a.glake", pool, store=store) as model:
        results = model.run(feeds_of())
    pool.trim()
    assert pool.stats().reserved == 0
    assert all(np.isfinite(array).all() for array in results.values())


def test_a_session_that_outlives_the_model_keeps_its_weights(workshop, pool):
    folder, store = workshop
    model = gi.load(folder / "a.glake", pool, sharing="lean", store=store)
    expected = model.run(feeds_of())
    session = model.session
    model.close()
    assert pool.stats().weights > 0
    for ours, theirs in zip(expected.values(), session.run(None, feeds_of()), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    del session, theirs
    assert pool.stats().weights == 0


def test_a_model_that_is_dropped_gives_everything_back(workshop, pool):
    folder, store = workshop
    model = gi.load(folder / "a.glake", pool, store=store)
    model.run(feeds_of())
    del model
    garbage.collect()
    pool.trim()
    assert pool.stats().reserved == 0


def test_closing_waits_for_runs_in_flight_and_ends_the_model(workshop, pool):
    folder, store = workshop
    model = gi.load(folder / "a.glake", pool, store=store)
    feeds = feeds_of(batch=64, length=64)
    started, answers = threading.Event(), []

    def run():
        started.set()
        answers.append(model.run(feeds))

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    model.close()
    model.close()
    thread.join()
    if answers:  # the run began before the close
        assert np.isfinite(next(iter(answers[0].values()))).all()
    with pytest.raises(gi.GlakeError, match="is closed"):
        model.run(feeds)


def stress(folder, store, pool, seconds, threads=8):
    """`threads` threads run four models at random; returns the number of runs. Every output is checked."""
    models = [
        gi.load(folder / f"{h}.glake", pool, sharing=("fast", "lean")[i % 2], store=store)
        for i, (h, _) in enumerate(FAMILY)
    ]
    cases = []
    for index, (head, _) in enumerate(FAMILY):
        for batch, length in ((1, 4), (2, 33), (7, 16), (3, 64)):
            feeds = feeds_of(head, batch, length, seed=index)
            cases.append((models[index], feeds, models[index].run(feeds)))
    for (head, _), first in zip(FAMILY, range(0, len(cases), 4), strict=True):
        reference = plain(folder / f"{head}.onnx", cases[first][1])
        for name, array in reference.items():
            np.testing.assert_allclose(cases[first][2][name], array, rtol=1e-4, atol=1e-4)
    problems, runs = [], [0] * threads
    end = time.monotonic() + seconds

    def work(number):
        rng = np.random.default_rng(number)
        try:
            while time.monotonic() < end and not problems:
                model, feeds, expected = cases[rng.integers(len(cases))]
                for name, array in model.run(feeds).items():
                    np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5)
                runs[number] += 1
                if number == 0:
                    pool.check_invariants()
                if rng.integers(50) == 0:
                    pool.trim()
        except BaseException as error:
            problems.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems, problems[0]
    for model in models:
        model.close()
    pool.check_invariants()
    pool.trim()
    assert pool.stats().reserved == 0
    return sum(runs)


def run_stress_twice(workshop, pool, seconds):
    folder, store = workshop
    levels = []
    for _ in range(3):  # the first warms ONNX Runtime's and Python's own memory up
        assert stress(folder, store, pool, seconds / 3) > 10
        garbage.collect()
        release_unused_heap()
        levels.append(measure().private)  # file pages come and go as the system likes
    assert levels[2] <= levels[1] + (4 << 20), levels


def test_eight_threads_on_four_models(workshop, pool):
    run_stress_twice(workshop, pool, 6)


@pytest.mark.soak
def test_eight_threads_on_four_models_for_a_minute(workshop, pool):
    run_stress_twice(workshop, pool, 60)


def test_a_limit_too_small_for_the_weights_says_how_much_would_do(workshop):
    folder, store = workshop
    with gi.Pool(device="cpu", limit="1MiB") as pool:
        with pytest.raises(gi.OutOfMemoryError) as caught:
            gi.load(folder / "a.glake", pool, store=store)
        assert pool.stats().reserved == 0
        needed = caught.value.needed_limit
        assert str(needed) in str(caught.value)
        pool.limit = needed  # what it says is enough
        with gi.load(folder / "a.glake", pool, store=store) as model:
            pool.limit = needed + (8 << 20)
            model.run(feeds_of())
        pool.trim()


def test_a_limit_too_small_for_a_run_leaves_the_model_usable(workshop):
    folder, store = workshop
    with gi.Pool(device="cpu", limit="1GiB") as pool:
        with gi.load(folder / "a.glake", pool, store=store) as model:
            expected = model.run(feeds_of())
            pool.trim()
            pool.limit = pool.stats().active + (2 << 20)
            with pytest.raises(gi.OutOfMemoryError) as caught:
                model.run(feeds_of(batch=64, length=64))
            assert isinstance(caught.value, MemoryError)
            assert caught.value.needed_limit > pool.limit
            for name, array in model.run(feeds_of()).items():
                np.testing.assert_array_equal(array, expected[name])
        pool.trim()


def test_a_refusal_while_inputs_are_bound_is_the_pools_error(pool):
    """An IOBinding raises MemoryError where it copies an input to the device."""
    with pytest.raises(MemoryError) as refused:
        _native.ort_allocate(1 << 50)
    with pytest.raises(gi.OutOfMemoryError) as caught, session_errors(pool, "running", "m"):
        raise refused.value
    assert caught.value.requested == 1 << 50
    with pytest.raises(MemoryError, match="the host's"), session_errors(pool, "running", "m"):
        raise MemoryError("the host's")


def test_a_session_that_a_refusal_left_in_disorder_is_made_anew(workshop, monkeypatch):
    """As on CUDA with convolutions (Model._spoil): the next run, and every run beside the refused one, uses another."""
    folder, store = workshop
    with gi.Pool(device="cpu", limit="1GiB") as pool:
        with gi.load(folder / "a.glake", pool, store=store) as model:
            expected = model.run(feeds_of())
            monkeypatch.setattr(model, "_convolutions", True)
            pool.trim()
            pool.limit = pool.stats().active + (4 << 20)
            first = weakref.ref(model.session)
            with pytest.raises(gi.OutOfMemoryError):
                model.run(feeds_of(batch=64, length=64))
            for name, array in model.run(feeds_of()).items():
                np.testing.assert_array_equal(array, expected[name])
            garbage.collect()
            assert first() is None
            second = model.session
            model.run(feeds_of())
            assert model.session is second
            del second

            errors = []

            def work(refused: bool) -> None:
                try:
                    for _ in range(6):
                        if refused:
                            with pytest.raises(gi.OutOfMemoryError):
                                model.run(feeds_of(batch=64, length=64))
                            continue
                        with contextlib.suppress(gi.OutOfMemoryError):  # the large run had the room just then
                            for name, array in model.run(feeds_of()).items():
                                np.testing.assert_array_equal(array, expected[name])
                except BaseException as error:
                    errors.append(error)

            pool.limit = pool.stats().active + (12 << 20)
            threads = [threading.Thread(target=work, args=(number == 0,)) for number in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            for name, array in model.run(feeds_of()).items():
                np.testing.assert_array_equal(array, expected[name])
        assert pool.stats().active == 0
        pool.trim()


def test_what_has_convolutions():
    def model(op: str, inside: bool) -> bytes:
        node = onnx.helper.make_node(op, ["x", "w"], ["y"])
        if inside:
            body = onnx.helper.make_graph([node], "b", [], [onnx.helper.make_tensor_value_info("y", 1, None)])
            node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])).SerializeToString()

    assert [has_convolutions(model(op, inside)) for op in ("Conv", "MatMul") for inside in (True, False)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_wrong_feeds_are_refused_by_name(workshop, pool):
    folder, store = workshop
    with gi.load(folder / "a.glake", pool, store=store) as model:
        good = feeds_of()
        with pytest.raises(gi.InputError, match=r"no input 'input_idz'.*Did you mean 'input_ids'"):
            model.run({**good, "input_idz": good["input_ids"]})
        with pytest.raises(gi.InputError, match="was not fed"):
            model.run({"input_ids": good["input_ids"]})
        with pytest.raises(gi.InputError, match="was fed float32"):
            model.run({**good, "input_ids": good["input_ids"].astype(np.float32)})
        with pytest.raises(gi.InputError, match="1 axes instead of 2"):
            model.run({**good, "input_ids": good["input_ids"][0]})
        with pytest.raises(gi.InputError, match="no output 'nothing'"):
            model.run(good, ["nothing"])
        model.run({**good, "input_ids": good["input_ids"].tolist()})
        # sizes that only disagree with each other: ONNX Runtime finds that, and the model survives it
        with pytest.raises(gi.GlakeError):
            model.run({**good, "attention_mask": good["attention_mask"][:, :3]})
        model.run(good)


@pytest.mark.parametrize("sharing", ["fast", "lean"])
def test_a_changed_object_is_refused_and_every_package_it_hurts_is_named(tmp_path, pool, sharing):
    store = gi.Store(tmp_path / "store")
    for head in ("a", "b"):
        zoo.convert(zoo.spec("bert-tiny", head=head), tmp_path / f"{head}.glake", store=store)
    gi.load(tmp_path / "a.glake", pool, sharing=sharing, store=store).close()
    weights = gi.Package(tmp_path / "a.glake", store).manifest.weights
    for weight in (max(weights, key=lambda w: w.bytes), min(weights, key=lambda w: w.bytes)):
        path = store.objects.path(weight.digest)
        original = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        with pytest.raises(gi.DigestMismatchError) as caught:
            gi.load(tmp_path / "a.glake", pool, sharing=sharing, store=store)
        for head in ("a", "b"):
            assert str(tmp_path / f"{head}.glake") in str(caught.value)
        assert pool.stats().active == 0
        path.write_bytes(original)
    gi.load(tmp_path / "a.glake", pool, sharing=sharing, store=store).close()


def test_a_changed_object_with_an_intact_seal_is_refused_when_its_bytes_are_used(tmp_path, pool):
    store = gi.Store(tmp_path / "store")
    zoo.convert(zoo.spec("bert-tiny"), tmp_path / "a.glake", store=store)
    gi.load(tmp_path / "a.glake", pool, sharing="lean", store=store).close()
    weight = max(gi.Package(tmp_path / "a.glake", store).manifest.weights, key=lambda w: w.bytes)
    path = store.objects.path(weight.digest)
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(gi.DigestMismatchError, match="was changed on disk"):
        gi.load(tmp_path / "a.glake", pool, sharing="lean", store=store)


def test_damaged_derived_objects_are_made_again(tmp_path, pool):
    store = gi.Store(tmp_path / "store")
    zoo.convert(zoo.spec("bert-tiny"), tmp_path / "a.glake", store=store)
    feeds = feeds_of()
    with gi.load(tmp_path / "a.glake", pool, store=store) as model:
        expected = model.run(feeds)
    derived = [store.prepared_objects.path(digest) for digest, _ in store.prepared_objects]
    assert derived
    for damage in ("change", "remove", "graph"):
        victim = derived[0]
        if damage == "change":
            victim.chmod(0o644)
            victim.write_bytes(b"\0" * victim.stat().st_size)
        elif damage == "remove":
            victim.unlink()
        else:
            next(store.prepared.glob("*/graph.onnx")).write_bytes(b"nonsense")
        with gi.load(tmp_path / "a.glake", pool, store=store) as model:
            for name, array in model.run(feeds).items():
                np.testing.assert_array_equal(array, expected[name])


def test_gc_takes_what_was_derived_with_its_package_and_a_load_brings_it_back(tmp_path, pool):
    store = gi.Store(tmp_path / "store")
    zoo.convert(zoo.spec("bert-tiny"), tmp_path / "a.glake", store=store)
    gi.load(tmp_path / "a.glake", pool, store=store).close()
    before = len(list(store.prepared_objects))
    assert maintenance.gc(store).objects == 0
    assert len(list(store.prepared_objects)) == before > 0
    (tmp_path / "a.glake").rename(tmp_path / "gone")
    for file in (tmp_path / "gone").iterdir():
        file.unlink()
    report = maintenance.gc(store)
    assert report.prepared == 1
    assert not list(store.prepared_objects)
    assert not list(store.objects)


def test_a_full_disk_while_preparing_falls_back_to_private_copies(workshop, pool, monkeypatch):
    from glake_infer.models import load as module

    def full(*_, **__):
        raise gi.StorageFullError("no space left on the disk")

    folder, store = workshop
    monkeypatch.setattr(module, "prepare", full)
    with gi.load(folder / "a.glake", pool, store=store) as model:
        assert "not prepared" in model.notes[-1]
        for ours, theirs in zip(
            model.run(feeds_of()).values(), plain(folder / "a.onnx", feeds_of()).values(), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_options_that_do_not_exist_are_refused(workshop, pool):
    folder, store = workshop
    with pytest.raises(gi.InputError, match="expected 'fast' or 'lean'"):
        gi.load(folder / "a.glake", pool, sharing="quick", store=store)
    with pytest.raises(gi.InputError, match="expected one of"):
        gi.load(folder / "a.glake", pool, optimization="most", store=store)


def test_the_process_ends_cleanly_with_open_models(workshop):
    folder, store = workshop
    code = f"""
        import glake_infer as gi
        from glake_infer.models import zoo
        model = gi.load({str(folder / "a.glake")!r}, store=gi.Store({str(store.root)!r}))
        model.run(zoo.feeds(zoo.spec("bert-tiny"), 0))
        print("ran")
    """
    done = processes.run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_overridable_weights_may_be_fed(tmp_path, pool):
    from onnx import TensorProto, helper, numpy_helper, save

    weight = np.arange(1024, dtype=np.float32).reshape(32, 32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "overridable",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 32]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "m.onnx",
    )
    store = gi.Store(tmp_path / "store")
    gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    x = np.eye(32, dtype=np.float32)
    for sharing in ("fast", "lean"):
        with gi.load(tmp_path / "m.glake", pool, sharing=sharing, store=store) as model:
            assert [value.name for value in model.inputs] == ["x"]
            assert [value.name for value in model.overridable] == ["w"]
            np.testing.assert_array_equal(model.run({"x": x})["y"], weight)
            np.testing.assert_array_equal(model.run({"x": x, "w": weight + 1})["y"], weight + 1)


def test_bfloat16_goes_in_and_comes_out(tmp_path, pool):
    import ml_dtypes
    from onnx import TensorProto, helper, save

    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["f", "z"], ["g"]),
            helper.make_node("Cast", ["g"], ["y"], to=TensorProto.BFLOAT16),
        ],
        "bfloat16",
        [
            helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 4]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 4]),
            helper.make_tensor_value_info("g", TensorProto.FLOAT, ["n", 4]),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    store = gi.Store(tmp_path / "store")
    gi.convert(tmp_path / "m.onnx", tmp_path / "m.glake", store=store)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with gi.load(tmp_path / "m.glake", pool, store=store) as model:
        results = model.run({"x": x.astype(ml_dtypes.bfloat16), "z": x})
        assert results["y"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(results["y"].astype(np.float32), 2 * x)
        np.testing.assert_array_equal(results["g"], 2 * x)
        with pytest.raises(gi.InputError, match="was fed float32"):
            model.run({"x": x, "z": x})


def test_settings_of_one_caller_do_not_reach_another(workshop, pool):
    folder, store = workshop
    dimension = next(axis for axis in gi.load(folder / "a.glake", pool, store=store).inputs[0].shape if axis)

    def fixed(options):
        options.add_free_dimension_override_by_name(dimension, 1)

    fresh = gi.Store(folder / "fresh")
    gi.convert(folder / "a.onnx", folder / "fresh.glake", store=fresh)
    gi.load(folder / "fresh.glake", pool, store=fresh, configure=fixed).close()
    with gi.load(folder / "fresh.glake", pool, store=fresh) as model:
        model.run(feeds_of(batch=2))


@pytest.mark.parametrize("damage", ["empty info", "no graph", "other info"])
def test_damaged_prepared_files_are_made_again(tmp_path, pool, damage):
    store = gi.Store(tmp_path / "store")
    zoo.convert(zoo.spec("bert-tiny"), tmp_path / "a.glake", store=store)
    gi.load(tmp_path / "a.glake", pool, store=store).close()
    folder = next(store.prepared.glob("*/info.json")).parent
    if damage == "no graph":
        (folder / "graph.onnx").unlink()
    else:
        (folder / "info.json").write_text("" if damage == "empty info" else '{"graph": 1}')
    with gi.load(tmp_path / "a.glake", pool, store=store) as model:
        model.run(feeds_of())


def test_many_derived_objects_damaged_behind_their_seals_are_made_again(tmp_path, pool):
    store = gi.Store(tmp_path / "store")
    zoo.convert(zoo.spec("bert-tiny"), tmp_path / "a.glake", store=store)
    with gi.load(tmp_path / "a.glake", pool, store=store) as model:
        expected = model.run(feeds_of())
    for digest, status in list(store.prepared_objects)[:8]:
        path = store.prepared_objects.path(digest)
        path.chmod(0o644)
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with gi.load(tmp_path / "a.glake", pool, store=store) as model:
        for name, array in model.run(feeds_of()).items():
            np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    ("options", "captures"),
    [({}, False), ({"enable_cuda_graph": 1}, True), ({"enable_cuda_graph": "1"}, True),
     ({"enable_cuda_graph": True}, True), ({"enable_cuda_graph": "0"}, False), ({"enable_cuda_graph": False}, False)],
)  # fmt: skip
def test_who_captures_cuda_graphs_is_seen_by_the_providers(options, captures):
    providers = [("CUDAExecutionProvider", {"device_id": 0, **options}), "CPUExecutionProvider"]
    assert captures_graphs(providers) is captures
