"""Stripped engines: what their weights manager is given, by one that checks as TensorRT's header says it does."""

from __future__ import annotations

import ctypes

import pytest
from engines import Plan, engine_pool, load, random_weights

import glake_infer as gi
from glake_infer.checking import AlteredObjectError
from glake_infer.plan_bytes import Stretch
from glake_infer.stripped_weights import StrippedWeights

tensorrt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

KiB, MiB = 1 << 10, 1 << 20


class Manager:
    """An IWeightsManager with `size` bytes that the `known` allocations are mapped into: handle -> (address, bytes)."""

    def __init__(self, native, size, granularity, holding=None):
        self.native, self.size, self.granularity = native, size, granularity
        self.mapped = {}
        self.refuses = None

    def get_size(self):
        return self.size

    def restore_from_vmm_allocation(self, allocation_handle, offset, size, stream_handle):
        assert stream_handle == 7
        assert offset % self.granularity == size % self.granularity == 0
        assert offset + size <= self.size
        assert not any(at < offset + size and offset < at + n for at, (_, n) in self.mapped.items())
        if self.refuses == offset:
            return False
        self.mapped[offset] = (allocation_handle, size)
        return True

    def unload(self, stream_handle):
        assert stream_handle == 7
        self.mapped.clear()
        return True

    def read(self, weights):
        """The engine's weights, through our addresses of what it has mapped; complete, or it could not work."""
        (region,) = weights.holding.regions
        handles = {
            self.native.handle_of(c): (s, n)
            for c, s, n in zip(region.chunks, region.starts, region.sizes, strict=True)
        }
        data = b""
        for offset, (handle, size) in sorted(self.mapped.items()):
            assert offset == len(data)
            start, whole = handles[handle]
            assert size <= whole
            data += ctypes.string_at(start, size)
        assert len(data) == self.size
        return data


@pytest.fixture
def pool():
    with engine_pool() as pool:
        yield pool


@pytest.fixture
def plan(tmp_path):
    return Plan(tmp_path, random_weights(5, 300 * KiB, MiB, 700 * KiB + 128), header=b"h" * 512)


def source_of(plan):
    """What the weights manager calls the weight data: the plan's weights."""
    begin = len(plan.bytes) - 4 - len(plan.block)
    return [Stretch(s.offset - begin, s.bytes, s.file, s.start) for s in plan.stretches[1:-1]]


def manager_for(pool, plan):
    native = pool._open()
    granule = native.granularity
    return Manager(native, -(-len(plan.block) // granule) * granule, granule)


def test_all_is_mapped_once_and_comes_back(pool, plan):
    manager = manager_for(pool, plan)
    weights = StrippedWeights(pool, manager, source_of(plan))
    assert pool.stats().reserved == 0
    weights.restore(7)
    assert manager.read(weights)[: len(plan.block)] == plan.block
    held = pool.stats().reserved
    assert held == manager.size
    assert weights.suspend(7) == held
    assert (pool.stats().reserved, manager.mapped) == (0, {})
    weights.restore(7)
    assert manager.read(weights)[: len(plan.block)] == plan.block
    weights.suspend(7)
    weights.close()
    weights.close()


def test_engines_of_one_layout_are_one(pool, plan):
    managers = [manager_for(pool, plan) for _ in range(2)]
    one, other = (StrippedWeights(pool, manager, source_of(plan)) for manager in managers)
    one.restore(7)
    held = pool.stats().reserved
    other.restore(7)
    assert pool.stats().reserved == held
    assert other.shared_bytes == managers[1].size
    assert [m.read(w)[: len(plan.block)] for m, w in zip(managers, (one, other), strict=True)] == [
        plan.block
    ] * 2
    assert one.suspend(7) == 0
    assert managers[1].read(other)[: len(plan.block)] == plan.block
    other.suspend(7)
    one.close()
    other.close()


def test_a_refusal_leaves_nothing_mapped(pool, plan):
    manager = manager_for(pool, plan)
    weights = StrippedWeights(pool, manager, source_of(plan))
    manager.refuses = 2 * manager.granularity
    with pytest.raises(gi.DriverError, match="STRIP_PLAN"):
        weights.restore(7)
    assert manager.mapped == {}
    manager.refuses = None
    weights.restore(7)
    assert manager.read(weights)[: len(plan.block)] == plan.block
    weights.suspend(7)
    weights.close()


def test_weights_of_another_engine_are_refused(pool, plan):
    manager = manager_for(pool, plan)
    manager.size = manager.granularity
    with pytest.raises(gi.InputError, match="of another engine"):
        StrippedWeights(pool, manager, source_of(plan))
    with pytest.raises(gi.InputError, match="STRIP_PLAN"):
        StrippedWeights(pool, None, source_of(plan))
    assert pool.stats().ranges == 0


def test_an_altered_object_is_named(pool, plan):
    manager = manager_for(pool, plan)
    weights = StrippedWeights(pool, manager, source_of(plan))
    victim = plan.stretches[2].file
    data = victim.path.read_bytes()
    victim.path.write_bytes(bytes(len(data)))
    with pytest.raises(AlteredObjectError, match=victim.digest):
        weights.restore(7)
    assert (manager.mapped, pool.stats().reserved) == ({}, 0)
    weights.close()


def test_a_block_that_tensorrt_loaded_lends_its_chunks(pool, tmp_path):
    plan = Plan(tmp_path, random_weights(6, MiB, 256 * KiB))
    allocator = gi.TensorRTAllocator(pool, tensorrt)
    engine = load(allocator, pool, plan)
    assert engine.report.own_bytes == len(plan.block)
    manager = manager_for(pool, plan)
    held = pool.stats().reserved
    weights = StrippedWeights(pool, manager, source_of(plan))
    weights.restore(7)
    assert manager.read(weights) == plan.block
    assert pool.stats().reserved == held
    weights.suspend(7)
    weights.close()
    engine.destroy()


def test_the_real_interface_has_these_methods():
    for name in ("get_size", "restore_from_vmm_allocation", "unload"):
        assert hasattr(tensorrt.IWeightsManager, name)
    text = tensorrt.IWeightsManager.restore_from_vmm_allocation.__doc__
    assert "allocation_handle" in text.partition("->")[0]


def test_rows_at_the_end_are_told_apart(pool, tmp_path):
    """Matrices side by side whose first rows are equal, and the others not."""
    equal, rest = random_weights(8, 2 * 64 * KiB)[0], random_weights(9, *[6 * 64 * KiB] * 2)
    made = []
    for each in rest:
        plan = Plan(tmp_path, [], header=b"h" * 512).weave(tmp_path, [equal + each] * 2, 64 * KiB)
        begin = len(plan.bytes) - 4 - len(plan.block)
        source = [
            Stretch(s.offset - begin, s.bytes, s.file, s.start, s.rows, s.pitch) for s in plan.stretches[1:-1]
        ]
        manager = manager_for(pool, plan)
        weights = StrippedWeights(pool, manager, source, user=len(made))
        weights.restore(7)
        made.append((weights, manager, plan))
    for weights, manager, plan in made:
        assert manager.read(weights)[: len(plan.block)] == plan.block
        weights.close()


@pytest.mark.parametrize("harm", ["gone", "altered"])
def test_objects_that_are_others_are_shared_with_nobody(pool, plan, tmp_path, harm):
    manager = manager_for(pool, plan)
    weights = StrippedWeights(pool, manager, source_of(plan))
    other = Plan(tmp_path, random_weights(6, *[len(plan.block)]), header=b"h" * 512)
    victim = other.stretches[1].file
    data = victim.path.read_bytes()
    victim.path.unlink()
    if harm == "altered":
        victim.path.write_bytes(plan.block)
    with pytest.raises(AlteredObjectError, match=victim.digest):
        StrippedWeights(pool, manager_for(pool, other), source_of(other))
    victim.path.write_bytes(data)
    weights.close()


def test_a_source_with_gaps_is_refused(pool, plan):
    source = source_of(plan)
    del source[1]
    with pytest.raises(gi.InputError, match="gaps"):
        StrippedWeights(pool, manager_for(pool, plan), source)
