"""Transfers of files to memory: on the host, and with a CUDA driver that copies only when its stream is waited for.

tests/gpu has the real driver.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import random
import threading
import time
import types

import pytest

import glake_infer as gi
from glake_infer import cuda, transfers
from glake_infer.transfers import GAP, PIECE, READERS, CudaTransfers, HostTransfers, Part

KiB, MiB = 1 << 10, 1 << 20
DIRTY = 0xA5
SMALL = 64 * KiB
"""What PIECE is in tests of many pieces."""


class Driver:
    """Answers like cuda.bindings.driver, on host memory. A copy is made when its stream is waited for, no earlier.

    `fail`: {call: which one of them, from 0, is to fail}. What is wrong in itself is in `problems`.
    """

    CUstream_flags = types.SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self):
        self.fail, self.counts, self.problems = {}, {}, []
        self.pinned = {}  # address -> its memory
        self.streams = {}  # handle -> queued copies: (target, source, bytes)
        self.copies = []  # (device address, bytes) of copies to the device
        self.contexts = threading.local()
        self._lock = threading.Lock()
        self._handles = itertools.count(100)

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            with self._lock:
                number = self.counts[name] = self.counts.get(name, -1) + 1
                failed = self.fail.get(name) == number
                code = types.SimpleNamespace(value=2 if failed else 0, name="CUDA_ERROR_OUT_OF_MEMORY")
                return (code, None) if failed else (code, getattr(self, f"_{name}", lambda *_: 0)(*arguments))

        return call

    def _cuCtxPushCurrent(self, context):
        self.contexts.depth = getattr(self.contexts, "depth", 0) + 1

    def _cuCtxPopCurrent(self):
        self.contexts.depth -= 1

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.contexts.mode = getattr(self.contexts, "mode", 0), mode
        return before

    def _cuStreamCreate(self, flag):
        handle = next(self._handles)
        self.streams[handle] = []
        return handle

    def _cuStreamDestroy(self, stream):
        if self.streams.pop(stream):
            self.problems.append("a stream was destroyed with copies queued")

    def _cuStreamSynchronize(self, stream):
        if getattr(self.contexts, "mode", 0) != 2:
            self.problems.append("waited where a capture could break")
        for target, source, size in self.streams[stream]:
            ctypes.memmove(target, source, size)
        self.streams[stream].clear()

    def _cuMemHostAlloc(self, size, flags):
        memory = ctypes.create_string_buffer(size)
        self.pinned[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _cuMemFreeHost(self, address):
        size = len(self.pinned.pop(address))
        for copies in self.streams.values():
            if any(address <= place < address + size for copy in copies for place in copy[:2]):
                self.problems.append("pinned memory was freed with copies queued")

    def _cuMemcpyHtoDAsync(self, address, source, size, stream):
        self.copies.append((address, size))
        self.streams[stream].append((address, source, size))

    def _cuMemcpyDtoHAsync(self, target, address, size, stream):
        self.streams[stream].append((target, address, size))

    @property
    def queued(self):
        return sum(map(len, self.streams.values()))


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    monkeypatch.setattr(transfers.os, "cpu_count", lambda: 64)
    cuda._primary_context.cache_clear()
    yield made
    cuda._primary_context.cache_clear()
    assert not made.problems
    assert getattr(made.contexts, "depth", 0) == getattr(made.contexts, "mode", 0) == 0


@pytest.fixture
def gpu(driver):
    return CudaTransfers(0)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(transfers, "PIECE", SMALL)


class Memory:
    """Memory of a device, dirty at first."""

    def __init__(self, size):
        self._memory = ctypes.create_string_buffer(bytes([DIRTY]) * size, size)
        self.address = ctypes.addressof(self._memory)

    def __bytes__(self):
        return self._memory.raw


class Layout:
    """Parts of random files, and what memory is to hold after they are loaded: `gaps` are the bytes between them."""

    def __init__(self, folder, seed, sizes, gaps, files=5, offsets=True):
        rng = random.Random(seed)
        self.memory = Memory(sum(sizes) + sum(gaps) + 2 * GAP)
        self.parts, self.spans = [], []
        data = [bytearray() for _ in range(files)]
        expected, position = bytearray([DIRTY]) * len(bytes(self.memory)), GAP
        for number, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
            file = data[number % files]
            file += rng.randbytes(rng.randrange(5000) if offsets else 0)
            content = rng.randbytes(size)
            path = folder / f"{seed}-{number % files}"
            self.parts.append(Part(path, len(file), size, self.memory.address + position))
            self.spans.append((position, position + size))
            file += content
            expected[position : position + size] = content
            position += size + gap
        self.expected = bytes(expected)
        for number, content in enumerate(data):
            (folder / f"{seed}-{number}").write_bytes(content + b"behind")
        rng.shuffle(self.parts)

    def check(self):
        """All bytes of parts arrived; between near ones are zeros or what was there, elsewhere what was there."""
        got = bytes(self.memory)
        for start, end in self.spans:
            assert got[start:end] == self.expected[start:end]
        bounds = [0, *itertools.chain.from_iterable(self.spans), len(got)]
        for index, (start, end) in enumerate(zip(bounds[::2], bounds[1::2], strict=True)):
            outside = index in (0, len(self.spans)) or end - start > GAP
            allowed = {DIRTY} if outside else {DIRTY, 0}
            assert set(got[start:end]) <= allowed


def sizes_around(piece):
    return [1, 255, 4096, piece - 1, piece, piece + 1, 2 * piece, 2 * piece + 3]


def random_layout(folder, seed, piece=SMALL, most=40):
    rng = random.Random(seed)
    count = rng.randrange(1, most)
    sizes = [rng.choice([rng.randrange(1, 3000), rng.choice(sizes_around(piece))]) for _ in range(count)]
    gaps = [rng.choice([0, 0, 1, 200, GAP, GAP + 1, 3 * GAP]) for _ in range(count)]
    return Layout(folder, seed, sizes, gaps)


def test_devices_by_name(driver):
    assert isinstance(transfers.device_for("cpu"), HostTransfers)
    assert transfers.device_for("cuda:61") is transfers.device_for("cuda:61") is CudaTransfers.of(61)
    assert CudaTransfers.of(62) is not CudaTransfers.of(61)


class TestHost:
    def test_parts_of_many_files(self, tmp_path):
        """With pieces as large as they are."""
        sizes = [PIECE + 1, *sizes_around(SMALL)]
        made = Layout(tmp_path, 0, sizes, [0, 1, GAP, GAP + 1, 0, 5, 0, 9, 0])
        HostTransfers().load(made.parts)
        assert bytes(made.memory) == made.expected  # no gap is touched

    @pytest.mark.parametrize("seed", range(10))
    def test_any_parts(self, tmp_path, seed, small):
        made = random_layout(tmp_path, seed)
        HostTransfers().load(made.parts)
        assert bytes(made.memory) == made.expected

    def test_nothing(self):
        HostTransfers().load([])
        HostTransfers().restore([])

    def test_keep_restore_and_forget(self):
        memory, host = Memory(3 * SMALL), HostTransfers()
        data = random.Random(0).randbytes(3 * SMALL)
        ctypes.memmove(memory.address, data, len(data))
        first, last = host.keep(memory.address, SMALL), host.keep(memory.address + 2 * SMALL, SMALL)
        ctypes.memset(memory.address, 0, 3 * SMALL)
        host.restore([(memory.address + 2 * SMALL, last, SMALL), (memory.address, first, SMALL)])
        assert bytes(memory) == data[:SMALL] + bytes(SMALL) + data[2 * SMALL :]
        host.forget(first)
        host.forget(last)


@pytest.fixture(params=["host", "cuda"])
def device(request):
    if request.param == "host":
        return HostTransfers()
    request.getfixturevalue("driver")
    return CudaTransfers(0)


@pytest.mark.parametrize("bad", ["missing", "short", "empty", "folder"])
def test_a_file_that_cannot_be_read_is_named(device, tmp_path, small, bad):
    made = Layout(tmp_path, 0, [3 * SMALL] * 8, [0] * 8, files=8, offsets=False)
    part = next(part for part in made.parts if part.path.name == "0-5")
    content = part.path.read_bytes()
    part.path.unlink()
    if bad == "folder":
        part.path.mkdir()
    elif bad != "missing":
        part.path.write_bytes(content[: 2 * SMALL + 100] if bad == "short" else b"")
    with pytest.raises(OSError, match="early" if bad in ("short", "empty") else None) as caught:
        device.load(made.parts)
    assert str(caught.value.filename) == str(part.path)
    if bad in ("missing", "folder"):
        assert caught.value.errno == (errno.ENOENT if bad == "missing" else errno.EISDIR)
    if bad == "short":
        assert str(SMALL - 100) in caught.value.strerror
    with contextlib.suppress(OSError):
        part.path.rmdir()
    part.path.write_bytes(content)
    device.load(made.parts)
    made.check()
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        device.load(made.parts)
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


class TestCuda:
    @pytest.mark.parametrize("seed", range(20))
    def test_any_parts(self, gpu, driver, tmp_path, seed, small):
        made = random_layout(tmp_path, seed)
        gpu.load(made.parts)
        made.check()
        assert driver.queued == 0
        assert all(size <= SMALL for _, size in driver.copies)

    def test_pieces_as_large_as_they_are(self, gpu, driver, tmp_path):
        made = Layout(tmp_path, 0, [PIECE - 1, 5, PIECE + 9, 300], [3, 0, GAP + 1, 0])
        gpu.load(made.parts)
        made.check()
        assert max(size for _, size in driver.copies) <= PIECE

    def test_near_parts_are_one_copy_with_zeros_between(self, gpu, driver, tmp_path):
        made = Layout(tmp_path, 0, [100, 1000, 10], [GAP, GAP + 1, 0])
        gpu.load(made.parts)
        made.check()
        start, got = made.memory.address, bytes(made.memory)
        assert driver.copies == [(start + GAP, 1100 + GAP), (start + 3 * GAP + 1101, 10)]
        assert got[GAP + 100 : 2 * GAP + 100] == bytes(GAP)
        for address, buffer in driver.pinned.items():  # what was in a buffer before does not come along
            ctypes.memset(address, 0xFF, len(buffer))
        gpu.load(made.parts)
        assert bytes(made.memory) == got

    def test_many_small_weights_are_few_copies(self, gpu, driver, tmp_path, small):
        made = Layout(tmp_path, 0, [1000] * 200, [24] * 200)
        gpu.load(made.parts)
        made.check()
        assert len(driver.copies) == -(-200 * 1024 // SMALL)

    def test_nothing_to_load(self, gpu, driver):
        gpu.load([])
        gpu.restore([])
        assert driver.copies == []
        assert driver.pinned == {}

    @pytest.mark.parametrize(("pieces", "count"), [(1, 1), (3, 3), (READERS, READERS), (40, READERS)])
    def test_readers_are_as_many_as_there_is_to_do_and_kept(
        self, gpu, driver, tmp_path, small, pieces, count
    ):
        made = Layout(tmp_path, 0, [SMALL] * pieces, [0] * pieces)
        for _ in range(3):
            gpu.load(made.parts)
            made.check()
            assert len(gpu._idle) == count
            assert len(driver.pinned) <= 2 * count
            assert {len(memory) for memory in driver.pinned.values()} == {SMALL}
            assert len(driver.streams) <= 2 * count

    def test_readers_work_at_the_same_time(self, gpu, driver, tmp_path, small, monkeypatch):
        """All of them read at once, or the barrier breaks."""
        barrier, read = threading.Barrier(READERS, timeout=20), transfers._read

        def wait(*arguments):
            barrier.wait()
            read(*arguments)

        monkeypatch.setattr(transfers, "_read", wait)
        made = Layout(tmp_path, 0, [SMALL] * READERS, [0] * READERS)
        gpu.load(made.parts)
        made.check()

    def test_one_processor_is_one_reader(self, gpu, tmp_path, small, monkeypatch):
        monkeypatch.setattr(transfers.os, "cpu_count", lambda: None)
        made = Layout(tmp_path, 0, [SMALL] * 9, [0] * 9)
        gpu.load(made.parts)
        made.check()
        assert len(gpu._idle) == 1

    def test_loads_at_the_same_time_keep_no_more_than_one_does(self, gpu, driver, tmp_path, small):
        made = [Layout(tmp_path, seed, [SMALL + 1] * 30, [0] * 30) for seed in range(4)]
        problems, most, barrier = [], [], threading.Barrier(4)

        def work(own):
            try:
                for _ in range(4):
                    barrier.wait(20)
                    gpu.load(own.parts)
                    own.check()
                    most.append(len(driver.streams))
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(own,)) for own in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems, problems[0]
        assert max(most) <= 2 * (READERS + 2 * 3)  # each load has one, and may be closing it
        assert len(gpu._idle) <= READERS
        assert len(driver.pinned) <= 2 * READERS
        assert len(driver.streams) <= 2 * READERS
        gpu.load(made[0].parts)
        made[0].check()

    def test_a_load_beside_another_has_the_readers_that_are_left(self, gpu):
        with (
            gpu._readers(READERS - 2) as first,
            gpu._readers(READERS) as second,
            gpu._readers(READERS) as third,
        ):
            assert [len(first), len(second), len(third)] == [READERS - 2, 2, 1]
            assert len({reader.stream for reader in (*first, *second, *third)}) == READERS + 1
        with gpu._readers(READERS) as again:
            assert len(again) == READERS

    def test_an_error_of_one_reader_ends_the_load(self, gpu, driver, tmp_path, small, monkeypatch):
        """The others stop early, nothing is queued any more, and the readers load again."""
        made = Layout(tmp_path, 0, [SMALL] * 400, [0] * 400, files=40, offsets=False)
        path = tmp_path / "0-1"
        path.rename(tmp_path / "away")
        threads = threading.active_count()
        failed, read = threading.Event(), transfers._read

        def slow(part, view):
            if part.path == path:
                failed.set()
            else:
                failed.wait(20)
                time.sleep(0.02)
            read(part, view)

        monkeypatch.setattr(transfers, "_read", slow)
        with pytest.raises(FileNotFoundError) as caught:
            gpu.load(made.parts)
        assert str(caught.value.filename) == str(path)
        assert threading.active_count() == threads
        assert driver.queued == 0
        assert len(driver.copies) < 100
        assert len(gpu._idle) == READERS
        (tmp_path / "away").rename(path)
        monkeypatch.setattr(transfers, "_read", read)
        gpu.load(made.parts)
        made.check()

    @pytest.mark.parametrize(
        ("call", "number"),
        [
            *itertools.product(["cuMemcpyHtoDAsync", "cuStreamSynchronize"], [0, 3, 30]),
            *itertools.product(["cuStreamCreate"], [0, READERS - 1, READERS]),
        ],
    )
    def test_a_call_that_fails_is_raised_and_leaks_nothing(self, gpu, driver, tmp_path, small, call, number):
        driver.fail = {call: number}
        made = Layout(tmp_path, 0, [SMALL] * 40, [0] * 40)
        with pytest.raises(gi.DriverError, match=rf"{call} failed.*CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
            gpu.load(made.parts)
        assert driver.queued == 0
        self.check_usable(gpu, driver, made)

    @pytest.mark.parametrize("number", range(2))
    def test_a_buffer_that_cannot_be_had_leaks_nothing(self, gpu, driver, tmp_path, small, number):
        """The first or the second of a reader."""
        driver.fail = {"cuMemHostAlloc": number}
        made = Layout(tmp_path, 0, [SMALL], [0])
        with pytest.raises(gi.DriverError, match=r"cuMemHostAlloc failed while page-locking"):
            gpu.load(made.parts)
        self.check_usable(gpu, driver, made)

    def check_usable(self, gpu, driver, made):
        """Loads go on, and all there is belongs to readers."""
        driver.fail = {}
        for _ in range(2):
            gpu.load(made.parts)
            made.check()
        buffers = [buffer for reader in gpu._idle for buffer in reader._buffers]
        streams = [stream for reader in gpu._idle for stream in reader._streams if stream]
        assert sorted(buffers) == sorted(driver.pinned)
        assert sorted(streams) == sorted(driver.streams)
        with gpu._readers(READERS) as readers:
            assert len(readers) == READERS

    def test_keep_restore_and_forget(self, gpu, driver):
        memory, data = Memory(3 * SMALL), random.Random(0).randbytes(3 * SMALL)
        ctypes.memmove(memory.address, data, len(data))
        kept = [gpu.keep(memory.address + i * SMALL, SMALL) for i in (0, 2)]
        assert {address: len(driver.pinned[address]) for address in kept} == dict.fromkeys(kept, SMALL)
        for _ in range(2):
            ctypes.memset(memory.address, 0, 3 * SMALL)
            gpu.restore(
                [
                    (memory.address + i * SMALL, copy, SMALL)
                    for i, copy in zip((2, 0), kept[::-1], strict=True)
                ]
            )
            assert bytes(memory) == data[:SMALL] + bytes(SMALL) + data[2 * SMALL :]
        assert driver.queued == 0
        assert len(gpu._idle) == 1
        for copy in kept:
            gpu.forget(copy)
        assert driver.pinned == {}  # no reader of copies has buffers

    @pytest.mark.parametrize("call", ["cuMemHostAlloc", "cuMemcpyDtoHAsync", "cuStreamSynchronize"])
    def test_a_copy_that_cannot_be_kept_leaks_nothing(self, gpu, driver, call):
        memory = Memory(SMALL)
        driver.fail = {call: 0}
        with pytest.raises(gi.DriverError, match=f"{call} failed"):
            gpu.keep(memory.address, SMALL)
        assert driver.pinned == {}
        driver.streams[gpu._idle[0].stream].clear()  # a stream whose wait fails is broken
        driver.problems.clear()
        gpu.forget(gpu.keep(memory.address, SMALL))

    def test_a_restore_that_fails_leaves_nothing_queued(self, gpu, driver):
        memory = Memory(2 * SMALL)
        copies = [(memory.address + i * SMALL, gpu.keep(memory.address, SMALL), SMALL) for i in range(2)]
        driver.fail = {"cuMemcpyHtoDAsync": 1}
        with pytest.raises(gi.DriverError, match="cuMemcpyHtoDAsync failed"):
            gpu.restore(copies)
        assert driver.queued == 0
        gpu.restore(copies)
        assert driver.queued == 0
