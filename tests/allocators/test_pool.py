"""The handle of a device's pool (pool.py)."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from conformance import MiB, fill
from memory import file_of_bytes

from glake_infer.allocators import (
    DeviceNotFoundError,
    GlakeError,
    InputError,
    InvalidPointerError,
    MissingDependencyError,
    OutOfMemoryError,
    Pool,
    PoolClosedError,
    PoolExistsError,
    PoolInUseError,
    PoolStats,
    _native,
    cpu_memory,
)
from glake_infer.allocators import pool as pool_module


def test_the_default_limit_is_the_memory_there_is():
    with Pool() as pool:
        assert pool.limit == cpu_memory() > 0
        assert pool.device == "cpu"
        assert pool.providers == ["CPUExecutionProvider"]


@pytest.mark.parametrize(("limit", "size"), [("64MiB", 64 * MiB), (10**8, 10**8), ("0.5GB", 5 * 10**8)])
def test_a_limit_can_be_text_or_bytes(limit, size):
    with Pool(limit=limit) as pool:
        assert pool.limit == size


@pytest.mark.parametrize("limit", [0, "0B", -1, "-1MiB", "lots", "4G", 1.5, True, b"4GiB"])
def test_a_bad_limit_is_refused_and_leaves_no_pool(limit):
    with pytest.raises(InputError):
        Pool(limit=limit)
    assert Pool.current() is None


def test_stats_are_a_frozen_snapshot_of_all_the_core_counts(pool):
    stats = pool.stats()
    assert isinstance(stats, PoolStats)
    assert set(dataclasses.asdict(stats)) == set(_native.host_pool().stats())
    assert stats.reserved == stats.active + stats.idle == 0
    assert stats.limit == 2**30
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.active = 1


def test_allocate_and_deallocate(pool):
    address = pool.allocate("3MiB", tag="weights")
    fill(address, 3 * MiB, 1)
    assert pool.stats().weights == pool.stats().active == 3 * MiB
    pool.deallocate(address)
    with pytest.raises(InvalidPointerError):
        pool.deallocate(address)
    assert pool.trim() == 3 * MiB
    assert "0 B active, 0 B idle, limit 1.0 GiB" in repr(pool)


def test_the_limit_can_be_changed(pool):
    kept = pool.allocate(8 * MiB)
    pool.deallocate(pool.allocate(20 * MiB))
    pool.limit = "10MiB"
    assert pool.limit == 10 * MiB
    assert pool.stats().reserved == 8 * MiB
    with pytest.raises(OutOfMemoryError):
        pool.allocate(3 * MiB)
    with pytest.raises(PoolInUseError):
        pool.limit = 1
    assert pool.limit == 10 * MiB
    pool.limit = None
    assert pool.limit == cpu_memory()
    pool.deallocate(kept)


def test_map_file_takes_the_whole_file_unless_told(pool, tmp_path):
    with file_of_bytes(tmp_path / "weights", 5000).open("rb") as file:
        whole, part = pool.map_file(file.fileno()), pool.map_file(file.fileno(), 4096)
    assert pool.stats().mapped_files == 3 * 4096
    pool.unmap_file(whole)
    pool.unmap_file(part)


def test_trim_takes_a_target(pool):
    pool.deallocate(pool.allocate(8 * MiB))
    assert pool.trim("8MiB") == 0
    assert pool.trim(0) == 8 * MiB
    with pytest.raises(InputError):
        pool.trim("some")


class TestOnePerDevice:
    def test_a_second_handle_is_refused(self, pool):
        with pytest.raises(PoolExistsError, match=r"Pool.current\('cpu'\) gives it; close\(\) it first"):
            Pool(device="cpu")
        assert Pool.current("cpu") is pool
        assert pool.limit == 2**30

    def test_current_is_none_without_an_open_handle(self):
        assert Pool.current() is None
        pool = Pool(limit="1GiB")
        assert Pool.current() is pool
        pool.close()
        assert Pool.current() is None
        with Pool(limit="2GiB") as other:
            assert Pool.current() is other
            assert other.limit == 2**31

    def test_a_dropped_handle_gives_idle_memory_back(self):
        pool = Pool(limit="1GiB")
        pool.deallocate(pool.allocate(5 * MiB))
        native = _native.host_pool()
        assert native.stats()["idle"] == 5 * MiB
        del pool
        gc.collect()
        assert native.stats()["reserved"] == 0
        assert Pool.current() is None

    def test_the_next_handle_takes_over_what_is_still_active(self):
        pool = Pool(limit="1GiB")
        address = pool.allocate(5 * MiB)
        del pool
        gc.collect()
        with pytest.raises(PoolInUseError, match=r"5\.0 MiB"):
            Pool(limit="4MiB")
        assert Pool.current() is None
        with Pool(limit="6MiB") as pool:
            assert pool.stats().active == pool.stats().peak_active == 5 * MiB
            pool.deallocate(address)

    def test_threads_that_race_make_one(self):
        made, refused = [], []
        barrier = threading.Barrier(8)

        def make() -> None:
            barrier.wait()
            try:
                made.append(Pool(limit="1GiB"))
            except PoolExistsError as error:
                refused.append(error)

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(made), len(refused)) == (1, 7)
        made[0].close()


class TestClose:
    def test_a_pool_in_use_stays_open(self, pool):
        address = pool.allocate(2 * MiB, "weights")
        with pytest.raises(
            PoolInUseError, match=r"2\.0 MiB \(2097152 bytes\) are active, 2\.0 MiB of them weights"
        ):
            pool.close()
        pool.deallocate(address)
        pool.close()

    def test_a_closed_pool_says_so(self):
        pool = Pool(limit="1GiB")
        pool.deallocate(pool.allocate(MiB))
        pool.close()
        pool.close()
        assert _native.host_pool().stats()["reserved"] == 0
        for use in (
            pool.stats,
            pool.trim,
            pool.check_invariants,
            lambda: pool.allocate(1),
            lambda: pool.limit,
        ):
            with pytest.raises(PoolClosedError, match="make another"):
                use()
        with pytest.raises(PoolClosedError):
            pool.attach(object())
        assert repr(pool) == "<Pool on 'cpu', closed>"

    def test_leaving_the_block_does_not_hide_another_error(self):
        address = 0
        with pytest.raises(KeyError), Pool(limit="1GiB") as pool:  # noqa: PT012
            address = pool.allocate(MiB)
            raise KeyError
        pool.deallocate(address)
        pool.close()

    def test_leaving_the_block_with_memory_in_use_is_an_error(self):
        with pytest.raises(PoolInUseError), Pool(limit="1GiB") as pool:
            address = pool.allocate(MiB)
        pool.deallocate(address)
        pool.close()


@pytest.mark.parametrize("device", ["banana", "CPU", "cuda:x", "cuda:", "cuda:-1", "", None, 0])
def test_a_device_that_is_no_device(device):
    with pytest.raises(DeviceNotFoundError, match="'cpu'"):
        Pool(device=device)
    with pytest.raises(GlakeError):
        Pool.current(device)


class TestOnCuda:
    """What Python does for a CUDA device; the memory behind it is the host's here (tests/gpu has real devices)."""

    TOTAL = 8 * 2**30

    @pytest.fixture
    def device(self, monkeypatch):
        opened = {}
        monkeypatch.setattr(pool_module, "parse_device", lambda name: name)
        monkeypatch.setattr(pool_module, "_devices", set(pool_module._devices))
        monkeypatch.setattr(_native, "device_memory", lambda name: self.TOTAL)
        monkeypatch.setattr(
            _native, "device_pool", lambda name: opened.setdefault(name, _native.Pool(self.TOTAL))
        )
        return "cuda:3"

    def test_the_default_limit_is_the_devices_memory(self, device):
        with Pool(device) as pool:
            assert (pool.device, pool.limit) == ("cuda:3", self.TOTAL)
            pool.limit = "1GiB"
            pool.limit = None
            assert pool.limit == self.TOTAL

    @pytest.mark.parametrize("limit", ["9GiB", 8 * 2**30 + 1])
    def test_a_limit_above_the_devices_memory_names_both_figures(self, device, limit):
        with pytest.raises(InputError, match=r"'cuda:3' has 8\.0 GiB \(8589934592 bytes\)") as caught:
            Pool(device, limit)
        assert str(9 * 2**30 if limit == "9GiB" else limit) in str(caught.value)
        assert Pool.current(device) is None
        with Pool(device, self.TOTAL) as pool:
            with pytest.raises(InputError, match="Choose a limit of at most that"):
                pool.limit = limit
            assert pool.limit == self.TOTAL

    def test_devices_have_pools_of_their_own(self, device, pool):
        with Pool("cuda:0") as first, Pool("cuda:1") as second:
            address = first.allocate(MiB)
            assert (first.stats().allocations, second.stats().allocations) == (1, 0)
            assert (Pool.current("cuda:0"), Pool.current("cuda:1"), Pool.current()) == (first, second, pool)
            with pytest.raises(PoolExistsError, match="'cuda:1'"):
                Pool("cuda:1")
            first.deallocate(address)

    def test_an_onnxruntime_without_cuda_names_the_commands(self, device, monkeypatch):
        ort = pytest.importorskip("onnxruntime")
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
        options = ort.SessionOptions()
        with Pool(device) as pool:
            for use in (lambda: pool.providers, lambda: pool.attach(options)):
                with pytest.raises(MissingDependencyError) as caught:
                    use()
                assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(caught.value)
                assert "pip install 'glake-infer[cuda]'" in str(caught.value)
        with pytest.raises(Exception, match="use_env_allocators"):  # the options were left alone
            options.get_session_config_entry("session.use_env_allocators")

    @pytest.mark.parametrize("version", ["1.24.0", "1.26.9"])
    def test_an_onnxruntime_for_cuda_12_is_refused_with_the_reason(self, device, monkeypatch, version):
        ort = pytest.importorskip("onnxruntime")
        monkeypatch.setattr(ort, "__version__", version)
        with Pool(device) as pool, pytest.raises(MissingDependencyError, match=r"1\.27 or newer.*CUDA 12"):
            pool.providers  # noqa: B018

    def test_the_providers_name_the_device(self, device, monkeypatch):
        ort = pytest.importorskip("onnxruntime")
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        with Pool(device) as pool:
            first = pool.providers
            assert first == [("CUDAExecutionProvider", {"device_id": 3}), "CPUExecutionProvider"]
            first[0][1]["use_tf32"] = 0
            assert pool.providers[0][1] == {"device_id": 3}


class TestStream:
    class Torch:
        cuda_stream = 77

    class Cupy:
        ptr = 78

    class Protocol:
        ptr = cuda_stream = 5  # the protocol comes first

        def __cuda_stream__(self):
            return (0, 79)

    class OldProtocol:
        __cuda_stream__ = (0, 80)

    @pytest.mark.parametrize(
        ("stream", "handle"),
        [
            (None, -1),
            (0, 0),
            (2**47, 2**47),
            (Torch(), 77),
            (Cupy(), 78),
            (Protocol(), 79),
            (OldProtocol(), 80),
        ],
    )
    def test_a_stream_is_known_by_its_handle(self, pool, monkeypatch, stream, handle):
        seen = []
        monkeypatch.setattr(
            pool, "_pool", SimpleNamespace(allocate=lambda *arguments: seen.append(arguments) or 4096)
        )
        assert pool.allocate("1KiB", "weights", stream) == 4096
        monkeypatch.undo()
        assert seen == [(1024, "weights", handle)]

    @pytest.mark.parametrize("stream", [-1, True, "0", 1.0, object(), 2**63, SimpleNamespace(ptr=None)])
    def test_what_is_no_stream_is_refused(self, pool, stream):
        with pytest.raises(InputError, match="is no CUDA stream"):
            pool.allocate(10, stream=stream)

    def test_the_host_ignores_it(self, pool):
        address = pool.allocate(3 * MiB, stream=77)
        fill(address, 3 * MiB, 1)
        pool.deallocate(address)


class TestLabel:
    @pytest.fixture
    def labels(self, monkeypatch):
        seen = []
        real = _native.set_label
        monkeypatch.setattr(_native, "set_label", lambda name: (seen.append(name), real(name)))
        return seen

    def test_labels_nest_and_end(self, pool, labels):
        with pool.label("bert"):
            with pool.label("head"):
                pool.deallocate(pool.allocate(10))
            assert labels == ["bert", "head", "bert"]
        assert labels == ["bert", "head", "bert", ""]

    def test_an_error_ends_the_label(self, pool, labels):
        with pytest.raises(KeyError), pool.label("bert"):
            raise KeyError
        assert labels == ["bert", ""]

    def test_each_thread_has_its_own(self, pool, labels):
        def work() -> None:
            with pool.label("theirs"):
                pass

        with pool.label("mine"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert labels == ["mine", "theirs", "", ""]

    @pytest.mark.parametrize("name", ["", None, 5])
    def test_what_is_no_name_is_refused(self, pool, labels, name):
        with pytest.raises(InputError, match="a label is a text"), pool.label(name):
            pass
        assert labels == []


def test_a_child_of_fork_is_told(pool):
    child = os.fork()
    if child == 0:
        code = 0
        for use in (pool.trim, lambda: Pool(limit="1GiB"), lambda: pool.allocate(10)):
            try:
                use()
                code = 1
            except GlakeError as error:
                if "spawn" not in str(error):
                    code = 2
        pool.close()  # nothing to do, and no error
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pool.deallocate(pool.allocate(10))


def test_an_exit_with_live_memory_is_clean():
    code = """
from glake_infer.allocators import Pool
pool = Pool(limit="1GiB")
addresses = [pool.allocate(size) for size in (10, 100_000, 10_000_000)]
pool.deallocate(addresses.pop())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
