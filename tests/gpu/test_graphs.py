"""CUDA graphs: no call of the pool's breaks a capture, and what a graph replays onto is nobody else's."""

from __future__ import annotations

import gc
import random
import threading
import time

import pytest

pytest.importorskip("cupy")
import kernels
import numpy as np
import stress

from glake_infer.allocators import OutOfMemoryError, import_onnxruntime

pytestmark = pytest.mark.gpu
MiB = 2**20
SIZE = 8 * MiB
MODES = pytest.mark.parametrize("mode", [0, 1, 2], ids=["global", "thread_local", "relaxed"])


@pytest.fixture(autouse=True)
def loaded(pool):
    kernels.load()
    pool.limit = 256 * MiB


def take_everything(pool, stream):
    """All that the pool will give, in blocks of SIZE and then small ones."""
    blocks = []
    for size in (SIZE, 2 * MiB, 64 * 1024):
        try:
            while True:
                blocks.append((pool.allocate(size, stream=stream.ptr), size))
        except OutOfMemoryError:
            pass
    return blocks


def comes_back(pool):
    """Whether all memory goes back to the device; the driver tells of a graph's end a little later."""
    for _ in range(200):
        gc.collect()
        kernels.synchronize()
        pool.trim()
        if pool.stats().reserved == 0:
            return True
        time.sleep(0.01)
    return False


@MODES
def test_memory_of_a_capture_stays_private_to_its_graph(pool, mode):
    capturing, other = kernels.new_stream(), kernels.new_stream()
    wrong = kernels.counter()
    capturing.begin_capture(mode)
    for value in (1, 2, 3):  # each freed while it is captured, and taken again for the next
        address = pool.allocate(SIZE, stream=capturing.ptr)
        small = pool.allocate(2000, stream=capturing.ptr)
        kernels.fill(capturing, address, SIZE, value)
        kernels.fill(capturing, small, 2000, value)
        kernels.compare(capturing, address, SIZE, value, wrong)
        kernels.compare(capturing, small, 2000, value, wrong)
        pool.deallocate(address)
        pool.deallocate(small)
    graph = capturing.end_capture()

    blocks = take_everything(pool, other)
    assert sum(size for _, size in blocks) > 200 * MiB
    for number, (block, size) in enumerate(blocks):
        kernels.fill(other, block, size, 1000 + number)
    kernels.synchronize()
    for _ in range(3):
        graph.launch(capturing)
    kernels.synchronize()
    for number, (block, size) in enumerate(blocks):
        kernels.compare(other, block, size, 1000 + number, wrong)
        pool.deallocate(block)
    kernels.synchronize()
    assert int(wrong.get()[0]) == 0
    pool.check_invariants()

    del graph
    assert comes_back(pool)


@MODES
def test_memory_from_before_the_capture_that_it_frees_stays_private_too(pool, mode):
    capturing, other = kernels.new_stream(), kernels.new_stream()
    wrong = kernels.counter()
    address = pool.allocate(SIZE, stream=capturing.ptr)
    capturing.begin_capture(mode)
    kernels.fill(capturing, address, SIZE, 5)
    pool.deallocate(address, capturing)
    graph = capturing.end_capture()
    blocks = take_everything(pool, other)
    for block, size in blocks:
        kernels.fill(other, block, size, 77)
    kernels.synchronize()
    graph.launch(capturing)
    kernels.synchronize()
    for block, size in blocks:
        kernels.compare(other, block, size, 77, wrong)
        pool.deallocate(block)
    kernels.synchronize()
    assert int(wrong.get()[0]) == 0
    del graph
    assert comes_back(pool)


@MODES
def test_a_live_block_of_a_capture_can_be_used_and_freed_after_it(pool, mode):
    capturing, other = kernels.new_stream(), kernels.new_stream()
    capturing.begin_capture(mode)
    address = pool.allocate(SIZE, stream=capturing.ptr)
    kernels.fill(capturing, address, SIZE, 0x01010101)
    graph = capturing.end_capture()
    graph.launch(capturing)
    kernels.synchronize()
    assert kernels.read(address, SIZE) == b"\x01" * SIZE
    del graph
    pool.deallocate(address)
    block = pool.allocate(SIZE, stream=other.ptr)
    pool.deallocate(block)
    assert comes_back(pool)


@MODES
def test_everything_else_goes_on_during_a_capture(pool, mode):
    """New memory, stitching, frees on other streams and threads, trim: none of it ends the capture."""
    capturing, other = kernels.new_stream(), kernels.new_stream()
    wrong = kernels.counter()
    idle = [pool.allocate(SIZE, stream=other.ptr) for _ in range(8)]
    for address in idle:
        kernels.fill(other, address, SIZE, 1)
        pool.deallocate(address)
    errors = []

    def elsewhere():
        try:
            stream = kernels.new_stream()
            large = pool.allocate(5 * SIZE, stream=stream.ptr)
            free = pool.allocate(SIZE)
            kernels.fill(stream, large, 5 * SIZE, 2)
            kernels.compare(stream, large, 5 * SIZE, 2, wrong)
            pool.deallocate(large)
            pool.deallocate(free)
            pool.trim()
        except BaseException as error:
            errors.append(error)

    capturing.begin_capture(mode)
    inside = pool.allocate(SIZE, stream=capturing.ptr)
    kernels.fill(capturing, inside, SIZE, 3)
    elsewhere_at_once = pool.allocate(3 * SIZE, stream=other.ptr)
    pool.deallocate(elsewhere_at_once)
    pool.trim()
    thread = threading.Thread(target=elsewhere)
    # In global mode, what another thread's own calls may do is the driver's to say; ours are always relaxed.
    if mode != 0:
        thread.start()
        thread.join()
    kernels.compare(capturing, inside, SIZE, 3, wrong)
    pool.deallocate(inside)
    graph = capturing.end_capture()  # raises if the capture was broken
    assert errors == []
    graph.launch(capturing)
    kernels.synchronize()
    assert int(wrong.get()[0]) == 0
    del graph
    assert comes_back(pool)


def test_a_capture_that_is_given_up(pool):
    cupy = kernels.cupy()
    capturing = kernels.new_stream()
    capturing.begin_capture(2)
    address = pool.allocate(SIZE, stream=capturing.ptr)
    kernels.fill(capturing, address, SIZE, 3)
    pool.deallocate(address)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        capturing.synchronize()  # not allowed: it invalidates the capture
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        capturing.end_capture()
    address = pool.allocate(SIZE, stream=capturing.ptr)
    kernels.fill(capturing, address, SIZE, 3)
    pool.deallocate(address)
    assert comes_back(pool)


def test_a_model_replays_its_graph_while_another_runs(pool, device, tmp_path):
    """ONNX Runtime's CUDA graph over the pool's memory; model B's sessions run beside it, all outputs checked."""
    pool.limit = "4GiB"
    replay_beside(pool, device, tmp_path)
    assert comes_back(pool)


CAPTURING = """
import sys
import numpy as np, onnxruntime as ort
from onnx import helper
import building
from glake_infer import Pool
device, announced = sys.argv[1], sys.argv[2] == "announced"
index = int(device.partition(":")[2])
weights = [building.tensor(building.matrix(n, (256, 256)), f"w{n}") for n in range(3)]
nodes = [helper.make_node("MatMul", [f"h{n}", f"w{n}"], [f"h{n + 1}"]) for n in range(3)]
model = building.model(nodes, [building.floats("h0", (64, 256))], [building.floats("h3", (64, 256))], weights)
pool = Pool(device, "64MiB")
options = ort.SessionOptions()
options.log_severity_level = 4
pool.attach(options, cuda_graph=announced)
more = {"device_id": str(index), "enable_cuda_graph": "1", "use_tf32": "0"}
session = ort.InferenceSession(model.SerializeToString(), options,
                               providers=[("CUDAExecutionProvider", more), "CPUExecutionProvider"])
x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
source, target = pool.allocate(x.nbytes), pool.allocate(x.nbytes)
binding = session.io_binding()
binding.bind_input("h0", "cuda", index, np.float32, x.shape, source)
binding.bind_output("h3", "cuda", index, np.float32, x.shape, target)
from cuda.bindings import runtime
runtime.cudaMemcpy(source, x.ctypes.data, x.nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice)
runtime.cudaDeviceSynchronize()
session.run_with_iobinding(binding)  # runs, captures and replays
pool.captures_ended()
from glake_infer.allocators import OutOfMemoryError
others = []
for size in (1 << 20, 1 << 16, 1 << 15):  # takes whatever the graph does not keep
    try:
        while True:
            others.append((pool.allocate(size), size))
    except OutOfMemoryError:
        pass
assert len(others) > 50
for address, size in others:
    runtime.cudaMemset(address, 255, size)
runtime.cudaDeviceSynchronize()
for _ in range(3):
    session.run_with_iobinding(binding)
runtime.cudaDeviceSynchronize()
y = np.empty_like(x)
runtime.cudaMemcpy(y.ctypes.data, target, y.nbytes, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
expected = x
for n in range(3):
    expected = expected @ building.matrix(n, (256, 256))
print(float(abs(y - expected).max() / abs(expected).max()))
for address, size in others:
    dirty = np.empty(size, np.uint8)
    runtime.cudaMemcpy(dirty.ctypes.data, address, size, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
    assert (dirty == 255).all(), "the graph wrote into somebody else's memory"
sys.stdout.flush()
import os
os._exit(0)
"""


def test_a_session_that_captures_is_right_where_it_was_announced(python, device):
    """With all inputs and outputs bound, and no activation that comes with a stream unless patterns are off."""
    process = python(CAPTURING, device, "announced")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert float(out) < 1e-5


def test_a_capture_that_was_not_announced_is_right_or_fails_and_says_what_to_do(python, device):
    """Right where a request with the stream tells the pool of the capture; where there is none, a free breaks it."""
    process = python(CAPTURING, device, "unannounced")
    out, error = process.communicate(timeout=120)
    if process.returncode == 0:
        assert float(out) < 1e-5
    else:
        assert "pool.attach(options, cuda_graph=True)" in error


def replay_beside(pool, device, tmp_path):
    from glake_infer.models import zoo

    ort, index = import_onnxruntime(), int(device.partition(":")[2])
    spec_a, spec_b = zoo.spec("resnet18", seed=1), zoo.spec("bert-mini", seed=2)
    model_a, model_b = (
        str(zoo.write(spec_a, tmp_path / "a.onnx")),
        str(zoo.write(spec_b, tmp_path / "b.onnx")),
    )
    feeds_a = [zoo.feeds(spec_a, seed, batch=4, length=128) for seed in range(4)]
    rng = random.Random(1)
    feeds_b = [
        zoo.feeds(spec_b, seed, batch=rng.randint(1, 12), length=rng.randint(8, 256)) for seed in range(8)
    ]
    plain_a, plain_b = stress.session(ort, model_a, index), stress.session(ort, model_b, index)
    expected_a = [plain_a.run(None, feed) for feed in feeds_a]
    expected_b = [plain_b.run(None, feed) for feed in feeds_b]
    del plain_a, plain_b

    a = stress.session(ort, model_a, index, pool, enable_cuda_graph="1")
    b = stress.session(ort, model_b, index, pool)
    (name,) = feeds_a[0]
    image, answer = feeds_a[0][name], expected_a[0][0]
    source, target = pool.allocate(image.nbytes), pool.allocate(answer.nbytes)
    binding = a.io_binding()
    binding.bind_input(name, "cuda", index, np.float32, image.shape, source)
    binding.bind_output(a.get_outputs()[0].name, "cuda", index, np.float32, answer.shape, target)

    def run_a(number):
        runtime, data = kernels.cupy().cuda.runtime, np.ascontiguousarray(feeds_a[number][name])
        runtime.memcpy(source, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice)
        kernels.synchronize()  # from pageable memory it may return early, and the session's stream does not wait
        a.run_with_iobinding(binding)
        kernels.synchronize()
        return kernels.read(target, answer.nbytes) == expected_a[number][0].tobytes()

    assert run_a(0)  # runs, captures and replays
    bad = []
    stop = threading.Event()

    def run_b():
        try:
            turn = 0
            while not stop.is_set():
                turn += 1
                number = turn % len(feeds_b)
                if not stress.same(b.run(None, feeds_b[number]), expected_b[number]):
                    bad.append(number)
        except BaseException as error:
            bad.append(error)

    threads = [threading.Thread(target=run_b) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        # compute-sanitizer runs one kernel at a time, slowly.
        turns = 20 if kernels.SANITIZED else 200
        replays = [run_a(turn % len(feeds_a)) for turn in range(turns)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(replays)
    assert bad == []
    pool.deallocate(source)
    pool.deallocate(target)
