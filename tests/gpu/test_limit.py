"""The limit as the device sees it (cuMemGetInfo).

What cuBLAS, cuDNN and the context take is not the pool's. ONNX Runtime 1.31.1 makes two cuBLAS handles a session, of 64
MiB each on Hopper: one when the session is made, one for the stream of its first run. With the provider option
`use_ep_level_unified_stream` there is only the first.
"""

from __future__ import annotations

import pytest

pytest.importorskip("cupy")
pytest.importorskip("onnxruntime")
import kernels

pytestmark = pytest.mark.gpu
MiB, GiB = 2**20, 2**30
SESSIONS = 4

# Prints the least free memory that it saw, once a millisecond, while it worked.
CHILD = """
import sys, threading, time
device, ours, limit, count = sys.argv[1], sys.argv[2] == "ours", int(sys.argv[3]), int(sys.argv[4])
more = {"use_ep_level_unified_stream": "1"} if sys.argv[5] == "unified" else {}
index = int(device.partition(":")[2])
import numpy as np
from cuda.bindings import driver, runtime
from glake_infer import Pool
from glake_infer.allocators import OutOfMemoryError, import_onnxruntime
import building
(error,) = runtime.cudaSetDevice(index)
assert error == 0, error
runtime.cudaFree(0)
least, stop = 1 << 62, False
def watch():
    global least
    runtime.cudaSetDevice(index)
    while not stop:
        error, free, total = runtime.cudaMemGetInfo()
        least = min(least, free)
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
ort = import_onnxruntime()
weights = [building.tensor(building.matrix(1, (256, 4096)), "w"), building.tensor(building.matrix(2, (4096, 256)), "v")]
from onnx import helper
model = building.model(
    [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
     helper.make_node("MatMul", ["r", "v"], ["y"])],
    [building.floats("x", ("n", 256))], [building.floats("y", ("n", 256))], weights).SerializeToString()
pool = Pool(device, limit) if ours else None
sessions = []
for _ in range(count):
    options = ort.SessionOptions()
    if pool:
        pool.attach(options)
    providers = [("CUDAExecutionProvider", {"device_id": str(index), **more}), "CPUExecutionProvider"]
    sessions.append(ort.InferenceSession(model, options, providers=providers))
for session in sessions:
    session.run(None, {"x": np.ones((8, 256), np.float32)})
if ours:
    held = []
    for size in (1 << 30, 64 << 20, 2 << 20, 1000):
        try:
            while len(held) < 3000:
                held.append(pool.allocate(size))
        except OutOfMemoryError:
            pass
    assert pool.stats().reserved > limit * 0.99, pool.stats()
    for _ in range(20):
        refused = 0
        for session in sessions:
            try:
                session.run(None, {"x": np.ones((20000, 256), np.float32)})
            except Exception as error:
                assert pool.explain(error), error
                refused += 1
        assert pool.stats().reserved <= limit
        for _ in range(min(3, len(held))):
            pool.deallocate(held.pop(0))
    for address in held:
        pool.deallocate(address)
stop = True
watcher.join()
print(least)
"""


@pytest.fixture(scope="module")
def limit():
    total = kernels.total_memory()
    return 24 * GiB if total > 30 * GiB else total // 2 // GiB * GiB


@pytest.fixture
def used(python, device, limit):
    """The most that the device had in use while a process ran sessions: a function of its side and their number."""

    def measure(side, count, streams="own"):
        before = kernels.free_memory()
        process = python(CHILD, device, side, limit, count, streams)
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
        return before - int(out)

    return measure


@pytest.mark.timeout(300)
def test_the_device_holds_the_limit_and_what_as_many_plain_sessions_take(used, limit):
    plain, ours = used("plain", SESSIONS), used("ours", SESSIONS)
    print(f"plain {plain / MiB:.0f} MiB, ours {ours / MiB:.0f} MiB with a limit of {limit / MiB:.0f} MiB")
    assert limit * 0.99 < ours <= limit + plain  # the pool really filled it


@pytest.mark.timeout(300)
def test_with_one_stream_a_session_a_further_session_takes_65_mib(used, limit):
    plain, ours = used("plain", 1), used("ours", SESSIONS, "unified")
    print(f"plain {plain / MiB:.0f} MiB, ours {ours / MiB:.0f} MiB with a limit of {limit / MiB:.0f} MiB")
    assert limit * 0.99 < ours <= limit + plain + (SESSIONS - 1) * 65 * MiB
