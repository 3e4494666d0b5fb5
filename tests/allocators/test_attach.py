"""Real ONNX Runtime sessions on the pool (attach.py, ort_attach.cpp)."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path

import numpy as np
import processes
import pytest
from conformance import MiB
from memory import file_of_bytes, smaps
from ort_c_api import Struct
from tiny import HIDDEN, rows, two_layers, weights

from glake_infer.allocators import (
    GlakeError,
    Initializer,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    Pool,
    _native,
    import_onnxruntime,
)

ort = pytest.importorskip("onnxruntime")
FLOAT = 1

WEIGHTS = weights()
ROWS = rows(500)


def plain(model: bytes, values: np.ndarray, options=None) -> np.ndarray:
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": values})[
        0
    ]


def unpacked() -> ort.SessionOptions:
    """Options under which ONNX Runtime uses injected weights as they lie, without a copy."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 4  # runs that fail on purpose
    return options


def copy_into(pool: Pool, values: dict[str, np.ndarray]) -> list[Initializer]:
    injected = []
    for name, value in values.items():
        address = pool.allocate(value.nbytes, "weights")
        ctypes.memmove(address, value.ctypes.data, value.nbytes)
        injected.append(Initializer(name, address, value.nbytes, FLOAT, value.shape))
    return injected


def release(pool: Pool, injected: list[Initializer]) -> None:
    gc.collect()
    for initializer in injected:
        pool.deallocate(initializer.address)


class TestSession:
    @pytest.mark.parametrize("arena", [True, False])
    @pytest.mark.parametrize("pattern", [True, False])
    def test_activations_come_from_the_pool_and_outputs_are_equal(self, pool, arena, pattern):
        model = two_layers(WEIGHTS)
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = arena
        options.enable_mem_pattern = pattern
        pool.attach(options)
        session = ort.InferenceSession(model, options, providers=pool.providers)
        before = pool.stats()
        output = session.run(None, {"x": ROWS})[0]
        np.testing.assert_array_equal(output, plain(model, ROWS))
        after = pool.stats()
        assert after.allocations > before.allocations
        assert after.peak_active >= before.active + 500 * HIDDEN * 4
        pool.check_invariants()
        del session, output
        gc.collect()
        assert pool.stats().active == 0

    def test_prepacked_weights_count_as_weights(self, pool):
        options = ort.SessionOptions()
        pool.attach(options)
        session = ort.InferenceSession(two_layers(WEIGHTS), options, providers=pool.providers)
        assert pool.stats().weights == pool.stats().active >= 4 * MiB
        del session

    def test_repeated_runs_make_no_system_calls_for_memory(self, pool):
        options = ort.SessionOptions()
        pool.attach(options)
        session = ort.InferenceSession(two_layers(WEIGHTS), options, providers=pool.providers)
        for _ in range(3):
            session.run(None, {"x": ROWS})
        before = pool.stats()
        for _ in range(50):
            session.run(None, {"x": ROWS})
        after = pool.stats()
        assert after.driver_calls == before.driver_calls
        assert after.reserved == before.reserved
        assert after.allocations > before.allocations

    def test_a_session_that_is_not_attached_stays_outside(self, pool):
        plain(two_layers(WEIGHTS), ROWS)
        assert pool.stats().allocations == _native.host_pool().stats()["allocations"]
        before = pool.stats().allocations
        plain(two_layers(WEIGHTS), ROWS)
        assert pool.stats().allocations == before

    def test_options_make_several_sessions(self, pool):
        options = ort.SessionOptions()
        pool.attach(options)
        models = [two_layers(weights(seed)) for seed in range(3)]
        sessions = [ort.InferenceSession(model, options, providers=pool.providers) for model in models]
        for session, model in zip(sessions, models, strict=True):
            np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], plain(model, ROWS))
        del session, sessions

    def test_sessions_of_all_shapes_at_once_from_four_threads(self, pool):
        models = [two_layers(weights(seed)) for seed in range(2)]
        expected = [[plain(model, rows(count)) for count in (1, 7, 64, 300)] for model in models]
        sessions = []
        for model in models:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            pool.attach(options)
            sessions.append(ort.InferenceSession(model, options, providers=pool.providers))
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for step in range(40):
                    which, shape = (step + seed) % 2, (step * 3 + seed) % 4
                    output = sessions[which].run(None, {"x": rows((1, 7, 64, 300)[shape])})[0]
                    np.testing.assert_allclose(output, expected[which][shape], rtol=1e-4, atol=1e-4)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        pool.check_invariants()
        sessions.clear()

    def test_the_session_outlives_the_handle(self):
        model = two_layers(WEIGHTS)
        pool = Pool(limit="1GiB")
        options = ort.SessionOptions()
        pool.attach(options)
        session = ort.InferenceSession(model, options, providers=pool.providers)
        del pool, options
        gc.collect()
        assert Pool.current() is None
        np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], plain(model, ROWS))
        with Pool(limit="2GiB") as pool:
            assert pool.stats().active > 0
            session.run(None, {"x": ROWS})
            del session
            gc.collect()

    def test_an_output_outlives_its_session(self, pool):
        model = two_layers(WEIGHTS)
        options = ort.SessionOptions()
        pool.attach(options)
        session = ort.InferenceSession(model, options, providers=pool.providers)
        output = session.run_with_ort_values(["y"], {"x": ort.OrtValue.ortvalue_from_numpy(ROWS)})[0]
        del session, options
        gc.collect()
        pool.trim()
        assert pool.stats().active >= ROWS.nbytes
        np.testing.assert_array_equal(output.numpy(), plain(model, ROWS))
        del output
        assert pool.stats().active == 0  # freed through the same allocator, without its session

    def test_an_output_outlives_its_session_and_the_handle(self):
        model = two_layers(WEIGHTS)
        pool = Pool(limit="1GiB")
        options = ort.SessionOptions()
        pool.attach(options)
        session = ort.InferenceSession(model, options, providers=pool.providers)
        output = session.run_with_ort_values(["y"], {"x": ort.OrtValue.ortvalue_from_numpy(ROWS)})[0]
        del session, options, pool
        gc.collect()
        np.testing.assert_array_equal(output.numpy(), plain(model, ROWS))
        with Pool(limit="1GiB") as pool:
            assert pool.stats().active >= ROWS.nbytes
            del output
            assert pool.stats().active == 0

    def test_the_options_say_what_was_set(self, pool):
        options = ort.SessionOptions()
        pool.attach(options)
        assert options.get_session_config_entry("session.use_env_allocators") == "1"
        assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"

    def test_the_allocator_is_registered_once_per_process(self, pool):
        pool.attach(ort.SessionOptions())
        address = _native.ort_allocator()
        info = Struct.from_address(address).Info(address)
        assert info
        pool.attach(ort.SessionOptions())
        assert Struct.from_address(address).Info(address) == info


class TestOutOfMemory:
    def test_a_run_that_does_not_fit_raises_and_the_next_one_works(self, pool):
        model = two_layers(WEIGHTS)
        options = unpacked()
        pool.attach(options)
        session = ort.InferenceSession(model, options, providers=pool.providers)
        reference = plain(model, ROWS, unpacked())
        held = pool.stats().active  # weights, with some versions of ONNX Runtime
        pool.limit = held + 2 * MiB
        before = pool.failure_count
        with pytest.raises(Exception, match=r"\[glake-infer failure \d+\] out of memory") as caught:
            session.run(None, {"x": ROWS})
        reason = pool.explain(caught.value)
        assert isinstance(reason, OutOfMemoryError)
        assert reason.requested == 500 * HIDDEN * 4
        assert reason.limit == held + 2 * MiB
        assert [failure.sequence for failure in pool.failures(before)] == [reason.sequence]
        pool.check_invariants()
        assert pool.stats().active == held
        del caught

        tried = 0
        while True:  # what each error names as needed is what it takes
            pool.limit = reason.needed_limit
            try:
                output = session.run(None, {"x": ROWS})[0]
                break
            except Exception as error:
                again = pool.explain(error)
                assert again.needed_limit > reason.needed_limit
                reason = again
                tried += 1
                assert tried < 10
        np.testing.assert_array_equal(output, reference)
        del session, output

    def test_a_session_that_does_not_fit_raises(self, pool):
        pool.limit = MiB
        options = ort.SessionOptions()
        options.log_severity_level = 4
        pool.attach(options)
        with pytest.raises(Exception, match="glake-infer failure") as caught:
            ort.InferenceSession(two_layers(WEIGHTS), options, providers=pool.providers)
        assert pool.explain(caught.value).limit == MiB
        del caught
        gc.collect()
        assert pool.stats().active == 0

    def test_failures_under_threads_leave_the_pool_whole(self, pool):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        pool.attach(options)
        session = ort.InferenceSession(two_layers(WEIGHTS), options, providers=pool.providers)
        session.run(None, {"x": ROWS})
        pool.limit = pool.stats().active + 6 * MiB
        done: list[int] = []
        unexplained: list[Exception] = []

        def work(session: ort.InferenceSession) -> None:
            for step in range(20):
                try:
                    session.run(None, {"x": ROWS})
                except Exception as error:
                    if "glake-infer failure" not in str(error):
                        unexplained.append(error)
                done.append(step)

        threads = [threading.Thread(target=work, args=(session,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(done), unexplained) == (80, [])
        pool.check_invariants()
        del session, threads


class TestInitializers:
    def test_injected_weights_are_used_where_they_lie(self, pool):
        injected = copy_into(pool, WEIGHTS)
        zeros = {name: np.zeros_like(value) for name, value in WEIGHTS.items()}
        options = unpacked()
        owner = pool.attach(options, injected)
        assert len(owner) == 2
        session = ort.InferenceSession(two_layers(zeros), options, providers=pool.providers)
        reference = plain(two_layers(WEIGHTS), ROWS, unpacked())
        np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], reference)
        # Their bytes are read at every run: the session has no copy.
        ctypes.memset(injected[1].address, 0, injected[1].bytes)
        assert not session.run(None, {"x": ROWS})[0].any()
        ctypes.memmove(injected[1].address, WEIGHTS["w2"].ctypes.data, injected[1].bytes)
        np.testing.assert_array_equal(session.run(None, {"x": ROWS})[0], reference)
        del session
        owner.close()
        owner.close()
        assert len(owner) == 2
        release(pool, injected)

    def test_sessions_share_one_copy(self, pool):
        injected = copy_into(pool, WEIGHTS)
        alone = pool.stats().active
        zeros = two_layers({name: np.zeros_like(value) for name, value in WEIGHTS.items()})
        sessions = []
        for _ in range(3):
            options = unpacked()
            pool.attach(options, injected)
            sessions.append(ort.InferenceSession(zeros, options, providers=pool.providers))
        assert pool.stats().active == alone
        outputs = [session.run(None, {"x": ROWS})[0] for session in sessions]
        for output in outputs:
            np.testing.assert_array_equal(output, plain(two_layers(WEIGHTS), ROWS, unpacked()))
        sessions.clear()
        del outputs, output, options
        release(pool, injected)

    def test_weights_can_be_mapped_from_a_file(self, pool, tmp_path):
        path = tmp_path / "w1"
        WEIGHTS["w1"].tofile(path)
        with path.open("rb") as file:
            address = pool.map_file(file.fileno())
        injected = [Initializer("w1", address, WEIGHTS["w1"].nbytes, FLOAT, WEIGHTS["w1"].shape)]
        model = two_layers({**WEIGHTS, "w1": np.zeros_like(WEIGHTS["w1"])})
        sessions = []
        for _ in range(2):
            options = unpacked()
            pool.attach(options, injected)
            sessions.append(ort.InferenceSession(model, options, providers=pool.providers))
        for session in sessions:
            np.testing.assert_array_equal(
                session.run(None, {"x": ROWS})[0], plain(two_layers(WEIGHTS), ROWS, unpacked())
            )
        assert smaps(str(path))["Rss"] == WEIGHTS["w1"].nbytes
        sessions.clear()
        del session, options
        gc.collect()
        pool.unmap_file(address)

    def test_dropping_the_owner_early_does_no_harm(self, pool):
        injected = copy_into(pool, WEIGHTS)
        zeros = two_layers({name: np.zeros_like(value) for name, value in WEIGHTS.items()})
        options = unpacked()
        pool.attach(options, injected)  # the result is dropped
        gc.collect()
        session = ort.InferenceSession(zeros, options, providers=pool.providers)
        np.testing.assert_array_equal(
            session.run(None, {"x": ROWS})[0], plain(two_layers(WEIGHTS), ROWS, unpacked())
        )
        del session, options
        release(pool, injected)

    def test_a_weight_injected_twice_is_refused(self, pool):
        injected = copy_into(pool, {"w1": WEIGHTS["w1"]})
        with pytest.raises(GlakeError, match=r"weight 'w1' could not be injected: .*already been added"):
            pool.attach(unpacked(), [*injected, *injected])
        release(pool, injected)

    def test_a_weight_with_too_few_bytes_is_refused(self, pool):
        with pytest.raises(GlakeError, match="weight 'w1' could not be described"):
            pool.attach(unpacked(), [("w1", 4096, 5, FLOAT, (2, 2))])
        with pytest.raises(Exception, match="not registered by hand"):  # the request does not linger
            ort.SessionOptions().register_custom_ops_library(_native.__file__)
        assert len(pool.attach(unpacked())) == 0


class TestBadUse:
    def test_registering_the_library_by_hand_is_refused(self, pool):
        with pytest.raises(Exception, match=r"not registered by hand. Use .*attach"):
            ort.SessionOptions().register_custom_ops_library(_native.__file__)

    @pytest.mark.parametrize("thing", [None, "options", 5])
    def test_what_is_no_options_is_refused(self, pool, thing):
        with pytest.raises(InputError, match=r"takes an onnxruntime\.SessionOptions"):
            pool.attach(thing)

    def test_a_session_is_refused_with_the_reason(self, pool):
        session = ort.InferenceSession(two_layers(WEIGHTS), providers=["CPUExecutionProvider"])
        with pytest.raises(InputError, match="attach its options before making it"):
            pool.attach(session)

    @pytest.mark.parametrize(("extra", "gpu"), [("cpu", False), ("cuda", True)])
    def test_a_missing_onnxruntime_names_the_command(self, monkeypatch, extra, gpu):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(Path, "exists", lambda self: gpu if str(self) == "/dev/nvidia0" else True)
        with pytest.raises(MissingDependencyError) as caught:
            import_onnxruntime()
        assert f"pip install 'glake-infer[{extra}]'" in str(caught.value)
        assert isinstance(caught.value, ImportError)

    @pytest.mark.parametrize("version", ["1.23.2", "0.9", "", "odd"])
    def test_an_old_onnxruntime_is_refused(self, monkeypatch, version):
        monkeypatch.setattr(ort, "__version__", version)
        with pytest.raises(MissingDependencyError, match=r"1\.24 or newer is needed"):
            import_onnxruntime()

    @pytest.mark.parametrize("version", ["1.24.0", "1.100", "2.0.0", ort.__version__])
    def test_a_newer_onnxruntime_is_taken(self, monkeypatch, version):
        monkeypatch.setattr(ort, "__version__", version)
        assert import_onnxruntime() is ort


def test_the_interpreter_exits_cleanly_with_a_live_session():
    done = processes.run(
        """
        import ctypes, onnxruntime as ort
        from glake_infer.allocators import Initializer, Pool
        from tiny import rows, two_layers, weights
        values = weights()
        pool = Pool(limit="1GiB")
        address = pool.allocate(values["w1"].nbytes)
        ctypes.memmove(address, values["w1"].ctypes.data, values["w1"].nbytes)
        options = ort.SessionOptions()
        owner = pool.attach(options, [Initializer("w1", address, values["w1"].nbytes, 1, values["w1"].shape)])
        session = ort.InferenceSession(two_layers(values), options, providers=pool.providers)
        kept = session.run(None, {"x": rows(10)})
        value = session.run_with_ort_values(["y"], {"x": ort.OrtValue.ortvalue_from_numpy(rows(3))})
        print("ran")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_a_child_of_fork_gets_an_error_from_its_session():
    done = processes.run(
        """
        import os, onnxruntime as ort
        from glake_infer.allocators import Pool
        from tiny import rows, two_layers, weights
        pool = Pool(limit="1GiB")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        pool.attach(options)
        session = ort.InferenceSession(two_layers(weights()), options, providers=pool.providers)
        session.run(None, {"x": rows(10)})
        child = os.fork()
        if child == 0:
            try:
                session.run(None, {"x": rows(10)})
            except Exception as error:
                os._exit(7 if "'spawn' or 'forkserver'" in str(error) else 8)
            os._exit(9)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        session.run(None, {"x": rows(10)})
        pool.check_invariants()
        """
    )
    assert done.stdout == "7\n", done.stderr


def test_the_file_that_backs_a_mapping_is_not_held_open(pool, tmp_path):
    path = file_of_bytes(tmp_path / "weights", 4096)
    with path.open("rb") as file:
        address = pool.map_file(file.fileno())
    targets = {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    assert str(path) not in targets
    pool.unmap_file(address)
