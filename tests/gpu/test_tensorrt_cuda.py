"""TensorRT's memory on a GPU: real plans, deserialized with the pool's allocator; nothing here executes an engine.

TensorRT-RTX deserializes on the GPUs that it has kernels for (7.5, 8.x of cards, 12.x) alone, so elsewhere its tests are
skipped. The engines are built here for the capability of the GPU. With the full TensorRT the same tests run where it is
installed.
"""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kernels import INDEX, free_memory, synchronize

import glake_infer as gi
from glake_infer import cuda
from glake_infer.engine_weights import EngineWeights
from glake_infer.models import zoo

pytestmark = pytest.mark.gpu

MiB = 1 << 20
HEADS = (2, 17, 1000, None)
SHAPES = dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), ((1, 8), (1, 128), (8, 512)))


@pytest.fixture(scope="module", params=["tensorrt-rtx", pytest.param("tensorrt", marks=pytest.mark.tensorrt)])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tensorrt(kind):
    return pytest.importorskip(kind.replace("-", "_"), reason=f"{kind} is not installed")


@pytest.fixture(scope="module")
def capability(kind, tensorrt):
    """What the engines are built for."""
    major, minor = cuda.compute_capability(INDEX)
    if kind == "tensorrt-rtx" and f"SM{major}{minor}" not in tensorrt.ComputeCapability.__members__:
        pytest.skip(f"TensorRT-RTX has no kernels for a GPU of compute capability {major}.{minor}")
    return f"{major}.{minor}"


@pytest.fixture(scope="module")
def packages(tmp_path_factory, kind, capability):
    """Fine-tunes of one BERT of 418 MiB, with heads of 2, 17, 1000 and none."""
    options = gi.EngineOptions(kind=kind, profiles=(SHAPES,), capabilities=(capability,))
    folder = tmp_path_factory.mktemp("engines")
    store = gi.Store(folder / "store")
    made = []
    for labels in HEADS:
        path = folder / f"bert-{labels}.glake"
        spec = zoo.spec("bert-base", labels=labels) if labels else zoo.spec("bert-base", head=None)
        zoo.convert(spec, path, engine=options, store=store)
        made.append(gi.Package(path, store))
    return made


@pytest.fixture(scope="module")
def plans(packages, kind):
    from glake_infer.models.tensorrt.plan import Plan

    return [Plan(package, kind) for package in packages]


@pytest.fixture
def logger(tensorrt):
    return tensorrt.Logger(tensorrt.Logger.ERROR)


@pytest.fixture
def allocator(pool, tensorrt):
    return gi.TensorRTAllocator(pool, tensorrt)


@pytest.fixture
def runtime(tensorrt, logger, allocator):
    runtime = tensorrt.Runtime(logger)
    runtime.gpu_allocator = allocator
    return runtime


class Loaded:
    def __init__(self, pool, allocator, runtime, plan, **options):
        data = plan.to_bytes()
        stretches = plan.stretches()
        with EngineWeights.of(pool).loading(
            allocator, plan_bytes=len(data), stretches=stretches, **options
        ) as loading:
            self.engine = runtime.deserialize_cuda_engine(data)
        assert self.engine is not None
        self.holding, self.report = loading.holding, loading.report
        (block,) = self.holding.blocks
        self.address, self.size = block.address, block.size

    def read(self):
        return read(self.address, self.size)

    def destroy(self):
        self.engine = self.holding = None
        gc.collect()


def taken():
    """Bytes of the GPU that are in use, as the driver says."""
    synchronize()
    return -free_memory()


def read(address, size):
    data = np.empty(size, np.uint8)
    cuda.copy_to_host(INDEX, address, data)
    return data


def plain_load(tensorrt, logger, plan):
    """What lies in the weight block of an engine that was loaded with memory of the driver's own."""
    from cuda.bindings import driver

    class Plain(tensorrt.IGpuAsyncAllocator):
        def __init__(self):
            tensorrt.IGpuAsyncAllocator.__init__(self)
            self.blocks = {}

        def allocate_async(self, size, alignment, flags, stream):
            address = int(driver.cuMemAlloc(size)[1])
            self.blocks[address] = size
            return address

        def deallocate_async(self, address, stream):
            del self.blocks[address]
            return driver.cuMemFree(address)[0] == driver.CUresult.CUDA_SUCCESS

    allocator = Plain()
    runtime = tensorrt.Runtime(logger)
    runtime.gpu_allocator = allocator
    engine = runtime.deserialize_cuda_engine(plan.to_bytes())
    ((address, size),) = allocator.blocks.items()
    data = read(address, size)
    del engine
    return data


def test_weights_live_in_the_pool_and_the_driver_agrees(pool, allocator, runtime, plans):
    before = taken()
    loaded = Loaded(pool, allocator, runtime, plans[0])
    assert loaded.size == plans[0].entry.weights_bytes
    assert allocator.held("weights") == loaded.size
    stats = pool.stats()
    assert loaded.size <= stats.reserved <= loaded.size + 4 * MiB
    assert stats.weights == loaded.size
    grown = taken() - before
    assert stats.reserved <= grown <= stats.reserved + 16 * MiB
    loaded.destroy()
    pool.trim()
    assert pool.stats().reserved == 0
    assert taken() - before <= 16 * MiB


def test_a_second_load_adds_at_most_three_hundredths(pool, allocator, runtime, plans):
    first = Loaded(pool, allocator, runtime, plans[0])
    before, driver = pool.stats().reserved, taken()
    second = Loaded(pool, allocator, runtime, plans[0])
    assert pool.stats().reserved - before <= 0.03 * first.size
    assert taken() - driver <= 0.03 * first.size
    assert second.report.shared_bytes == second.size
    assert np.array_equal(first.read(), second.read())
    first.destroy()
    second.destroy()


def test_fine_tunes_with_other_heads_hold_one_trunk(pool, tensorrt, allocator, runtime, logger, plans):
    driver = taken()
    loaded = [Loaded(pool, allocator, runtime, plan) for plan in plans]
    objects = {}
    for plan in plans:
        for stretch in plan.stretches():
            if plan.entry.bytes - 4 - plan.entry.weights_bytes <= stretch.offset:
                objects[stretch.file.digest] = stretch.file.length
    distinct = sum(objects.values())
    assert distinct >= 400 * MiB
    held = pool.stats().reserved
    print(f"four fine-tunes: {held} bytes held for {distinct} distinct ({held / distinct:.4f})")
    assert held <= 1.10 * distinct
    assert taken() - driver <= 1.10 * distinct + 32 * MiB
    for each, plan in zip(loaded, plans, strict=True):
        assert np.array_equal(each.read(), plain_load(tensorrt, logger, plan))
        assert each.report.source_known
    for each in loaded:
        each.destroy()
    pool.trim()
    assert pool.stats().reserved == 0


def test_suspend_and_resume_bring_the_same_bytes_to_the_same_address(pool, allocator, runtime, plans):
    one, other = (Loaded(pool, allocator, runtime, plan) for plan in plans[:2])
    held, driver = pool.stats().reserved, taken()
    before = one.read(), other.read()
    one.holding.suspend()
    other.holding.suspend()
    assert pool.stats().reserved == 0
    assert driver - taken() >= 0.9 * held
    with one.holding:
        assert np.array_equal(one.read(), before[0])
    with other.holding:
        assert np.array_equal(other.read(), before[1])
    assert pool.stats().reserved == held
    one.destroy()
    other.destroy()


def test_pinned_copies_bring_them_back_too(pool, allocator, runtime, plans):
    loaded = Loaded(pool, allocator, runtime, plans[3], host_copy="pinned")
    before = loaded.read()
    assert loaded.holding.weigh().pinned >= loaded.size
    loaded.holding.suspend()
    with loaded.holding:
        assert np.array_equal(loaded.read(), before)
    loaded.destroy()


def test_without_a_package_engines_share_too(pool, allocator, runtime, plans):
    data = plans[3].to_bytes()
    weights = EngineWeights.of(pool)
    engines = []
    for _ in range(2):
        with weights.loading(allocator) as loading:
            engines.append(runtime.deserialize_cuda_engine(data))
    assert loading.report.own_bytes == 0
    assert not loading.report.source_known
    held = pool.stats().reserved
    assert loading.holding.suspend() == 0
    assert pool.stats().reserved == held
    engines.clear()
    gc.collect()
    pool.trim()
    assert pool.stats().reserved == 0


def test_a_limit_that_is_too_small_fails_and_says_so(pool, allocator, runtime, plans):
    pool.limit = 100 * MiB
    data = plans[0].to_bytes()
    with EngineWeights.of(pool).loading(allocator) as loading:
        assert runtime.deserialize_cuda_engine(data) is None
    assert loading.report is None
    assert isinstance(allocator.take_error(), gi.OutOfMemoryError)
    assert pool.stats().active == 0


def test_a_truncated_plan_leaves_nothing(pool, allocator, runtime, plans):
    data = plans[3].to_bytes()
    for cut in (data[:50], data[: len(data) // 2], data[:-1000]):
        with EngineWeights.of(pool).loading(allocator):
            assert runtime.deserialize_cuda_engine(cut) is None
        assert pool.stats().active == 0


def test_weights_that_come_later_come_from_the_pool(pool, allocator, runtime, plans):
    """A deferred engine: TensorRT frees its block and asks for another, wherever that lies."""
    if not hasattr(runtime, "defer_weights_loading"):
        pytest.skip("this TensorRT cannot load weights later")
    data = plans[3].to_bytes()
    runtime.defer_weights_loading = True
    engine = runtime.deserialize_cuda_engine(data)
    assert pool.stats().active == 0
    for _ in range(2):
        with EngineWeights.of(pool).loading(allocator) as loading:
            assert engine.load_weights(data)
        assert loading.report.block_bytes == plans[3].entry.weights_bytes
        assert engine.unload_weights()
        assert pool.stats().active == 0
    del engine


def test_gi_load_takes_a_package_with_an_engine(pool, packages):
    told = []

    def progress(done, total):
        told.append((done, total))

    with gi.load(packages[1].path, pool, store=packages[1].store, progress=progress) as model:
        held = pool.stats().reserved
        assert held >= 400 * MiB
        size = packages[1].manifest.engines["tensorrt-rtx"].bytes
        assert len(told) > 5
        assert told == sorted(told)
        assert told[-1] == (size, size)
        with gi.load(packages[0].path, pool, store=packages[0].store) as other:
            assert pool.stats().reserved - held <= 0.03 * held
            assert other.memory.shared >= 0.97 * (other.memory.shared + other.memory.own)
        freed = model.suspend()
        assert freed >= 0.9 * held
        assert model.suspended
        model.resume()
        assert not model.suspended
        assert {value.name for value in model.inputs} == set(SHAPES)
    pool.trim()
    assert pool.stats().reserved == 0


@pytest.mark.soak
def test_five_hundred_loads_leave_no_growth(pool, allocator, runtime, plans):
    small = plans[3]
    data, stretches = small.to_bytes(), small.stretches()
    marks = []
    for turn in range(500):
        with EngineWeights.of(pool).loading(allocator, plan_bytes=len(data), stretches=stretches) as loading:
            engine = runtime.deserialize_cuda_engine(data)
        if turn % 3 == 0:
            loading.holding.suspend()
        del engine, loading
        if turn in (20, 499):
            gc.collect()
            pool.trim()
            stats = pool.stats()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
            marks.append((taken(), stats.reserved, stats.ranges, stats.mappings, resident))
    print("after 21 and 500 loads:", marks)
    assert marks[0][:4] == marks[1][:4]
    assert marks[1][4] - marks[0][4] <= 64 * MiB


def test_nothing_is_printed_at_the_end_of_a_process_with_a_live_engine(packages):
    script = (
        "import sys, glake_infer as gi\n"
        "pool = gi.Pool(sys.argv[1]); model = gi.load(sys.argv[2], pool, store=gi.Store(sys.argv[3]))\n"
    )
    arguments = [f"cuda:{INDEX}", str(packages[3].path), str(packages[3].store.root)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
