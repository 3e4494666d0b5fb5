"""Processes that share weights by a broker: real models, real processes, killed at bad moments. On the CPU."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import brokers
import brokers_worker
import pytest
from brokers import until

import glake_infer as gi
from glake_infer.models import zoo
from glake_infer.models.package import Package
from glake_infer.sharing import protocol as p
from glake_infer.sharing.channel import Channel, frame
from glake_infer.sharing.refusals import BrokerMemoryError

KiB, MiB = 1 << 10, 1 << 20
SPECS = {
    "a": zoo.spec("bert-tiny", head="a", labels=2),
    "b": zoo.spec("bert-tiny", head="b", labels=17),
    "c": zoo.spec("bert-tiny", seed=1),
    "d": zoo.spec("bert-tiny", seed=2),
}
LARGE = {
    "m": zoo.spec("bert-mini", head="m", labels=2),
    "n": zoo.spec("bert-mini", head="n", labels=3),
    "o": zoo.spec("bert-mini", seed=1),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Two of one trunk and two others, of 4.5 MiB."""
    return brokers.make_workshop(tmp_path_factory.mktemp("workshop"), SPECS)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two of one trunk and another, of 20 MiB."""
    return brokers.make_workshop(tmp_path_factory.mktemp("large"), LARGE, fast=False)


@pytest.fixture
def machine(workshop, place):
    machine = brokers.Machine(place, workshop)
    yield machine
    machine.close()


@pytest.fixture
def large_machine(large, place):
    machine = brokers.Machine(place, large)
    yield machine
    machine.close()


# One copy.


@pytest.mark.parametrize("sharing", ["lean", "fast"])
def test_the_second_process_loads_nothing(machine, sharing):
    machine.start()
    first, second = machine.workers(2)
    loads, hits = first(f"serve_models('a', sharing={sharing!r})")
    assert loads
    assert not hits
    assert second(f"serve_models('a', sharing={sharing!r})") == (0, loads)
    # A fine-tune of the same trunk: what differs is loaded, and no more. (Fast, its prepacked weights are files.)
    own = sharing == "lean"
    assert second(f"serve_models('b', sharing={sharing!r})") == (own, loads)
    assert first(f"serve_models('b', sharing={sharing!r})") == (loads, own)
    # Another model.
    more, _ = first(f"serve_models('c', sharing={sharing!r})")
    assert more > loads
    assert second(f"serve_models('c', sharing={sharing!r})") == (own, more)
    machine.audit([first, second])
    device = machine.broker.cpu
    assert device.loads == more + own
    assert all(sorted(c.processes) == sorted([first.pid, second.pid]) for c in device.chunks)


def test_six_processes_at_once(machine):
    """Each chunk is loaded once, whoever comes first; it stays when all have ended, and goes when it is not needed."""
    machine.start()
    workers = machine.workers(6)
    wanted = ["'a'", "'a'", "'b','a'", "'a','b'", "'c','a'", "'d','c','b'"]
    for worker, names in zip(workers, wanted, strict=True):
        worker.begin(f"serve_models({names})")
    for worker in workers:
        worker.result()
    machine.audit(workers)
    counts = [worker("transfers()") for worker in workers]
    ready = machine.broker.ready_chunks()
    assert sum(loads for loads, _ in counts) == len(ready) == machine.broker.cpu.loads
    assert sum(hits for _, hits in counts) == sum(len(pids) - 1 for pids in ready.values())

    before = machine.broker.memfds()
    for worker in workers:
        worker._connection.close()
    for worker in workers:
        assert worker.process.wait(20) == 0
    until(lambda: not machine.broker.clients())
    machine.audit()
    assert machine.broker.memfds() == before
    device = machine.broker.cpu
    assert device.unused == device.weights == device.used
    seventh = machine.worker()
    assert seventh("serve_models('a','b','c','d')") == (0, len(ready))


def test_memory_by_the_operating_system(large_machine):
    """Three processes: no more than where each maps the store's files, and far less than with plain ONNX Runtime."""
    machine = large_machine
    machine.start()
    plain = f"""
        import onnxruntime
        def load_plain(name):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            made = onnxruntime.InferenceSession({str(machine.workshop)!r} + f"/{{name}}.onnx", options)
            feeds = _read(_folder / f"{{name}}.feeds0.npz")
            models[name] = made
            return [made.run(None, feeds) for _ in range(2)] and None
    """
    lean = "serve_models({0!r}); run({0!r})"
    weights = (machine.workshop / "m.onnx").stat().st_size
    taken = {}
    for kind, broker in {"plain": "off", "mapped": "off", "broker": ""}.items():
        workers = machine.workers(3, broker=broker)
        load = "load_plain({0!r})" if kind == "plain" else lean
        pids = [worker.pid for worker in workers] + [machine.broker.pid]
        for worker in workers:
            worker(plain)
            worker(load.format("o"))  # the libraries, and what they make once
        before = brokers.machine_bytes(*pids)
        for worker, name in zip(workers, "mmn", strict=True):
            worker(load.format(name))
        taken[kind] = brokers.machine_bytes(*pids) - before
        for worker in workers:
            worker.kill()
        until(lambda: not machine.broker.clients())
    assert taken["plain"] > 3 * weights
    assert weights < taken["broker"] < 0.6 * taken["plain"]
    assert taken["broker"] < 1.15 * taken["mapped"] + 2 * MiB
    # Nobody maps it any more: it is memory all the same, and what the broker says.
    assert brokers.taken(machine.broker.memfds()) > 2 * weights
    machine.audit()


def test_suspend_trim_and_close_give_memory_back(machine):
    """To the system, when nobody else has it."""
    machine.start()
    one, other = machine.workers(2)
    one("serve_models('a', 'c')")
    assert other("serve_models('a')")[0] == 0
    both = brokers.taken(machine.broker.memfds())
    other.begin("""
        ran = 0
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            ran += run("a")
        ran
    """)
    while not other.ready():  # it runs, while the other's is put to sleep and brought back
        assert one("models['a'].suspend()") > 0
        assert one("run('a')")
    assert other.result() > 5
    assert one("transfers()")[0] == len(machine.broker.ready_chunks())  # nothing was read again

    assert one("models['a'].suspend()") > 4 * MiB
    assert brokers.taken(machine.broker.memfds()) == both  # the other one has it
    assert other("models['a'].suspend()") > 4 * MiB
    of_c = brokers.taken(machine.broker.memfds())
    assert of_c < both - 4 * MiB
    assert {c.state for c in machine.broker.cpu.chunks} == {"ready", "absent"}
    machine.audit([one, other])

    one("close_model('c')")
    assert one("stats().unused_weights") > 4 * MiB
    assert brokers.taken(machine.broker.memfds()) == of_c
    assert one("runtime.pool.trim()") > 4 * MiB
    assert brokers.taken(machine.broker.memfds()) == 0
    assert one("run('a')")
    assert other("run('a')")
    assert brokers.taken(machine.broker.memfds()) == both - of_c
    one("close_runtime()")
    assert brokers.taken(machine.broker.memfds()) == both - of_c
    assert other("run('a')")
    other("close_runtime()")
    assert brokers.taken(machine.broker.memfds()) == 0
    until(lambda: not machine.broker.clients())
    assert machine.broker.status().broker.lost == 0
    assert machine.broker.cpu.chunks == []
    one("open_runtime(" + repr(str(machine.path)) + ")")
    one("serve_models('a')")
    machine.audit([one])


# Clients that are killed.


def stalled(machine, worker, code, when="before"):
    """Let a worker evaluate something, and return when it stands still as it fills chunks; `go()` lets it go on."""
    marker, go = (machine.folder / f"{worker.name}.{what}" for what in ("marker", "go"))
    worker(f"stall({str(marker)!r}, {str(go)!r}, {when!r})")
    worker.begin(code)
    until(marker.exists)
    return go.touch


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_client_killed_while_it_loads(machine, when):
    machine.start()
    one, other = machine.workers(2)
    stalled(machine, one, "serve_models('a')", when)
    other.begin("serve_models('a', 'b')")
    assert not other.ready(0.3)  # it waits for the first one
    one.kill()
    loads, hits = other.result(10)
    assert (loads, hits) == (len(machine.broker.ready_chunks()), 0)
    machine.audit([other])
    assert machine.broker.status().broker.lost == 1
    third = machine.worker()
    assert third("serve_models('a', 'b')") == (0, loads)


def test_a_client_killed_while_it_waits_for_anothers_load(machine):
    machine.start()
    one, two, three = machine.workers(3)
    go = stalled(machine, one, "serve_models('a')")
    two.begin("serve_models('a')")
    three.begin("serve_models('a')")
    assert not two.ready(0.3)
    two.kill()
    go()
    assert one.result() == (2, 0)
    assert three.result() == (0, 2)
    machine.audit([one, three])


def test_a_client_killed_while_it_is_idle(machine):
    machine.start()
    one, other = machine.workers(2)
    one("serve_models('a', 'c')")
    other("serve_models('a')")
    before = machine.broker.memfds()
    one.kill()
    until(lambda: machine.broker.clients() == [other.pid])
    assert machine.broker.memfds() == before
    assert sorted(machine.broker.ready_chunks().values()) == [[], [other.pid], [other.pid]]
    machine.audit([other])
    assert other("serve_models('c')")[0] == 0
    other("models['c'].suspend()")
    assert len(machine.broker.memfds()) == 2
    machine.audit([other])


# Brokers that are killed.

QUICK = {"PATIENCE": 1.0, "SILENCE": 0.6, "BLOCKED": 0.6}


def quick(**more):
    """Set-up for a worker that gives a broker up sooner."""
    return f"patch(**{ {**QUICK, **more}!r})"


def loop(worker, name):
    """Let a worker run a model again and again, until `end_loop`."""
    worker(f"""
        import threading
        looping, ran, failed = True, 0, []
        def go_on():
            global ran
            try:
                while looping:
                    ran += run({name!r})
            except BaseException as error:
                failed.append(error)
        thread = threading.Thread(target=go_on)
        thread.start()
    """)


def end_loop(worker):
    """Returns how often it ran; raises what a run raised."""
    return worker("""
        looping = False
        thread.join()
        if failed:
            raise failed[0]
        ran
    """)


def reconnected(*workers):
    for worker in workers:
        until(lambda w=worker: w("share().connected and share().reconnections > 0"), 15)


def test_a_new_broker_is_told_of_everything(machine):
    """The old one is killed while one process runs a model, and others have some awake and some asleep."""
    machine.start()
    one, two, three = machine.workers(3)
    one("serve_models('a', 'b', 'c')")
    one("models['c'].suspend()")
    two("serve_models('a', 'd')")
    three("serve_models('d', sharing='fast')")
    machine.audit([one, two, three])
    before = machine.broker.ready_chunks()
    quotas = {process.pid: process.pool.quota for process in machine.broker.cpu.processes}
    loop(two, "a")
    machine.broker.kill()
    assert one("run('a') and run('b')")
    machine.start()
    reconnected(one, two, three)
    assert end_loop(two) > 3
    until(lambda: machine.broker.ready_chunks() == before)  # once their bytes were compared with the files
    machine.audit([one, two, three])
    status = machine.broker.status()
    assert status.broker.resumed == 3
    assert {process.pid: process.pool.quota for process in status.devices[0].processes} == quotas
    for worker in (one, two, three):
        gone, back = worker("said")[-2:]
        assert f"the broker at {machine.path} is gone" in gone
        assert f"reconnected to a broker at {machine.path}: it was told of" in back
    fourth = machine.worker()
    assert fourth("serve_models('a', 'b', 'd')") == (0, len(before))
    loads, hits = one("transfers()")
    assert one("run('c')")  # what slept when the old one went
    assert one("transfers()") == (loads + 1, hits)
    machine.audit([one, two, three, fourth])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_broker_killed_while_clients_load(machine, when):
    """One makes a chunk and another waits for it: the next broker gets the questions again."""
    machine.start()
    one, other = machine.workers(2)
    one("serve_models('d')")
    go = stalled(machine, one, "serve_models('a')", when)
    other.begin("serve_models('a')")
    assert not other.ready(0.2)
    machine.broker.kill()
    machine.start()
    if when == "before":
        go()
    else:
        until(lambda: len(machine.broker.clients()) == 2)
        assert not other.ready(0.2) or True
        go()
    one.result(15)
    other.result(15)
    machine.audit([one, other])
    third = machine.worker()
    assert third("serve_models('a', 'd')")[0] == 0


def test_no_broker_for_longer_than_patience(machine):
    """Models still load, for this process alone. The next broker takes one of the copies; the other goes with its user."""
    machine.start()
    one, other = machine.workers(2, setup=quick())
    one("serve_models('a')")
    other("serve_models('a')")
    # Two models have places, and no memory.
    for worker in (one, other):
        worker("serve_models('c')")
        worker("models['c'].suspend()")
    machine.broker.kill()
    one.begin("serve_models('d'); run('c')")
    other.begin("run('c'); run('a')")
    assert one.result(15)
    assert other.result(15)
    for worker in (one, other):
        assert not worker("share().connected")
    machine.start()
    reconnected(one, other)
    until(lambda: len(machine.broker.clients()) == 2)
    until(lambda: all(c.state != "loading" for c in machine.broker.cpu.chunks))
    ours = machine.broker.memfds()
    apart = {w: brokers.memfds(w.pid, sealed=True).keys() - ours.keys() for w in (one, other)}
    assert sorted(len(found) for found in apart.values()) == [0, 1]
    loser = next(worker for worker in apart if apart[worker])
    winner = one if loser is other else other
    assert "and has 1 of them from others" in loser("said")[-1]
    chunk = next(iter(apart[loser]))
    size = brokers.memfds(loser.pid)[chunk][0]
    assert machine.broker.cpu.quotas >= size  # it counts all the same
    machine.audit([one, other], strays=True)
    assert loser("run('c')")
    assert winner("run('c')")

    assert loser("models['c'].suspend()") > 4 * MiB
    assert chunk not in brokers.memfds(loser.pid)
    loads, hits = loser("transfers()")
    assert loser("run('c')")
    assert loser("transfers()") == (loads, hits + 1)  # the broker's now
    machine.audit([one, other])
    third = machine.worker()
    assert third("serve_models('a', 'c', 'd')")[0] == 0


def test_a_broker_killed_while_a_client_waits_for_room(large_machine):
    """All of the limit is in use by a model that runs; the next broker is asked again, and gives what becomes free."""
    machine = large_machine
    options = {"limit": 24 * MiB, "patience": 30.0}
    machine.start(**options)
    one, other = machine.workers(2)
    other("serve_models('o')")
    one("serve_models('m')")  # makes it sleep
    one("using = models['m']._holding; using.__enter__() and None")
    other.begin("run('o')")
    assert not other.ready(0.4)
    machine.broker.kill()
    machine.start(**options)
    reconnected(one)
    assert not other.ready(0.6)
    one("using.__exit__(None, None, None)")
    assert other.result(10)
    machine.audit([one, other])
    assert one("run('m')")


def test_a_broker_that_stands_still(machine):
    """For longer than it may: it counts as gone. When it goes on it is introduced to everything again."""
    machine.start()
    one, other = machine.workers(2, setup=quick())
    one("serve_models('a')")
    other("serve_models('a')")
    machine.broker.signal(signal.SIGSTOP)
    one.begin("serve_models('c')")
    assert other("run('a')")
    assert one.result(15)
    assert "it said nothing for 1 s" in one("said")[0]
    machine.broker.signal(signal.SIGCONT)
    reconnected(one)
    until(lambda: all(c.state != "loading" for c in machine.broker.cpu.chunks))
    machine.audit([one, other])
    assert other("serve_models('c')")[0] == 0
    assert other("said") == []  # it did not ask meanwhile


# One limit for all.


@pytest.fixture
def never_above():
    """Watches a machine: what is used never exceeds the limit."""
    seen, ended = [], threading.Event()

    def watch(machine):
        while not ended.is_set():
            device = next(iter(machine.broker.status().devices), None)
            if device:
                seen.append((device.used, device.limit))
            time.sleep(0.01)

    started = []

    def start(machine):
        started.append(threading.Thread(target=watch, args=(machine,)))
        started[-1].start()

    yield start
    ended.set()
    for thread in started:
        thread.join()
    assert len(seen) > 10 or not started
    above = [(used, limit) for used, limit in seen if used > limit]
    assert not above


def test_models_of_two_processes_take_turns(large_machine, never_above):
    """Each fits alone, both together do not."""
    machine = large_machine
    machine.start(limit=24 * MiB)
    one, other = machine.workers(2)
    never_above(machine)
    for _ in range(3):
        for worker, name in ((one, "m"), (other, "o")):
            worker(f"load({name!r}) if not models else None")
            assert worker(f"run({name!r})")
    one.begin("[run('m') for _ in range(5)]")
    other.begin("[run('o') for _ in range(5)]")
    assert one.result() == other.result() == [True] * 5
    assert machine.broker.cpu.evictions >= 5
    asleep = [worker(f"models[{name!r}].memory.asleep") for worker, name in ((one, "m"), (other, "o"))]
    assert min(asleep) == 0
    assert max(asleep) > 18 * MiB
    machine.audit([one, other])
    machine.broker.check()


def test_mapped_files_leave_the_limit_to_others(machine):
    """The system has their pages once for all, and takes them back by itself: they are in nobody's way."""
    machine.start(limit=16 * MiB, patience=0.5)
    one, other = machine.workers(2)
    one("serve_models('a', 'b', 'c', 'd', sharing='fast', pin=True)")
    mapped, shared, reserved = one("stats().mapped_files, stats().shared, stats().reserved")
    chunks = machine.broker.cpu.weights
    assert shared == mapped + chunks
    assert mapped > 8 * MiB
    assert reserved - shared <= one("share().quota") == machine.broker.cpu.used - chunks < mapped
    assert other("serve_models('a', 'c')")[0] > 0
    assert machine.broker.cpu.used + mapped > 16 * MiB
    assert machine.broker.cpu.refusals == 0
    machine.audit([one, other])


def test_no_room_beside_pinned_models(large_machine):
    """The error names who has it, and the limit that does."""
    machine = large_machine
    limit = 24 * MiB
    machine.start(limit=limit, patience=0.5)
    one, other = machine.workers(2)
    one("load('o', pin=True); run('o')")
    with pytest.raises(gi.OutOfMemoryError) as caught:
        other("load('m')")
    error = caught.value
    assert isinstance(error, BrokerMemoryError)
    holder = f"{one.name} ({one.pid})"
    assert error.holders[0][:2] == (holder, "weights")
    assert error.holders[0][2] == machine.broker.cpu.weights
    assert error.limit == limit
    assert error.needed_limit == error.reserved + error.requested > limit
    for part in (
        holder,
        "24.0 MiB",
        f"limit of {error.needed_limit} bytes",
        other.name,
        "--limit",
        "suspend",
    ):
        assert part in str(error)
    assert machine.broker.cpu.refusals == 1
    machine.audit([one, other])
    assert one("run('o')")
    assert other("transfers()") == (0, 0)
    # What holds it lets it go.
    one("models['o'].pinned = False")
    assert other("load('m'); run('m')")
    for worker in (one, other):
        worker("close_runtime()")
    # With the limit that was named it passes.
    machine.broker.kill()
    machine.start(limit=error.needed_limit, patience=0.5)
    for worker, name in ((one, "o"), (other, "m")):
        worker(f"open_runtime({str(machine.path)!r})")
        worker(f"load({name!r}, pin=True)")
    assert len(machine.broker.ready_chunks()) == 3
    # A run needs more for its activations. Nobody can give it that.
    with pytest.raises(gi.OutOfMemoryError, match=r"its pool by.*with a larger --limit"):
        _ = one("run('o')") and other("run('m')")
    machine.audit([one, other])
    other("close_model('m')")
    assert one("run('o')")


BATCH = """
    feeds = {{name: np.repeat(array, {0}, 0) for name, array in _read(_folder / "{1}.feeds0.npz").items()}}
    results = models[{1!r}].run(feeds)
    results = None
"""


def test_activations_make_another_processs_models_sleep(large_machine, never_above):
    machine = large_machine
    machine.start(limit=44 * MiB)
    one, other = machine.workers(2)
    never_above(machine)
    one("serve_models('m')")
    other("serve_models('o')")
    assert one("models['m'].memory.asleep") == 0
    other(BATCH.format(16, "o"))  # of 12 MiB
    assert one("models['m'].memory.asleep") > 4 * MiB
    assert other("models['o'].memory.asleep") == 0
    # And idle private memory goes back for another's model.
    assert other("stats().idle") > 2 * MiB
    assert one("run('m')")
    assert other("stats().idle") < 2 * MiB
    assert other("models['o'].memory.asleep") == 0
    machine.audit([one, other])


# Which broker.


def end_brokers(place):
    """Those that were started on demand, whose sockets lie below."""
    for lock in place.rglob("*.sock.lock"):
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(int(lock.read_text()), signal.SIGTERM)


@pytest.fixture
def runtime_folder(place, monkeypatch):
    """The default socket is below it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    yield place
    end_brokers(place)


def test_a_broker_is_started_on_demand(machine, runtime_folder):
    """By several processes at once: there is one. It ends when it is not needed, and is started again."""
    path = runtime_folder / "glake-infer" / "broker.sock"
    score = "/proc/{}/oom_score_adj"
    setup = (
        f"patch(IDLE_EXIT=1); open({score.format('self')!r}, 'w').write('500')"  # as Ray's workers have it
    )
    environment = {"XDG_RUNTIME_DIR": runtime_folder, "GLAKE_BROKER": "auto"}
    workers = [machine.worker(opened=False, setup=setup, **environment) for _ in range(4)]
    for worker in workers:
        worker.result()
    for worker, broker in zip(workers, ("auto", "auto", None, "auto"), strict=True):
        worker.begin(f"open_runtime({broker!r}); serve_models('a')")
    counts = [worker.result() for worker in workers]
    assert sum(loads for loads, _ in counts) == 2
    assert sum(hits for _, hits in counts) == 6
    status = brokers.observe(path)
    assert sorted(p.pid for p in status.devices[0].processes) == sorted(w.pid for w in workers)
    # It outlives who started it, and gets none of its signals.
    assert os.getsid(status.broker.pid) not in [os.getsid(pid) for pid in (0, *(w.pid for w in workers))]
    assert Path(score.format(status.broker.pid)).read_text() == "0\n"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    first = workers.pop()
    for worker in workers:
        assert worker.end() == 0
    time.sleep(1.5)
    assert brokers.observe(path).broker.pid == status.broker.pid
    assert first.end() == 0
    until(lambda: not brokers.is_socket(path), 10)
    until(lambda: not os.path.exists(f"/proc/{status.broker.pid}"), 10)  # noqa: PTH110
    again = machine.worker("auto", setup=setup, **environment)
    assert again("serve_models('a')") == (2, 0)
    assert brokers.observe(path).broker.pid != status.broker.pid


def test_a_broker_on_demand_that_was_killed_is_started_again(machine, runtime_folder):
    path = runtime_folder / "glake-infer" / "broker.sock"
    worker = machine.worker("auto", XDG_RUNTIME_DIR=runtime_folder)
    worker("serve_models('a')")
    killed = brokers.observe(path).broker.pid
    os.kill(killed, signal.SIGKILL)
    reconnected(worker)
    assert brokers.observe(path).broker.pid != killed
    until(lambda: len([c for c in brokers.observe(path).devices[0].chunks if c.state == "ready"]) == 2)
    other = machine.worker("auto", XDG_RUNTIME_DIR=runtime_folder)
    assert other("serve_models('a')") == (0, 2)


def test_the_variable_names_a_broker(machine):
    machine.start()
    environment = {"GLAKE_BROKER": machine.path}
    by_name, none, off = (machine.worker(b, **environment) for b in (None, "off", "off"))
    assert by_name("serve_models('a')") == (2, 0)
    assert none("serve_models('a')") is None
    assert off("share()") is None
    machine.audit([by_name])


@pytest.fixture
def unchanged():
    """A test leaves neither threads nor descriptors behind in this process."""
    gi.Pool("cpu", broker="off").close()  # the device is opened once
    before = own_count()
    yield
    until(lambda: own_count() <= before, 10, lambda: f"{own_count()}, before {before}")


def own_count():
    return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208


@pytest.fixture
def impatient(monkeypatch):
    brokers_worker.patch(monkeypatch.setattr, **QUICK)
    monkeypatch.delenv("GLAKE_BROKER", raising=False)


def fails_to_open(path, error, match):
    with pytest.raises(error, match=match) as caught:
        gi.Pool("cpu", broker=path)
    assert gi.Pool.current("cpu") is None
    with gi.Pool("cpu", broker="off") as pool:
        assert pool.stats().limit
    return caught.value


def test_no_broker_there(place, unchanged, impatient):
    path = place / "none.sock"
    fails_to_open(path, gi.BrokerError, rf"no broker at {path}.*`glake-infer broker`.*'auto'")
    path.touch()
    fails_to_open(path, gi.GlakeError, "another kind of file")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as left:  # of a broker that is gone
        left.bind(str(path))
    fails_to_open(path, gi.BrokerError, "no broker at .*refused")
    fails_to_open(place / ("x" * 120), gi.InputError, "system takes 107")
    fails_to_open(place / "missing" / "b.sock", gi.GlakeError, "cannot be used: No such file")
    fails_to_open("", gi.InputError, "expected 'auto', 'off'")
    place.chmod(0o777)
    fails_to_open(path, gi.GlakeError, f"chmod 700 {place}")


class Fake:
    """A server that does one thing with whoever connects."""

    def __init__(self, path, serve):
        self._serve, self.failed = serve, []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self.connections = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection):
        with contextlib.suppress(OSError):
            self._serve(connection)

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self.connections:
            connection.close()
        self._thread.join()


def answering(data, ends=False):
    def serve(connection):
        connection.recv(1 << 20)
        connection.sendall(data)
        if ends:
            connection.shutdown(socket.SHUT_RDWR)

    return serve


WELCOME = p.Welcome(to=1, release="1", broker="0" * 16, limit=1 << 30, quota=0)
REFUSAL = p.Refusal(to=0, reason="version", message="this broker speaks version 2, and you version 1.")
FAKES = {
    "version 2": (answering(frame(WELCOME, version=2)), gi.BrokerError, "speaks version 2.*this one version 1"),
    "version 2 and a word": (answering(frame(REFUSAL, version=2), True), gi.BrokerError, "version 2.*version 1"),
    "a refusal": (
        answering(frame(p.Refusal(to=1, reason="user", message="not for you"))), gi.BrokerError, "not for you",
    ),
    "silence": (lambda connection: None, gi.BrokerError, "does not answer"),
    "an end": (lambda connection: connection.shutdown(socket.SHUT_RDWR), gi.BrokerError, "broker"),
    "an end after hello": (answering(b"", True), gi.BrokerError, "ended the connection"),
    "an end in the middle": (answering(frame(WELCOME)[:-5], True), gi.BrokerError, "ended the connection"),
    "a stop in the middle": (answering(frame(WELCOME)[:-5]), gi.BrokerError, "does not answer"),
    "garbage": (answering(b"HTTP/1.1 400 Bad Request"), gi.GlakeError, "no message of ours"),
    "a huge length": (
        answering(p.HEADER.pack(p.MAGIC, 1, 0, (1 << 32) - 1)), gi.GlakeError, "4294967295 bytes.*allowed",
    ),
    "many descriptors": (answering(p.HEADER.pack(p.MAGIC, 1, 65535, 2) + b"{}"), gi.GlakeError, "65535"),
    "no JSON": (answering(p.HEADER.pack(p.MAGIC, 1, 0, 2) + b"{}"), gi.GlakeError, "not as the protocol says"),
    "another answer": (answering(frame(p.Done(to=1))), gi.BrokerError, "does not answer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAKES)
def test_somebody_else_at_the_socket(place, unchanged, impatient, kind):
    serve, error, match = FAKES[kind]
    fake = Fake(place / "b.sock", serve)
    try:
        fails_to_open(place / "b.sock", error, match)
    finally:
        fake.close()


class Between:
    """Passes on what a client and a broker say, and lets a test change what the broker says."""

    def __init__(self, path, behind):
        self.change = None
        self._behind = behind
        self._fake = Fake(path, self._serve)
        self._pairs = []

    def _serve(self, connection):
        pair = Channel(connection), Channel.connect(self._behind, 60)
        self._pairs.append(pair)
        back = threading.Thread(target=self._pass_on, args=(pair[1], pair[0], True), daemon=True)
        back.start()
        self._pass_on(*pair, False)
        back.join()

    def _pass_on(self, source, target, changes):
        try:
            while found := source.receive():
                message, descriptors = found
                changed = self.change if changes else None
                sent = changed(target, message, descriptors) if changed else (message, descriptors)
                if sent:
                    target.send(*sent)
                for descriptor in descriptors:
                    os.close(descriptor)
        except (OSError, gi.GlakeError):
            pass
        source.close()
        target.close()

    def close(self):
        self._fake.close()
        for pair in self._pairs:
            for channel in pair:
                channel.close()


def memfd(size, seals=0):
    made = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(made, size)
    if seals:
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, seals)
    return made


SEALED = 0xF


def sent_instead(make):
    """Changes Acquired: `make` gives the descriptors to send instead."""

    def change(target, message, descriptors):
        if not isinstance(message, p.Acquired) or not message.given:
            return message, descriptors
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        made = make(descriptors, sizes)
        try:
            target.send(message, made)
        finally:
            for descriptor in made:
                if descriptor not in descriptors:
                    os.close(descriptor)
        return None

    return change


def cut(data):
    """Changes Acquired: only the beginning of some bytes comes."""

    def change(target, message, descriptors):
        if not isinstance(message, p.Acquired):
            return message, descriptors
        target.socket.sendall(data)
        return None

    return change


CHANGED = "where one of that size was expected that nobody can change any more"
WRONG = {
    "not sealed": (sent_instead(lambda fds, sizes: [memfd(size) for size in sizes]), gi.DriverError, CHANGED),
    "too small": (
        sent_instead(lambda fds, sizes: [memfd(size - 65536, SEALED) for size in sizes]), gi.DriverError, CHANGED,
    ),
    "too large": (
        sent_instead(lambda fds, sizes: [memfd(2 * size, SEALED) for size in sizes]), gi.DriverError, CHANGED,
    ),
    "no memory": (
        sent_instead(lambda fds, sizes: [os.open("/dev/null", os.O_RDWR) for _ in sizes]),
        gi.DriverError, "no memory file",
    ),
    "too few": (sent_instead(lambda fds, sizes: fds[:1]), gi.BrokerError, "2 chunks.*1 descriptor"),
    "too many": (sent_instead(lambda fds, sizes: [*fds, *fds]), gi.BrokerError, "2 chunks.*4 descriptors"),
    "none": (sent_instead(lambda fds, sizes: []), gi.BrokerError, "2 chunks.*0 descriptors"),
    "unknown chunks": (
        lambda target, message, fds: (
            (message.model_copy(update={"given": [], "make": ["0" * 16]}), [])
            if isinstance(message, p.Acquired) else (message, fds)
        ), gi.BrokerError, "other chunks than were asked for",
    ),
    "no regions": (
        lambda target, message, fds: (
            message.model_copy(update={"regions": []}) if isinstance(message, p.Placed) else message, fds,
        ), gi.BrokerError, "no place",
    ),
    "another answer": (
        lambda target, message, fds: (
            (p.Done(to=message.to), []) if isinstance(message, p.Acquired) else (message, fds)
        ), gi.BrokerError, "answered.*to Acquire",
    ),
    "garbage": (cut(b"garbage, garbage, garbage"), None, "no message of ours"),
    "a huge length": (cut(p.HEADER.pack(p.MAGIC, 1, 0, (1 << 32) - 1)), None, "4294967295 bytes"),
    "a stop in the middle": (cut(p.HEADER.pack(p.MAGIC, 1, 0, 100) + b"{"), None, "said nothing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def between(workshop, tmp_path_factory):
    """A broker, a process that has a model, and another one behind what changes the words of the broker."""
    place = tmp_path_factory.mktemp("s")
    place.chmod(0o700)
    machine = brokers.Machine(place, workshop)
    machine.start()
    between = Between(place / "between.sock", machine.path)
    between.machine = machine
    between.one = machine.worker()
    between.other = machine.worker(place / "between.sock", setup=quick())
    between.one("serve_models('a')")
    between.other("serve_models('d')")
    yield between
    between.close()
    machine.close()


@pytest.mark.parametrize("kind", WRONG)
def test_a_broker_that_sends_the_wrong_thing(between, kind):
    """A clear error, or the model is loaded without it; nothing leaks, and the process goes on with a sound one."""
    change, error, match = WRONG[kind]
    machine, one, other = between.machine, between.one, between.other
    until(lambda: other("share().connected"))
    count = other.descriptors(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    loads, hits = other("transfers()")
    between.change = change
    if error:
        with pytest.raises(error, match=match):
            other("load('a')", 20)
    else:
        other("serve_models('a')", 20)
    between.change = None
    assert one("run('a')")
    until(lambda: other("share().connected"))
    if not error:
        assert match in other("said")[-2]
        assert other("run('a')")
        other("models['a'].suspend()")
        other("close_model('a')")
    other("runtime.pool.trim()")
    until(lambda: (other.descriptors(), len(os.listdir("/proc/self/fd"))) <= count, 5)  # noqa: PTH208
    assert other("serve_models('a')") == (loads, hits + 2)
    machine.audit([one, other])
    other("close_model('a'); runtime.pool.trim()")


# What else can go wrong.


def test_descriptors_exhausted(machine):
    """In a client, when chunks come or are made: the error says so, nothing leaks, and later it works."""
    machine.start()
    one, other = machine.workers(2, setup=quick(PATIENCE=0.3))
    one("serve_models('a', 'd')")
    other("serve_models('c', 'a')")
    other("models['a'].suspend()")
    one("models['d'].suspend()")
    for worker, name in ((other, "a"), (one, "d")):  # one takes what is there, the other makes it
        count, failed = worker.descriptors(), []
        for more in range(4):
            worker(f"limit_descriptors({more})")
            try:
                worker(f"models[{name!r}].resume()")
            except gi.GlakeError as error:
                failed.append(str(error))
            worker("limit_descriptors()")
            until(lambda w=worker: w("share().connected"))
            worker(f"models[{name!r}].suspend()")
            until(lambda w=worker, c=count: w.descriptors() <= c)
        assert failed
        assert all("ulimit -n" in text or "Too many open files" in text for text in failed), failed
        assert worker(f"run({name!r})")
    until(lambda: all(c.state != "loading" for c in machine.broker.cpu.chunks))
    machine.audit([one, other])
    assert one("run('a')")
    assert other("run('c') and run('a')")


def test_fork(machine):
    """A child of fork() gets an error, and does not keep its parent's part alive."""
    machine.start()
    one, other = machine.workers(2)
    one("serve_models('a', 'c'); models['c'].suspend()")
    for code in ("run('a')", "models['c'].suspend()", "models['c'].resume()", "load('d')"):
        answer = one(f"in_child({code!r})", 20)
        assert answer == "ForkedProcessError", (code, answer)
    one("in_child('close_runtime()')", 20)
    assert one("share().connected")
    assert one("run('a') and run('c')")
    machine.audit([one, other])
    child = one("linger()")
    try:
        one.kill()
        until(lambda: machine.broker.clients() == [other.pid], 5)
        machine.audit([other])
        assert other("serve_models('a')") == (0, 2)
        other("close_model('a'); runtime.pool.trim()")
        assert list(machine.broker.ready_chunks().values()) == [[]]  # of c, which nobody has
        assert len(machine.broker.memfds()) == 1
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "cycles", [15, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_attaching_and_leaving_again_and_again(machine, cycles):
    """Neither the client nor the broker grows."""
    machine.start()
    one, other = machine.workers(2)
    other("serve_models('a')")
    one("close_runtime()")
    some = f"""
        import gc
        for _ in range({max(5, cycles // 10)}):
            open_runtime({str(machine.path)!r})
            load("a")
            run("a")
            load("c")
            close_runtime()
        gc.collect()
        from glake_infer.process_memory import release_unused_heap
        release_unused_heap()
    """
    one(some, 300)
    settle = "import gc; gc.collect(); from glake_infer.process_memory import release_unused_heap; release_unused_heap()"
    machine.broker(settle)

    def figures():
        found = [(each.descriptors(), each.threads()) for each in (one, other, machine.broker)]
        return found, [each.resident() for each in (one, machine.broker)]

    until(lambda: machine.broker.clients() == [other.pid])
    counts, sizes = figures()
    for _ in range(10 if cycles > 100 else 2):
        one(some, 300)
    machine.broker(settle)
    until(lambda: machine.broker.clients() == [other.pid])
    until(
        lambda: all(now <= then for now, then in zip(figures()[0], counts, strict=True)),
        5,
        lambda: f"{figures()[0]}, before {counts}",
    )
    grown = [after - before for after, before in zip(figures()[1], sizes, strict=True)]
    assert max(grown) < 2 * MiB, grown
    machine.audit([other])
    assert len(machine.broker.memfds()) == 2
    assert machine.broker.status().broker.lost == 0


@pytest.fixture
def own_workshop(workshop, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(workshop, tmp_path / "workshop", copy_function=shutil.copy2)
    return tmp_path / "workshop"


@pytest.fixture
def damaged(own_workshop, place):
    machine = brokers.Machine(place, own_workshop)
    yield machine
    machine.close()


def largest(workshop, name):
    """The file of a model's largest weight."""
    manifest = Package(workshop / f"{name}.glake", gi.Store(workshop / "store")).manifest
    digest = max(manifest.weights, key=lambda weight: weight.bytes).digest
    return next(path for path in (workshop / "store").rglob(digest) if path.is_file())


def alter(path):
    """Other bytes, of the same length, at the same time."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"other bytes")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("broker", ["", "off"])
@pytest.mark.parametrize("damage", ["altered", "missing", "shortened"])
def test_damaged_store_files(damaged, broker, damage):
    """The same errors with a broker and without; models sleep on, and wake once it is mended."""
    machine = damaged
    machine.start()
    one, other = machine.workers(2, broker=broker)
    one("serve_models('a', 'c')")
    one("models['a'].suspend(); runtime.pool.trim()")
    path = largest(machine.workshop, "a")
    good = path.read_bytes()
    if damage == "altered":
        alter(path)
    elif damage == "missing":
        path.unlink()
    else:
        path.chmod(0o644)
        os.truncate(path, len(good) - 100)
    wanted = gi.StoreError if damage == "missing" else gi.DigestMismatchError
    for code in ("models['a'].resume()", "run('a')"):
        with pytest.raises(wanted) as caught:
            one(code)
        assert type(caught.value) is wanted
        assert str(path) in str(caught.value) or path.name in str(caught.value)
        assert ("sleeps on" if damage == "missing" else "a.glake") in str(caught.value)
    assert one("models['a'].suspended")
    for name in ("a", "b"):
        with pytest.raises(gi.DigestMismatchError if damage == "altered" else gi.PackageError):
            other(f"load({name!r})")
    assert other("list(models)") == []
    assert one("run('c')")
    assert other("serve_models('c')") in ((0, 1), None)
    if broker != "off":
        machine.audit([one, other])
        assert sum(c.state == "ready" for c in machine.broker.cpu.chunks) <= 2
    path.unlink(missing_ok=True)
    path.write_bytes(good)
    assert one("run('a')")
    assert other("serve_models('a', 'b')") or broker == "off"


def test_memory_that_is_not_what_it_should_be(machine):
    """A process fills a chunk with other bytes: the broker gives it to nobody, and the process does not use it."""
    machine.start()
    one, other = machine.workers(2)
    one("""
        import ctypes
        original = Residency._fill
        def filling(self, holding, chunks):
            done = original(self, holding, chunks)
            address = self._native.address_of(chunks[0])
            ctypes.memset(address + 5000, 1, 4)
            return done
        Residency._fill = filling
    """)
    with pytest.raises(gi.StoreError):
        one("load('a')")
    assert one("held()") == []
    assert machine.broker.memfds() == {}
    machine.audit([one, other])
    assert other("serve_models('a')") == (2, 0)
    assert one("serve_models('a')") == (0, 2)
    machine.audit([one, other])


BUSY = """
    import random
    def work(seed):
        choose = random.Random(seed)
        own = None
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            name = choose.choice("abcd")
            what = choose.random()
            if what < 0.6:
                run(name, choose.randrange(2))
            elif what < 0.75:
                models[name].suspend()
            elif what < 0.8:
                runtime.pool.trim()
            elif own:
                own.close()
                own = None
            else:
                key = name + "*" * (seed + 1)
                load(key, sharing=choose.choice(SHARINGS))
                own = models.pop(key)
        if own:
            own.close()
"""


@pytest.mark.parametrize("limit", [None, 12 * MiB])
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.soak)])
def test_many_threads_of_three_processes(machine, never_above, limit, seconds):
    machine.start(limit=limit)
    workers = machine.workers(3)
    never_above(machine)
    for worker in workers:
        worker("serve_models('a', 'b', 'c', 'd')")
        # What ONNX Runtime makes of a fast model's weights is private, and cannot go while the model is open.
        worker(f"SECONDS = {seconds}; SHARINGS = {['lean'] if limit else ['lean', 'fast']}")
        worker(BUSY)
    for worker in workers:
        worker.begin("in_threads('work(0)', 'work(1)', 'work(2)')")
    for worker in workers:
        worker.result(seconds + 60)
    assert machine.broker.cpu.evictions or not limit
    machine.audit(workers)
    for worker in workers:
        worker("close_runtime()")
    machine.broker.check()
    # A process gives back what it alone has; what one let go of below its limit stays, for whoever needs it next.
    left = machine.broker.cpu
    assert not any(chunk.processes for chunk in left.chunks)
    assert left.used == (left.weights if limit else 0)


def test_weights_of_a_broker_do_not_lie_in_one_process(machine):
    machine.start()
    (worker,) = machine.workers(1, limit="64MiB")
    for options in ("offload='1MiB'", "offload='auto', headroom='1GiB'"):
        with pytest.raises(gi.InputError, match=r"make the pool on 'cpu' with broker='off'"):
            worker(f"load('a', {options})")
    assert worker("load('a', offload='auto', headroom='1MiB')") is None  # it needs nothing
    assert worker("run('a')")
    machine.audit([worker])
