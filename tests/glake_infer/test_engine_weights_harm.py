"""Weight blocks of engines where something goes wrong, or goes on at the same time: bytes stay right, nothing is left."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from engines import Engine, Plan, engine_pool, load, random_weights

import glake_infer as gi
from glake_infer import engine_weights
from glake_infer.engine_weights import EngineWeights
from glake_infer.holding import Holding
from glake_infer.residency import Residency
from glake_infer.transfers.host_cache import host_cache

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

KiB, MiB = 1 << 10, 1 << 20

WEIGHTS = random_weights(1, *[256 * KiB + 128 * k for k in range(8)])


@pytest.fixture
def pool():
    with engine_pool() as pool:
        yield pool


@pytest.fixture
def allocator(pool):
    return gi.TensorRTAllocator(pool)


def test_a_block_whose_chunks_are_all_others_too_outlives_a_sweep_while_it_sleeps(pool, allocator, tmp_path):
    plan = Plan(tmp_path, WEIGHTS)
    engines = [load(allocator, pool, plan) for _ in range(2)]
    for engine in engines:
        engine.holding.suspend()
    load(allocator, pool, Plan(tmp_path, random_weights(2, MiB))).destroy()  # sweeps
    for engine in reversed(engines):
        with engine.holding:
            assert engine.read() == plan.block
    for engine in engines:
        engine.destroy()


def test_what_sleeps_counts_once(pool, allocator, tmp_path):
    plans = [Plan(tmp_path, [random_weights(3, size)[0], *WEIGHTS]) for size in (512, 1024)]
    engines = [load(allocator, pool, plan) for plan in plans]
    before = pool.stats().reserved
    for engine in engines:
        engine.holding.suspend()
    assert pool.stats().reserved == 0
    assert Residency.of(pool).asleep() == before
    for engine in engines:
        engine.destroy()


def test_an_evicted_engine_is_given_back_where_there_is_no_room_for_it(pool, allocator, tmp_path):
    pool.limit = "12MiB"
    one, other = (Plan(tmp_path, random_weights(seed, 8 * MiB)) for seed in (1, 2))
    engine = load(allocator, pool, one, evictable=True)
    stays = load(allocator, pool, other)
    engine.destroy()
    assert engine.holding.closed
    assert stays.read() == other.block
    stays.destroy()


def test_giving_an_evicted_engine_back_takes_no_memory_from_others(pool, allocator, tmp_path):
    pool.limit = "12MiB"
    one, other = (Plan(tmp_path, random_weights(seed, 8 * MiB)) for seed in (1, 2))
    engine = load(allocator, pool, one, evictable=True)
    stays = load(allocator, pool, other, evictable=True)
    engine.destroy()
    assert stays.holding.weigh().asleep == 0
    stays.destroy()


def test_an_object_that_is_gone_keeps_a_load_from_sharing_and_no_more(pool, allocator, tmp_path):
    plan = Plan(tmp_path, WEIGHTS)
    asleep = load(allocator, pool, plan)
    asleep.holding.suspend()
    victim = plan.stretches[3].file.path
    data = victim.read_bytes()
    victim.unlink()
    engine = load(allocator, pool, plan)
    assert engine.report.shared_bytes == 0
    assert engine.read() == plan.block
    victim.write_bytes(data)
    with asleep.holding:
        assert asleep.read() == plan.block
    engine.destroy()
    asleep.destroy()


@pytest.mark.parametrize("alignment", [1, 0, 512, 64 * KiB, 128 * KiB, 1 << 20])
@pytest.mark.parametrize("size", [1, 127, 64 * KiB, 64 * KiB + 1, 3 * MiB + 5])
def test_blocks_of_any_size_and_alignment(pool, allocator, tmp_path, size, alignment):
    plan = Plan(tmp_path, random_weights(size, size))
    engines = []
    for _ in range(2):
        with EngineWeights.of(pool).loading(allocator, plan_bytes=len(plan.bytes), stretches=plan.stretches):
            engines.append(Engine(allocator, plan, alignment or 1))
    for engine in engines:
        assert engine.address
        assert engine.read() == plan.block
        engine.destroy()


class Meanwhile(dict):
    """A dictionary during whose look-ups a collection ends engines, as it may in any thread at any time."""

    def __init__(self, content, action):
        super().__init__(content)
        self.action = action

    def values(self):
        if self.action:
            action, self.action = self.action, None
            action()
        return super().values()


def finishes(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_an_engine_may_be_collected_while_a_thread_looks_at_the_blocks(pool, allocator, tmp_path):
    plan = Plan(tmp_path, WEIGHTS)
    weights = EngineWeights.of(pool)
    gone, stays = (load(allocator, pool, plan) for _ in range(2))
    weights._blocks = Meanwhile(weights._blocks, gone.destroy)
    made = []
    assert finishes(lambda: made.append(load(allocator, pool, plan)))
    assert made[0].read() == plan.block
    for engine in (stays, *made):
        engine.destroy()


def test_an_engine_may_be_collected_while_its_allocator_is_asked(pool, allocator, tmp_path):
    plan = Plan(tmp_path, WEIGHTS)
    gone, stays = (load(allocator, pool, plan) for _ in range(2))
    state = allocator._state
    state.live = Meanwhile(state.live, gone.destroy)
    assert finishes(allocator.held)
    assert allocator.held() == len(plan.block)
    stays.destroy()


def test_what_waits_for_room_to_grow_holds_up_nobody_else(pool, allocator, tmp_path):
    pool.limit = "13MiB"
    engine = load(allocator, pool, Plan(tmp_path, random_weights(1, 4 * MiB)))
    caller = engine._caller
    growing, small = caller.allocate_async(MiB, 512, 1), caller.allocate_async(100)
    grown = []
    with engine.holding:
        thread = threading.Thread(
            target=lambda: grown.append(caller.reallocate(growing, 512, 10 * MiB)), daemon=True
        )
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert finishes(lambda: caller.deallocate_async(small))
    thread.join(10)
    assert caller.deallocate_async(growing)
    engine.destroy()
    pool.trim()


@pytest.mark.parametrize("shared", [True, False])
def test_a_driver_failure_at_any_call_leaves_nothing(pool, allocator, tmp_path, shared):
    """Whatever fails: engines have their bytes, later loads share as before, and all goes with the engines."""
    plan = Plan(tmp_path, WEIGHTS[:2])
    other = Plan(tmp_path, [random_weights(3, 512)[0], *WEIGHTS[:2]])
    native, weights, table = pool._open(), EngineWeights.of(pool), Residency.of(pool)
    raised = 0
    for number in range(120 if shared else 60):
        asleep = load(allocator, pool, plan) if shared else None
        if asleep and number % 2:
            asleep.holding.suspend()
        engines = []
        native.inject_failure(number)
        try:
            with weights.loading(allocator, plan_bytes=len(other.bytes), stretches=other.stretches):
                engines += [Engine(allocator, plan), Engine(allocator, other)]
        except gi.DriverError:
            raised += 1
        native.inject_failure(-1)
        pool.check_invariants()
        engines = [engine for engine in engines if engine.address]
        again = load(allocator, pool, plan)
        assert again.report.own_bytes == 0 or not shared
        table.asleep()
        for engine in engines:
            assert engine.read() == engine.plan.block
            engine.destroy()
        assert again.read() == plan.block
        for engine in filter(None, (again, asleep)):
            engine.destroy()
        assert (weights._blocks, table._regions, table._owners, table._entries) == ({}, {}, {}, {})
        assert pool.stats().reserved == 0
    assert raised or shared


@pytest.mark.parametrize("keep", [True, False])
def test_the_first_owner_goes_while_another_brings_back_or_keeps(pool, allocator, tmp_path, keep):
    """What is copied to or from shared chunks lies at addresses of who copies, not of who had them first."""
    table = Residency.of(pool, copies=True)
    plan = Plan(tmp_path, WEIGHTS[:3])
    first = load(allocator, pool, plan)
    other = load(allocator, pool, plan, host_copy="store" if keep else "pinned")
    assert other.report.own_bytes == 0
    device = table._device
    spans = []

    class Device:
        def __getattr__(self, name):
            return getattr(device, name)

        def keep(self, wanted):
            spans.extend(address for address, _ in wanted)
            return device.keep(wanted)

        def start(self, steps, total, **options):
            steps = list(steps)
            spans.extend(address for step in steps for address, _, _ in step.copies)
            return device.start(steps, total, **options)

    table._device = Device()
    if keep:
        other.holding.host_copy = "pinned"
    else:
        first.holding.suspend()
        other.holding.suspend()
    with other.holding:
        assert other.read() == plan.block
    assert spans
    (region,) = other.holding.regions
    assert all(region.address <= address < region.address + sum(region.sizes) for address in spans)
    first.destroy()
    other.destroy()


@pytest.mark.parametrize("known", [True, False])
def test_an_engine_goes_whose_chunks_a_load_is_about_to_use(pool, allocator, tmp_path, monkeypatch, known):
    """The one that has no source kept them there; another that sleeps may have one."""
    plan = Plan(tmp_path, WEIGHTS[:3])
    with EngineWeights.of(pool).loading(allocator):
        gone = Engine(allocator, plan)
    others = [load(allocator, pool, plan)] if known else []
    for other in others:
        other.holding.suspend()

    class Late(Holding):
        def __enter__(self):
            gone.destroy()
            pool.limit, before = 4 * len(plan.block), pool.limit
            pool.deallocate(pool.allocate(2 * len(plan.block)))  # takes the memory of what nobody keeps
            pool.limit = before
            return super().__enter__()

    monkeypatch.setattr(engine_weights, "Holding", Late)
    engine = load(allocator, pool, plan)
    monkeypatch.undo()
    assert engine.report.shared_bytes == (len(plan.block) if known else 0)
    for each in (engine, *others):
        with each.holding:
            assert each.read() == plan.block
    for each in (engine, *others):
        each.destroy()


def test_nothing_stays_of_a_pool_that_is_closed(tmp_path):
    with gi.Pool("cpu", "64MiB") as pool:
        allocator = gi.TensorRTAllocator(pool)
        load(allocator, pool, Plan(tmp_path, WEIGHTS[:1])).destroy()
        table = weakref.ref(Residency.of(pool))
    gc.collect()
    assert table() is None


def test_engines_that_outlive_the_pools_handle_share_with_those_of_the_next(tmp_path):
    plan = Plan(tmp_path, WEIGHTS[:2])
    pool = gi.Pool("cpu", "64MiB")
    allocator = gi.TensorRTAllocator(pool)
    first = load(allocator, pool, plan)
    first.holding.suspend()
    del pool
    gc.collect()
    with gi.Pool("cpu", "64MiB") as pool:
        other = load(allocator, pool, plan)
        assert other.report.own_bytes == 0
        with first.holding:
            assert first.read() == plan.block
        first.destroy()
        assert other.read() == plan.block
        other.destroy()
        assert pool.stats().reserved == 0


def test_an_engine_may_be_collected_while_copies_are_counted(pool, allocator, tmp_path, monkeypatch):
    Residency.of(pool, copies=True)
    gone = load(allocator, pool, Plan(tmp_path, WEIGHTS[:1]), host_copy="pinned")
    before = host_cache.bytes

    def excess(size):
        gone.destroy()
        return 0

    monkeypatch.setattr(host_cache, "excess", excess)
    assert finishes(lambda: host_cache.reserve(KiB))
    host_cache.give_back(KiB)
    assert host_cache.bytes < before
