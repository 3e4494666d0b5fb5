"""What a process says of itself: pools and models, in every state, while they are used and closed."""

import gc as garbage
import threading
import time

import pytest

import glake_infer as gi
from glake_infer.holding import Holding
from glake_infer.models import load as loading
from glake_infer.models import status as module
from glake_infer.models import zoo
from glake_infer.models.status import machine_status, process_statuses
from glake_infer.residency import Residency
from glake_infer.sharing import client

MiB = 1 << 20
SPECS = {name: zoo.spec("bert-tiny", head=name) for name in "ab"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Two packages of one trunk, and their store."""
    folder = tmp_path_factory.mktemp("workshop")
    store = gi.Store(folder / "store")
    for name, spec in SPECS.items():
        zoo.convert(spec, folder / f"{name}.glake", store=store)
    return folder, store


@pytest.fixture(params=["mapped", "copied"])
def kind(request, monkeypatch):
    if request.param == "copied":
        original = Residency.__init__
        monkeypatch.setattr(loading, "maps_weights", lambda pool: False)
        monkeypatch.setattr(
            Residency, "__init__", lambda self, pool, copies, *more: original(self, pool, True, *more)
        )
    return request.param


@pytest.fixture
def pool(kind):
    with gi.Pool(device="cpu", limit="2GiB", broker="off") as pool:
        yield pool
        garbage.collect()


def load(workshop, name, pool, **options):
    folder, store = workshop
    return gi.load(folder / f"{name}.glake", pool, store=store, **options)


def feeds(name):
    return zoo.feeds(SPECS[name], 0, batch=2, length=8)


def shown():
    (process,) = process_statuses()
    return process


def states():
    return [(model.name, model.state) for model in shown().models]


def test_no_pool_no_status():
    garbage.collect()
    assert process_statuses() == []
    assert machine_status().devices == []


def test_pool_and_models_as_they_are(workshop, pool):
    with load(workshop, "a", pool) as a, load(workshop, "b", pool) as b:
        a.run(feeds("a"))
        a.run(feeds("a"))
        b.run(feeds("b"))
        process = shown()
        stats = pool.stats()
        for name in (
            "limit",
            "reserved",
            "active",
            "idle",
            "requested",
            "weights",
            "shared",
            "peak_reserved",
        ):
            assert getattr(process.pool, name) == getattr(stats, name)
        assert process.pool.quota is None
        assert not process.connected
        first, second = process.models
        assert (first.name, first.state, first.runs) == ("a", "awake", 2)
        assert (second.name, second.state, second.runs) == ("b", "awake", 1)
        for status, model in ((first, a), (second, b)):
            memory = model.memory
            assert (status.shared, status.own, status.private) == (memory.shared, memory.own, memory.private)
            assert status.shared > 10 * status.own > 0
            assert status.idle_seconds >= 0
            assert status.chunks == []
        b.close()
        garbage.collect()
        (left,) = shown().models
        assert (left.name, left.shared) == ("a", 0)
    garbage.collect()
    assert shown().models == []


def test_the_states_of_a_model(workshop, pool, monkeypatch):
    with load(workshop, "a", pool) as model:
        assert states() == [("a", "awake")]
        model.suspend()
        (status,) = shown().models
        assert status.state == "suspended"
        assert status.asleep >= status.own
        assert states() == [("a", "suspended")]  # looking has not woken it
        assert model.suspended
        with model._holding:
            (status,) = shown().models
            assert (status.state, status.asleep, status.idle_seconds) == ("running", 0, 0)
        assert states() == [("a", "awake")]


@pytest.mark.parametrize("kind", ["copied"], indirect=True)
def test_what_a_pool_took_by_itself(workshop, kind):
    with gi.Runtime(limit="24MiB", device="cpu") as runtime:
        folder, store = workshop
        first = runtime.load(folder / "a.glake", store=store, priority=3)
        runtime.pool.limit = runtime.pool.stats().active + MiB
        address = runtime.pool.allocate(4 * MiB)
        (status,) = shown().models
        assert (status.state, status.priority, status.pinned) == ("idle", 3, False)
        assert status.asleep > 0
        runtime.pool.deallocate(address)
        first.close()


def test_the_machine_of_one_process(workshop, pool):
    with load(workshop, "a", pool):
        (device,) = machine_status().devices
        assert (device.name, device.governed) == ("cpu", False)
        assert device.memory > 1 << 30
        assert device.limit == 2 << 30
        assert device.used == pool.stats().reserved
        assert device.processes[0].device == "cpu"


def test_the_broker_asks_the_same():
    assert client.describe is process_statuses


def test_it_waits_for_no_load(workshop, pool, monkeypatch):
    """A load that hangs in its files, and a pool that is being opened, hold nobody up."""
    begun, go_on = threading.Event(), threading.Event()
    original = Residency._bring

    def slow(self, *arguments, **options):
        begun.set()
        assert go_on.wait(60)
        return original(self, *arguments, **options)

    with load(workshop, "a", pool) as ready:
        monkeypatch.setattr(Residency, "_bring", slow)
        made = []
        thread = threading.Thread(target=lambda: made.append(load(workshop, "b", pool)))
        thread.start()
        assert begun.wait(60)
        start = time.monotonic()
        assert states() == [("a", "awake")]
        assert time.monotonic() - start < 1
        go_on.set()
        thread.join()
        assert states() == [("a", "awake"), ("b", "awake")]
        made[0].close()
        del ready
    from glake_infer.allocators import pool as pools

    with pools._lock:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(process_statuses()))
        thread.start()
        thread.join(10)
        assert len(seen) == 1


def test_while_models_come_run_sleep_and_go(workshop, pool):
    """Nothing raises, whenever it is asked, and no run is disturbed."""
    ending = threading.Event()
    failures = []

    def work(name):
        try:
            while not ending.is_set():
                with load(workshop, name, pool) as model:
                    for _ in range(3):
                        model.run(feeds(name))
                        model.suspend()
        except Exception as error:
            failures.append(error)

    def look():
        try:
            while not ending.is_set():
                for process in process_statuses():
                    for model in process.models:
                        assert model.state in ("running", "awake", "idle", "suspended")
                        assert min(model.shared, model.own, model.private, model.asleep, model.runs) >= 0
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[name]) for name in "ab"]
    threads += [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    ending.set()
    for thread in threads:
        thread.join()
    assert failures == []
    garbage.collect()
    assert shown().models == []


def test_a_model_that_closes_while_it_is_described_is_left_out(workshop, pool, monkeypatch):
    model = load(workshop, "a", pool)
    original = Holding.weigh

    def closing(self, patience=-1):
        weighed = original(self)
        model.close()
        return weighed

    monkeypatch.setattr(Holding, "weigh", closing)
    for status in shown().models:
        assert status.name == "a"
    garbage.collect()
    assert shown().models == []


def test_a_pool_closes_while_somebody_looks_at_its_models(workshop, kind, monkeypatch):
    """Who looks may be the last to have a model, and ends it: the pool waits for that."""
    original = module._model_status
    looks, go_on = threading.Event(), threading.Event()

    def slow(model):
        looks.set()
        assert go_on.wait(60)
        return original(model)

    monkeypatch.setattr(module, "_model_status", slow)
    pool = gi.Pool(device="cpu", limit="2GiB", broker="off")
    model = load(workshop, "a", pool)
    model.run(feeds("a"))
    looking = threading.Thread(target=process_statuses)
    looking.start()
    assert looks.wait(60)
    del model
    garbage.collect()
    assert pool.stats().active
    threading.Timer(0.2, go_on.set).start()
    pool.close()
    looking.join()


def test_models_of_an_earlier_handle_are_the_devices_too(workshop, kind):
    first = gi.Pool(device="cpu", limit="2GiB", broker="off")
    model = load(workshop, "a", first)
    session = model.session
    garbage.collect()
    assert states() == [("a", "awake")]
    model.close()
    del session, model
    garbage.collect()
    first.close()


def test_a_name_for_the_process(monkeypatch):
    assert len(client.process_name()) > 0
    monkeypatch.setenv("GLAKE_NAME", "embedder-3")
    assert client.process_name() == "embedder-3"


def test_who_asks_wakes_nobody_through_a_monitor(workshop, pool, tmp_path, monkeypatch):
    from glake_infer.window.observe import observe

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    with load(workshop, "a", pool) as model, gi.monitor() as monitor:
        model.suspend()
        for _ in range(5):
            (process,) = observe(monitor.path).devices[0].processes
            assert process.models[0].state == "suspended"
        assert model.suspended
    assert module._monitors == [] or all(m is not monitor for m in module._monitors)
