"""Files straight to a device, with a kvikio of ours that writes to host memory. tests/gpu has the real one."""

import ctypes
import os
import random
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from glake_infer.allocators import _native
from glake_infer.transfers import storage
from glake_infer.transfers.device import GAP, CancelledError, CudaTransfers, Part, Step
from glake_infer.transfers.settings import configure_transfers, transfer_settings
from glake_infer.transfers.storage import LEAST


class FakeFile:
    """A kvikio.CuFile: reads in threads; `hold` keeps them from it, `short` bytes are missing."""

    threads = ThreadPoolExecutor(4)
    hold = threading.Event()
    short = 0
    opened: list[str] = []  # noqa: RUF012

    def __init__(self, path, flags):
        assert flags == "r"
        self.opened.append(path)
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)

    def pread(self, memory, *, size, file_offset):
        address, read_only = memory.__cuda_array_interface__["data"]
        assert memory.__cuda_array_interface__["shape"] == (size,)
        assert not read_only

        def read():
            assert self.hold.wait(10)
            data = os.pread(self.fd, size - self.short, file_offset)
            ctypes.memmove(address, data, len(data))
            return len(data)

        future = self.threads.submit(read)
        return types.SimpleNamespace(done=future.done, get=future.result)


@pytest.fixture
def kvikio(monkeypatch):
    made = type("CuFile", (FakeFile,), {"opened": [], "hold": threading.Event()})
    made.hold.set()
    monkeypatch.setattr(storage, "kvikio", lambda: types.SimpleNamespace(CuFile=made))
    monkeypatch.setattr(storage, "is_direct", lambda: True)
    monkeypatch.setattr(storage, "is_cached", lambda path, offset: False)
    before = transfer_settings()
    yield made
    configure_transfers(direct_storage=before.direct_storage)


@pytest.fixture
def device():
    engine = _native.TransferEngine.on_host(2, 1 << 20, 8 << 20, GAP)
    engine.add_host_path(0, "memory")
    made = CudaTransfers.__new__(CudaTransfers)
    super(CudaTransfers, made).__init__(engine, 0)
    made._prepared = made._told_of_locks = True
    made._relays = types.SimpleNamespace(ready=lambda: 0)
    return made


@pytest.fixture
def parts(tmp_path):
    """Two large parts of one file and a small one of another, and what memory holds once they are there."""
    data = random.Random(0).randbytes(3 * LEAST + 5)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:1000])
    memory = ctypes.create_string_buffer(4 * LEAST)
    address = ctypes.addressof(memory)
    found = [
        Part(tmp_path / "a", 0, LEAST, address),
        Part(tmp_path / "b", 0, 1000, address + LEAST),
        Part(tmp_path / "a", LEAST + 7, 2 * LEAST - 7, address + 2 * LEAST),
    ]
    return found, memory, (data[:LEAST], data[:1000], data[LEAST + 7 : 3 * LEAST])


def bring(device, parts, **options):
    device.bring([Step(parts)], sum(p.size for p in parts), **options)


def check(parts, memory, expected):
    start = ctypes.addressof(memory)
    for part, data in zip(parts, expected, strict=True):
        assert memory.raw[part.address - start :][: part.size] == data


def test_large_parts_go_straight_and_small_ones_by_the_engine(device, kvikio, parts):
    bring(device, parts[0])
    check(*parts)
    assert [os.path.basename(p) for p in kvikio.opened] == ["a"]  # noqa: PTH119


@pytest.mark.parametrize("why", ["never", "not direct", "cached", "not installed"])
def test_the_engine_brings_all_otherwise(device, kvikio, parts, monkeypatch, why):
    if why == "never":
        configure_transfers(direct_storage="never")
    elif why == "not direct":
        monkeypatch.setattr(storage, "is_direct", lambda: False)
    elif why == "cached":
        monkeypatch.setattr(storage, "is_cached", lambda path, offset: True)
    else:
        monkeypatch.setattr(storage, "kvikio", lambda: None)
    bring(device, parts[0])
    check(*parts)
    assert kvikio.opened == []


def test_always_takes_what_is_not_direct_too(device, kvikio, parts, monkeypatch):
    monkeypatch.setattr(storage, "is_direct", lambda: False)
    configure_transfers(direct_storage="always")
    bring(device, parts[0])
    check(*parts)
    assert kvikio.opened


def test_a_file_that_ends_early_or_is_gone_is_named(device, kvikio, parts):
    kvikio.short = 3
    with pytest.raises(OSError, match="ends 3 bytes early") as caught:
        bring(device, parts[0])
    assert caught.value.filename == str(parts[0][0].path)
    kvikio.short = 0
    parts[0][0].path.unlink()
    with pytest.raises(FileNotFoundError):
        bring(device, parts[0])


def test_cancelling_waits_for_what_has_begun(device, kvikio, parts):
    kvikio.hold.clear()
    threading.Timer(0.2, kvikio.hold.set).start()
    with pytest.raises(CancelledError):
        bring(device, parts[0], cancelled=lambda: True)
    assert kvikio.hold.is_set()


def test_progress_counts_both(device, kvikio, parts):
    seen = []
    bring(device, parts[0], progress=lambda done, total: seen.append((done, total)))
    total = sum(p.size for p in parts[0])
    assert seen[-1] == (total, total)


def test_what_the_page_cache_has(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(bytes(10000))
    file.read_bytes()
    assert storage.is_cached(file, 0)
    assert not storage.is_cached(file, 20000)
    assert not storage.is_cached(tmp_path / "no", 0)
    assert storage.kvikio() is None or hasattr(storage.kvikio(), "CuFile")


def test_memory_that_cannot_be_page_locked_is_told_once(device, kvikio, parts, caplog):
    configure_transfers(direct_storage="never")
    device._told_of_locks = False
    for _ in range(2):
        bring(device, parts[0])
    check(*parts)
    assert [record.message.count("ulimit -l") for record in caplog.records] == [1]
