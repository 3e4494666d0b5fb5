"""What cannot work says why, what was received and what to do, and leaves the rest working."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("cupy")
import kernels

from glake_infer import Pool
from glake_infer.allocators import DeviceNotFoundError, InputError, OutOfMemoryError, PoolExistsError

pytestmark = pytest.mark.gpu
MiB, GiB = 2**20, 2**30

# Takes nearly all of the device's memory, says so, and leaves when its input ends.
HOG = """
import sys
from cuda.bindings import runtime
runtime.cudaSetDevice(int(sys.argv[1]))
for piece in (1 << 30, 64 << 20):
    while runtime.cudaMemGetInfo()[1] > (700 << 20) + piece:
        error, _ = runtime.cudaMalloc(piece)
        if error:
            break
print("full", flush=True)
sys.stdin.read()
"""


def run(code, *prefix, **environment):
    """Run code in a new process; returns what it printed."""
    command = [*prefix, sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(device, *prefix, **environment):
    """The error of making a pool in a new process."""
    return run(
        f"""
from glake_infer import GlakeError, Pool
try:
    Pool({device!r}, "1GiB")
    print("no error")
except GlakeError as error:
    print(type(error).__name__, error)
""",
        *prefix,
        **environment,
    )


def test_a_limit_above_the_devices_memory_is_refused(device):
    with pytest.raises(InputError, match="100.0 TiB .* has .* GiB"):
        Pool(device, "100TiB")


def test_a_device_that_is_full_ends_in_an_error_that_says_what_it_has(device):
    with Pool(device) as pool:
        held = []
        with pytest.raises(OutOfMemoryError, match="device") as caught:  # noqa: PT012
            while True:
                held.append(pool.allocate(2 * GiB))
        assert caught.value.device_free < 3 * GiB
        assert pool.stats().active == len(held) * 2 * GiB
        for address in held:
            pool.deallocate(address)
        pool.check_invariants()


def test_without_a_limit_the_devices_memory_is_it(device):
    with Pool(device) as pool:
        assert 0.5 * kernels.total_memory() < pool.limit <= kernels.total_memory()


def test_another_process_fills_the_gpu_and_leaves(python, pool, device):
    pool.limit = "8GiB"
    kept = pool.allocate(512 * MiB)
    hog = python(HOG, device.partition(":")[2], stdin=subprocess.PIPE)
    assert hog.stdout.readline() == "full\n"
    with pytest.raises(OutOfMemoryError) as caught:
        pool.allocate(2 * GiB)
    assert caught.value.device_free < 2 * GiB
    assert "device has" in str(caught.value)
    pool.deallocate(kept)
    again = pool.allocate(512 * MiB)  # what the pool holds still serves
    hog.stdin.close()
    hog.wait(60)
    for _ in range(100):
        if kernels.free_memory() > 4 * GiB:
            break
        time.sleep(0.1)
    large = pool.allocate(2 * GiB)
    pool.deallocate(large)
    pool.deallocate(again)


def test_an_index_that_is_not_there():
    count = kernels.cupy().cuda.runtime.getDeviceCount()
    with pytest.raises(DeviceNotFoundError, match=f"cuda:{count}") as caught:
        Pool(f"cuda:{count}")
    assert str(count) in str(caught.value)
    for name in ("cuda:-1", "cuda:x", "cuda:", "gpu", "CUDA:0"):
        with pytest.raises(DeviceNotFoundError):
            Pool(name)


def test_no_visible_device():
    assert refusal("cuda:0", CUDA_VISIBLE_DEVICES="").startswith("DeviceNotFoundError ")


def test_a_device_by_its_uuid():
    uuid = subprocess.run(
        ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")[0]
    assert refusal("cuda:0", CUDA_VISIBLE_DEVICES=uuid.strip()) == "no error\n"
    assert refusal("cuda:1", CUDA_VISIBLE_DEVICES=uuid.strip()).startswith("DeviceNotFoundError ")


def test_devices_are_counted_as_cuda_counts_them():
    if kernels.cupy().cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")

    def used():
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return [int(line) for line in subprocess.check_output(query, text=True).split()]

    code = """
import subprocess
from glake_infer import Pool
pool = Pool("cuda:0", "4GiB")
address = pool.allocate("3GiB")
print(subprocess.check_output(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], text=True))
"""
    before = used()
    after = [int(line) for line in run(code, CUDA_VISIBLE_DEVICES="1,0").split()]
    assert after[1] - before[1] > 3000
    assert after[0] - before[0] < 1000


def test_no_driver(device):
    """In a mount namespace where the driver's library is an empty file."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        libraries = sorted({line.split()[-1] for line in maps if "/libcuda.so" in line})
    assert libraries
    hide = " && ".join(f"mount --bind /dev/null '{os.path.realpath(path)}'" for path in libraries)
    prefix = ["unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount here")
    message = refusal(device, *prefix)
    assert message.startswith(("DeviceNotFoundError ", "DriverError "))
    assert "libcuda.so.1" in message


@pytest.mark.timeout(60)
def test_a_fork_after_use_is_an_error_and_no_hang(device):
    out = run(f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from glake_infer import Pool
from glake_infer.allocators import ForkedProcessError
pool = Pool({device!r}, "1GiB")
address = pool.allocate(1 << 20)
child = os.fork()
if child == 0:
    refused = 0
    for call in (lambda: pool.allocate(100), lambda: pool.deallocate(address), pool.trim, lambda: Pool({device!r})):
        try:
            call()
        except ForkedProcessError:
            refused += 1
    os._exit(refused)
_, status = os.waitpid(child, 0)
pool.deallocate(address)
pool.deallocate(pool.allocate(2 << 20))
pool.close()
print(os.waitstatus_to_exitcode(status))
""")
    assert out == "4\n", out


def test_a_second_pool_on_the_device(pool, device):
    with pytest.raises(PoolExistsError):
        Pool(device, "1GiB")
    assert Pool.current(device) is pool
    with Pool("cpu", "64MiB") as host:
        host.deallocate(host.allocate(100))
