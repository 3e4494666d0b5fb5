"""PyTorch's tensors on the pool: a MemPool, and the whole process (in processes of their own)."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("cupy")
pytest.importorskip("torch")
import kernels
import torch

from glake_infer.allocators import OutOfMemoryError

pytestmark = pytest.mark.gpu
MiB = 2**20


def test_tensors_of_a_mem_pool_come_from_the_pool(pool):
    mem_pool = pool.torch_mem_pool()
    with torch.cuda.use_mem_pool(mem_pool):
        large = torch.arange(30 * MiB // 4, dtype=torch.int32, device=pool.device)
        small = torch.ones(10, device=pool.device)
    assert pool.stats().active >= 32 * MiB
    outside = torch.ones(50 * MiB, dtype=torch.uint8, device=pool.device)
    assert pool.stats().active < 80 * MiB
    assert int(large[123456]) == 123456
    assert float(small.sum()) == 10
    del large, small, outside, mem_pool
    gc.collect()
    assert pool.stats().active == 0


def test_memory_comes_in_pytorchs_segments_and_stays_with_the_mem_pool(pool):
    mem_pool = pool.torch_mem_pool()
    with torch.cuda.use_mem_pool(mem_pool):
        first = torch.ones(100, device=pool.device)
        assert pool.stats().requested == 2 * MiB
        second = torch.ones(100, device=pool.device)
        assert pool.stats().requested == 2 * MiB
    del first, second
    assert pool.stats().requested == 2 * MiB
    del mem_pool
    gc.collect()
    assert pool.stats().requested == 0


def test_the_limit_ends_in_pytorchs_error_and_a_record(pool):
    pool.limit = 64 * MiB
    mem_pool, before = pool.torch_mem_pool(), pool.failure_count
    with torch.cuda.use_mem_pool(mem_pool):
        kept = torch.ones(10 * MiB, dtype=torch.uint8, device=pool.device)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.ones(100 * MiB, dtype=torch.uint8, device=pool.device)
        again = torch.ones(10 * MiB, dtype=torch.uint8, device=pool.device)
    failure = pool.failures(before)[-1]
    assert pool.explain(caught.value).sequence == failure.sequence
    assert isinstance(failure, OutOfMemoryError)
    assert failure.requested == 100 * MiB
    del kept, again, mem_pool
    gc.collect()
    assert pool.stats().active == 0


def test_a_tensor_follows_its_stream(pool):
    pool.limit = 64 * MiB
    kernels.load()
    slow, other = torch.cuda.Stream(), kernels.new_stream()
    wrong = kernels.counter()
    mem_pool = pool.torch_mem_pool()
    with torch.cuda.stream(slow), torch.cuda.use_mem_pool(mem_pool):
        tensor = torch.empty(16 * MiB, dtype=torch.int32, device=pool.device)
    with kernels.cupy().cuda.Stream.from_external(slow) as stream:
        kernels.fill(stream, tensor.data_ptr(), 64 * MiB, 3)
        kernels.spin(stream, 0.2)
        kernels.compare(stream, tensor.data_ptr(), 64 * MiB, 3, wrong)
    del tensor, mem_pool
    gc.collect()
    address = pool.allocate(64 * MiB, stream=other.ptr)
    kernels.fill(other, address, 64 * MiB, 4)
    kernels.synchronize()
    assert int(wrong.get()[0]) == 0
    pool.deallocate(address)


def test_a_graph_of_pytorchs_on_the_pool(pool):
    mem_pool, graph = pool.torch_mem_pool(), torch.cuda.CUDAGraph()
    x = torch.zeros(4 * MiB, device=pool.device)
    with torch.cuda.graph(graph, pool=mem_pool.id):
        y = (x * 2 + 1) * (x + 3)
    assert pool.stats().active >= 16 * MiB
    others = [pool.allocate(16 * MiB) for _ in range(8)]
    for address in others:
        kernels.memset(address, 0xAB, 16 * MiB)
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert bool((y == (value * 2 + 1) * (value + 3)).all())
    for address in others:
        assert kernels.read(address, 16 * MiB) == b"\xab" * (16 * MiB)
        pool.deallocate(address)
    del graph, y, x, mem_pool
    gc.collect()
    torch.cuda.synchronize()
    assert pool.stats().active == 0


def child(python, device, code):
    process = python(f"import sys; device = {device!r}\nfrom glake_infer import Pool\n{code}", text=True)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


def test_the_whole_process(python, device):
    out = child(
        python,
        device,
        """
pool = Pool(device, "1GiB")
pool.use_in_torch()
import torch
x = torch.arange(30 * 2**20 // 4, dtype=torch.int32, device=device)
assert pool.stats().requested == 30 * 2**20, pool.stats()
empty = torch.empty(0, device=device)
y = x * 2
assert int(y[777]) == 1554
try:
    torch.empty(2**31, dtype=torch.uint8, device=device)
    raise SystemExit("no error")
except RuntimeError as error:
    why = pool.explain(error)
    assert why is not None and why.requested == 2**31, error
g = torch.cuda.CUDAGraph()
static = torch.ones(2**20, device=device)
torch.cuda.synchronize()
with torch.cuda.graph(g):
    z = (static * 3 + 1) * 2
others = [torch.full((2**20,), 5.0, device=device) for _ in range(16)]
static.fill_(2.0)
g.replay()
torch.cuda.synchronize()
assert float(z[5]) == 14.0
assert all(bool((other == 5.0).all()) for other in others)
del x, y, z, others, static, g, empty
import time
for _ in range(200):  # the driver tells of a graph's end a little later
    torch.cuda.synchronize()
    if pool.stats().active == 0:
        break
    time.sleep(0.01)
assert pool.stats().active == 0, pool.stats()
pool.close()
print("done")
""",
    )
    assert out == "done\n"


def test_too_late_for_the_whole_process(python, device):
    out = child(
        python,
        device,
        """
import torch
from glake_infer import GlakeError
kept = torch.ones(5, device=device)
pool = Pool(device, "1GiB")
try:
    pool.use_in_torch()
except GlakeError as error:
    print("before anything else uses torch.cuda" in str(error))
assert float(kept.sum()) == 5
mem_pool = pool.torch_mem_pool()  # still works
with torch.cuda.use_mem_pool(mem_pool):
    assert float(torch.ones(7, device=device).sum()) == 7
""",
    )
    assert out == "True\n"
