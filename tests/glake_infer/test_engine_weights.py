"""Weight blocks of engines: equal chunks become one, the shift that makes them equal, sleep and wake, nothing left."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest
from engines import Engine, Plan, engine_pool, load, random_weights

import glake_infer as gi
from glake_infer.checking import AlteredObjectError
from glake_infer.engine_weights import EngineWeights
from glake_infer.residency import Residency

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def pool():
    with engine_pool() as pool:
        yield pool


@pytest.fixture
def allocator(pool):
    return gi.TensorRTAllocator(pool)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


TRUNK = random_weights(1, *[256 * KiB + 128 * k for k in range(16)])


def family(folder, head):
    """A trunk of 4 MiB with a head of so many bytes in front, as TensorRT lays it out."""
    return Plan(folder, [*random_weights(head, head), *TRUNK] if head else TRUNK)


def reserved(pool):
    return pool.stats().reserved


def test_a_second_load_adds_nothing(pool, allocator, folder):
    plan = family(folder, 100 * KiB)
    first = load(allocator, pool, plan)
    before = reserved(pool)
    assert before < len(plan.block) + 2 * 64 * KiB
    second = load(allocator, pool, plan)
    assert reserved(pool) == before
    assert first.address != second.address
    assert first.read() == second.read() == plan.block
    assert (second.report.shared_bytes, second.report.own_bytes) == (len(plan.block), 0)
    assert second.report.reserved_bytes == 0
    assert second.report.source_known
    first.destroy()
    assert second.read() == plan.block
    assert reserved(pool) == before
    second.destroy()
    assert reserved(pool) == 0


@pytest.mark.parametrize("known", [True, False])
def test_heads_of_other_sizes_share_the_trunk(pool, allocator, folder, known):
    plans = [family(folder, head) for head in (0, 512, 17 * 512, 1000 * 512)]
    engines = [load(allocator, pool, plan, known=known) for plan in plans]
    distinct = sum(map(len, TRUNK)) + 512 + 17 * 512 + 1000 * 512
    assert reserved(pool) <= 1.10 * distinct
    assert all(engine.read() == engine.plan.block for engine in engines)
    assert [engine.report.source_known for engine in engines] == [known] * 4
    for engine in engines:
        engine.destroy()
    assert reserved(pool) == 0


def test_where_the_end_differs_the_stored_objects_say_how_to_lie(pool, allocator, folder):
    """A larger embedding: it lies at the end, so that ends do not coincide."""
    short = Plan(folder, [*random_weights(7, 1024), *TRUNK, *random_weights(8, 64 * KiB)])
    long = Plan(folder, [*random_weights(9, 5 * 1024), *TRUNK, *random_weights(10, 100 * KiB + 512)])
    engines = [load(allocator, pool, plan) for plan in (short, long)]
    assert engines[1].report.shared_bytes >= 0.95 * sum(map(len, TRUNK))
    assert all(engine.read() == engine.plan.block for engine in engines)
    for engine in engines:
        engine.destroy()


def test_what_is_out_of_step_is_reported_as_lost(pool, allocator, folder):
    one, other = family(folder, 512), family(folder, 512 + 128)
    engines = [load(allocator, pool, plan) for plan in (one, other)]
    assert engines[1].report.shared_bytes == 0
    assert engines[1].report.lost_bytes >= sum(map(len, TRUNK))
    assert engines[1].read() == other.block
    for engine in engines:
        engine.destroy()


def test_a_changed_layer_costs_its_chunks(pool, allocator, folder):
    changed = [random_weights(99, len(w))[0] if k == 5 else w for k, w in enumerate(TRUNK)]
    engines = [load(allocator, pool, Plan(folder, weights)) for weights in (TRUNK, changed)]
    assert 0 < engines[1].report.own_bytes <= len(TRUNK[5]) + 2 * 64 * KiB
    assert engines[1].read() == engines[1].plan.block
    assert engines[0].read() == engines[0].plan.block
    for engine in engines:
        engine.destroy()


def test_sleeping_engines_wake_with_the_same_bytes_at_the_same_address(pool, allocator, folder):
    plans = [family(folder, head) for head in (512, 17 * 512)]
    one, other = (load(allocator, pool, plan) for plan in plans)
    before = reserved(pool)
    freed = one.holding.suspend()
    assert 0 < freed < 3 * 64 * KiB  # the other needs the trunk
    assert other.read() == other.plan.block
    other.holding.suspend()
    assert reserved(pool) == 0
    assert one.holding.suspended
    with one.holding:
        assert one.read() == one.plan.block
    with other.holding:
        assert other.read() == other.plan.block
    assert reserved(pool) == before
    assert one.holding.weigh().shared > 0.9 * sum(map(len, TRUNK))
    for engine in (one, other):
        engine.destroy()


def test_a_load_shares_with_an_engine_that_sleeps(pool, allocator, folder):
    plan = family(folder, 512)
    one = load(allocator, pool, plan)
    before = reserved(pool)
    one.holding.suspend()
    other = load(allocator, pool, plan)
    assert reserved(pool) == before
    with one.holding:
        assert one.read() == plan.block
    assert reserved(pool) == before
    one.destroy()
    assert other.read() == plan.block
    other.destroy()


def test_the_one_that_came_first_goes_first(pool, allocator, folder):
    """What others share lives on where its first owner has gone, asleep or awake."""
    plan = family(folder, 512)
    engines = [load(allocator, pool, plan) for _ in range(3)]
    before = reserved(pool)
    engines[0].destroy()
    engines[1].holding.suspend()
    engines[2].holding.suspend()
    assert reserved(pool) == 0
    engines[1].destroy()
    with engines[2].holding:
        assert engines[2].read() == plan.block
    assert reserved(pool) == before
    engines[2].destroy()
    assert reserved(pool) == 0


def test_after_all_have_gone_the_next_ones_share_again(pool, allocator, folder):
    plans = [family(folder, head) for head in (512, 17 * 512)]
    for _ in range(3):
        engines = [load(allocator, pool, plan) for plan in plans]
        assert engines[1].report.shared_bytes > 0.9 * sum(map(len, TRUNK))
        for engine in engines:
            engine.destroy()


@pytest.mark.parametrize("row", [384, 3072, 200 * KiB])
def test_matrices_side_by_side_come_back_row_by_row(pool, allocator, folder, row):
    """Query, key and value: TensorRT puts their rows one behind the other."""
    plan = Plan(folder, TRUNK[:3]).weave(folder, random_weights(11, *[row * 40] * 3), row)
    plan.weave(folder, random_weights(12, *[row * 12] * 2), row)
    engine = load(allocator, pool, plan)
    assert engine.report.source_known
    engine.holding.suspend()
    with engine.holding:
        assert engine.read() == plan.block
    other = load(allocator, pool, plan)
    assert other.report.own_bytes == 0
    engine.destroy()
    other.destroy()


def test_without_a_source_a_block_stays(pool, allocator, folder):
    engine = load(allocator, pool, family(folder, 512), known=False)
    before = reserved(pool)
    engine.holding.suspend()
    assert reserved(pool) == before
    assert engine.read() == engine.plan.block
    engine.destroy()
    assert reserved(pool) == 0


def test_a_plan_whose_weights_lie_elsewhere_is_searched(pool, allocator, folder):
    plan = family(folder, 512)
    longer = Plan(folder, [])
    moved = list(plan.stretches)
    del moved[0]  # nothing is known of the beginning
    extra = longer.stretches[0]
    end = len(plan.bytes)
    moved.append(type(extra)(end, extra.bytes, extra.file))
    with EngineWeights.of(pool).loading(allocator, plan_bytes=end + extra.bytes, stretches=moved) as loading:
        engine = Engine(allocator, plan)
    assert loading.report.source_known
    loading.holding.suspend()
    with loading.holding:
        assert engine.read() == plan.block
    engine.destroy()


def test_a_plan_that_is_another_is_no_source(pool, allocator, folder):
    plan, other = family(folder, 512), Plan(folder, random_weights(3, 5 * MiB))
    with EngineWeights.of(pool).loading(
        allocator, plan_bytes=len(other.bytes), stretches=other.stretches
    ) as loading:
        engine = Engine(allocator, plan)
    assert not loading.report.source_known
    before = reserved(pool)
    loading.holding.suspend()
    assert (reserved(pool), engine.read()) == (before, plan.block)
    engine.destroy()


def test_an_object_that_changed_is_named_and_the_engine_sleeps_on(pool, allocator, folder):
    plan = family(folder, 512)
    engine = load(allocator, pool, plan)
    engine.holding.suspend()
    victim = plan.stretches[5].file
    data = victim.path.read_bytes()
    victim.path.write_bytes(bytes(len(data)))
    with pytest.raises(AlteredObjectError, match=victim.digest), engine.holding:
        pass
    assert reserved(pool) == 0
    victim.path.write_bytes(data)
    with engine.holding:
        assert engine.read() == plan.block
    engine.destroy()


def test_evicted_when_another_needs_the_room(pool, allocator, folder):
    pool.limit = "12MiB"
    plans = [Plan(folder, random_weights(seed, 7 * MiB)) for seed in (1, 2)]
    one = load(allocator, pool, plans[0], evictable=True)
    other = load(allocator, pool, plans[1], evictable=True)
    assert reserved(pool) <= 12 * MiB
    assert one.holding.weigh().asleep > 0
    with one.holding:
        assert one.read() == plans[0].block
    with other.holding:
        assert other.read() == plans[1].block
    for engine in (one, other):
        engine.destroy()


def test_no_room_is_no_block_and_says_why(pool, allocator, folder):
    pool.limit = "12MiB"
    one = load(allocator, pool, Plan(folder, random_weights(1, 7 * MiB)))
    with EngineWeights.of(pool).loading(allocator) as loading:
        assert Engine(allocator, Plan(folder, random_weights(2, 7 * MiB))).address == 0
    assert (loading.holding, loading.report) == (None, None)
    assert isinstance(allocator.take_error(), gi.OutOfMemoryError)
    one.destroy()
    assert reserved(pool) == 0


def test_a_library_that_fails_gives_its_block_back(pool, allocator, folder):
    engines = []

    def fail():
        engines.append(Engine(allocator, family(folder, 512)))
        raise gi.ModelError("of a truncated plan")

    with pytest.raises(gi.ModelError, match="truncated"), EngineWeights.of(pool).loading(allocator):
        fail()
    (engine,) = engines
    engine.destroy()
    assert reserved(pool) == 0


def test_threads_load_run_and_destroy(pool, allocator, folder):
    plans = [family(folder, head) for head in (0, 512, 17 * 512)]
    failures = []

    def work(number):
        try:
            for turn in range(6):
                plan = plans[(number + turn) % 3]
                engine = load(allocator, pool, plan)
                if turn % 2:
                    engine.holding.suspend()
                with engine.holding:
                    assert engine.read() == plan.block
                engine.destroy()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    Residency.settle(pool)
    assert reserved(pool) == 0


def test_loads_leave_nothing_behind(pool, allocator, folder):
    plans = [family(folder, head) for head in (512, 17 * 512)]
    keeper = load(allocator, pool, plans[0])
    counts = []
    for turn in range(40):
        engine = load(allocator, pool, plans[turn % 2])
        engine.destroy()
        stats = pool.stats()
        counts.append((stats.reserved, stats.chunks, stats.mappings, stats.ranges))
    assert counts[-1] == counts[-2] == counts[1]
    keeper.destroy()
    assert reserved(pool) == 0


@pytest.mark.soak
def test_five_hundred_loads_leave_nothing_behind(pool, allocator, folder):
    plans = [family(folder, head) for head in (0, 512, 17 * 512, 1000 * 512)]
    marks = []
    for turn in range(500):
        engine = load(allocator, pool, plans[turn % 4])
        if turn % 3 == 0:
            engine.holding.suspend()
        engine.destroy()
        if turn in (20, 499):
            pool.trim()
            stats = pool.stats()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
            marks.append((stats.reserved, stats.chunks, stats.mappings, stats.ranges, resident))
    assert marks[0][:4] == marks[1][:4]
    assert marks[1][4] - marks[0][4] <= 16 * MiB
