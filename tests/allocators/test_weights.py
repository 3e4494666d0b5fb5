"""Weights in the native pool: chunks that come and go, and never while work that reads them is queued."""

import contextlib
import ctypes
import threading
import time

import pytest

from glake_infer.allocators import DriverError, InvalidPointerError, OutOfMemoryError, _native

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def device():
    return _native.SimulatedDevice()


@pytest.fixture
def pool(device):
    pool = _native.Pool.simulated(device, 16 * MiB)
    yield pool
    pool.check_invariants()


def fill(pool, user, value):
    """Begin a use and load what is missing."""
    chunks = pool.begin_use(user)
    for chunk in chunks:
        with contextlib.suppress(InvalidPointerError):  # all but those on the host have memory already
            pool.make([chunk])
        ctypes.memset(pool.address_of(chunk), value, MiB)
    pool.loaded(user, chunks)
    return chunks


def make(pool, count, **policy):
    region, address, chunks = pool.place_weights([(MiB, MiB - 10, 0, False)] * count, "memory")
    return region, address, chunks, pool.add_user(chunks, **policy)


def test_a_use_loads_what_is_missing_and_figures_follow(pool):
    region, address, chunks, user = make(pool, 3)
    assert pool.stats()["reserved"] == 0
    assert pool.user(user) | {"idle_seconds": 0} == {
        "bytes": 3 * MiB, "missing": 3 * MiB, "missing_on_host": 0, "busy": 0, "awake": False, "evictable": False,
        "priority": 0, "idle_seconds": 0}  # fmt: skip
    assert fill(pool, user, 7) == chunks
    assert [pool.address_of(c) for c in chunks] == [address + i * MiB for i in range(3)]
    assert pool.user(user)["missing"] == 0
    assert pool.user(user)["busy"] == 1
    stats = pool.stats()
    assert (stats["reserved"], stats["active"], stats["requested"]) == (3 * MiB, 3 * MiB, 3 * (MiB - 10))
    assert stats["weights"] == 3 * (MiB - 10)
    assert pool.begin_use(user) == []
    pool.end_use(user)
    pool.end_use(user)
    assert pool.suspend(user) == 3 * MiB
    assert pool.stats()["reserved"] == 0
    assert fill(pool, user, 8) == chunks
    assert ctypes.string_at(address, 3 * MiB) == b"\x08" * (3 * MiB)
    pool.end_use(user)
    with pytest.raises(InvalidPointerError, match="still used"):
        pool.remove_region(region)
    pool.remove_user(user)
    assert pool.stats()["active"] == 0
    assert pool.stats()["unused_weights"] == pool.resident_in(region) == 3 * MiB
    pool.trim()
    assert pool.resident_in(region) == 0
    pool.remove_region(region)
    with pytest.raises(InvalidPointerError):
        pool.remove_region(region)
    with pytest.raises(InvalidPointerError):
        pool.begin_use(user)


@pytest.mark.parametrize("way", ["suspend", "evict", "trim", "remove"])
def test_memory_goes_only_when_queued_work_has_passed(pool, device, way):
    """A job that reads unmapped memory ends the process."""
    region, address, _, user = make(pool, 4, evictable=True)
    stream = device.new_stream()
    for turn in range(5):
        fill(pool, user, turn)
        device.enqueue_delay(stream, 20_000)
        device.enqueue_check(stream, address, 4 * MiB, turn)
        pool.end_use(user)  # the work is queued, and goes on
        if way == "suspend":
            assert pool.suspend(user) == 4 * MiB
        elif way == "evict":
            pool.deallocate(pool.allocate(16 * MiB, stream=stream))
            assert pool.user(user)["missing"] == 4 * MiB
            pool.trim()
        else:
            pool.remove_user(user)
            if way == "trim":
                pool.trim()
                assert pool.stats()["reserved"] == 0
            else:
                pool.remove_region(region)
            pool.check_invariants()
            region, address, _, user = make(pool, 4)
    device.synchronize_stream(stream)
    assert (device.mismatches, device.misuses) == (0, 0)


def test_a_chunk_in_two_regions_is_one_memory(pool):
    _, first, chunks, one = make(pool, 2)
    region, second, both = pool.place_weights([(MiB, MiB, 0, False), (MiB, MiB, chunks[1], False)], "memory")
    assert both[1] == chunks[1]
    two = pool.add_user(both)
    fill(pool, one, 3)
    assert pool.begin_use(two) == [both[0]]
    ctypes.memset(second, 4, MiB)
    pool.loaded(two, [both[0]])
    assert ctypes.string_at(second, 2 * MiB) == b"\4" * MiB + b"\3" * MiB
    assert pool.stats()["reserved"] == 3 * MiB
    third, address, _ = pool.place_weights([(MiB, MiB, chunks[1], False)], "memory")  # while it is there
    assert ctypes.string_at(address, MiB) == b"\3" * MiB
    pool.remove_region(third)
    pool.end_use(one)
    pool.end_use(two)
    assert pool.suspend(one) == MiB
    assert ctypes.string_at(second + MiB, 10) == b"\3" * 10
    assert pool.suspend(two) == 2 * MiB
    fill(pool, one, 5)
    assert ctypes.string_at(second + MiB, 10) == b"\5" * 10
    pool.end_use(one)
    pool.remove_user(two)
    pool.remove_region(region)
    assert ctypes.string_at(first + MiB, 10) == b"\5" * 10
    pool.remove_user(one)
    with pytest.raises(InvalidPointerError, match="cannot be mapped a second time"):
        pool.place_weights([(2 * MiB, MiB, chunks[0], False)], "memory")


def test_a_failed_load_leaves_the_chunks_absent_and_wakes_who_waits_for_them(pool):
    _, _, chunks, one = make(pool, 2)
    two = pool.add_user(chunks)
    assert pool.begin_use(one) == chunks
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.begin_use(two)))
    thread.start()
    time.sleep(0.05)
    assert not got
    pool.load_failed(one, chunks)
    thread.join()
    assert got == [chunks]  # now it is the other's to load them
    pool.loaded(two, chunks)
    assert pool.begin_use(one) == []
    pool.end_use(one)
    pool.end_use(two)


@pytest.mark.parametrize("calls", range(12))
def test_after_a_driver_call_that_fails_all_is_as_before(pool, calls):
    _, _, chunks, user = make(pool, 3)
    pool.inject_failure(calls, 10**6)
    try:
        got = pool.begin_use(user)
        pool.loaded(user, got)
    except DriverError:
        pool.inject_failure(-1)
        pool.check_invariants()
        if pool.user(user)["busy"]:
            pool.load_failed(user, chunks)
        assert pool.stats()["reserved"] == 0
        assert pool.user(user)["busy"] == 0
    pool.inject_failure(-1)
    assert pool.begin_use(user) in ([], chunks)


def test_what_has_waited_long_is_served_before_what_comes_and_goes(pool):
    """Without an order, two small models that take turns would keep a large one out for ever."""
    _, _, _, large = make(pool, 12, evictable=True)
    small = [make(pool, 5, evictable=True)[3] for _ in range(2)]
    stop, served = threading.Event(), []

    def churn(user, offset):
        time.sleep(offset)
        while not stop.is_set():
            fill(pool, user, 1)
            time.sleep(0.03)
            pool.end_use(user)

    def ask():
        fill(pool, large, 2)
        served.append(True)
        pool.end_use(large)

    threads = [threading.Thread(target=churn, args=(user, 0.015 * n)) for n, user in enumerate(small)]
    threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    threads[-1].join(10)
    stop.set()
    for thread in threads:
        thread.join()
    assert served


def test_a_budget_below_one_model_is_an_error_that_names_what_would_do(pool):
    _, _, _, user = make(pool, 20)
    with pytest.raises(OutOfMemoryError) as caught:
        pool.begin_use(user)
    assert caught.value.needed_limit == 20 * MiB
    assert pool.stats()["reserved"] == 0
    pool.set_limit(20 * MiB)
    fill(pool, user, 1)
    pool.end_use(user)


def test_debug_mode_counts_weights_too():
    pool = _native.Pool(16 * MiB)
    pool.configure("on")
    _, _, _, user = make(pool, 4, evictable=True)
    fill(pool, user, 1)
    pool.end_use(user)
    assert pool.stats()["active"] == 4 * MiB
    address = pool.allocate(14 * MiB - 512 * KiB)
    assert pool.user(user)["missing"] != 0
    pool.deallocate(address)
    pool.remove_user(user)
    pool.trim()
    pool.configure("off")


def host(pool, count, **policy):
    region, address, chunks = pool.place_weights([(MiB, MiB - 10, 0, False)] * count, "memory", on_host=True)
    return region, address, chunks, pool.add_user(chunks, **policy)


def figures(pool):
    stats = pool.stats()
    return tuple(stats[name] for name in ("reserved", "active", "requested", "weights", "offloaded"))


def test_what_is_on_the_host_is_counted_apart_and_needs_no_room(pool):
    region, address, chunks, user = host(pool, 20)  # the limit is 16
    assert figures(pool) == (0, 0, 0, 0, 0)
    assert fill(pool, user, 7) == chunks
    assert ctypes.string_at(address, 20 * MiB) == b"\7" * (20 * MiB)
    assert figures(pool) == (0, 0, 0, 0, 20 * MiB)
    assert pool.resident_in(region) == 20 * MiB
    pool.deallocate(pool.allocate(16 * MiB))  # all of the limit
    assert pool.holders() == []
    pool.end_use(user)
    assert pool.suspend(user) == 20 * MiB
    assert figures(pool)[-1] == 0
    view = pool.user(user)
    assert view["missing"] == view["missing_on_host"] == view["bytes"] == 20 * MiB
    assert fill(pool, user, 8) == chunks
    assert ctypes.string_at(address, 20 * MiB) == b"\x08" * (20 * MiB)
    pool.end_use(user)
    pool.remove_user(user)  # nobody would ever need its room: it is not kept
    assert figures(pool)[-1] == pool.resident_in(region) == 0
    pool.remove_region(region)


def test_eviction_never_takes_what_is_on_the_host(pool):
    _, _, _, far = host(pool, 4, evictable=True)
    _, _, _, near = make(pool, 8, evictable=True)
    for user in (far, near):
        fill(pool, user, 1)
        pool.end_use(user)
    held = pool.allocate(14 * MiB)
    assert (pool.user(far)["missing"], pool.user(near)["missing"]) == (0, 6 * MiB)
    with pytest.raises(OutOfMemoryError) as caught:
        pool.allocate(4 * MiB)
    assert caught.value.needed_limit == 20 * MiB  # all but what is on the host
    assert pool.user(far)["missing"] == 0
    pool.set_limit(14 * MiB)
    pool.trim()
    assert pool.stats()["offloaded"] == 4 * MiB
    pool.deallocate(held)


def test_no_room_counts_what_is_on_the_device_alone(pool):
    _, _, one, _ = host(pool, 30)
    _, _, two, _ = make(pool, 17)
    user = pool.add_user([*one, *two])
    with pytest.raises(OutOfMemoryError) as caught:
        pool.begin_use(user)
    assert (caught.value.requested, caught.value.needed_limit) == (17 * MiB, 17 * MiB)
    assert figures(pool) == (0, 0, 0, 0, 0)
    pool.set_limit(17 * MiB)
    fill(pool, user, 1)
    assert figures(pool)[::4] == (17 * MiB, 30 * MiB)
    pool.end_use(user)


@pytest.mark.parametrize("calls", range(9))
def test_a_refusal_on_the_host_leaves_nothing(pool, calls):
    _, address, chunks, _ = host(pool, 2)
    user = pool.add_user([*chunks, *make(pool, 2)[2]])
    pool.inject_failure(calls, 1000)
    if calls < 8:
        begun = []

        def begin():
            begun.extend(pool.begin_use(user))
            for chunk in chunks:
                pool.make([chunk])

        with pytest.raises(DriverError, match="injected"):
            begin()
        if begun:
            pool.load_failed(user, begun)
        assert figures(pool) == (0, 0, 0, 0, 0)
        pool.check_invariants()
    pool.inject_failure(-1)
    fill(pool, user, 3)
    assert ctypes.string_at(address, 10) == b"\3" * 10
    assert figures(pool)[::4] == (2 * MiB, 2 * MiB)
    pool.end_use(user)


def test_what_is_on_the_host_goes_only_when_queued_work_has_passed(pool, device):
    region, address, _, user = host(pool, 4)
    stream = device.new_stream()
    for turn, way in enumerate(["suspend", "remove"]):
        fill(pool, user, turn)
        device.enqueue_delay(stream, 20_000)
        device.enqueue_check(stream, address, 4 * MiB, turn)
        pool.end_use(user)
        pool.suspend(user) if way == "suspend" else pool.remove_user(user)
        assert pool.stats()["offloaded"] == 0
    pool.remove_region(region)
    device.synchronize_stream(stream)
    assert (device.mismatches, device.misuses) == (0, 0)


def test_only_memory_of_its_own_is_on_the_host(pool):
    for kind in ("file", "shared"):
        with pytest.raises(InvalidPointerError, match="its kind is memory"):
            pool.place_weights([(MiB, MiB, 0, False)], kind, on_host=True)
    _, _, chunks, user = host(pool, 1)
    fill(pool, user, 4)
    _, address, again = pool.place_weights([(MiB, MiB, chunks[0], False)], "memory")  # stays where it is
    assert again == chunks
    assert ctypes.string_at(address, 10) == b"\4" * 10
    assert figures(pool) == (0, 0, 0, 0, MiB)
    pool.end_use(user)


def test_room_is_what_the_limit_has_when_all_is_gone_that_may_go(pool):
    _, _, mine, _ = make(pool, 3)
    _, _, other, evictable = make(pool, 2, evictable=True)
    _, _, far, _ = host(pool, 5)
    assert pool.room_for([*mine, *mine, *far]) == (3 * MiB, 16 * MiB)
    fill(pool, evictable, 1)
    assert pool.room_for(mine) == (3 * MiB, 14 * MiB)  # it is busy
    pool.end_use(evictable)
    assert pool.room_for(mine) == (3 * MiB, 16 * MiB)
    assert pool.room_for([*mine, *other]) == (3 * MiB, 14 * MiB)  # what is to be used is not to go
    held = pool.allocate(4 * MiB)
    assert pool.room_for(mine) == (3 * MiB, 12 * MiB)
    pool.deallocate(held)
    assert pool.room_for(mine) == (3 * MiB, 16 * MiB)


def test_a_chunk_takes_the_place_of_an_equal_one_with_its_users(pool):
    first, _, theirs, one = make(pool, 2)
    fill(pool, one, 5)
    second, address, mine, other = make(pool, 2)
    assert pool.begin_use(other) == mine
    ctypes.memset(address, 5, 2 * MiB)
    pool.loaded(other, mine, writable=True)
    pool.end_use(other)
    ctypes.memset(address, 5, 2 * MiB)  # it still can be written to
    pool.replace(second, 1, theirs[0])
    assert pool.stats()["reserved"] == 3 * MiB
    assert ctypes.string_at(address, 2 * MiB) == b"\5" * (2 * MiB)
    pool.freeze(mine[:1])
    pool.replace(second, 0, theirs[0])  # twice in one region
    pool.replace(second, 0, theirs[0])
    stats = pool.stats()
    assert (stats["reserved"], stats["active"]) == (2 * MiB, 2 * MiB)
    pool.check_invariants()
    pool.end_use(one)
    pool.remove_user(one)
    assert pool.suspend(other) == MiB
    assert pool.user(other)["missing"] == MiB
    assert fill(pool, other, 6) == theirs[:1]
    assert ctypes.string_at(address, 2 * MiB) == b"\6" * (2 * MiB)
    pool.end_use(other)
    pool.remove_user(other)
    pool.remove_region(second)
    pool.remove_region(first)
    assert pool.stats()["reserved"] == 0


def test_what_cannot_take_a_place_is_refused_and_changes_nothing(pool):
    region, _, chunks, user = make(pool, 2)
    _, _, absent, _ = make(pool, 1)
    small_region, _, small = pool.place_weights([(64 * KiB, 1, 0, False)], "memory")
    tiny = pool.add_user(small)
    pool.loaded(tiny, pool.begin_use(tiny))
    pool.loaded(user, pool.begin_use(user), writable=True)
    before = pool.stats()["mappings"]
    with pytest.raises(InvalidPointerError, match="can still be written to"):
        pool.replace(region, 0, chunks[1])
    with pytest.raises(InvalidPointerError, match="cannot take the place"):
        pool.replace(region, 0, absent[0])
    with pytest.raises(InvalidPointerError, match="cannot take the place"):
        pool.replace(region, 0, small[0])
    with pytest.raises(InvalidPointerError, match="has no chunk 2"):
        pool.replace(region, 2, chunks[0])
    with pytest.raises(InvalidPointerError, match="none of this pool's weights"):
        pool.replace(region, 0, 10**6)
    pool.freeze(chunks)
    device_memory = pool.stats()["reserved"]
    pool.inject_failure(0)  # of the mapping; then the former is mapped again
    with pytest.raises(DriverError):
        pool.replace(region, 0, chunks[1])
    assert (pool.stats()["reserved"], pool.stats()["mappings"]) == (device_memory, before)
    pool.end_use(user)
    pool.end_use(tiny)
    del small_region
