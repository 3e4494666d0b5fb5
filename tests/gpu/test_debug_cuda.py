"""Pool("cuda:N", debug=...): misuse of device memory is found. Faults end a context: they run in child processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.gpu
pytest.importorskip("cupy")

START = """
import cupy, sys
from glake_infer import Pool
from glake_infer.allocators import errors
SOURCE = r'''
extern "C" __global__ void put(unsigned char* where, long long offset, int value, int count) {
  for (int i = 0; i < count; ++i) where[offset + i] = (unsigned char)value;
}
extern "C" __global__ void get(const unsigned char* where, long long offset, int* out) { *out = where[offset]; }
extern "C" __global__ void slow_put(unsigned char* where, long long offset, int value, long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
  where[offset] = (unsigned char)value;
}
'''
module = cupy.RawModule(code=SOURCE)
MiB = 1 << 20

def put(address, offset, value=1, count=1):
    arguments = (cupy.uint64(address), cupy.int64(offset), cupy.int32(value), cupy.int32(count))
    module.get_function("put")((1,), (1,), arguments)
    cupy.cuda.runtime.deviceSynchronize()

def get(address, offset):
    out = cupy.zeros(1, cupy.int32)
    module.get_function("get")((1,), (1,), (cupy.uint64(address), cupy.int64(offset), out))
    return int(out[0])

def faults(action):
    try:
        action()
    except Exception as error:
        assert "illegal" in str(error).lower(), error
        print("faulted")
    else:
        print("no fault")
    sys.stdout.flush()
    import os
    os._exit(0)  # the context is lost: nothing can be given back
"""


def run(code: str, device: str, debug: bool | str = True) -> str:
    """Run code with a debug pool in a process of its own; returns what it printed."""
    program = f"{START}\npool = Pool({device!r}, '4GiB', debug={debug!r})\n{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class TestFaults:
    @pytest.mark.parametrize("size", ["2 * MiB", "3 * MiB + 256", "64 * MiB"])
    def test_a_kernel_that_writes_behind_a_block(self, device, size):
        code = f"""
            size = {size}
            address = pool.allocate(size)
            put(address, 0)
            put(address, size - 1)
            assert get(address, size - 1) == 1
            print("inside")
            faults(lambda: put(address, size))
            """
        assert run(code, device) == "inside\nfaulted\n"

    def test_a_kernel_that_reads_behind_a_block(self, device):
        code = """
            address = pool.allocate(2 * MiB)
            assert get(address, 2 * MiB - 1) in range(256)
            faults(lambda: get(address, 2 * MiB))
            """
        assert run(code, device) == "faulted\n"

    def test_a_kernel_that_writes_before_a_block(self, device):
        code = """
            address = pool.allocate(2 * MiB)
            put(address, 0)
            faults(lambda: put(address, -1))
            """
        assert run(code, device) == "faulted\n"

    def test_use_after_free(self, device):
        code = """
            address = pool.allocate(8 * MiB)
            put(address, 0)
            pool.deallocate(address)
            faults(lambda: put(address, 0))
            """
        assert run(code, device) == "faulted\n"

    def test_a_small_block_in_mode_guard(self, device):
        code = """
            address = pool.allocate(256)
            put(address, 255)
            faults(lambda: put(address, 256))
            """
        assert run(code, device, "guard") == "faulted\n"

    def test_the_pool_says_it_at_the_next_free(self, device):
        code = """
            address = pool.allocate(2 * MiB)
            module.get_function("put")((1,), (1,), (cupy.uint64(address), cupy.int64(2 * MiB), cupy.int32(1), cupy.int32(1)))
            try:
                pool.deallocate(address)
            except errors.DriverError as error:
                assert "ILLEGAL_ADDRESS" in str(error), error
                print("said", flush=True)
            import os
            os._exit(0)
            """
        assert run(code, device) == "said\n"


class TestReports:
    def test_an_overrun_is_found_at_free_and_by_check(self, device):
        code = """
            def loads():
                return pool.allocate(1000)
            address = loads()
            assert not pool.check()
            put(address, 1000, 0x41, 3)
            (found,) = pool.check()
            assert (found.kind, found.offset, found.overwritten, found.found) == ("overrun", 1000, 3, b"AAA")
            try:
                pool.deallocate(address)
            except errors.MemoryCorruptionError as error:
                print(error)
            assert pool.stats().requested == 0
            """
        printed = run(code, device)
        assert "3 bytes were overwritten, beginning at the end of the block of 1000 bytes" in printed
        assert "in loads" in printed

    @pytest.mark.parametrize("offset", [-1, "size"])
    def test_the_slack_of_a_large_block(self, device, offset):
        code = f"""
            size = 3 * MiB + 7
            address = pool.allocate(size)
            put(address, {offset}, 0)
            try:
                pool.deallocate(address)
            except errors.MemoryCorruptionError as error:
                print(error.corruptions[0].kind)
            """
        assert run(code, device) == ("underrun\n" if offset == -1 else "overrun\n")

    def test_a_write_to_a_freed_small_block(self, device):
        code = """
            address = pool.allocate(1000)
            pool.deallocate(address)
            assert get(address, 5) == 0xDD
            put(address, 5, 0)
            (found,) = pool.check()
            print(found.kind, found.offset)
            """
        assert run(code, device) == "use after free 5\n"

    def test_double_and_foreign_frees(self, device):
        code = """
            for size in (1000, 4 * MiB):
                address = pool.allocate(size)
                pool.deallocate(address)
                for wrong in (address, address + 8, 0x1000):
                    try:
                        pool.deallocate(wrong)
                    except errors.InvalidPointerError as error:
                        print(str(error).partition(":")[0])
            """
        assert run(code, device) == "double free\ninterior pointer\nforeign free\n" * 2

    def test_a_free_waits_for_kernels_that_use_the_memory(self, device):
        code = """
            stream = cupy.cuda.Stream(non_blocking=True)
            address = pool.allocate(4 * MiB, stream=stream.ptr)
            with stream:
                arguments = (cupy.uint64(address), cupy.int64(0), cupy.int32(1), cupy.int64(200_000_000))
                module.get_function("slow_put")((1,), (1,), arguments)
            pool.deallocate(address)
            cupy.cuda.runtime.deviceSynchronize()
            print("no fault")
            """
        assert run(code, device) == "no fault\n"

    def test_a_graph_keeps_what_was_freed_in_its_capture(self, device):
        code = """
            stream = cupy.cuda.Stream(non_blocking=True)
            keep = pool.allocate(2 * MiB, stream=stream.ptr)
            function = module.get_function("put")  # loaded before the capture
            put(keep, 0)
            with stream:
                stream.begin_capture()
                address = pool.allocate(2 * MiB, stream=stream.ptr)
                function((1,), (1,), (cupy.uint64(address), cupy.int64(0), cupy.int32(5), cupy.int32(1)))
                pool.deallocate(address)
                graph = stream.end_capture()
            for _ in range(3):
                graph.launch(stream)
                pool.deallocate(pool.allocate(2 * MiB))
            stream.synchronize()
            assert get(address, 0) == 5
            print("replayed")
            del graph
            pool.deallocate(keep)
            """
        assert run(code, device) == "replayed\n"

    def test_leaks(self, device):
        code = """
            address = pool.allocate("3MiB", tag="weights")
            (leak,) = pool.leaks()
            assert (leak.address, leak.bytes, leak.tag) == (address, 3 * MiB, "weights")
            try:
                pool.close()
            except errors.PoolInUseError as error:
                assert leak.stack.splitlines()[0] in str(error), error
                print("in use")
            pool.deallocate(address)
            pool.close()
            """
        assert run(code, device) == "in use\n"

    def test_memory_goes_back_to_the_device(self, device):
        code = """
            free = cupy.cuda.runtime.memGetInfo()[0]
            address = pool.allocate(512 * MiB)
            assert free - cupy.cuda.runtime.memGetInfo()[0] >= 512 * MiB
            pool.deallocate(address)
            assert free - cupy.cuda.runtime.memGetInfo()[0] < 64 * MiB
            print("back")
            """
        assert run(code, device) == "back\n"
