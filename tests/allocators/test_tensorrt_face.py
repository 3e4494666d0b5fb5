"""The pool as TensorRT's allocator, called through the C++ object as TensorRT does (tests/trampoline.py)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
import threading

import pytest
from trampoline import Trampoline

from glake_infer.allocators import (
    MissingDependencyError,
    OutOfMemoryError,
    Pool,
    PoolClosedError,
    TensorRTAllocator,
)
from glake_infer.allocators.errors import DriverError, InvalidPointerError

KiB, MiB = 1 << 10, 1 << 20
RESIZABLE = 1  # AllocatorFlag.RESIZABLE is bit 0


@pytest.fixture(params=["tensorrt_rtx", pytest.param("tensorrt", marks=pytest.mark.tensorrt)])
def tensorrt(request):
    return pytest.importorskip(request.param, reason=f"{request.param} is not installed")


@pytest.fixture
def pool():
    with Pool("cpu", "64MiB") as pool:
        yield pool
        pool.check_invariants()


@pytest.fixture
def allocator(pool, tensorrt):
    return TensorRTAllocator(pool, tensorrt)


@pytest.fixture
def caller(allocator):
    return Trampoline(allocator)


def holders(pool):
    return {(holder.label, holder.tag): holder.bytes for holder in pool.holders()}


def test_it_is_both_and_says_how_it_allocates(allocator, tensorrt):
    assert 1 << int(tensorrt.AllocatorFlag.RESIZABLE) == RESIZABLE
    assert isinstance(allocator, TensorRTAllocator)
    assert isinstance(allocator, tensorrt.IGpuAsyncAllocator)
    info = allocator.interface_info
    assert (info.kind, allocator.device) == ("IGpuAllocator", "cpu")


def test_a_builder_and_a_runtime_take_it(allocator, tensorrt):
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    builder.gpu_allocator = allocator  # write-only in Python
    runtime = tensorrt.Runtime(logger)
    runtime.gpu_allocator = allocator


@pytest.mark.parametrize("size", [1, 100, 4 * KiB + 1, MiB, 3 * MiB + 5])
@pytest.mark.parametrize("alignment", [0, 1, 128, 512, 1 << 12, 1 << 17])
def test_any_alignment(pool, caller, allocator, size, alignment):
    blocks = [caller.allocate_async(size, alignment) for _ in range(3)]
    for value, block in enumerate(blocks):
        assert block
        assert block % max(alignment, 1) == 0
        ctypes.memset(block, value + 1, size)
    for value, block in enumerate(blocks):
        assert ctypes.string_at(block, size) == bytes([value + 1]) * size
    assert allocator.held() == 3 * size
    assert all(caller.deallocate_async(block) for block in blocks)
    assert (allocator.held(), pool.stats().active) == (0, 0)


def test_the_older_methods_are_the_same(pool, caller):
    block = caller.allocate(MiB, 512)
    assert holders(pool) == {("", "context"): MiB}
    assert caller.deallocate(block)
    assert pool.stats().active == 0


def test_tags_are_per_thread_and_labels_count_too(pool, caller, allocator):
    blocks = []
    with allocator.tagged("scratch"), pool.label("bert"):
        blocks.append(caller.allocate_async(MiB))
        other = threading.Thread(target=lambda: blocks.append(caller.allocate_async(2 * MiB)))
        other.start()
        other.join()
    with allocator.tagged("weights"):
        blocks.append(caller.allocate_async(3 * MiB))
    blocks.append(caller.allocate_async(4 * MiB, 512, RESIZABLE))
    assert holders(pool) == {
        ("bert", "scratch"): MiB, ("", "context"): 2 * MiB, ("", "weights"): 3 * MiB, ("", "outputs"): 4 * MiB,
    }  # fmt: skip
    assert (allocator.held("weights"), allocator.held("outputs"), allocator.held()) == (
        3 * MiB,
        4 * MiB,
        10 * MiB,
    )
    assert pool.stats().weights == 3 * MiB
    assert all(map(caller.deallocate_async, blocks))


def test_what_is_resizable_grows_where_it_is(pool, caller, allocator):
    block = caller.allocate_async(100 * KiB, 512, RESIZABLE)
    ctypes.memset(block, 1, 100 * KiB)
    for size in (200 * KiB, 5 * MiB, 20 * MiB):
        assert caller.reallocate(block, 512, size) == block
        assert pool.stats().reserved >= size
        ctypes.memset(block + 100 * KiB, 2, size - 100 * KiB)
    assert ctypes.string_at(block, 100 * KiB) == b"\1" * (100 * KiB)
    assert caller.reallocate(block, 512, 50 * KiB) == block
    assert allocator.held() == 50 * KiB
    assert caller.deallocate_async(block)
    pool.trim()
    assert pool.stats().reserved == 0


def test_growth_beyond_the_limit_is_refused_and_leaves_all(pool, caller, allocator):
    block = caller.allocate_async(MiB, 512, RESIZABLE)
    ctypes.memset(block, 7, MiB)
    assert caller.reallocate(block, 512, 100 * MiB) == 0
    assert isinstance(allocator.take_error(), OutOfMemoryError)
    assert ctypes.string_at(block, MiB) == b"\7" * MiB
    assert caller.reallocate(block, 512, 1 << 40) == 0
    assert isinstance(allocator.take_error(), DriverError)
    assert caller.deallocate_async(block)


def test_what_is_not_resizable_stays_valid(caller):
    block = caller.allocate_async(MiB)
    assert caller.reallocate(block, 256, 2 * MiB) == 0
    assert caller.reallocate(12345, 256, 2 * MiB) == 0
    assert caller.deallocate_async(block)


def test_a_refusal_is_zero_and_keeps_its_reason_for_its_thread(pool, caller, allocator):
    assert caller.allocate_async(0) == 0
    assert allocator.take_error() is None
    assert caller.allocate_async(100 * MiB) == 0
    seen = []
    other = threading.Thread(target=lambda: seen.append(allocator.take_error()))
    other.start()
    other.join()
    assert seen == [None]
    error = allocator.take_error()
    assert isinstance(error, OutOfMemoryError)
    assert error.requested == 100 * MiB
    assert allocator.take_error() is None
    assert caller.allocate_async(MiB, 3) == 0
    assert "no power of two" in str(allocator.take_error())


def test_an_address_that_is_none_of_ours(caller, allocator):
    assert caller.deallocate_async(0)
    assert not caller.deallocate_async(4096)
    assert isinstance(allocator.take_error(), InvalidPointerError)


def test_it_outlives_the_pools_handle_and_gives_back_what_is_live(caller, allocator, pool):
    block = caller.allocate_async(MiB)
    other = Pool.current("cpu")
    assert other is pool
    native = pool._open()
    pool._pool = None  # as if the handle were dropped with memory in use
    from glake_infer.allocators import pool as pool_module

    del pool_module._handles["cpu"]
    assert caller.allocate_async(MiB) == 0
    assert isinstance(allocator.take_error(), PoolClosedError)
    assert caller.deallocate_async(block)
    pool._pool = native
    pool_module._handles["cpu"] = pool


def test_a_runtime_that_outlives_every_reference_to_its_allocator(pool, tensorrt):
    """TensorRT has a plain pointer to it: it lives on, and does not keep the pool's handle."""
    caller = Trampoline(TensorRTAllocator(pool, tensorrt))
    caller._keep = None
    gc.collect()
    block = caller.allocate_async(MiB)
    assert block
    assert caller.deallocate_async(block)


def test_the_pools_handle_is_not_kept(tensorrt):
    script = (
        "import gc, importlib, sys; from glake_infer.allocators import Pool, TensorRTAllocator\n"
        "pool = Pool('cpu'); allocator = TensorRTAllocator(pool, importlib.import_module(sys.argv[1]))\n"
        "del pool; gc.collect()\n"
        "assert Pool.current('cpu') is None\n"
        "pool = Pool('cpu'); assert allocator.allocate_async(100, 0, 0, 0)\n"
    )
    subprocess.run([sys.executable, "-c", script, tensorrt.__name__], check=True, timeout=60)


def test_a_child_of_fork_gives_nothing_back_and_says_nothing(tensorrt):
    """An engine may be destroyed there, which is the parent's."""
    script = (
        "import importlib, os, sys; from glake_infer.allocators import Pool, TensorRTAllocator\n"
        "pool = Pool('cpu'); allocator = TensorRTAllocator(pool, importlib.import_module(sys.argv[1]))\n"
        "blocks = [allocator.allocate_async(100, 0, flags, 0) for flags in (0, 1)]\n"
        "if not (child := os.fork()): os._exit(0 if all(allocator.deallocate_async(b, 0) for b in blocks) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert all(allocator.deallocate_async(block, 0) for block in blocks)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tensorrt.__name__], check=True, timeout=60, capture_output=True
    )
    assert done.stderr == b""


def test_without_any_tensorrt_the_error_says_what_to_install(pool, monkeypatch):
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'glake-infer\[tensorrt-rtx\]'"):
        TensorRTAllocator(pool)


def test_threads(pool, allocator):
    caller = Trampoline(allocator)
    wrong = []

    def work(seed):
        for turn in range(60):
            size = (seed * 7919 + turn * 104729) % (300 * KiB) + 1
            block = caller.allocate_async(size, 512, RESIZABLE if turn % 10 == 0 else 0, seed << 20)
            ctypes.memset(block, seed, size)
            if ctypes.string_at(block, size) != bytes([seed]) * size or not caller.deallocate_async(
                block, seed << 20
            ):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (allocator.held(), pool.stats().active) == (0, 0)


@pytest.mark.parametrize("block", ["tagged", "blocks_from"])
def test_an_interrupt_in_a_request_comes_behind_tensorrt(pool, allocator, caller, block):
    class Interrupted:
        def allocate(self, size, alignment):
            raise KeyboardInterrupt

    addresses = []

    def ask():
        outer = allocator.tagged("weights") if block == "tagged" else contextlib.nullcontext()
        with outer, allocator.blocks_from(Interrupted()):
            addresses.append(caller.allocate_async(MiB))
            addresses.append(0)  # TensorRT went on to its own error

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert addresses == [0, 0]
    assert isinstance(allocator.take_error(), DriverError)
    with allocator.tagged("weights"):
        assert caller.deallocate_async(caller.allocate_async(MiB))
