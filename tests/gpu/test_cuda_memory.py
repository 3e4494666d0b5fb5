"""CudaMemory and CudaStreams on a real GPU, call by call: what the pool builds on."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time

import kernels
import pytest

from glake_infer.allocators import _native
from glake_infer.allocators.errors import DriverError

pytestmark = pytest.mark.gpu
driver = pytest.importorskip("cuda.bindings.driver")

MiB = 1 << 20
GiB = 1 << 30

# Stores into `address` until `nanoseconds` are over.
SPIN = b""".version 7.0
.target sm_70
.address_size 64
.visible .entry spin(.param .u64 address, .param .u64 nanoseconds)
{
 .reg .u64 %rd<8>;
 .reg .u32 %r<3>;
 .reg .pred %q;
 ld.param.u64 %rd1, [address];
 ld.param.u64 %rd2, [nanoseconds];
 mov.u64 %rd3, %globaltimer;
 add.u64 %rd3, %rd3, %rd2;
 mov.u32 %r1, 1;
AGAIN:
 st.volatile.global.u32 [%rd1], %r1;
 mov.u64 %rd4, %globaltimer;
 setp.lt.u64 %q, %rd4, %rd3;
 @%q bra AGAIN;
 ret;
}
\0"""


def call(function, *arguments):
    """The results of a driver call that must succeed."""
    error, *results = function(*arguments)
    assert error == driver.CUresult.CUDA_SUCCESS, (function.__name__, error)
    return results[0] if len(results) == 1 else tuple(results)


class Gpu:
    """Work on the GPU beside the code under test, in the primary context."""

    def __init__(self):
        call(driver.cuInit, 0)
        self.device = call(driver.cuDeviceGet, 0)
        self.context = call(driver.cuDevicePrimaryCtxRetain, self.device)
        call(driver.cuCtxSetCurrent, self.context)
        self.spin_kernel = call(driver.cuModuleGetFunction, call(driver.cuModuleLoadData, SPIN), b"spin")
        self.scratch = int(call(driver.cuMemAlloc, 4096))

    def stream(self, blocking=False):
        flags = driver.CUstream_flags
        return call(
            driver.cuStreamCreate, flags.CU_STREAM_DEFAULT if blocking else flags.CU_STREAM_NON_BLOCKING
        )

    def spin(self, stream, milliseconds, address=None):
        values = (address or self.scratch, int(milliseconds * 1e6))
        types = (ctypes.c_uint64, ctypes.c_uint64)
        call(driver.cuLaunchKernel, self.spin_kernel, 1, 1, 1, 1, 1, 1, 0, stream, (values, types), 0)

    def begin(self, stream, mode="GLOBAL"):
        call(
            driver.cuStreamBeginCapture,
            stream,
            getattr(driver.CUstreamCaptureMode, f"CU_STREAM_CAPTURE_MODE_{mode}"),
        )

    def end(self, stream):
        """The graph, or None where the capture was broken."""
        error, graph = driver.cuStreamEndCapture(stream)
        return graph if error == driver.CUresult.CUDA_SUCCESS else None


@pytest.fixture(scope="module")
def gpu():
    return Gpu()


@pytest.fixture
def memory(gpu):
    return _native.cuda_memory(0)


@pytest.fixture
def streams(memory):
    return memory.streams()


@pytest.fixture
def mapped(memory):
    """The address of 4 MiB of zeros."""
    address, handle = memory.reserve(64 * MiB), memory.create(4 * MiB)
    memory.map(address, handle, 4 * MiB)
    memory.fill(address, 4 * MiB, 0)
    yield address
    memory.unmap(address, 4 * MiB)
    memory.destroy(handle, 4 * MiB)
    memory.release(address, 64 * MiB)


def in_child(code):
    """Run Python code in a process of its own and return its output; the GPU of this one stays usable."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_chunks_are_mapped_several_times_and_moved(memory):
    g = memory.granularity
    assert g == 2 * MiB
    address = memory.reserve(16 * g)
    assert address % g == 0
    handles = [memory.create(g) for _ in range(2)]
    for place, handle in enumerate([handles[0], handles[1], handles[0]]):
        memory.map(address + place * g, handle, g)
    memory.fill(address, g, 7)
    memory.fill(address + g, g, 8)
    assert memory.read(address + 2 * g - 4, 8) == b"\x08" * 4 + b"\x07" * 4, "the first chunk shows twice"
    memory.unmap(address, 3 * g)  # three mappings in one call
    memory.map(address + 5 * g, handles[1], g)
    assert memory.read(address + 5 * g, 2) == b"\x08\x08", "the bytes stay with the chunk"
    memory.unmap(address + 5 * g, g)
    for handle in handles:
        memory.destroy(handle, g)
    memory.release(address, 16 * g)


def test_what_is_created_shows_in_what_is_free(memory):
    before = memory.free_bytes
    handle = memory.create(GiB)
    assert before - memory.free_bytes == pytest.approx(GiB, abs=64 * MiB)
    memory.destroy(handle, GiB)
    assert memory.free_bytes == pytest.approx(before, abs=64 * MiB)
    assert 0 < before < _native.cuda_device_memory(0)


def test_more_than_the_device_has_names_the_call_the_size_and_what_is_free(memory):
    with pytest.raises(DriverError) as caught:
        memory.create(1 << 40)
    text = str(caught.value)
    for part in ("cuMemCreate", str(1 << 40), "cuda:0", "CUDA_ERROR_OUT_OF_MEMORY", "free", "nvidia-smi"):
        assert part in text
    memory.destroy(memory.create(2 * MiB), 2 * MiB)  # and the next one works


def test_a_mapping_where_one_is_fails_and_changes_nothing(memory, mapped):
    memory.fill(mapped, 16, 3)
    handle = memory.create(2 * MiB)
    with pytest.raises(DriverError, match="cuMemMap"):
        memory.map(mapped, handle, 2 * MiB)
    assert memory.read(mapped, 2) == b"\x03\x03"
    memory.map(mapped + 8 * MiB, handle, 2 * MiB)
    memory.unmap(mapped + 8 * MiB, 2 * MiB)
    memory.destroy(handle, 2 * MiB)


def test_access_none_is_refused_without_harm_and_comes_back(memory, mapped):
    memory.fill(mapped, 16, 5)
    memory.protect(mapped, 4 * MiB, "none")
    with pytest.raises(DriverError, match="cuMemcpyDtoH"):
        memory.read(mapped, 4)
    memory.protect(mapped, 4 * MiB, "read_only")
    assert memory.read(mapped, 2) == b"\x05\x05"
    memory.protect(mapped, 4 * MiB, "read_write")
    memory.fill(mapped, 16, 6)
    assert memory.read(mapped, 2) == b"\x06\x06"


def test_files_are_the_hosts(memory):
    with pytest.raises(DriverError, match="host only"):
        memory.map_file(0, 4096)


def test_shared_memory_lives_while_somebody_has_a_descriptor(memory):
    address = memory.reserve(4 * MiB)
    handle, descriptor = memory.create_shared(2 * MiB)
    memory.map(address, handle, 2 * MiB, descriptor)
    memory.fill(address, 2 * MiB, 9)
    memory.freeze(handle, 2 * MiB, descriptor, [address])
    kept = os.dup(descriptor)
    again = memory.adopt(kept, 2 * MiB)
    memory.unmap(address, 2 * MiB)
    memory.destroy(handle, 2 * MiB, descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    memory.map(address + 2 * MiB, again, 2 * MiB, kept, "read_only")
    assert memory.read(address + 2 * MiB, 2) == b"\x09\x09"
    memory.unmap(address + 2 * MiB, 2 * MiB)
    memory.destroy(again, 2 * MiB, kept)
    memory.release(address, 4 * MiB)


def test_no_memory_is_made_of_a_descriptor_that_is_none(memory, tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(DriverError, match="cuMemImportFromShareableHandle"):
        memory.adopt(descriptor, 2 * MiB)
    os.close(descriptor)  # still ours


def test_reading_and_mapping_wait_for_no_kernel(gpu, memory, mapped):
    for blocking in (False, True):
        stream = gpu.stream(blocking)
        memory.read(mapped, 16)
        gpu.spin(stream, 300)
        start = time.perf_counter()
        memory.read(mapped, 16)
        handle = memory.create(2 * MiB)
        memory.map(mapped + 8 * MiB, handle, 2 * MiB)
        memory.fill(mapped + 8 * MiB, 16, 1)
        memory.unmap(mapped + 8 * MiB, 2 * MiB)
        memory.destroy(handle, 2 * MiB)
        assert time.perf_counter() - start < 0.15
        call(driver.cuStreamSynchronize, stream)


def test_a_fill_on_a_stream_is_in_its_order(gpu, memory, mapped):
    stream = gpu.stream()
    gpu.spin(stream, 200, mapped)
    memory.fill(mapped, 16, 4, int(stream))
    assert memory.read(mapped + 8, 1) == b"\x00", "it does not come before the kernel"
    call(driver.cuStreamSynchronize, stream)
    assert memory.read(mapped, 16) == b"\x04" * 16


def test_events_order_streams(gpu, memory, mapped, streams):
    one, two = gpu.stream(), gpu.stream()
    event = streams.create_event()
    assert streams.finished(event), "never recorded"
    gpu.spin(one, 200)
    streams.record(event, int(one))
    assert not streams.finished(event)
    streams.wait(int(two), event)
    memory.fill(mapped, 16, 2, int(two))
    assert memory.read(mapped, 1) == b"\x00"
    start = time.perf_counter()
    streams.synchronize(event)
    assert 0.1 < time.perf_counter() - start < 1
    assert streams.finished(event)
    call(driver.cuStreamSynchronize, two)
    assert memory.read(mapped, 1) == b"\x02"
    streams.destroy_event(event)


def test_an_event_outlives_its_stream(gpu, streams):
    stream, event = gpu.stream(), streams.create_event()
    gpu.spin(stream, 100)
    streams.record(event, int(stream))
    call(driver.cuStreamDestroy, stream)
    # compute-sanitizer's cuStreamDestroy may wait for the kernel.
    assert not streams.finished(event) or kernels.SANITIZED
    streams.synchronize(event)
    assert streams.finished(event)
    streams.destroy_event(event)


def test_an_event_of_all_streams_covers_all_and_nothing_later(gpu, streams):
    for blocking in (False, True):
        busy, later, event = gpu.stream(blocking), gpu.stream(), streams.create_event()
        gpu.spin(busy, 150)
        streams.record_all(event)
        gpu.spin(later, 600)
        assert not streams.finished(event)
        start = time.perf_counter()
        streams.synchronize(event)
        assert 0.05 < time.perf_counter() - start < 0.4
        assert streams.synchronize_all()
        assert call(driver.cuStreamQuery, later) == ()
        streams.destroy_event(event)


def test_streams_are_told_apart(gpu, streams):
    seen = set()
    for _ in range(5):
        stream = gpu.stream()
        identity, capture = streams.state(int(stream))
        assert capture == 0
        assert streams.state(int(stream)) == (identity, 0)
        seen.add(identity)
        call(driver.cuStreamDestroy, stream)  # its handle is used again by the next
    assert len(seen) == 5
    assert 0 not in seen
    legacy, per_thread = streams.state(0), streams.state(2)
    assert legacy == streams.state(1) != per_thread
    assert streams.state(-1) is None
    others = []
    thread = threading.Thread(target=lambda: others.extend([streams.state(0), streams.state(2)]))
    thread.start()
    thread.join()
    assert others[0] == legacy
    assert others[1] != per_thread


@pytest.mark.parametrize("mode", ["GLOBAL", "THREAD_LOCAL", "RELAXED"])
@pytest.mark.parametrize("other_thread", [False, True])
def test_no_call_breaks_a_capture(gpu, memory, mapped, streams, mode, other_thread):
    capturing, free = gpu.stream(), gpu.stream()
    identity, _ = streams.state(int(capturing))
    event = streams.create_event()
    streams.record(event, int(free))
    gpu.begin(capturing, mode)
    call(driver.cuMemsetD8Async, gpu.scratch, 1, 64, capturing)
    errors = []

    def use():
        try:
            first = streams.state(int(capturing))
            assert first == streams.state(int(capturing))
            assert first[1] != 0
            assert first[0] not in (0, identity)
            assert streams.state(int(free))[1] == 0
            assert streams.state(0)[1] == 0
            handle = memory.create(2 * MiB)
            memory.map(mapped + 8 * MiB, handle, 2 * MiB)
            memory.fill(mapped + 8 * MiB, 2 * MiB, 1)
            memory.fill(mapped + 8 * MiB, 2 * MiB, 2, int(free))
            memory.read(mapped + 8 * MiB, 16)
            other = streams.create_event()
            streams.record(other, int(free))
            streams.wait(int(free), event)
            streams.finished(other)
            streams.synchronize(other)
            streams.destroy_event(other)
            assert streams.synchronize_all()
            assert memory.free_bytes > 0
            with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
                memory.create(1 << 40)
            memory.unmap(mapped + 8 * MiB, 2 * MiB)
            memory.destroy(handle, 2 * MiB)
            memory.release(memory.reserve(GiB), GiB)
        except BaseException as error:
            errors.append(error)

    if other_thread:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    else:
        use()
    graph = gpu.end(capturing)
    assert graph is not None, "the capture was broken"
    call(driver.cuGraphDestroy, graph)
    assert not errors, errors
    assert streams.state(int(capturing)) == (identity, 0)
    streams.destroy_event(event)


@pytest.mark.parametrize("blocking", [False, True])
def test_waiting_for_everything_spares_captures(gpu, streams, blocking):
    capturing, busy = gpu.stream(blocking), gpu.stream()
    gpu.begin(capturing)
    gpu.spin(busy, 150)
    start = time.perf_counter()
    assert streams.synchronize_all()
    assert 0.1 < time.perf_counter() - start < 1
    graph = gpu.end(capturing)
    assert graph is not None, "the capture was broken"
    call(driver.cuGraphDestroy, graph)


def test_waiting_for_everything_needs_no_memory_of_the_device(gpu, memory, streams):
    handles = []
    busy = gpu.stream()
    gpu.spin(busy, 0)  # loads the kernel, which needs memory too
    try:
        for size in (GiB, 64 * MiB, 2 * MiB):
            while True:
                try:
                    handles.append((memory.create(size), size))
                except DriverError:
                    break
        gpu.spin(busy, 150)
        start = time.perf_counter()
        assert streams.synchronize_all()
        assert time.perf_counter() - start > 0.1
    finally:
        for handle, size in handles:
            memory.destroy(handle, size)


def test_a_capture_on_a_blocking_stream_takes_the_legacy_stream(gpu, streams):
    capturing = gpu.stream(blocking=True)
    gpu.begin(capturing)
    _, capture = streams.state(0)
    assert capture == 2**64 - 1
    with pytest.raises(DriverError, match="IMPLICIT"):
        streams.watch_graph(0)
    assert streams.state(int(capturing))[1] not in (0, capture)
    assert gpu.end(capturing) is not None
    assert streams.state(0)[1] == 0


def test_streams_of_another_context_are_not_ours(gpu, streams):
    other = call(driver.cuCtxCreate, driver.CUctxCreateParams(), 0, gpu.device)
    stream = gpu.stream()
    call(driver.cuCtxPopCurrent)
    try:
        assert streams.state(int(stream)) is None
        event = streams.create_event()
        with pytest.raises(DriverError, match="cuEventRecord"):
            streams.record(event, int(stream))
        streams.destroy_event(event)
    finally:
        call(driver.cuCtxDestroy, other)


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("order", ["graph first", "executable first"])
def test_a_graph_is_watched_until_all_of_it_is_gone(gpu, streams, order):
    stream = gpu.stream()
    gpu.begin(stream)
    gpu.spin(stream, 200)
    flag = streams.watch_graph(int(stream))
    graph = gpu.end(stream)
    executable = call(driver.cuGraphInstantiate, graph, 0)
    destroy = [(driver.cuGraphDestroy, graph), (driver.cuGraphExecDestroy, executable)]
    if order != "graph first":
        destroy.reverse()
    call(driver.cuGraphLaunch, executable, stream)
    call(*destroy[0])
    time.sleep(0.05)
    assert not flag.dead
    call(*destroy[1])
    assert not flag.dead, "the launch is still running"
    assert wait_until(lambda: flag.dead)
    call(driver.cuStreamSynchronize, stream)


def test_a_capture_that_broke_frees_its_watch(gpu, streams):
    stream = gpu.stream()
    gpu.begin(stream)
    call(driver.cuMemsetD8Async, gpu.scratch, 1, 64, stream)
    flag = streams.watch_graph(int(stream))
    assert driver.cuCtxSynchronize()[0] != driver.CUresult.CUDA_SUCCESS
    assert gpu.end(stream) is None
    assert wait_until(lambda: flag.dead)


def test_only_a_capturing_stream_has_a_graph(gpu, streams):
    with pytest.raises(DriverError, match="not capturing"):
        streams.watch_graph(int(gpu.stream()))


def test_a_thread_without_a_context_is_served_and_left_without(gpu, memory, mapped, streams):
    stream = gpu.stream()
    results = []

    def use():
        call(driver.cuCtxSetCurrent, driver.CUcontext(0))
        handle = memory.create(2 * MiB)
        memory.destroy(handle, 2 * MiB)
        memory.fill(mapped, 16, 1)
        results.append(memory.read(mapped, 2))
        event = streams.create_event()
        for handle in (0, 2, int(stream)):
            assert streams.state(handle) is not None
            streams.record(event, handle)
            streams.wait(handle, event)
        streams.record_all(event)
        streams.synchronize(event)
        streams.destroy_event(event)
        results.append(int(call(driver.cuCtxGetCurrent)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert results == [b"\x01\x01", 0]


LOST = """
import sys
sys.path[:0] = {path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("gpu_tests", {file!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
gpu = tests.Gpu()
memory = tests._native.cuda_memory(0)
address, handle = memory.reserve(tests.MiB * 4), memory.create(tests.MiB * 2)
memory.map(address, handle, tests.MiB * 2)
stream = gpu.stream()
event = memory.streams().create_event()
gpu.spin(stream, 300, address)
memory.unmap(address, tests.MiB * 2)
tests.driver.cuStreamSynchronize(stream)
for use in (lambda: memory.read(gpu.scratch, 4), lambda: memory.streams().record(event, int(stream)),
            lambda: memory.streams().synchronize_all()):
    try:
        use()
    except tests.DriverError as error:
        print(error)
memory.destroy(handle, tests.MiB * 2)
memory.release(address, tests.MiB * 4)
print("alive")
"""


def test_a_lost_context_is_said_and_the_process_lives(gpu):
    output = in_child(LOST.format(path=sys.path, file=__file__))
    assert output.count("Restart the process") >= 2
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in output
    assert output.endswith("alive\n")


def test_what_lives_at_exit_makes_no_noise(gpu):
    code = (
        "from glake_infer.allocators import _native\n"
        "m = _native.cuda_memory(0); a = m.reserve(1 << 30); h = m.create(1 << 21); m.map(a, h, 1 << 21)\n"
        "import builtins; builtins.kept = m; s = m.streams(); builtins.event = s.create_event()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "glake-infer" not in done.stderr


def test_a_child_of_fork_gives_nothing_back(memory, mapped):
    memory.fill(mapped, 16, 8)
    child = os.fork()
    if child == 0:
        memory.unmap(mapped, 4 * MiB)
        try:
            memory.create(2 * MiB)
        except DriverError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert memory.read(mapped, 2) == b"\x08\x08"


def test_the_device_says_what_it_is():
    assert _native.cuda_driver_version() >= 12000
    assert _native.cuda_device_count() >= 1
    assert _native.cuda_device_name(0)
    assert _native.cuda_device_memory(0) > GiB
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_DEVICE"):
        _native.cuda_device_name(1000)
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_DEVICE"):
        _native.cuda_memory(1000)
    gc.collect()
