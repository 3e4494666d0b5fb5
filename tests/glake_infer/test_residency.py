"""Residency: one address per digest, memory that comes and goes there, references, nothing left after an error.

On the host both ways are tested: files that are mapped, and (as on a GPU) weights that are copied into chunks.
"""

import ctypes
import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from stored_weights import parted, wanted

import glake_infer as gi
from glake_infer import layout
from glake_infer.allocators import _native
from glake_infer.checking import AlteredObjectError
from glake_infer.mapped_files import drop_pages, mappings_of
from glake_infer.residency import Residency
from glake_infer.transfers import settings
from glake_infer.transfers.device import EngineTransfers
from glake_infer.transfers.host_cache import host_cache
from glake_infer.transfers.settings import configure_transfers

PAGE = 4096
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def pool():
    with gi.Pool(device="cpu", limit="64MiB") as pool:
        yield pool
        pool.check_invariants()
        gc.collect()


@pytest.fixture(params=["files", "copies"])
def table(request, pool):
    return Residency.of(pool, copies=request.param == "copies")


@pytest.fixture
def copies(pool):
    return Residency.of(pool, copies=True)


@pytest.fixture
def folder(tmp_path):
    return gi.Store(tmp_path).objects


def read(address, size):
    return ctypes.string_at(address, size)


def held(items):
    """Every weight's bytes as its file has them."""
    return {item.digest: item.folder.path(item.digest).read_bytes()[: item.mapped] for item in items}


def check(holding, items):
    with holding:
        for digest, data in held(items).items():
            assert read(holding.addresses[digest], len(data)) == data


def test_equal_digests_get_one_address_that_lives_as_long_as_its_last_user(folder, pool, table):
    items = [wanted(folder, os.urandom(3 * PAGE)), wanted(folder, os.urandom(200 * KiB))]
    assert Residency.of(pool) is table
    first, second = table.hold([*items, items[0]], 1), table.hold(items, 2)
    assert first.addresses == second.addresses
    assert len(set(first.addresses.values())) == 2
    check(first, items)
    check(second, items)
    active = pool.stats().active
    assert 203 * KiB <= active <= 280 * KiB
    assert table.users() == {i.digest: (i.mapped, frozenset({1, 2})) for i in items}
    assert first.weigh().shared_with == {2: 212 * KiB}
    first.close()
    first.close()
    assert pool.stats().active == active
    check(second, items)
    second.close()
    assert table.users() == {}
    assert pool.stats().active == 0
    pool.trim()
    assert pool.stats().reserved == 0


def test_what_no_model_has_is_kept_until_there_is_need(folder, pool, copies):
    """On a device the next load of the same weights finds them there."""
    item = wanted(folder, os.urandom(4 * MiB))
    holding = copies.hold([item], 1)
    check(holding, [item])
    address = holding.addresses[item.digest]
    holding.close()
    stats = pool.stats()
    assert (stats.active, stats.weights) == (0, 0)
    assert stats.unused_weights == stats.idle == 4 * MiB
    folder.path(item.digest).touch()  # what is there is not read again
    again = copies.hold([item], 2)
    assert again.addresses[item.digest] == address
    check(again, [item])
    again.close()
    assert pool.allocate(62 * MiB) != 0  # the limit is 64
    assert pool.stats().unused_weights == 0
    other = copies.hold([item], 3)
    with pytest.raises(gi.OutOfMemoryError):
        check(other, [item])
    other.close()
    for address in [r.address for s in pool.snapshot().segments for r in s.ranges if r.state == "active"]:
        pool.deallocate(address)


def test_only_the_part_that_is_used_is_mapped(folder, pool, table):
    part = wanted(folder, os.urandom(300 * PAGE), 100 * PAGE)
    none = wanted(folder, os.urandom(PAGE), 0)
    holding = table.hold([part, none], 1)
    check(holding, [part])
    assert 100 * PAGE <= pool.stats().active < 132 * PAGE
    assert holding.addresses[none.digest] == 0
    holding.close()


@pytest.mark.parametrize("damage", ["change", "shorten", "lengthen", "remove"])
def test_wrong_bytes_are_never_mapped_and_nothing_is_left(folder, pool, table, damage):
    good, bad = wanted(folder, os.urandom(PAGE)), wanted(folder, os.urandom(300 * PAGE))
    spoil(folder.path(bad.digest), damage)
    if damage == "change":  # nothing is read before they are used
        holding = table.hold([good, bad], 1)
        with pytest.raises(AlteredObjectError) as caught, holding:
            pytest.fail("it was used")
        holding.close()
    else:
        with pytest.raises(AlteredObjectError) as caught:
            table.hold([good, bad], 1)
    assert caught.value.digest == bad.digest
    assert caught.value.unreadable == (damage == "remove")
    assert table.users() == {}
    assert pool.stats().active == 0


def spoil(path, damage):
    data = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(
            {"change": data[:-1] + bytes([data[-1] ^ 1]), "shorten": data[:-1], "lengthen": data + b"\0"}[
                damage
            ]
        )


@pytest.mark.parametrize("damage", ["change", "shorten", "remove"])
def test_a_file_that_changes_while_a_model_sleeps_is_refused_and_can_be_mended(folder, pool, table, damage):
    items = [wanted(folder, os.urandom(50 * PAGE)) for _ in range(3)]
    holding = table.hold(items, 1)
    check(holding, items)
    addresses = dict(holding.addresses)
    assert holding.suspend() >= 150 * PAGE
    path = folder.path(items[1].digest)
    data = path.read_bytes()
    spoil(path, damage)
    for _ in range(2):
        with pytest.raises(AlteredObjectError), holding:
            pass
        assert pool.stats().active == 0
        assert holding.weigh().asleep >= 150 * PAGE
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    check(holding, items)
    assert holding.addresses == addresses
    holding.close()


def test_a_limit_in_the_middle_gives_everything_back(folder, pool, table):
    items = [wanted(folder, os.urandom(MiB)) for _ in range(4)]
    pool.limit = 2 * MiB
    holding = table.hold(items, 1)
    with pytest.raises(gi.OutOfMemoryError) as caught:
        check(holding, items)
    assert pool.stats().active == 0
    pool.limit = caught.value.needed_limit
    check(holding, items)
    holding.close()


@pytest.mark.parametrize("calls", range(0, 24, 3))
def test_a_driver_that_refuses_leaves_a_holding_that_can_be_used_later(folder, pool, table, calls):
    items = [wanted(folder, os.urandom(MiB)) for _ in range(4)]
    native = pool._open()
    holding = None
    native.inject_failure(calls, 1000)
    try:
        holding = table.hold(items, 1)
        check(holding, items)
    except gi.DriverError:
        pool.check_invariants()
        assert pool.stats().active == 0
    native.inject_failure(-1)
    holding = holding or table.hold(items, 2)
    check(holding, items)
    holding.close()


def test_suspend_gives_memory_back_and_the_next_use_brings_the_same_bytes_to_the_same_place(
    folder, pool, table
):
    items = [wanted(folder, os.urandom(size)) for size in (3 * MiB, 70_000, 5 * MiB + 11, 1025)]
    holding = table.hold(items, 1)
    assert holding.suspended
    check(holding, items)
    before, reserved = holding.addresses.copy(), pool.stats().reserved
    for _ in range(3):
        assert not holding.suspended
        freed = holding.suspend()
        assert holding.suspended
        assert freed == reserved == holding.weigh().asleep
        assert pool.stats().reserved == 0
        assert holding.suspend() == 0
        check(holding, items)
        assert holding.weigh().asleep == 0
        assert pool.stats().reserved == reserved
    assert holding.addresses == before
    holding.close()


def test_a_shared_weight_stays_while_any_awake_model_uses_it(folder, pool, table):
    trunk = [wanted(folder, os.urandom(2 * MiB), group="trunk") for _ in range(3)]
    heads = [[wanted(folder, os.urandom(MiB), group=n)] for n in range(2)]
    first, second = (table.hold(trunk + head, n) for n, head in enumerate(heads))
    check(first, trunk + heads[0])
    check(second, trunk + heads[1])
    assert first.suspend() == MiB
    assert pool.stats().active == 7 * MiB
    assert first.weigh().asleep == MiB
    with second:  # the trunk is as it was
        for item in trunk:
            assert read(second.addresses[item.digest], item.mapped) == held([item])[item.digest]
    assert second.suspend() == 7 * MiB
    assert pool.stats().reserved == 0
    check(first, trunk + heads[0])
    assert pool.stats().active == 7 * MiB
    assert second.weigh().asleep == MiB
    first.close()
    second.close()


def test_suspend_waits_for_uses_in_progress(folder, pool, table):
    items = [wanted(folder, os.urandom(MiB))]
    holding = table.hold(items, 1)
    done, order = [], []
    with holding:
        thread = threading.Thread(target=lambda: (done.append(holding.suspend()), order.append("suspended")))
        thread.start()
        time.sleep(0.1)
        assert not done
        assert read(holding.addresses[items[0].digest], 4096) == held(items)[items[0].digest][:4096]
        order.append("used")
    thread.join()
    assert order == ["used", "suspended"]
    assert done == [MiB]
    holding.close()


def test_the_least_recently_used_go_first_and_never_the_busy_the_pinned_or_the_important(folder, pool, table):
    pool.limit = 8 * MiB
    items = {name: wanted(folder, os.urandom(2 * MiB)) for name in "abcde"}
    holdings = {
        n: table.hold([item], number, evictable=True) for number, (n, item) in enumerate(items.items())
    }
    for name in "abcd":
        check(holdings[name], [items[name]])
    asleep = lambda: {name for name, each in holdings.items() if each.weigh().asleep}  # noqa: E731
    assert asleep() == {"e"}
    check(holdings["a"], [items["a"]])  # now b is the oldest
    check(holdings["e"], [items["e"]])
    assert asleep() == {"b"}
    holdings["c"].set_policy(evictable=False, priority=0)
    check(holdings["b"], [items["b"]])
    assert asleep() == {"d"}
    holdings["a"].set_policy(evictable=True, priority=1)
    check(holdings["d"], [items["d"]])
    assert asleep() == {"e"}
    with holdings["b"], holdings["d"]:
        check(holdings["e"], [items["e"]])  # a, whatever its priority: all others are busy or pinned
        assert asleep() == {"a"}
    assert pool.stats().peak_reserved <= 8 * MiB
    for holding in holdings.values():
        holding.close()


def test_activations_push_idle_weights_out_and_weights_push_idle_activations_out(folder, pool, table):
    pool.limit = 8 * MiB
    item = wanted(folder, os.urandom(4 * MiB))
    holding = table.hold([item], 1, evictable=True)
    check(holding, [item])
    address = pool.allocate(6 * MiB)
    assert holding.weigh().asleep == 4 * MiB
    with pytest.raises(gi.OutOfMemoryError):
        check(holding, [item])
    pool.deallocate(address)
    check(holding, [item])
    with holding, pytest.raises(gi.OutOfMemoryError):
        pool.allocate(6 * MiB)
    pool.limit = 4 * MiB  # evicts nothing that fits
    assert holding.weigh().asleep == 0
    pool.limit = 2 * MiB
    assert holding.weigh().asleep == 4 * MiB
    holding.close()


def test_who_finds_no_room_waits_for_uses_that_are_in_progress(folder, pool, table):
    pool.limit = 4 * MiB
    items = [wanted(folder, os.urandom(3 * MiB)) for _ in range(2)]
    first, second = (table.hold([item], n, evictable=True) for n, item in enumerate(items))
    order = []

    def use():
        check(second, [items[1]])
        order.append("second")

    with first:
        thread = threading.Thread(target=use)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    first.close()
    second.close()


def test_many_threads_under_a_small_limit_always_read_the_right_bytes(folder, pool, table):
    pool.limit = 6 * MiB
    trunk = [wanted(folder, os.urandom(MiB), group="t") for _ in range(2)]
    kinds = [[*trunk, wanted(folder, os.urandom(MiB + n), group=n)] for n in range(8)]
    holdings = [table.hold(items, n, evictable=True) for n, items in enumerate(kinds)]
    problems, high = [], []

    def work(seed):
        import random

        chosen = random.Random(seed)
        try:
            for turn in range(60):
                index = chosen.randrange(8)
                check(holdings[index], kinds[index])
                high.append(pool.stats().reserved)
                if turn % 7 == 0:
                    holdings[chosen.randrange(8)].suspend()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert max(high) <= 6 * MiB
    for holding in holdings:
        holding.close()


def test_copied_weights_are_read_only(folder, pool, copies):
    from tests import processes

    item = wanted(folder, os.urandom(MiB))
    holding = copies.hold([item], 1)
    check(holding, [item])
    holding.close()
    done = processes.run(
        "import ctypes, os, sys, glake_infer as gi\n"
        "from glake_infer.residency import Residency, Wanted\n"
        "store = gi.Store(sys.argv[1]); digest = sys.argv[2]\n"
        "pool = gi.Pool('cpu')\n"
        "h = Residency.of(pool, copies=True).hold([Wanted(digest, 1 << 20, 1 << 20, store.objects)], 1)\n"
        "with h: ctypes.memset(h.addresses[digest], 1, 1)\n",
        folder.root.parent,
        item.digest,
        faults=True,
    )
    assert done.returncode == -11


def test_small_models_go_on_in_what_others_left_of_a_granule(folder, pool, copies):
    kinds = [[wanted(folder, os.urandom(1030 + n)) for _ in range(5)] for n in range(8)]
    kinds.append([wanted(folder, os.urandom(90 * KiB))])
    kinds.append([wanted(folder, os.urandom(1030))])
    holdings = []
    for number, items in enumerate(kinds):
        holdings.append(copies.hold(items, number, host_copy="pinned" if number == 3 else "store"))
        if number % 3:
            check(holdings[-1], items)  # the others come later, into granules that are there, or with them
    for holding, items in zip(holdings, kinds, strict=True):
        check(holding, items)
        assert all(address % layout.ALIGNMENT == 0 for address in holding.addresses.values())
    sizes = sum(item.mapped for items in kinds for item in items)
    assert pool.stats().requested == sizes
    assert pool.stats().reserved <= sizes + 64 * KiB + 256 * 50
    for holding in holdings:
        holding.suspend()
    assert pool.stats().reserved == 0
    for holding, items in zip(holdings[::-1], kinds[::-1], strict=True):
        check(holding, items)
    for holding in holdings[::2]:
        holding.close()
    for holding, items in zip(holdings[1::2], kinds[1::2], strict=True):
        check(holding, items)
        holding.suspend()
        check(holding, items)
        holding.close()
    assert pool.stats().active == 0
    pool.trim()
    last = copies.hold(kinds[0], 99)  # the tails of what is gone are not used
    check(last, kinds[0])
    assert pool.stats().reserved == 64 * KiB
    last.close()


def test_versions_of_a_large_weight_share_their_equal_pieces(folder, pool, copies):
    pool.limit = 400 * MiB
    data = os.urandom(64 * MiB) + os.urandom(MiB + 77)
    longer = data + os.urandom(3 * MiB)  # as an embedding with added rows
    other = data[: 10 * MiB] + os.urandom(8 * MiB) + data[18 * MiB :]
    edges = {"edges": (10 * MiB, 18 * MiB)}
    first = parted(folder, data, **edges)
    second, third = parted(folder, longer), parted(folder, other)
    holdings, items = [], [first, second, third]
    for number, item in enumerate(items):
        holdings.append(copies.hold([item], number))
        check(holdings[-1], [item])
    distinct = len(data) + (len(longer) - 64 * MiB) + 8 * MiB
    assert pool.stats().active <= distinct + 4 * layout.PARTED_CHUNK // 4
    assert holdings[0].suspend() < 16 * MiB
    check(holdings[1], [second])
    holdings[0].close()
    check(holdings[1], [second])
    for holding in holdings[1:]:
        holding.suspend()
    assert pool.stats().active == 0
    for holding, item in zip(holdings[1:], items[1:], strict=True):
        check(holding, [item])
        holding.close()


def test_kept_copies_need_no_files(folder, pool, copies):
    items = [wanted(folder, os.urandom(2 * MiB)) for _ in range(2)]
    holding = copies.hold(items, 1, host_copy="pinned")
    other = copies.hold(items[:1], 2)
    expected = held(items)
    check(holding, items)
    assert holding.weigh().pinned == 4 * MiB
    holding.suspend()
    for item in items:
        folder.path(item.digest).unlink()
    with holding:
        for digest, data in expected.items():
            assert read(holding.addresses[digest], len(data)) == data
    holding.close()
    other.close()


def test_a_table_that_is_gone_leaves_no_addresses(folder):
    item = wanted(folder, os.urandom(4 * MiB))
    for _ in range(3):
        with gi.Pool(device="cpu", limit="64MiB") as pool:
            holding = Residency.of(pool, copies=True).hold([item], 1)
            check(holding, [item])
            holding.close()
        del holding
        gc.collect()
    with gi.Pool(device="cpu") as pool:
        assert pool.stats().reserved == 0


def test_pages_that_this_process_mapped_by_itself_are_dropped(tmp_path):
    import mmap

    file = tmp_path / "file"
    file.write_bytes(os.urandom(8 * MiB))
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def resident():
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        for line in lines:
            if line.endswith(str(file)):
                return int(next(x for x in lines if x.startswith("Rss:")).split()[1]) << 10
        raise AssertionError

    assert len(mapped[:]) == 8 * MiB
    assert resident() >= 8 * MiB
    drop_pages(mappings_of([file]))
    assert resident() == 0
    assert mapped[:] == file.read_bytes()
    mapped[0:1] = b"x"  # written to: it stays
    drop_pages(mappings_of([file]))
    assert mapped[0:1] == b"x"
    mapped.close()


def test_weights_on_the_host_have_their_bytes_and_take_none_of_the_limit(folder, pool, copies):
    pool.limit = 8 * MiB
    near = [wanted(folder, os.urandom(3 * MiB + 5), group="near")]
    far = [
        wanted(folder, os.urandom(size), group=n, on_host=True)
        for n, size in enumerate((9 * MiB, 70_000, 5 * MiB))
    ]
    items = [far[0], *near, *far[1:]]
    assert copies.room(items) == (pytest.approx(3 * MiB, abs=128 * KiB), 8 * MiB)
    holding = copies.hold(items, 1)
    needed, _ = copies.room(items)
    check(holding, items)
    stats = pool.stats()
    assert stats.reserved == needed == copies.room(near)[0] + stats.reserved
    assert 14 * MiB + 70_000 <= stats.offloaded <= 14 * MiB + 70_000 + 3 * 64 * KiB
    assert stats.weights == 3 * MiB + 5
    weighed = holding.weigh()
    assert (weighed.own, weighed.offloaded) == (17 * MiB + 70_005, 14 * MiB + 70_000)
    pool.deallocate(pool.allocate(4 * MiB))
    pool.trim()
    addresses = dict(holding.addresses)
    assert holding.suspend() == stats.reserved + stats.offloaded == holding.weigh().asleep
    assert (pool.stats().reserved, pool.stats().offloaded) == (0, 0)
    check(holding, items)
    assert holding.addresses == addresses
    assert copies.placed([i.digest for i in items]) == {i.digest: i.on_host for i in items}
    holding.close()
    assert pool.stats().offloaded == 0
    assert copies.placed([i.digest for i in items]) == {}


@pytest.mark.parametrize("first", ["device", "host"])
def test_a_weight_that_another_model_has_is_shared_where_it_is(folder, pool, copies, first):
    data = os.urandom(2 * MiB)
    near, far = wanted(folder, data), wanted(folder, data, on_host=True)
    one = copies.hold([near if first == "device" else far], 1)
    check(one, [near])
    two = copies.hold([far if first == "device" else near], 2)
    assert one.addresses == two.addresses
    check(two, [near])
    figures = (pool.stats().reserved, pool.stats().offloaded)
    assert figures == ((2 * MiB, 0) if first == "device" else (0, 2 * MiB))
    assert one.weigh().offloaded == two.weigh().offloaded == figures[1]
    assert one.suspend() == 0
    one.close()
    check(two, [near])
    two.close()


def test_what_no_model_has_moves_to_where_it_is_wanted(folder, pool, copies):
    data, other = os.urandom(2 * MiB), wanted(folder, os.urandom(MiB))
    first = copies.hold([wanted(folder, data), other], 1)
    check(first, [wanted(folder, data)])
    first.close()
    assert pool.stats().unused_weights == 3 * MiB
    far = wanted(folder, data, on_host=True)
    assert copies.room([far, other])[0] == MiB
    second = copies.hold([far, other], 2)
    check(second, [far, other])
    assert (pool.stats().reserved, pool.stats().offloaded) == (MiB, 2 * MiB)
    second.close()
    near = copies.hold([wanted(folder, data)], 3)
    check(near, [wanted(folder, data)])
    assert pool.stats().offloaded == 0
    near.close()


def test_no_copies_are_kept_of_what_is_on_the_host(folder, pool, copies):
    near, far = wanted(folder, os.urandom(MiB)), wanted(folder, os.urandom(2 * MiB), on_host=True)
    holding = copies.hold([near, far], 1, host_copy="pinned")
    check(holding, [near, far])
    assert holding.weigh().pinned == MiB
    holding.suspend()
    check(holding, [near, far])
    holding.close()


def test_room_counts_what_a_load_would_add(folder, pool, copies):
    """Weights that are there, tails and versions of large weights included."""
    trunk = wanted(folder, os.urandom(40_000))  # leaves a tail
    first = copies.hold([trunk], 1, evictable=True)
    check(first, [trunk])
    head = wanted(folder, os.urandom(10_000))
    assert copies.room([trunk, head]) == (0, 64 * MiB - 64 * KiB)
    assert copies.room([head]) == (0, 64 * MiB - 64 * KiB)
    large = parted(folder, os.urandom(20 * MiB))
    assert copies.room([large]) == (20 * MiB, 64 * MiB)  # the other one may go
    first.suspend()
    assert copies.room([trunk, large]) == (20 * MiB + 64 * KiB, 64 * MiB)
    first.close()


@pytest.mark.parametrize("calls", range(0, 16, 2))
def test_a_driver_that_refuses_memory_of_the_host_leaves_nothing(folder, pool, copies, calls):
    items = [wanted(folder, os.urandom(MiB), group=n, on_host=n > 0) for n in range(3)]
    native, holding = pool._open(), None
    native.inject_failure(calls, 1000)
    try:
        holding = copies.hold(items, 1)
        check(holding, items)
    except gi.DriverError:
        pool.check_invariants()
        assert (pool.stats().active, pool.stats().offloaded) == (0, 0)
    native.inject_failure(-1)
    holding = holding or copies.hold(items, 2)
    check(holding, items)
    holding.close()


@pytest.fixture
def budget(monkeypatch):
    """Sets the budget of kept copies; all of them are given back at the end."""
    monkeypatch.setattr(settings, "_settings", None)
    before = host_cache.bytes
    yield lambda size: configure_transfers(host_cache=size)
    gc.collect()
    assert host_cache.bytes == before


def pinned(folder, copies, number, size=2 * MiB, count=1):
    items = [wanted(folder, os.urandom(size), group=(number, i)) for i in range(count)]
    return copies.hold(items, number, host_copy="pinned"), items


class TestBudgetOfCopies:
    def weights(self, holdings):
        return [holding.weigh().pinned // MiB for holding, _ in holdings]

    def test_the_longest_unused_go_and_nothing_is_made_anew_at_every_run(
        self, folder, copies, budget, monkeypatch
    ):
        budget(4 * MiB)
        made, keep = [], copies._device.keep
        monkeypatch.setattr(copies._device, "keep", lambda spans: made.append(len(spans)) or keep(spans))
        holdings = [pinned(folder, copies, number) for number in range(3)]
        for each in holdings:
            check(*each)
        assert self.weights(holdings) == [0, 2, 2]
        assert made == [1, 1, 1]
        for _ in range(3):
            for each in holdings:
                check(*each)
        assert self.weights(holdings) == [0, 2, 2]
        assert made == [1, 1, 1]
        holdings[1][0].suspend()
        check(*holdings[1])  # from its copy, which is the last one used now
        holdings[0][0].suspend()
        check(*holdings[0])  # from files
        assert self.weights(holdings) == [2, 2, 0]
        assert made == [1, 1, 1, 1]
        for holding, _ in holdings:
            holding.close()

    def test_many_models_that_take_turns_always_have_the_right_bytes(self, folder, copies, budget):
        budget(6 * MiB)
        holdings = [pinned(folder, copies, number, MiB, 2) for number in range(5)]
        for turn in range(4):
            for each in holdings[turn % 2 :]:
                check(*each)
                each[0].suspend()
            assert sum(self.weights(holdings)) <= 6
            assert host_cache.bytes <= 6 * MiB
        for holding, _ in holdings:
            holding.close()

    @pytest.mark.parametrize(("size", "kept"), [(0, 0), (MiB, 0), (5 * MiB, 4), (None, 8)])
    def test_a_model_that_is_larger_has_copies_of_a_part(self, folder, copies, budget, size, kept):
        budget(size)
        holding, items = pinned(folder, copies, 1, count=4)
        for _ in range(3):
            check(holding, items)
            assert holding.weigh().pinned == kept * MiB
            holding.suspend()
        holding.close()

    def test_a_model_that_does_not_fit_leaves_the_others_their_copies(self, folder, copies, budget):
        budget(3 * MiB)
        small, large = pinned(folder, copies, 1), pinned(folder, copies, 2, 4 * MiB)
        for _ in range(3):
            for each in (small, large):
                check(*each)
                each[0].suspend()
            assert self.weights([small, large]) == [2, 0]
        small[0].close()
        large[0].close()

    def test_a_copy_that_another_one_wants_too_is_dropped_for_both(self, folder, copies, budget):
        budget(2 * MiB)
        first, items = pinned(folder, copies, 1)
        second = copies.hold(items, 2, host_copy="pinned")
        check(first, items)
        check(second, items)
        assert (first.weigh().pinned, second.weigh().pinned) == (2 * MiB, 2 * MiB)
        other = pinned(folder, copies, 3)
        check(*other)
        assert (first.weigh().pinned, second.weigh().pinned) == (0, 0)
        for holding in (first, second, other[0]):
            check(holding, items if holding is not other[0] else other[1])
            holding.close()

    def test_a_copy_that_cannot_be_made_is_not_counted(self, folder, copies, budget, monkeypatch):
        budget(4 * MiB)
        holding, items = pinned(folder, copies, 1)

        def fail(spans):
            raise gi.DriverError("no memory to lock")

        with monkeypatch.context() as patch:
            patch.setattr(copies._device, "keep", fail)
            before = host_cache.bytes
            with pytest.raises(gi.DriverError, match="no memory to lock"), holding:
                pass
            assert host_cache.bytes == before
            assert not holding.busy
        check(holding, items)
        assert holding.weigh().pinned == 2 * MiB
        holding.close()


class Slow(EngineTransfers):
    """Over a link of 16 MiB per second: what is on its way can be seen."""

    def __init__(self):
        engine = _native.TransferEngine.on_host(2, 64 * KiB, 32 * 64 * KiB, 4096)
        engine.add_host_path(0, "slow", rate=16 * MiB)
        super().__init__(engine, 0)


@pytest.fixture
def slow(copies):
    copies._device = Slow()
    return copies


@pytest.fixture
def loads(slow, folder):
    """A holding of 4 MiB, which takes 0.25 s to load, and its weights."""
    items = [wanted(folder, os.urandom(2 * MiB)) for _ in range(2)]
    holding = slow.hold(items, 1)
    yield holding, items
    assert slow._device._engine.memory()["in_use"] == 0
    assert not holding.busy
    for _ in range(2):  # it stays what it is
        check(holding, items)
        holding.suspend()
    with holding.arriving():
        pass
    check(holding, items)
    holding.close()


@pytest.mark.clock
class TestWeightsThatArrive:
    @staticmethod
    def fail(holding, after, error):
        with holding.arriving():
            time.sleep(after)
            raise error

    def test_have_their_addresses_at_once_and_their_bytes_at_the_end(self, loads):
        holding, items = loads
        start = time.perf_counter()
        with holding.arriving():
            inside = time.perf_counter()
            assert holding.busy
        assert inside - start < 0.15 < time.perf_counter() - start
        check(holding, items)

    def test_that_are_there_do_not_come_again(self, loads, slow):
        holding, items = loads
        check(holding, items)
        before = slow.transfers.loads
        start = time.perf_counter()
        with holding.arriving():
            assert holding.busy
        assert time.perf_counter() - start < 0.1
        assert slow.transfers.loads == before

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    @pytest.mark.parametrize("after", [0, 0.05, 0.6])
    def test_are_stopped_by_an_error_in_the_block(self, pool, loads, error, after):
        holding, _ = loads
        start = time.perf_counter()
        with pytest.raises(error):
            self.fail(holding, after, error)
        if after < 0.1:
            assert time.perf_counter() - start < after + 0.2
            assert pool.stats().active == 0
            assert holding.suspended

    @pytest.mark.parametrize("damage", ["change", "shorten", "remove"])
    def test_that_cannot_come_are_an_error_at_the_latest_at_the_end(self, folder, pool, loads, damage):
        holding, items = loads
        path = folder.path(items[1].digest)
        data = path.read_bytes()
        spoil(path, damage)
        reached = []
        for _ in range(2):
            with pytest.raises(AlteredObjectError), holding.arriving():
                reached.append(True)
            assert pool.stats().active == 0
            assert not holding.busy
        assert len(reached) == (2 if damage == "change" else 0)  # what a look at the file tells comes first
        with pytest.raises(ZeroDivisionError if reached else AlteredObjectError):  # then the block's own
            self.fail(holding, 0.1, ZeroDivisionError)
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def test_are_stopped_by_ctrl_c_while_they_are_waited_for(self, pool, loads):
        holding, _ = loads
        thread = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt), holding.arriving():
            thread.start()
        assert time.perf_counter() - start < 0.24
        thread.join()
        assert pool.stats().active == 0

    def test_are_stopped_by_ctrl_c_after_an_error_in_the_block_too(self, loads):
        holding, _ = loads

        def fail():
            thread = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
            thread.start()
            try:
                self.fail(holding, 0, ZeroDivisionError)
            finally:
                thread.join()

        with pytest.raises(KeyboardInterrupt):
            fail()

    def test_come_at_the_end_where_there_is_no_thread(self, loads, monkeypatch):
        holding, items = loads
        start = threading.Thread.start

        def refuse(thread):
            if thread.name == "glake-infer weights":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with holding.arriving():
                pass
            check(holding, items)

    def test_that_another_waits_for_are_loaded_by_it_instead(self, slow, loads):
        holding, items = loads
        other, problems = slow.hold(items, 2), []

        def use():
            try:
                check(other, items)
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=use)
        threading.Timer(0.02, thread.start).start()
        with pytest.raises(ZeroDivisionError):
            self.fail(holding, 0.1, ZeroDivisionError)
        thread.join(20)
        assert not problems, problems[0]
        other.close()

    def test_of_a_holding_that_is_closed_meanwhile(self, pool, slow, folder):
        items = [wanted(folder, os.urandom(2 * MiB))]
        holding = slow.hold(items, 1)
        with holding.arriving():
            holding.close()
            assert not holding.closed
        assert holding.closed
        assert slow.users() == {}
        assert pool.stats().active == 0
        with pytest.raises(gi.GlakeError, match="closed"), holding.arriving():
            pass
