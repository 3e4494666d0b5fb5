"""Real ONNX Runtime sessions on the pool of a CUDA device (attach.py, ort_allocator.cpp)."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.append(str(Path(__file__).parent.parent / "allocators"))

from kernels import SANITIZED
from ort_c_api import Api, Stream, Struct
from tiny import HIDDEN, rows, two_layers, weights

from glake_infer.allocators import (
    DeviceNotFoundError,
    DriverError,
    Initializer,
    InputError,
    OutOfMemoryError,
    Pool,
    PoolExistsError,
    _native,
)
from glake_infer.allocators.attach import require_cuda_provider

ort = pytest.importorskip("onnxruntime")


def device_count() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) else 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers() or not device_count(),
        reason="needs an NVIDIA GPU and onnxruntime-gpu",
    ),
]

MiB = 2**20
FLOAT = 1
DEVICE = "cuda:0"
WEIGHTS = weights()
ROWS = rows(500)
EXACT = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}


@pytest.fixture(autouse=True, scope="module")
def libraries():
    require_cuda_provider()


@pytest.fixture(scope="session")
def device():
    """The first device, on which plain sessions run too."""
    return DEVICE


def exact(pool: Pool, **more: str) -> list:
    providers = pool.providers
    providers[0][1].update(EXACT, **more)
    return providers


def on_cuda(model: bytes, options=None, providers=None) -> ort.InferenceSession:
    session = ort.InferenceSession(
        model,
        options,
        providers=providers or [("CUDAExecutionProvider", EXACT), "CPUExecutionProvider"],
    )
    assert session.get_providers()[0] == "CUDAExecutionProvider", "ONNX Runtime fell back to the CPU"
    return session


def plain(model: bytes, values: np.ndarray) -> np.ndarray:
    return on_cuda(model).run(None, {"x": values})[0]


def attached(pool: Pool, model: bytes, injected=(), pattern: bool = True, **more: str):
    options = ort.SessionOptions()
    options.log_severity_level = 4  # runs that fail on purpose
    options.enable_mem_pattern = pattern
    pool.attach(options, injected)
    return on_cuda(model, options, exact(pool, **more))


def convolutions() -> bytes:
    """y = relu(conv(x)) + x, pooled; images of any size."""
    kernel = np.random.default_rng(3).standard_normal((8, 8, 3, 3), np.float32) / 9
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 1, 1])],
        [numpy_helper.from_array(kernel, "k")],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def images(count: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 8, size, size), np.float32)


class Runtime:
    """What the CUDA runtime says, by cuda-python."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self.api = runtime

    def call(self, name: str, *arguments: object) -> object:
        error, *results = getattr(self.api, name)(*arguments)
        assert error == self.api.cudaError_t.cudaSuccess, f"{name}: {error}"
        return results[0] if len(results) == 1 else results

    def to_device(self, address: int, value: np.ndarray) -> None:
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpy", address, value.ctypes.data, value.nbytes, kind)

    def free_bytes(self) -> int:
        return self.call("cudaMemGetInfo")[0]


@pytest.fixture
def cuda():
    runtime = Runtime()
    runtime.call("cudaSetDevice", 0)
    return runtime


def copy_into(pool: Pool, cuda: Runtime, values: dict[str, np.ndarray]) -> list[Initializer]:
    injected = []
    for name, value in values.items():
        address = pool.allocate(value.nbytes, "weights")
        cuda.to_device(address, value)
        injected.append(Initializer(name, address, value.nbytes, FLOAT, value.shape))
    cuda.call("cudaDeviceSynchronize")
    return injected


class TestSession:
    @pytest.mark.parametrize("pattern", [True, False])
    @pytest.mark.parametrize(("model", "feed"), [(two_layers(WEIGHTS), ROWS), (convolutions(), images(4))])
    def test_outputs_are_equal_bit_for_bit(self, pool, model, feed, pattern):
        expected = plain(model, feed)
        session = attached(pool, model, pattern=pattern)
        before = pool.stats()
        for _ in range(4):  # from the second run on with a memory pattern
            np.testing.assert_array_equal(session.run(None, {"x": feed})[0], expected)
        assert pool.stats().allocations > before.allocations
        del session
        gc.collect()
        assert pool.stats().active == 0

    def test_weights_come_through_reserve(self, pool):
        allocator = _native.ort_allocator(DEVICE)
        pool.attach(ort.SessionOptions())
        before = int(Api(DEVICE).allocator_stats(allocator)["NumReserves"])
        session = attached(pool, two_layers(WEIGHTS))
        stats = pool.stats()
        assert stats.weights >= sum(value.nbytes for value in WEIGHTS.values())
        assert int(Api(DEVICE).allocator_stats(allocator)["NumReserves"]) >= before + 2
        del session

    def test_activations_come_with_the_stream_of_the_session(self, pool):
        native = _native.device_pool(DEVICE)
        session = attached(pool, two_layers(WEIGHTS), pattern=False)
        session.run(None, {"x": ROWS})
        native.start_recording(100_000)
        session.run(None, {"x": ROWS})
        events = native.stop_recording()
        activations = [event for event in events if event[0] == "a"]
        assert any(event[3] >= ROWS.shape[0] * HIDDEN * 4 for event in activations)
        on_stream = [event for event in activations if event[4] > 0]
        assert on_stream, "no activation came with a stream"
        assert len({event[4] for event in on_stream}) == 1
        assert not [event for event in events if event[0] == "r"]
        del session

    def test_every_activation_has_its_stream(self, pool):
        # Without memory patterns, which are one buffer without a stream.
        native = _native.device_pool(DEVICE)
        session = attached(pool, two_layers(WEIGHTS), pattern=False)
        for _ in range(3):
            session.run(None, {"x": ROWS})
        native.start_recording(100_000)
        session.run(None, {"x": ROWS})
        events = [event for event in native.stop_recording() if event[0] == "a"]
        large = [event for event in events if event[3] >= ROWS.shape[0] * HIDDEN * 4]
        assert large
        assert all(event[4] > 0 for event in large)
        del session

    def test_a_stream_of_the_users_is_used(self, pool, cuda):
        stream = int(cuda.call("cudaStreamCreateWithFlags", 1))
        native = _native.device_pool(DEVICE)
        expected = plain(two_layers(WEIGHTS), ROWS)
        session = attached(pool, two_layers(WEIGHTS), pattern=False, user_compute_stream=str(stream))
        native.start_recording(100_000)
        np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], expected)
        streams = {event[4] for event in native.stop_recording() if event[0] == "a"}
        assert stream in streams
        assert streams <= {stream, -1}
        del session
        gc.collect()
        pool.trim()
        cuda.call("cudaStreamDestroy", stream)

    def test_repeated_runs_make_no_driver_calls_for_memory(self, pool):
        session = attached(pool, two_layers(WEIGHTS))
        for _ in range(5):
            session.run(None, {"x": ROWS})
        before = pool.stats()
        for _ in range(50):
            session.run(None, {"x": ROWS})
        after = pool.stats()
        assert (after.driver_calls, after.reserved) == (before.driver_calls, before.reserved)
        assert after.allocations > before.allocations
        del session

    def test_several_sessions_from_several_threads(self, pool):
        # With compute-sanitizer eight threads of plain sessions take half a second a run, and starve each other.
        workers, steps = (2, 4) if SANITIZED else (8, 60)
        counts = (1, 7, 64, 300)
        models = [two_layers(weights(seed)) for seed in range(4)]
        expected = [[plain(model, rows(count)) for count in counts] for model in models]
        sessions = [attached(pool, model) for model in models]
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for step in range(steps):
                    which, shape = (step + seed) % 4, (step * 3 + seed) % 4
                    output = sessions[which].run(None, {"x": rows(counts[shape])})[0]
                    np.testing.assert_array_equal(output, expected[which][shape])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        pool.check_invariants()
        sessions.clear()

    def test_the_session_outlives_the_handle(self):
        pool = Pool(DEVICE, limit="1GiB")
        expected = plain(two_layers(WEIGHTS), ROWS)
        session = attached(pool, two_layers(WEIGHTS))
        del pool
        gc.collect()
        assert Pool.current(DEVICE) is None
        np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], expected)
        with Pool(DEVICE, limit="2GiB") as pool:
            assert pool.stats().active > 0
            session.run(None, {"x": ROWS})
            del session
            gc.collect()


class TestBinding:
    def bound(self, session, feed):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(feed, "cuda", 0))
        binding.bind_output("y", "cuda", 0)
        session.run_with_iobinding(binding)
        return binding

    def test_outputs_on_the_device_come_from_the_pool(self, pool):
        expected = plain(two_layers(WEIGHTS), ROWS)
        session = attached(pool, two_layers(WEIGHTS))
        before = pool.stats().active
        binding = self.bound(session, ROWS)
        output = binding.get_outputs()[0]
        assert output.device_name() == "cuda"
        assert pool.stats().active >= before + ROWS.nbytes
        np.testing.assert_array_equal(output.numpy(), expected)
        del output, binding, session

    def test_an_output_outlives_its_session(self, pool):
        expected = plain(two_layers(WEIGHTS), ROWS)
        session = attached(pool, two_layers(WEIGHTS))
        output = self.bound(session, ROWS).get_outputs()[0]
        del session
        gc.collect()
        pool.trim()
        assert pool.stats().active >= ROWS.nbytes
        np.testing.assert_array_equal(output.numpy(), expected)
        del output
        gc.collect()
        assert pool.stats().active == 0  # freed through the same allocator, its stream long gone
        pool.check_invariants()


class TestInitializers:
    ZEROS = two_layers({name: np.zeros_like(value) for name, value in WEIGHTS.items()})

    def test_sessions_share_injected_weights(self, pool, cuda):
        expected = plain(two_layers(WEIGHTS), ROWS)
        injected = copy_into(pool, cuda, WEIGHTS)
        alone = pool.stats().weights
        sessions = [attached(pool, self.ZEROS, injected) for _ in range(3)]
        assert pool.stats().weights == alone
        for session in sessions:
            np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], expected)
        # Their bytes are read at every run: no session has a copy.
        cuda.call("cudaMemset", injected[1].address, 0, injected[1].bytes)
        cuda.call("cudaDeviceSynchronize")
        for session in sessions:
            assert not session.run(None, {"x": ROWS})[0].any()
        sessions.clear()
        del session
        gc.collect()
        for initializer in injected:
            pool.deallocate(initializer.address)

    def test_closing_the_owner_leaves_the_sessions_whole(self, pool, cuda):
        injected = copy_into(pool, cuda, WEIGHTS)
        options = ort.SessionOptions()
        owner = pool.attach(options, injected)
        session = on_cuda(self.ZEROS, options, exact(pool))
        owner.close()
        del options
        gc.collect()
        expected = plain(two_layers(WEIGHTS), ROWS)
        np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], expected)
        del session
        gc.collect()
        for initializer in injected:
            pool.deallocate(initializer.address)


class TestOutOfMemory:
    def test_a_run_that_does_not_fit_raises_and_the_next_one_works(self, pool):
        feed = rows(20_000)  # activations of 156 MiB each
        expected = plain(two_layers(WEIGHTS), feed)
        session = attached(pool, two_layers(WEIGHTS))
        held = pool.stats().active
        pool.limit = held + 64 * MiB
        with pytest.raises(Exception, match=r"\[glake-infer failure \d+\] out of memory") as caught:
            session.run(None, {"x": feed})
        reason = pool.explain(caught.value)
        assert isinstance(reason, OutOfMemoryError)
        assert reason.limit == held + 64 * MiB
        assert reason.needed_limit > reason.limit
        assert reason.sequence == pool.failure_count
        del caught
        gc.collect()
        pool.check_invariants()
        assert pool.stats().active == held
        pool.limit = "2GiB"
        np.testing.assert_array_equal(session.run(None, {"x": feed})[0], expected)
        del session

    def test_with_a_memory_pattern_too(self, pool):
        feed = rows(20_000)
        session = attached(pool, two_layers(WEIGHTS))
        expected = [session.run(None, {"x": feed})[0] for _ in range(3)][-1]
        pool.limit = pool.stats().active + 64 * MiB
        with pytest.raises(Exception, match=r"\[glake-infer failure \d+\]") as caught:
            session.run(None, {"x": feed})
        assert isinstance(pool.explain(caught.value), OutOfMemoryError)
        del caught
        pool.limit = "2GiB"
        np.testing.assert_array_equal(session.run(None, {"x": feed})[0], expected)
        del session

    def test_a_session_that_does_not_fit_raises(self, pool):
        pool.limit = 2 * MiB
        with pytest.raises(Exception, match="glake-infer failure") as caught:
            attached(pool, two_layers(weights()))
        assert pool.explain(caught.value).limit == 2 * MiB
        del caught
        gc.collect()
        assert pool.stats().active == 0


class TestAllocator:
    """The struct, called as ONNX Runtime calls it."""

    @pytest.fixture
    def face(self, pool):
        pool.attach(ort.SessionOptions())
        address = _native.ort_allocator(DEVICE)
        return address, Struct.from_address(address), Api(DEVICE)

    def test_it_is_the_environments_for_the_device(self, face):
        address, struct, api = face
        info = struct.Info(address)
        assert api.memory_info(info) == ("Cuda", 0)
        assert api.shared_allocator(info) == address
        assert struct.version == 25

    def test_stats_and_shrink(self, face, pool):
        address, struct, api = face
        pool.limit = "2GiB"
        kept = _native.ort_allocate(5 * MiB, reserve=True, device=DEVICE)
        struct.Free(address, _native.ort_allocate(40 * MiB, device=DEVICE))
        now, stats = api.allocator_stats(address), pool.stats()
        assert int(now["InUse"]) == stats.active >= 5 * MiB
        assert int(now["TotalAllocated"]) == stats.reserved >= 40 * MiB
        assert int(now["Limit"]) == 2**31
        assert int(now["MaxInUse"]) >= 45 * MiB
        assert not struct.Shrink(address)
        after = pool.stats()
        assert after.reserved < stats.reserved
        assert after.weights >= 5 * MiB
        struct.Free(address, kept)

    def test_a_stream_of_cuda(self, face, pool, cuda):
        address, struct, _ = face
        handle = int(cuda.call("cudaStreamCreateWithFlags", 1))
        native = _native.device_pool(DEVICE)
        native.start_recording(100)
        on_stream = _native.ort_allocate(
            3 * MiB, device=DEVICE, stream=ctypes.addressof(Stream(handle=handle))
        )
        without = _native.ort_allocate(3 * MiB, device=DEVICE, stream=ctypes.addressof(Stream()))
        streams = [event[4] for event in native.stop_recording() if event[0] == "a"]
        assert streams == [handle, -1]
        struct.Free(address, on_stream)
        struct.Free(address, without)
        pool.trim()
        cuda.call("cudaStreamDestroy", handle)


class TestPool:
    def test_close_gives_the_memory_back(self, cuda):
        with Pool(DEVICE, limit="2GiB") as pool:
            pool.deallocate(pool.allocate("4MiB"))
            pool.trim()
            before = cuda.free_bytes()
            pool.deallocate(pool.allocate("1GiB"))
            assert cuda.free_bytes() <= before - 2**30
        assert cuda.free_bytes() >= before - 8 * MiB

    def test_a_second_pool_on_the_device_is_refused(self, pool):
        for name in ("cuda:0", "cuda"):
            with pytest.raises(PoolExistsError, match=r"'cuda:0'"):
                Pool(name)
            assert Pool.current(name) is pool

    def test_a_limit_above_the_devices_memory_is_refused(self, cuda):
        total = cuda.call("cudaMemGetInfo")[1]
        with pytest.raises(InputError, match=f"{2 * total}"):
            Pool(DEVICE, limit=2 * total)
        with Pool(DEVICE) as pool:
            assert total * 0.9 < pool.limit <= total * 1.1

    def test_a_device_that_is_not_there(self):
        with pytest.raises((DeviceNotFoundError, DriverError), match="63"):
            Pool("cuda:63")

    def test_streams_of_other_packages(self, pool, cuda):
        handle = int(cuda.call("cudaStreamCreateWithFlags", 1))
        native = _native.device_pool(DEVICE)
        streams: list[object] = [None, handle]
        expected = [-1, handle]
        torch = pytest.importorskip("torch")
        streams.append(torch.cuda.Stream())
        expected.append(streams[-1].cuda_stream)
        native.start_recording(100)
        addresses = [pool.allocate("3MiB", stream=stream) for stream in streams]
        assert [event[4] for event in native.stop_recording() if event[0] == "a"] == expected
        for address in addresses:
            pool.deallocate(address)
        pool.trim()
        cuda.call("cudaStreamDestroy", handle)


@pytest.mark.skipif(device_count() < 2, reason="needs two devices")
def test_two_devices_at_once(pool):
    model = two_layers(WEIGHTS)
    expected = plain(model, ROWS)
    with Pool("cuda:1", limit="2GiB") as second:
        sessions = [attached(pool, model), attached(second, model)]
        for session, on in zip(sessions, (pool, second), strict=True):
            before = on.stats().allocations
            np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], expected)
            assert on.stats().allocations > before
        other = pool.stats().allocations
        sessions[1].run(None, {"x": ROWS})
        assert pool.stats().allocations == other
        sessions.clear()
        del session
        gc.collect()


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, with the tests' helpers at hand."""
    head = f"import sys; sys.path.append({str(Path(__file__).parent.parent / 'allocators')!r})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_interpreter_exits_cleanly_with_live_sessions_and_values():
    done = run(
        """
        import onnxruntime as ort
        from glake_infer.allocators import Pool
        from tiny import rows, two_layers, weights
        pool = Pool("cuda:0", limit="1GiB")
        sessions, values = [], []
        for seed in range(3):
            options = ort.SessionOptions()
            pool.attach(options)
            session = ort.InferenceSession(two_layers(weights(seed)), options, providers=pool.providers)
            assert session.get_providers()[0] == "CUDAExecutionProvider"
            binding = session.io_binding()
            binding.bind_cpu_input("x", rows(100))
            binding.bind_output("y", "cuda", 0)
            session.run_with_iobinding(binding)
            values.extend(binding.get_outputs())
            sessions.append(session)
        held = pool.allocate(1 << 20)
        print("ran", flush=True)
        """
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    assert "glake-infer" not in done.stderr


def test_a_child_of_fork_gets_an_error():
    done = run(
        """
        import os, onnxruntime as ort
        from glake_infer.allocators import ForkedProcessError, Pool
        from tiny import rows, two_layers, weights
        pool = Pool("cuda:0", limit="1GiB")
        options = ort.SessionOptions()
        pool.attach(options)
        session = ort.InferenceSession(two_layers(weights()), options, providers=pool.providers)
        expected = session.run(None, {"x": rows(10)})[0]
        child = os.fork()
        if child == 0:
            for use in (lambda: pool.allocate(1 << 20), pool.trim):
                try:
                    use()
                except ForkedProcessError:
                    continue
                os._exit(8)
            try:
                session.run(None, {"x": rows(10)})
            except Exception:  # ours, or CUDA's own if it is asked first; no hang
                os._exit(7)
            os._exit(9)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        assert (session.run(None, {"x": rows(10)})[0] == expected).all()
        pool.check_invariants()
        """
    )
    assert done.stdout == "7\n", done.stderr
    assert done.returncode == 0, done.stderr


def test_a_host_pool_beside_it_serves_the_host_side():
    done = run(
        """
        import numpy as np, onnxruntime as ort
        from glake_infer.allocators import Pool
        from tiny import rows, two_layers, weights
        device, host = Pool("cuda:0", limit="1GiB"), Pool("cpu", limit="1GiB")
        model = two_layers(weights())
        outputs = []
        for pool in (device, host, device):
            options = ort.SessionOptions()
            pool.attach(options)
            session = ort.InferenceSession(model, options, providers=pool.providers)
            before = pool.stats().allocations
            outputs.append(session.run(None, {"x": rows(50)})[0])
            assert pool.stats().allocations > before
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-2, atol=1e-2)
        np.testing.assert_array_equal(outputs[0], outputs[2])
        print("ran", flush=True)
        """
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_a_child_of_fork_that_drops_the_handle_does_no_harm():
    done = run(
        """
        import os
        from glake_infer.allocators import GlakeError, Pool
        pool = Pool("cuda:0", limit="64MiB")
        held = pool.allocate(3 << 20)
        child = os.fork()
        if child == 0:
            del pool  # its copy: no error, no hang
            try:
                Pool("cuda:0", limit="64MiB")
            except GlakeError:
                os._exit(7)
            os._exit(8)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        assert pool.stats().active >= 3 << 20
        pool.deallocate(held)
        pool.close()
        """
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
