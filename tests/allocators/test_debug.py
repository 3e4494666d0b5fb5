"""Memory that finds misuse (debug_heap.cpp, debugging.py)."""

from __future__ import annotations

import ctypes
import pickle
import random
import re
import signal
import sys
import textwrap
import threading
from types import SimpleNamespace

import processes
import pytest
from conformance import KiB, MiB
from memory import Physical

from glake_infer.allocators import DriverError, InvalidPointerError, _native
from glake_infer.allocators.debugging import DebugReport, allocations, corruptions, leak_report
from glake_infer.allocators.errors import MemoryCorruptionError

GRANULE = 64 * KiB


@pytest.fixture
def heap():
    heap = _native.DebugHeap(256 * MiB)
    yield heap
    heap.check_invariants()


def write(address, value, size=1):
    ctypes.memset(address, value, size)


def dies(code: str, mode: str = "on") -> None:
    """Run code, which must print "before", and fault afterwards."""
    start = f"""
        import ctypes
        from glake_infer.allocators import _native
        heap = _native.DebugHeap(1 << 30, {mode!r})
        def write(address): ctypes.memset(address, 1, 1)
        def before(): print("before", flush=True)
        """
    program = textwrap.dedent(start) + textwrap.dedent(code) + "\nprint('after')"
    done = processes.run(program, faults=True)
    assert done.stdout == "before\n", done.stderr
    assert done.returncode == -signal.SIGSEGV, done.stderr


class TestFaults:
    @pytest.mark.parametrize("size", [4096, 4352, 64 * KiB, 64 * KiB + 256, 5 * MiB])
    def test_one_byte_past_the_end_of_a_large_block(self, size):
        dies(f"a = heap.allocate({size}); write(a); write(a + {size} - 1); before(); write(a + {size})")

    def test_a_read_past_the_end(self):
        dies("a = heap.allocate(1 << 20); before(); ctypes.string_at(a + (1 << 20), 1)")

    def test_before_the_guard(self):
        dies("a = heap.allocate(1 << 16); write(a); before(); write(a - 1)")

    def test_every_block_is_guarded_in_mode_guard(self):
        dies("a = heap.allocate(256); write(a + 255); before(); write(a + 256)", "guard")

    @pytest.mark.parametrize("size", [4096, 3 * MiB])
    def test_use_after_free(self, size):
        dies(f"a = heap.allocate({size}); write(a); heap.deallocate(a); before(); write(a)")

    def test_use_after_free_of_a_small_block_in_mode_guard(self):
        dies("a = heap.allocate(10); write(a); heap.deallocate(a); before(); ctypes.string_at(a, 1)", "guard")

    def test_behind_a_slab(self):
        dies("a = heap.allocate(100); write(a); before(); write(a + (1 << 16))")

    def test_addresses_are_not_reused_while_in_quarantine(self):
        dies(
            """
            a = heap.allocate(1 << 16)
            heap.deallocate(a)
            for _ in range(500):
                heap.deallocate(heap.allocate(1 << 16))
            before()
            write(a)
            """
        )


class TestCanaries:
    @pytest.mark.parametrize("size", [1, 63, 64, 100, 256, 1000, 4095])
    @pytest.mark.parametrize("distance", [0, 1, 63])
    def test_an_overrun_of_a_small_block_is_found_at_free(self, heap, size, distance):
        address = heap.allocate(size)
        neighbour = heap.allocate(size)
        write(address, 1, size)
        write(address + size + distance, 0x41)
        with pytest.raises(MemoryCorruptionError) as caught:
            heap.deallocate(address)
        (found,) = caught.value.corruptions
        assert (found.kind, found.offset, found.overwritten) == ("overrun", size + distance, 1)
        assert (found.found, found.expected) == (b"A", 0xCA)
        assert found.allocation.address == address
        assert "test_an_overrun" in found.allocation.stack
        text = str(caught.value)
        place = (
            "at the end of" if distance == 0 else f"{distance} byte{'s' * (distance > 1)} behind the end of"
        )
        assert f"1 byte was overwritten, {place} the block of {size} byte" in text
        assert "the bytes are 41, and each should be ca" in text
        assert "test_debug.py" in text
        heap.deallocate(neighbour)
        assert heap.stats()["live"] == 0  # taken back all the same

    def test_an_underrun_is_found_at_free(self, heap):
        address = heap.allocate(300)
        write(address - 5, 7, 5)
        with pytest.raises(MemoryCorruptionError, match="5 bytes before the beginning of") as caught:
            heap.deallocate(address)
        (found,) = caught.value.corruptions
        assert (found.kind, found.offset, found.overwritten, found.found) == ("underrun", -5, 5, b"\7" * 5)

    @pytest.mark.parametrize("size", [4097, 5000, 70_001])
    def test_the_slack_of_a_large_block(self, heap, size):
        address = heap.allocate(size)
        assert address % 256 == 0
        write(address, 1, size)
        write(address + size, 9)
        write(address - 1, 9)
        with pytest.raises(MemoryCorruptionError) as caught:
            heap.deallocate(address)
        under, over = caught.value.corruptions
        assert (under.kind, under.offset, over.kind, over.offset) == ("underrun", -1, "overrun", size)

    def test_holes_in_the_damage_are_counted(self, heap):
        address = heap.allocate(100)
        write(address + 100, 1, 2)
        write(address + 110, 2, 1)
        (found,) = corruptions(heap.check())
        assert (found.overwritten, found.extent) == (3, 11)
        assert found.found == b"\1\1" + b"\xca" * 8 + b"\2"
        assert "3 bytes of 11 in a row were overwritten" in str(found)

    def test_check_finds_it_while_the_block_is_live(self, heap):
        blocks = [heap.allocate(size) for size in (10, 100, 1000, 5000, 100_000)]
        assert heap.check() == []
        for address, size in zip(blocks, (10, 100, 1000, 5000, 100_000), strict=True):
            if size % 256:
                write(address + size, 0)
        found = corruptions(heap.check())
        assert sorted(one.allocation.address for one in found) == sorted(blocks)
        assert {one.found_at for one in found} == {"by check()"}
        assert "5 places overwritten:" in str(found)

    def test_what_was_found_at_a_free_is_in_the_next_check_once(self, heap):
        address = heap.allocate(10)
        write(address + 10, 0)
        with pytest.raises(MemoryCorruptionError):
            heap.deallocate(address)
        (found,) = corruptions(heap.check())
        assert found.found_at == "when it was freed"
        assert heap.check() == []

    def test_a_write_to_a_freed_small_block_is_found_by_check(self, heap):
        address = heap.allocate(1000)
        heap.deallocate(address)
        assert ctypes.string_at(address, 1000) == b"\xdd" * 1000
        assert heap.check() == []
        write(address + 17, 0, 3)
        (found,) = corruptions(heap.check())
        assert (found.kind, found.offset, found.overwritten) == ("use after free", 17, 3)
        assert found.expected == 0xDD
        assert "test_a_write_to_a_freed" in found.freed_stack
        assert re.search(
            r"at offset 17 in the freed block of 1000 bytes(.|\n)*Allocated (.|\n)*Freed ", str(found)
        )

    def test_a_write_to_a_freed_small_block_is_found_when_it_is_used_again(self, heap, capfd):
        address = heap.allocate(1000)
        heap.deallocate(address)
        write(address + 999, 0)
        for _ in range(1000):
            again = heap.allocate(990)
            if again == address:
                break
            heap.deallocate(again)
        assert again == address
        assert "use after free: 1 byte was overwritten, at offset 999" in capfd.readouterr().err
        heap.deallocate(again)  # the damage was mended
        (found,) = corruptions(heap.check())
        assert found.found_at == "when its slot was used again"
        assert heap.check() == []

    def test_a_write_to_a_freed_small_block_is_found_when_its_slab_goes(self, heap, capfd):
        address = heap.allocate(100)
        heap.deallocate(address)
        write(address, 0)
        assert heap.trim() == GRANULE
        assert "use after free" in capfd.readouterr().err
        assert [one["found_at"] for one in heap.check()] == ["when its slab was given back"]

    def test_a_stray_write(self, heap):
        address = heap.allocate(100)
        write(address + 40 * KiB, 0)
        (found,) = corruptions(heap.check())
        assert found.kind == "stray write"
        assert "never handed out" in str(found)

    def test_the_freed_block_that_is_used_again_is_the_oldest(self, heap):
        first, second = heap.allocate(100), heap.allocate(100)
        heap.deallocate(second)
        heap.deallocate(first)
        addresses = []
        while first not in addresses:
            addresses.append(heap.allocate(100))
        assert addresses.index(second) == len(addresses) - 2


class TestInvalidPointers:
    @pytest.mark.parametrize("size", [100, 100_000])
    def test_a_double_free_shows_three_stacks(self, heap, size):
        def allocates():
            return heap.allocate(size)

        def frees_first():
            heap.deallocate(address)

        def frees_again():
            heap.deallocate(address)

        address = allocates()
        frees_first()
        with pytest.raises(InvalidPointerError) as caught:
            frees_again()
        text = str(caught.value)
        assert text.startswith(f"double free: address {address:#x} is that of a block of {size} bytes")
        parts = re.split(r"\nAllocated |\nFreed |\nThis free: ", text)
        assert len(parts) == 4
        for part, function in zip(parts[1:], ("allocates", "frees_first", "frees_again"), strict=True):
            assert re.search(rf"test_debug\.py:\d+ in \S*{function}\n", part), part

    @pytest.mark.parametrize("size", [100, 100_000])
    def test_an_interior_pointer(self, heap, size):
        address = heap.allocate(size)
        with pytest.raises(
            InvalidPointerError, match=rf"is at offset 64 in a live block of {size} bytes at {address:#x}"
        ):
            heap.deallocate(address + 64)
        with pytest.raises(InvalidPointerError, match="8 bytes before the beginning of a live block"):
            heap.deallocate(address - 8)
        with pytest.raises(InvalidPointerError, match="at the end of a live block"):
            heap.deallocate(address + size)
        heap.deallocate(address)
        with pytest.raises(InvalidPointerError, match=r"at offset 1 in a freed block(.|\n)*Freed"):
            heap.deallocate(address + 1)

    def test_a_foreign_pointer(self, heap):
        buffer = ctypes.create_string_buffer(100)
        heap.allocate(10)
        for address in (ctypes.addressof(buffer), 1, 2**63):
            with pytest.raises(InvalidPointerError, match="was never handed out by this pool"):
                heap.deallocate(address)

    def test_a_slot_that_was_never_handed_out(self, heap):
        address = heap.allocate(100)
        with pytest.raises(InvalidPointerError, match="in a slot that was never handed out"):
            heap.deallocate(address + 32 * KiB)

    def test_a_slab_that_was_given_back_still_knows(self, heap):
        address = heap.allocate(100)
        heap.deallocate(address)
        heap.trim()
        with pytest.raises(InvalidPointerError, match="double free"):
            heap.deallocate(address)

    def test_the_quarantine_is_bounded(self):
        heap = _native.DebugHeap(256 * MiB, quarantine=3)
        blocks = [heap.allocate(MiB) for _ in range(5)]
        for address in blocks:
            heap.deallocate(address)
        assert heap.stats()["quarantined"] == 3
        for address, text in zip(blocks, ["foreign"] * 2 + ["double"] * 3, strict=True):
            with pytest.raises(InvalidPointerError, match=f"{text} free"):
                heap.deallocate(address)

    def test_no_quarantine(self):
        heap = _native.DebugHeap(256 * MiB, quarantine=0)
        heap.deallocate(heap.allocate(MiB))
        assert heap.stats()["quarantined"] == 0


class TestAccounting:
    def test_memory_goes_back_at_once(self):
        with Physical() as physical:
            heap = _native.DebugHeap(256 * MiB)
        address = heap.allocate(8 * MiB)
        write(address, 1, 8 * MiB)
        assert physical.bytes() == 8 * MiB
        heap.deallocate(address)
        assert physical.bytes() == 0
        small = heap.allocate(100)
        assert physical.bytes() == GRANULE
        heap.deallocate(small)
        assert heap.trim() == GRANULE
        assert physical.bytes() == 0

    def test_wiped_memory_is_written_before_it_goes(self):
        calls = []
        for wipe in (False, True):
            heap = _native.DebugHeap(256 * MiB, wipe=wipe)
            address = heap.allocate(MiB)
            before = heap.stats()["driver_calls"]
            heap.deallocate(address)
            calls.append(heap.stats()["driver_calls"] - before)
        assert calls[1] == calls[0] + 1  # the fill; the memory itself is gone

    def test_figures(self, heap):
        large, small = heap.allocate(100_000, "weights"), heap.allocate(10)
        stats = heap.stats()
        assert stats["reserved"] == stats["active"] == 3 * GRANULE
        assert stats["weights"] == 2 * GRANULE
        assert stats["requested"] == 100_010
        assert (stats["live"], stats["slabs"]) == (2, 1)
        heap.deallocate(large)
        heap.deallocate(small)
        stats = heap.stats()
        assert (stats["reserved"], stats["active"], stats["requested"], stats["live"]) == (GRANULE, 0, 0, 0)

    def test_the_limit_holds(self):
        heap = _native.DebugHeap(4 * GRANULE)
        held = heap.allocate(3 * GRANULE)
        assert heap.needed_limit(GRANULE + 1) == 5 * GRANULE
        assert heap.allocate(GRANULE + 1) == 0
        assert heap.allocate(2**62) == heap.allocate(2**64 - 1) == 0
        small = heap.allocate(10)
        assert small
        assert heap.stats()["reserved"] == 4 * GRANULE
        assert heap.allocate(10, "weights") == 0  # a slab of its own
        heap.deallocate(small)
        assert heap.allocate(GRANULE)  # the empty slab makes room
        assert not heap.set_limit(GRANULE)
        heap.deallocate(held)
        assert heap.set_limit(GRANULE)
        assert heap.allocate(GRANULE) == 0
        heap.check_invariants()

    @pytest.mark.parametrize("size", [10, 4000, 4096, 5000, 3 * MiB])
    def test_a_failure_of_the_system_leaves_nothing(self, heap, size):
        failures = 0
        while True:
            before = heap.stats()
            heap.inject_failure(failures, 1)
            try:
                address = heap.allocate(size)
            except DriverError:
                failures += 1
                after = heap.stats()
                for name in ("active", "requested", "live"):
                    assert after[name] == before[name]
                heap.check_invariants()
                continue
            finally:
                heap.inject_failure(-1)
            break
        assert failures >= 3  # reserve, create, map
        write(address, 0, size)
        heap.deallocate(address)
        assert heap.check() == []

    @pytest.mark.parametrize("size", [10, 5000])
    def test_a_failure_of_the_device_at_a_free_leaves_the_block_live(self, heap, size):
        address = heap.allocate(size)
        heap.inject_failure(0, 1)
        with pytest.raises(DriverError, match="injected"):
            heap.deallocate(address)
        assert heap.stats()["live"] == 1
        assert heap.check() == []
        heap.deallocate(address)

    @pytest.mark.parametrize("mode", ["on", "guard"])
    def test_random_stress_with_threads(self, mode):
        heap = _native.DebugHeap(64 * MiB, mode)
        errors = []

        def work(seed):
            chance, held = random.Random(seed), {}
            try:
                for _ in range(300):
                    if held and (len(held) > 20 or chance.random() < 0.45):
                        address = chance.choice(list(held))
                        size, value = held.pop(address)
                        assert ctypes.string_at(address, size) == bytes([value]) * size
                        heap.deallocate(address)
                    else:
                        size = int(2 ** chance.uniform(0, 18))
                        address, value = heap.allocate(size), chance.randrange(256)
                        if address:
                            assert address not in held
                            write(address, value, size)
                            held[address] = (size, value)
                for address in held:
                    heap.deallocate(address)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert heap.check() == []
        heap.trim()
        assert heap.stats()["reserved"] == 0


class TestStreams:
    """On a device whose work is queued."""

    @pytest.fixture
    def device(self):
        return _native.SimulatedDevice()

    @pytest.fixture
    def queued(self, device):
        heap = _native.DebugHeap(64 * MiB, device=device)
        yield heap
        heap.check_invariants()
        assert device.misuses == device.mismatches == 0

    @pytest.mark.parametrize("size", [100, MiB])
    def test_a_free_waits_for_the_work_that_uses_the_memory(self, device, queued, size):
        stream = device.new_stream()
        address = queued.allocate(size, stream=stream)
        device.enqueue_fill(stream, address, size, 7, delay_us=50_000)
        device.enqueue_check(stream, address, size, 7)
        queued.deallocate(address)  # the device would die of memory that was unmapped too early
        device.synchronize_stream(stream)
        assert queued.check() == []

    def test_an_overrun_of_queued_work_is_found(self, device, queued):
        stream = device.new_stream()
        address = queued.allocate(100, stream=stream)
        device.enqueue_fill(stream, address, 101, 7, delay_us=50_000)
        with pytest.raises(MemoryCorruptionError, match="1 byte was overwritten, at the end of"):
            queued.deallocate(address)

    @pytest.mark.parametrize("size", [100, MiB])
    def test_what_is_freed_in_a_capture_stays_until_the_graph_is_gone(self, device, queued, size):
        stream = device.new_stream()
        seen = queued.allocate(10, stream=stream)
        device.begin_capture(stream)
        address = queued.allocate(size, stream=stream)
        device.enqueue_fill(stream, address, size, 7, delay_us=0)
        device.enqueue_check(stream, address, size, 7)
        queued.deallocate(address)
        assert queued.stats()["pending"] == 1
        assert queued.stats()["requested"] == 10
        with pytest.raises(InvalidPointerError, match="double free"):
            queued.deallocate(address)
        graph = device.end_capture(stream)
        assert graph
        for _ in range(3):
            device.launch_graph(graph, stream)
            queued.deallocate(queued.allocate(size, stream=stream))
        assert queued.stats()["pending"] == 1
        device.destroy_graph(graph)
        assert queued.check() == []
        assert queued.stats()["pending"] == 0
        queued.deallocate(seen)
        queued.trim()
        assert queued.stats()["reserved"] == 0

    def test_what_another_stream_freed_in_a_capture_stays_until_its_end(self, device, queued):
        capturing, other = device.new_stream(), device.new_stream()
        address = queued.allocate(MiB, stream=other)
        queued.deallocate(queued.allocate(10, stream=capturing))
        device.begin_capture(capturing)
        device.enqueue_fill(other, address, MiB, 7, delay_us=20_000)
        queued.deallocate(address)
        assert queued.stats()["pending"] == 1
        assert device.end_capture(capturing)
        queued.deallocate(queued.allocate(10))
        assert queued.stats()["pending"] == 0

    def test_damage_to_what_was_freed_in_a_capture_is_found_later(self, device, queued, capfd):
        stream = device.new_stream()
        address = queued.allocate(100, stream=stream)
        device.begin_capture(stream)
        queued.deallocate(address)
        graph = device.end_capture(stream)
        device.enqueue_fill(stream, address + 100, 2, 7, delay_us=0)
        device.destroy_graph(graph)
        (found,) = corruptions(queued.check())
        assert (found.kind, found.overwritten, found.found_at) == ("overrun", 2, "when it was freed")
        assert "overrun" in capfd.readouterr().err


class TestLeaks:
    def test_each_live_allocation_is_listed_with_its_stack(self, heap):
        def loads_the_model():
            return heap.allocate(3 * MiB, "weights", 5, 7)

        before = threading.get_native_id()
        address = loads_the_model()
        gone = heap.allocate(10)
        heap.deallocate(gone)
        heap.allocate(20)
        leaks = allocations(heap.live())
        assert [one.bytes for one in leaks] == [3 * MiB, 20]
        leak = leaks[0]
        assert (leak.address, leak.tag, leak.label, leak.stream) == (address, "weights", "7", 5)
        assert leak.thread == before
        assert leaks[1].stream is None
        assert re.match(r"\S*test_debug\.py:\d+ in \S*loads_the_model\n", leak.stack)
        assert len(leak.stack.splitlines()) <= 24
        text = str(leaks)
        assert text.startswith("2 live allocations, 3.0 MiB:\n#1: 3.0 MiB (3145728 bytes)")
        assert "(MainThread) at\n" in text

    def test_the_report_shows_the_largest(self, heap):
        for size in (100, 5000, 10):
            heap.allocate(size)
        pool = SimpleNamespace(leaks=lambda: allocations(heap.live()))
        text = leak_report(pool, most=1)
        assert "(5000 bytes)" in text
        assert "(100 bytes)" not in text
        assert "... and 2 more" in text

    def test_nothing(self):
        assert not DebugReport()
        assert str(DebugReport()).startswith("nothing")

    def test_errors_cross_processes(self, heap):
        address = heap.allocate(10)
        write(address + 10, 0)
        with pytest.raises(MemoryCorruptionError) as caught:
            heap.deallocate(address)
        again = pickle.loads(pickle.dumps(caught.value))
        assert str(again) == str(caught.value)
        assert again.corruptions == caught.value.corruptions


class TestStacks:
    def test_it_is_bounded_and_innermost_first(self):
        def deep(n):
            return _native.capture_stack() if n == 0 else deep(n - 1)

        lines = deep(50).splitlines()
        assert len(lines) == 24
        assert all(re.fullmatch(r".*test_debug\.py:\d+ in .*deep", line) for line in lines)

    def test_our_own_frames_at_the_top_are_left_out(self):
        scope = {"__name__": "glake_infer.allocators.pool", "capture": _native.capture_stack}
        exec("def allocate(call=None):\n    return call() if call else capture()", scope)
        assert "allocate" not in scope["allocate"]().splitlines()[0]
        inner = scope["allocate"](lambda: _native.capture_stack()).splitlines()
        assert "lambda" in inner[0]
        assert inner[1].endswith("in allocate")

    def test_an_error_on_its_way_stays(self):
        try:
            raise KeyError("x")
        except KeyError:
            _native.capture_stack()
            assert isinstance(sys.exc_info()[1], KeyError)

    def test_a_native_thread_does_not_wait_for_the_gil(self):
        """The GIL's holder may be waiting for it: here it joins a thread that frees, and never lets go."""
        done = processes.run(
            """
            import ctypes, ctypes.util, sys
            from glake_infer.allocators import _native
            held = ctypes.PyDLL(None)  # keeps the GIL during its calls
            thread = ctypes.c_ulong()
            entry = ctypes.cast(_native.native_stack_entry(), ctypes.c_void_p)
            assert held.pthread_create(ctypes.byref(thread), None, entry, None) == 0
            result = ctypes.c_void_p()
            assert held.pthread_join(thread, ctypes.byref(result)) == 0
            print(ctypes.string_at(result.value).decode())
            """
        )
        assert done.stdout == "[no Python frames: called by a native thread]\n", done.stderr

    def test_no_capture_while_the_interpreter_exits(self):
        code = """
            import atexit
            from glake_infer.allocators import _native
            class Late:
                def __del__(self):
                    print(capture())
            capture = _native.capture_stack
            late = Late()
            """
        done = processes.run(code)
        assert done.stdout == "[no Python frames: no interpreter runs]\n", done.stderr
        assert done.returncode == 0


def runs(code: str) -> str:
    """Run code in a process of its own, which has its own pool; returns what it printed."""
    start = """
        import ctypes
        from glake_infer import Pool
        from glake_infer.allocators import errors
        """
    done = processes.run(textwrap.dedent(start) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestPool:
    """Pool(debug=...)."""

    @pytest.mark.parametrize("debug", [True, "guard"])
    def test_leaks_check_and_close(self, debug):
        printed = runs(f"""
            pool = Pool("cpu", "1GiB", debug={debug!r})
            def loads():
                return pool.allocate(100_000, tag="weights")
            with pool.label("bert"):
                address = loads()
            (leak,) = pool.leaks()
            assert (leak.address, leak.bytes, leak.tag, leak.label) == (address, 100_000, "weights", "bert")
            assert leak.stack.splitlines()[0].endswith("in loads"), leak.stack
            assert not pool.check()
            pool.check_invariants()
            stats = pool.stats()
            assert stats.requested == 100_000 and stats.reserved >= stats.active >= 100_000
            try:
                pool.close()
            except errors.PoolInUseError as error:
                print(error)
            pool.deallocate(address)
            assert not pool.leaks()
            try:
                pool.deallocate(address)
            except errors.InvalidPointerError as error:
                print(error)
            pool.close()
            """)
        assert "100000 bytes" in printed
        assert printed.count("in loads") == 2
        assert "double free" in printed

    def test_overwritten_memory(self):
        printed = runs("""
            pool = Pool("cpu", "1GiB", debug=True)
            address = pool.allocate(100)
            ctypes.memset(address, 0, 101)
            print(pool.check())
            try:
                pool.deallocate(address)
            except errors.MemoryCorruptionError as error:
                print(error)
            assert pool.stats().requested == 0
            """)
        assert printed.count("overrun: 1 byte was overwritten, at the end of the block of 100 bytes") == 2

    def test_the_limit_holds(self):
        runs("""
            pool = Pool("cpu", "1MiB", debug=True)
            address = pool.allocate("1MiB")
            try:
                pool.allocate(1)
                raise SystemExit("no error")
            except errors.OutOfMemoryError as error:
                assert error.active == error.limit == 1 << 20
                assert error.needed_limit > 1 << 20
            assert len(pool.leaks()) == 1
            pool.deallocate(address)
            """)

    def test_a_session(self):
        printed = runs("""
            import numpy as np, onnxruntime
            from onnx import TensorProto, helper, numpy_helper
            weight = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
            graph = helper.make_graph(
                [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Relu", ["t"], ["y"])], "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
                [numpy_helper.from_array(weight, "w")],
            )
            opset = [helper.make_opsetid("", 17)]
            model = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
            feeds = {"x": np.random.default_rng(0).standard_normal((7, 64), np.float32)}
            pool = Pool("cpu", "1GiB", debug=True)
            options = onnxruntime.SessionOptions()
            pool.attach(options)
            def makes_the_session():
                return onnxruntime.InferenceSession(model, options, providers=pool.providers)
            session = makes_the_session()
            plain = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            for _ in range(5):
                assert np.array_equal(session.run(None, feeds)[0], plain.run(None, feeds)[0])
            assert any("makes_the_session" in leak.stack for leak in pool.leaks())
            assert not pool.check()
            print("same")
            """)
        assert printed == "same\n"


class TestWipe:
    """Pool(wipe=True): freed memory holds zeros before anybody gets it again."""

    @pytest.mark.parametrize("size", [100, 5000, 100_000, 1 << 20, 5 << 20])
    def test_the_next_tenant_sees_zeros(self, size):
        runs(f"""
            pool = Pool("cpu", "1GiB", wipe=True)
            held = [pool.allocate({size}) for _ in range(8)]
            for address in held:
                ctypes.memset(address, 0x5A, {size})
            for address in held:
                pool.deallocate(address)
            again = [pool.allocate({size}) for _ in range(8)]
            assert set(again) & set(held), "nothing was used again: this test shows nothing"
            for address in again:
                assert ctypes.string_at(address, {size}) == bytes({size})
                pool.deallocate(address)
            pool.check_invariants()
            """)

    def test_freed_memory_is_wiped_at_once_and_its_neighbours_are_not(self):
        runs("""
            pool = Pool("cpu", "1GiB", wipe=True)
            held = [pool.allocate(1000) for _ in range(3)]
            for address in held:
                ctypes.memset(address, 0x5A, 1000)
            pool.deallocate(held[1])
            assert ctypes.string_at(held[1], 1000) == bytes(1000)  # its slab is still mapped
            for address in (held[0], held[2]):
                assert ctypes.string_at(address, 1000) == b"\\x5a" * 1000
            """)

    def test_without_it_freed_memory_keeps_its_bytes(self):
        """Else the tests above could not fail."""
        runs("""
            pool = Pool("cpu", "1GiB")
            held = [pool.allocate(1000) for _ in range(3)]
            ctypes.memset(held[1], 0x5A, 1000)
            pool.deallocate(held[1])
            assert ctypes.string_at(held[1], 1000).count(0x5A) > 900
            """)

    def test_with_debug(self):
        runs("""
            pool = Pool("cpu", "1GiB", debug=True, wipe=True)
            for size in (100, 100_000):
                address = pool.allocate(size)
                ctypes.memset(address, 0x5A, size)
                pool.deallocate(address)
                again = pool.allocate(size)
                assert 0x5A not in ctypes.string_at(again, size)
                pool.deallocate(again)
            assert not pool.check()
            """)
