"""Models that sleep, and a Runtime for more than fit. On the CPU; weights are mapped, or copied as on a GPU."""

import contextlib
import gc as garbage
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import glake_infer as gi
from glake_infer.models import load as module
from glake_infer.models import zoo
from glake_infer.process_memory import measure, release_unused_heap
from glake_infer.residency import Residency

MiB = 1 << 20
SPECS = {
    "a": zoo.spec("bert-tiny", head="a", labels=2),
    "b": zoo.spec("bert-tiny", head="b", labels=17),
    "c": zoo.spec("bert-tiny", seed=1),
    "d": zoo.spec("bert-tiny", seed=2),
    "e": zoo.spec("bert-tiny", seed=3),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Two of one trunk and three others, and their store."""
    folder = tmp_path_factory.mktemp("workshop")
    store = gi.Store(folder / "store")
    for name, spec in SPECS.items():
        zoo.write(spec, folder / f"{name}.onnx")
        gi.convert(folder / f"{name}.onnx", folder / f"{name}.glake", store=store)
    return folder, store


@pytest.fixture
def pool():
    with gi.Pool(device="cpu", limit="2GiB") as pool:
        yield pool
        garbage.collect()
        pool.check_invariants()


@pytest.fixture(params=["mapped", "copied"])
def kind(request, monkeypatch):
    if request.param == "copied":
        monkeypatch.setattr(module, "maps_weights", lambda pool: False)
        monkeypatch.setattr(Residency, "__init__", _copying(Residency.__init__))
    return request.param


def _copying(original):
    return lambda self, pool, copies, share=None: original(self, pool, True, share)


def feeds_of(name, seed=0):
    return zoo.feeds(SPECS[name], seed, batch=2, length=8)


def load(workshop, name, pool, **options):
    folder, store = workshop
    return gi.load(folder / f"{name}.glake", pool, store=store, **options)


def same(ours, theirs):
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("sharing", ["fast", "lean"])
def test_a_sleeping_model_gives_its_memory_back_and_answers_as_before(workshop, pool, kind, sharing):
    model = load(workshop, "a", pool, sharing=sharing)
    expected = model.run(feeds_of("a"))
    weights = model.memory.own
    assert weights > 2 * MiB
    for _ in range(3):
        pool.trim()
        active = pool.stats().active
        assert model.suspend() >= weights
        assert model.suspended
        assert pool.stats().active <= active - weights
        assert pool.stats().reserved <= active - weights + MiB
        assert model.memory.asleep >= weights
        assert "asleep" in repr(model)
        same(model.run(feeds_of("a")), expected)
        assert not model.suspended
        assert model.memory.asleep == 0
    model.suspend()
    model.resume()
    assert (model.suspended, model.memory.asleep, model.memory.waking) == (False, 0, 0)
    same(model.run(feeds_of("a")), expected)
    model.suspend()
    model.close()
    for call in (model.suspend, model.resume):
        with pytest.raises(gi.GlakeError, match="is closed"):
            call()
    assert model.memory == gi.ModelMemory(0, 0, 0)


@pytest.mark.clock
def test_the_operating_system_sees_the_memory_go(workshop):
    """Also what ONNX Runtime has mapped by itself: prepacked weights."""
    spec = zoo.spec("bert-mini")
    folder, store = workshop
    if not (folder / "mini.glake").exists():
        zoo.write(spec, folder / "mini.onnx")
        gi.convert(folder / "mini.onnx", folder / "mini.glake", store=store)
    feeds = zoo.feeds(spec, 0, batch=1, length=8)
    with gi.Pool(device="cpu") as pool, gi.load(folder / "mini.glake", pool, store=store) as model:
        expected = model.run(feeds)
        assert in_memory(store.root) > 10 * MiB
        before = measure().total
        assert model.suspend() > 20 * MiB
        assert in_memory(store.root) == 0
        assert before - measure().total > 10 * MiB
        same(model.run(feeds), expected)


def in_memory(folder):
    """Bytes of pages of the folder's files that this process has mapped and touched."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_who_runs_the_session_wakes_it_too(workshop, pool, kind):
    model = load(workshop, "a", pool)
    feeds = feeds_of("a")
    expected = list(model.run(feeds).values())
    session = model.session
    assert isinstance(session, ort.InferenceSession)
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits", "cpu")

    def bound():
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for run in (
        lambda: session.run(None, feeds),
        bound,
        lambda: [value.numpy() for value in session.run_with_ort_values(None, values)],
    ):
        model.suspend()
        for ours, theirs in zip(run(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert not model.suspended
    with pytest.raises(gi.GlakeError, match="run_async is not possible"):
        session.run_async(None, feeds, lambda *_: None, None)
    model.close()


def test_suspend_waits_for_runs_and_runs_go_on_after_it(workshop, pool, kind):
    models = {name: load(workshop, name, pool) for name in ("a", "b")}
    expected = {name: model.run(feeds_of(name)) for name, model in models.items()}
    problems, end = [], time.monotonic() + 2

    def work(number):
        chosen = random.Random(number)
        try:
            while time.monotonic() < end:
                name = chosen.choice("ab")
                same(models[name].run(feeds_of(name)), expected[name])
                if number == 0:
                    models[chosen.choice("ab")].suspend()
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


def test_memory_says_who_shares_what_with_whom(workshop, pool, kind):
    one, two, other = (load(workshop, name, pool) for name in "abc")
    trunk = one.memory.shared
    assert trunk > 2 * MiB
    assert one.memory.shared_with == {"b": trunk}
    assert two.memory.shared_with == {"a": trunk}
    assert other.memory.shared_with == {}
    one.suspend()
    assert one.memory.asleep < MiB  # the trunk stays for the other
    two.suspend()
    assert two.memory.asleep >= trunk
    assert one.memory.asleep >= trunk
    expected = one.run(feeds_of("a"))
    assert two.memory.asleep < MiB
    two.close()
    garbage.collect()
    assert (one.memory.shared, one.memory.shared_with) == (0, {})
    same(one.run(feeds_of("a")), expected)
    one.close()
    other.close()


def test_a_store_that_is_gone_is_a_clear_error_and_the_model_sleeps_on(tmp_path, pool, kind):
    store = gi.Store(tmp_path / "store")
    zoo.write(SPECS["a"], tmp_path / "a.onnx")
    gi.convert(tmp_path / "a.onnx", tmp_path / "a.glake", store=store)
    model = gi.load(tmp_path / "a.glake", pool, store=store)
    expected = model.run(feeds_of("a"))
    model.suspend()
    shutil.move(store.root, tmp_path / "away")
    for call in (model.resume, lambda: model.run(feeds_of("a"))):
        with pytest.raises(gi.StoreError, match=r"cannot be read: No such file.*sleeps on"):
            call()
        assert model.suspended
        assert model.memory.asleep > 2 * MiB
    shutil.move(tmp_path / "away", store.root)
    same(model.run(feeds_of("a")), expected)
    model.suspend()
    weight = max(
        (w for w in model._holding.addresses), key=lambda d: model._residency._entries[d].wanted.length
    )
    path = model._residency._entries[weight].wanted.folder.path(weight)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises((gi.DigestMismatchError, gi.StoreError)) as caught:
        model.run(feeds_of("a"))
    assert weight in str(caught.value)
    path.unlink()
    path.write_bytes(data)
    same(model.run(feeds_of("a")), expected)
    model.close()


def test_a_limit_below_what_waking_takes_is_an_error_and_the_model_sleeps_on(workshop, pool, kind):
    model = load(workshop, "a", pool)
    expected = model.run(feeds_of("a"))
    model.suspend()
    pool.limit = pool.stats().active + MiB
    with pytest.raises(gi.OutOfMemoryError) as caught:
        model.run(feeds_of("a"))
    assert caught.value.needed_limit > pool.limit
    assert model.memory.asleep > 2 * MiB
    pool.limit = "1GiB"
    same(model.run(feeds_of("a")), expected)
    model.close()


def test_host_copy_is_checked(workshop, pool):
    with pytest.raises(gi.InputError, match="'store' or 'pinned'"):
        load(workshop, "a", pool, host_copy="disk")


class TestRuntime:
    def limit(self, workshop, kind):
        """Room for about two of the models, and for what ONNX Runtime prepacks for the CPU where it is not prepared."""
        folder, store = workshop
        weights = gi.Package(folder / "c.glake", store).manifest.weight_bytes
        return int((2.6 if kind == "mapped" else 5.8) * weights) + 2 * MiB

    def test_more_models_than_fit_answer_from_four_threads(self, workshop, kind):
        folder, store = workshop
        limit = self.limit(workshop, kind)
        with gi.Runtime(limit, device="cpu", store=store) as runtime:
            models = {name: runtime.load(folder / f"{name}.glake") for name in SPECS}
            expected = {name: model.run(feeds_of(name)) for name, model in models.items()}
            assert runtime.models == list(models.values())[::-1]
            assert any(model.memory.asleep for model in models.values())
            assert not models["e"].memory.asleep
            problems, high = [], []

            def work(number):
                chosen = random.Random(number)
                try:
                    for _ in range(40):
                        name = chosen.choice(list(SPECS))
                        same(models[name].run(feeds_of(name)), expected[name])
                        high.append(runtime.pool.stats().reserved)
                except BaseException as error:
                    problems.append(error)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not problems, problems[0]
            assert max(high) <= runtime.pool.stats().peak_reserved <= limit

    def test_pinned_and_important_models_stay(self, workshop, kind):
        folder, store = workshop
        with gi.Runtime(self.limit(workshop, kind), device="cpu", store=store) as runtime:
            pinned = runtime.load(folder / "c.glake", pin=True)
            models = [runtime.load(folder / f"{name}.glake") for name in "ade"]
            for name, model in zip("ade", models, strict=True):
                model.run(feeds_of(name))
            assert pinned.memory.asleep == 0
            assert models[0].memory.asleep
            models[2].priority = 5
            assert (pinned.pinned, models[2].pinned, models[2].priority) == (True, False, 5)
            models[1].run(feeds_of("d"))
            models[0].run(feeds_of("a"))
            assert models[2].memory.asleep <= models[1].memory.asleep
            pinned.pinned = False
            pinned.pinned = True
            assert runtime.suspend_idle(older_than=3600) == 0
            assert runtime.suspend_idle() > 0
            assert not pinned.suspended
            assert all(model.suspended for model in models)
            with pytest.raises(gi.InputError, match="seconds"):
                runtime.suspend_idle(older_than=-1)

    def test_a_limit_below_one_model(self, workshop, kind):
        folder, store = workshop
        with gi.Runtime("1MiB", device="cpu", store=store) as runtime:
            with pytest.raises(gi.OutOfMemoryError) as caught:
                runtime.load(folder / "c.glake")
            garbage.collect()
            assert runtime.pool.stats().active == 0
            runtime.pool.limit = caught.value.needed_limit + 4 * MiB
            runtime.load(folder / "c.glake").run(feeds_of("c"))

    def test_a_run_whose_activations_do_not_fit_beside_others_waits_and_goes_alone(self, workshop, kind):
        folder, store = workshop
        with gi.Runtime("1GiB", device="cpu", store=store) as runtime:
            models = {name: runtime.load(folder / f"{name}.glake") for name in "cde"}
            large = {name: zoo.feeds(SPECS[name], 0, batch=16, length=64) for name in models}
            expected = {}
            for name, model in models.items():
                runtime.pool.trim()
                before = runtime.pool.stats().active
                expected[name] = model.run(large[name])
            most = runtime.pool.stats().reserved - before  # what one run's activations take
            weights = max(model.memory.own for model in models.values())
            runtime.suspend_idle()
            runtime.pool.limit = runtime.pool.stats().active + int(1.3 * (weights + most)) + MiB
            problems = []

            def work(name):
                try:
                    for _ in range(6):
                        same(models[name].run(large[name]), expected[name])
                except BaseException as error:
                    problems.append(error)

            threads = [threading.Thread(target=work, args=(name,)) for name in models]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not problems, problems[0]

    def test_what_it_takes_and_what_it_refuses(self, workshop, pool):
        folder, store = workshop
        with pytest.raises(gi.InputError, match="not both"):
            gi.Runtime("1GiB", pool=pool)
        runtime = gi.Runtime(pool=pool, store=store)
        with pytest.raises(gi.InputError, match="no 'device'"):
            runtime.load(folder / "a.glake", device="cpu")
        model = runtime.load(folder / "a.glake")
        assert "1 models" in repr(runtime)
        alone = load(workshop, "b", pool)
        assert alone.pinned
        with pytest.raises(gi.InputError, match=r"Runtime\.load"):
            alone.pinned = False
        runtime.close()
        runtime.close()
        assert model.closed
        with pytest.raises(gi.GlakeError, match="is closed"):
            runtime.load(folder / "a.glake")
        assert pool.stats().reserved >= 0  # not the Runtime's to close
        alone.close()

    def test_without_a_device_it_takes_what_is_there(self, workshop, monkeypatch):
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
        with gi.Runtime("1GiB", store=workshop[1]) as runtime:
            assert runtime.pool.device == "cpu"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_thousand_naps_leave_no_growth(workshop, kind):
    folder, store = workshop
    with gi.Pool(device="cpu", limit="1GiB") as pool, gi.load(folder / "a.glake", pool, store=store) as model:
        expected = model.run(feeds_of("a"))
        levels = []
        for cycle in range(1000):
            model.suspend()
            model.resume()
            if cycle % 10 == 0:
                same(model.run(feeds_of("a")), expected)
            if cycle in (99, 549, 999):
                garbage.collect()
                release_unused_heap()
                levels.append((measure().private, pool.stats().reserved, pool.stats().requested))
        assert levels[1][1:] == levels[2][1:]
        assert levels[2][0] - levels[1][0] < MiB


def test_errors_of_waking_keep_no_session_alive(tmp_path, pool, kind):
    store = gi.Store(tmp_path / "store")
    zoo.write(SPECS["a"], tmp_path / "a.onnx")
    gi.convert(tmp_path / "a.onnx", tmp_path / "a.glake", store=store)
    model = gi.load(tmp_path / "a.glake", pool, store=store)
    expected = model.run(feeds_of("a"))
    model.suspend()
    pool.limit = pool.stats().active + MiB
    kept = []
    with pytest.raises(gi.OutOfMemoryError) as no_room:
        model.run(feeds_of("a"))
    kept.append(no_room.value)
    pool.limit = "1GiB"
    shutil.move(store.root, tmp_path / "away")
    with pytest.raises(gi.StoreError) as no_store:
        model.run(feeds_of("a"))
    kept.append(no_store.value)
    shutil.move(tmp_path / "away", store.root)
    same(model.run(feeds_of("a")), expected)
    holding = model._holding
    del no_room, no_store
    model.close()
    garbage.collect()
    assert holding.closed
    assert len(kept) == 2


def test_too_little_room_to_wake_does_not_end_a_session_with_convolutions(workshop, pool, kind):
    model = load(workshop, "a", pool)
    model._convolutions = True  # as on a GPU: a refused run leaves them in disorder
    expected = model.run(feeds_of("a"))
    session = model.session
    model.suspend()
    pool.limit = pool.stats().active + MiB
    for _ in range(2):
        with pytest.raises(gi.OutOfMemoryError):
            model.run(feeds_of("a"))
    assert model.session is session
    pool.limit = "1GiB"
    same(model.run(feeds_of("a")), expected)
    del session
    model.close()


def test_a_runtime_is_looked_at_and_closed_while_others_load_and_close(workshop, monkeypatch):
    folder, store = workshop
    runtime = gi.Runtime("1GiB", device="cpu", store=store)
    problems, stop = [], threading.Event()

    def look():
        try:
            while not stop.is_set():
                assert len(runtime.models) <= 2
                runtime.suspend_idle()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(10):
        runtime.load(folder / "a.glake").close()
    stop.set()
    thread.join()
    assert not problems, repr(problems[0])
    from glake_infer.models import runtime as runtime_module

    real = runtime_module.load

    def slow(*arguments, **options):
        model = real(*arguments, **options)
        with contextlib.suppress(gi.PoolInUseError):
            runtime.close()
        return model

    monkeypatch.setattr(runtime_module, "load", slow)
    with pytest.raises(gi.GlakeError, match="closed while the model was loaded"):
        runtime.load(folder / "a.glake")
    runtime.close()
