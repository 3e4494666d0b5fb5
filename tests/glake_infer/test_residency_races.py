"""Residency where things happen at once: collections, closes and copies amid others, waits that are broken off."""

import contextlib
import ctypes
import gc
import os
import signal
import threading
import time
import weakref

import pytest
from stored_weights import parted, wanted

import glake_infer as gi
from glake_infer.allocators.pool import _handles
from glake_infer.residency import Residency

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """Whatever a test leaves held is given back after it."""
    held, hold = [], Residency.hold

    def recorded(self, *arguments, **options):
        held.append(hold(self, *arguments, **options))
        return held[-1]

    monkeypatch.setattr(Residency, "hold", recorded)
    yield
    for holding in held:
        holding.close()
    held.clear()
    gc.collect()
    _handles.pop("cpu", None)
    Residency._by_device.clear()


@pytest.fixture
def pool():
    pool = gi.Pool(device="cpu", limit="64MiB")
    yield pool
    pool.check_invariants()


@pytest.fixture
def table(pool):
    return Residency.of(pool, copies=True)


@pytest.fixture
def folder(tmp_path):
    return gi.Store(tmp_path).objects


def right(holding, items):
    for item in items:
        data = item.folder.path(item.digest).read_bytes()[: item.mapped]
        assert ctypes.string_at(holding.addresses[item.digest], len(data)) == data, "wrong bytes"


def check(holding, items):
    with holding:
        right(holding, items)


class Cycle:
    pass


def garbage(holding):
    """A cycle whose collection closes the holding, as that of a session does."""
    cycle = Cycle()
    cycle.itself = cycle
    weakref.finalize(cycle, holding.close).atexit = False


@pytest.mark.parametrize("kind", ["copies", "files"])
def test_a_collection_while_weights_are_placed(pool, folder, kind, monkeypatch):
    table = Residency.of(pool, copies=kind == "copies")
    a = [wanted(folder, os.urandom(MiB))]
    b = wanted(folder, os.urandom(1000))
    wanted(folder, os.urandom(MiB))
    h = table.hold(a, 1)
    garbage(h)
    del h
    real = Residency._place

    def place(self, missing, specs):
        gc.collect()  # may happen at any allocation
        return real(self, missing, specs)

    monkeypatch.setattr(Residency, "_place", place)
    again = table.hold([*a, b], 2)
    check(again, [*a, b])
    again.close()


def test_a_collection_after_that_takes_nothing_of_the_new(pool, table, folder, monkeypatch):
    h = table.hold([wanted(folder, os.urandom(MiB))], 1)
    garbage(h)
    del h
    real = Residency._place

    def place(self, missing, specs):
        real(self, missing, specs)
        gc.collect()

    monkeypatch.setattr(Residency, "_place", place)
    b = [wanted(folder, os.urandom(MiB))]
    again = table.hold(b, 2)
    check(again, b)
    again.close()


def test_a_copy_that_is_read_is_not_given_back(pool, table, folder, monkeypatch):
    items = [wanted(folder, os.urandom(2 * MiB))]
    keeper = table.hold(items, 1, host_copy="pinned")
    other = table.hold(items, 2)
    check(keeper, items)
    keeper.suspend()
    dev = table._device
    freed = set()
    bad = []
    rf, rb = dev.forget, dev.start

    def forget(copy):
        freed.add(copy)
        rf(copy)

    def start(steps, total, **options):
        keeper.close()  # as another thread may at this moment
        steps = list(steps)
        bad.extend(c for step in steps for _, c, _ in step.copies if c in freed)
        if not bad:
            return rb(steps, total, **options)
        raise OSError

    monkeypatch.setattr(dev, "forget", forget, raising=False)
    monkeypatch.setattr(dev, "start", start, raising=False)
    with other:
        pass
    assert not bad, "restored from memory that was given back"


def test_a_copy_is_given_back_once(pool, table, folder, monkeypatch):
    a, b = [wanted(folder, os.urandom(1000))], [wanted(folder, os.urandom(1000))]
    keeper = table.hold(a, 1, host_copy="pinned")
    check(keeper, a)
    guest = table.hold(b, 2)
    assert guest.chunks == keeper.chunks
    dev = table._device
    _rf, rk = dev.forget, dev.keep
    forgotten = []
    monkeypatch.setattr(dev, "forget", lambda c: forgotten.append(c), raising=False)

    def keep(spans):
        made = rk(spans)
        keeper.close()
        return made

    monkeypatch.setattr(dev, "keep", keep, raising=False)
    check(guest, b)
    guest.close()
    assert len(forgotten) == len(set(forgotten)), "freed twice"
    assert not table._pinned, "a copy that nobody wants is kept for ever"


def test_a_copy_has_what_was_written_while_it_was_made(pool, table, folder, monkeypatch):
    a, b = [wanted(folder, os.urandom(1000))], [wanted(folder, os.urandom(1000))]
    keeper = table.hold(a, 1, host_copy="pinned")
    dev = table._device
    rk = dev.keep
    guests = []

    def keep(spans):
        made = rk(spans)  # the copy's bytes are read
        if not guests:  # and only then another thread uses a model in the same granule
            guests.append(table.hold(b, 2))
            t = threading.Thread(target=check, args=(guests[0], b))
            t.start()
            t.join(1)
            guests.append(t)
        return made

    monkeypatch.setattr(dev, "keep", keep, raising=False)
    check(keeper, a)
    guests[1].join()
    guest = guests[0]
    check(guest, b)
    keeper.suspend()
    guest.suspend()
    check(guest, b)


def test_an_old_copy_is_never_used(pool, table, folder, monkeypatch):
    a, b = [wanted(folder, os.urandom(1000))], [wanted(folder, os.urandom(1000))]
    keeper = table.hold(a, 1, host_copy="pinned")
    check(keeper, a)
    guest = table.hold(b, 2)
    with monkeypatch.context() as m:

        def keep(*_):
            raise MemoryError("no page-locked memory")

        m.setattr(table._device, "keep", keep, raising=False)
        with contextlib.suppress(MemoryError):
            check(guest, b)
    check(guest, b)
    keeper.suspend()
    guest.suspend()
    check(guest, b)


def test_wake_does_not_need_the_files_of_a_closed_model(pool, table, folder):
    a, b = [wanted(folder, os.urandom(1000))], [wanted(folder, os.urandom(1000))]
    mine, gone = table.hold(a, 1), table.hold(b, 2)
    check(mine, a)
    check(gone, b)
    gone.close()
    folder.path(b[0].digest).unlink()  # its package was removed, and gc ran
    mine.suspend()
    check(mine, a)


def test_wake_does_not_need_the_files_of_another_model(pool, table, folder):
    a, b = [wanted(folder, os.urandom(1000))], [wanted(folder, os.urandom(1000))]
    mine, other = table.hold(a, 1), table.hold(b, 2)
    check(mine, a)
    check(other, b)
    mine.suspend()
    other.suspend()
    folder.path(b[0].digest).write_bytes(b"damaged") if False else (folder.path(b[0].digest).unlink())
    check(mine, a)


def test_run_does_not_need_the_files_of_another_model(pool, table, folder):
    a, b = [wanted(folder, os.urandom(1000))], [wanted(folder, os.urandom(1000))]
    mine = table.hold(a, 1)
    check(mine, a)
    table.hold(b, 2)
    folder.path(b[0].digest).unlink()
    check(mine, a)  # it is resident, and nothing of it changed


def test_versions_wake_after_the_first_is_gone(folder):
    with gi.Pool(device="cpu", limit="400MiB") as pool:
        table = Residency.of(pool, copies=True)
        data = os.urandom(66 * MiB)
        v1, v2 = parted(folder, data), parted(folder, data[:-100] + os.urandom(100))
        one, two = table.hold([v1], 1), table.hold([v2], 2)
        check(one, [v1])
        check(two, [v2])
        assert set(one.chunks) & set(two.chunks)
        one.close()
        folder.path(v1.digest).unlink()
        two.suspend()
        try:
            check(two, [v2])
        finally:
            two.close()


def test_ctrl_c_ends_a_wait_for_room(pool, folder, table):
    pool.limit = 4 * MiB
    items = [wanted(folder, os.urandom(3 * MiB)) for _ in range(2)]
    first, second = (table.hold([i], n, evictable=True) for n, i in enumerate(items))

    def later():
        with first:
            ready.set()
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    ready = threading.Event()
    t = threading.Thread(target=later)
    t.start()
    ready.wait()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), second:
        pass
    time.monotonic() - began
    t.join()
    assert not second.busy, "a use that never ends"
    check(second, [items[1]])


def test_resident_pinned_models_do_not_wait_behind_others(pool, folder, table):
    pool.limit = 8 * MiB
    p, y, x = ([wanted(folder, os.urandom(n * MiB))] for n in (1, 5, 5))
    P = table.hold(p, 1)
    Y = table.hold(y, 2, evictable=True)
    X = table.hold(x, 3, evictable=True)
    check(P, p)
    done = []
    with Y:
        t = threading.Thread(target=check, args=(X, x))
        t.start()
        time.sleep(1.2)
        u = threading.Thread(target=lambda: (check(P, p), done.append(1)))
        u.start()
        u.join(1.5)
        ok = bool(done)
    t.join()
    u.join()
    assert ok, "a pinned, resident model waited for another's room"


def test_what_cannot_fit_evicts_nobody(pool, folder, table):
    pool.limit = 8 * MiB
    a, b = [wanted(folder, os.urandom(4 * MiB))], [wanted(folder, os.urandom(16 * MiB))]
    A, B = table.hold(a, 1, evictable=True), table.hold(b, 2)
    check(A, a)
    with pytest.raises(gi.OutOfMemoryError), B:
        pass
    assert A.weigh().asleep == 0


def test_figures_of_a_debug_pool(folder):
    with gi.Pool(device="cpu", limit="64MiB", debug=True) as pool:
        table = Residency.of(pool, copies=True)
        a = [wanted(folder, os.urandom(4 * MiB))]
        h = table.hold(a, 1, evictable=True)
        check(h, a)
        before = pool.stats().requested
        pool.deallocate(pool.allocate(1000))
        assert pool.stats().requested == before == 4 * MiB, (before, pool.stats().requested)
        h.close()
        assert pool.stats().requested == 0, pool.stats()


def test_a_lower_limit_of_a_debug_pool_evicts(folder):
    with gi.Pool(device="cpu", limit="64MiB", debug=True) as pool:
        table = Residency.of(pool, copies=True)
        a = [wanted(folder, os.urandom(4 * MiB))]
        h = table.hold(a, 1, evictable=True)
        check(h, a)
        try:
            pool.limit = 2 * MiB
        finally:
            h.close()


def test_a_copy_that_cannot_be_given_back_keeps_no_reference(pool, folder, table, monkeypatch):
    a = [wanted(folder, os.urandom(MiB))]
    h = table.hold(a, 1, host_copy="pinned")
    check(h, a)

    def forget(copy):
        raise gi.DriverError("freeing page-locked memory failed")

    with monkeypatch.context() as m:
        m.setattr(table._device, "forget", forget, raising=False)
        with contextlib.suppress(gi.DriverError):
            h.close()
    h.close()
    assert table.users() == {}


def test_what_is_closed_weighs_nothing(pool, folder):
    table = Residency.of(pool, copies=False)
    a = [wanted(folder, os.urandom(MiB))]
    h = table.hold(a, 1)
    check(h, a)
    h.close()
    h.weigh()


def test_weights_without_bytes_leave_nothing(pool, folder, table):
    h = table.hold([wanted(folder, b"")], 1)
    h.close()
    assert table._entries == {}


def test_a_close_in_the_middle_of_a_use_waits_for_its_end(pool, folder, table, monkeypatch):
    a = [wanted(folder, os.urandom(MiB))]
    h = table.hold(a, 1, host_copy="pinned")
    pool._open()
    rk = table._device.keep
    gone = []

    def keep(spans):
        h.close()
        pool.trim()  # as another thread may
        gone.append(not pool.stats().reserved)
        return [0] if gone[0] else rk(spans)

    monkeypatch.setattr(table._device, "keep", keep, raising=False)
    try:
        with h:
            pass
    except gi.GlakeError as e:
        print(repr(e))
    monkeypatch.undo()
    leaked = dict(table._pinned)
    table._pinned.clear()
    assert not gone[0], "the memory is unmapped while it is copied"
    assert not leaked


def test_requested_after_the_first_version_is_gone(folder):
    with gi.Pool(device="cpu", limit="400MiB") as pool:
        table = Residency.of(pool, copies=True)
        data = os.urandom(66 * MiB)
        v1, v2 = parted(folder, data), parted(folder, data[:-100] + os.urandom(100))
        one, two = table.hold([v1], 1), table.hold([v2], 2)
        check(one, [v1])
        check(two, [v2])
        one.close()
        two.suspend()
        pool.trim()
        table._sweep()
        assert len(table._regions) == 1
        check(two, [v2])
        got = pool.stats()
        two.close()
        assert got.requested == got.weights == 66 * MiB, got


def test_a_tail_whose_guest_left_is_not_filled_at_every_use(pool, folder, table, monkeypatch):
    a, b = [wanted(folder, os.urandom(1000))], [wanted(folder, os.urandom(1000))]
    mine = table.hold(a, 1)
    guest = table.hold(b, 2)
    assert mine.chunks == guest.chunks
    guest.close()  # never used; swept, as nothing of it is there
    check(mine, a)
    calls = pool.stats().driver_calls
    for _ in range(10):
        check(mine, a)
    assert pool.stats().driver_calls == calls, pool.stats().driver_calls - calls
    assert not table._unfilled


def test_ctrl_c_ends_a_wait_for_runs(pool, folder, table):
    a = [wanted(folder, os.urandom(MiB))]
    h = table.hold(a, 1)
    with h:
        time.monotonic()
        stop = threading.Timer(3, lambda: os._exit(9))
        stop.start()
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            h.suspend()
        stop.cancel()


def test_room_made_by_a_free_is_seen_by_who_waits(pool, folder, table):
    pool.limit = 8 * MiB
    y, x = ([wanted(folder, os.urandom(n * MiB))] for n in (1, 5))
    Y, X = (table.hold(i, n, evictable=True) for n, i in enumerate((y, x)))
    with Y:
        address = pool.allocate(6 * MiB)
        t = threading.Thread(target=check, args=(X, x))
        t.start()
        time.sleep(0.3)
        pool.deallocate(address)
        t.join(2)
        ok = not t.is_alive()
    t.join()
    assert ok, "there was room for X, and it waited for the end of Y"


def test_new_handle_shares_weights_with_the_old_table(folder):
    a = [wanted(folder, os.urandom(4 * MiB))]
    p1 = gi.Pool("cpu", limit="64MiB")
    h1 = Residency.of(p1, copies=True).hold(a, 1)
    check(h1, a)
    del p1
    gc.collect()
    p2 = gi.Pool("cpu", limit="64MiB")
    h2 = Residency.of(p2, copies=True).hold(a, 2)
    check(h2, a)
    assert h1.addresses == h2.addresses
    assert p2.stats().active == 4 * MiB


@pytest.mark.parametrize("what", ["hold", "close", "weigh"])
def test_a_child_of_fork_does_not_hang(tmp_path, monkeypatch, what):
    pool = gi.Pool("cpu", limit="64MiB")
    table = Residency.of(pool, copies=True)
    folder = gi.Store(tmp_path).objects
    a, b = [wanted(folder, os.urandom(MiB))], [wanted(folder, os.urandom(MiB))]
    h = table.hold(a, 1)
    check(h, a)
    inside = threading.Event()
    real = Residency._place

    def place(self, missing, specs):
        inside.set()
        time.sleep(1)
        real(self, missing, specs)

    monkeypatch.setattr(Residency, "_place", place)
    t = threading.Thread(target=table.hold, args=(b, 2))
    t.start()
    inside.wait()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(4)
        with contextlib.suppress(gi.ForkedProcessError):
            {"hold": lambda: table.hold(a, 3), "close": h.close, "weigh": h.weigh}[what]()
        os._exit(0)
    t.join()
    assert os.waitpid(pid, 0)[1] == 0, "the child hangs"


def test_a_close_is_done_when_it_returns(pool, table, folder, monkeypatch):
    a, b = [wanted(folder, os.urandom(MiB))], [wanted(folder, os.urandom(MiB))]
    holding = table.hold(a, 1)
    check(holding, a)
    inside, real = threading.Event(), Residency._place

    def place(self, missing, specs):
        inside.set()
        time.sleep(0.5)
        real(self, missing, specs)

    monkeypatch.setattr(Residency, "_place", place)
    thread = threading.Thread(target=table.hold, args=(b, 2))
    thread.start()
    inside.wait()
    holding.close()
    assert pool.stats().active == 0
    thread.join()


def test_a_mapped_weight_takes_one_mapping(pool, folder):
    table = Residency.of(pool, copies=False)
    items = [wanted(folder, os.urandom(5000)) for _ in range(100)]
    holding = table.hold(items, 1)

    def mappings():
        with open("/proc/self/maps") as file:  # noqa: PTH123
            return len(file.readlines())

    before = mappings()
    with holding:
        right(holding, items)
        assert mappings() - before <= 105
