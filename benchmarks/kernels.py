"""Kernels on stitched memory of the pool beside contiguous memory (cudaMalloc): a large copy, a matrix product.

    python -m benchmarks.kernels --device cuda:0 [--out FILE]

The pool's blocks are made of the pieces of many freed ones, so that they are really stitched. Times are the GPU's
(events), in pairs that take turns; a ratio above 1 says that stitched memory is slower.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.record import record
from glake_infer import Pool

MiB = 2**20
BYTES = 512 * MiB  # of each of the copy's two buffers
SIDE = 8192  # of the square float32 matrices


def stitched(pool: Pool, sizes: list[int]) -> list[int]:
    """Blocks that are made of pieces which other blocks left, in an order that is not that of the addresses."""
    rng = random.Random(1)
    total, parts = sum(sizes), []
    while sum(size for _, size in parts) < total * 1.2:
        size = rng.choice((2, 4, 6, 10, 16, 32, 48)) * MiB
        parts.append((pool.allocate(size), size))
    rng.shuffle(parts)
    kept = [parts.pop() for _ in range(len(parts) // 8)]  # holes stay between the pieces
    for address, _ in parts:
        pool.deallocate(address)
    reserved = pool.stats().reserved
    pool.limit = max(reserved, pool.stats().active + total + 64 * MiB)
    blocks = [pool.allocate(size) for size in sizes]
    for address, _ in kept:
        pool.deallocate(address)
    return blocks


def paired(run: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Median seconds of each on the GPU, and of the ratio of neighbours."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    times: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(rounds + 3):
        for name in sorted(run, reverse=bool(turn % 2)):
            start.record()
            run[name]()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    ratios = [mine / twin for mine, twin in zip(times["ours"], times["twin"], strict=True)]
    return {
        "ours": statistics.median(times["ours"]),
        "twin": statistics.median(times["twin"]),
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Record one line per kernel."""
    import cupy

    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    index = int(arguments.device.partition(":")[2] or 0)
    cupy.cuda.Device(index).use()
    runtime = cupy.cuda.runtime

    with Pool(arguments.device) as pool:
        sizes = [BYTES, BYTES, *[4 * SIDE * SIDE] * 3]
        places = {"ours": stitched(pool, sizes), "twin": [runtime.malloc(size) for size in sizes]}
        stats = pool.stats()

        def matrix(address: int) -> Any:
            memory = cupy.cuda.UnownedMemory(address, 4 * SIDE * SIDE, None, index)
            return cupy.ndarray((SIDE, SIDE), cupy.float32, cupy.cuda.MemoryPointer(memory, 0))

        copies: dict[str, Callable[[], None]] = {}
        products: dict[str, Callable[[], None]] = {}
        outputs = {}
        for name, (source, target, *rest) in places.items():
            runtime.memset(source, 1, BYTES)
            a, b, c = (matrix(address) for address in rest)
            a[:], b[:] = cupy.random.RandomState(1).standard_normal((SIDE, SIDE), dtype=cupy.float32), 0.5
            outputs[name] = c
            copies[name] = lambda target=target, source=source: runtime.memcpyAsync(
                target, source, BYTES, runtime.memcpyDeviceToDevice, cupy.cuda.get_current_stream().ptr
            )
            products[name] = lambda a=a, b=b, c=c: cupy.matmul(a, b, out=c)
        results = {"copy": paired(copies, arguments.rounds), "matmul": paired(products, arguments.rounds)}
        equal = bool((outputs["ours"] == outputs["twin"]).all())
        runtime.deviceSynchronize()
        for address in places["ours"]:
            pool.deallocate(address)
        for address in places["twin"]:
            runtime.free(address)
    for name, result in results.items():
        record(
            "kernels-cuda",
            {
                "benchmark": "kernels",
                "kernel": name,
                "bytes": BYTES if name == "copy" else 12 * SIDE * SIDE,
                "chunks": stats.chunks,
                "same_result": equal,
                **result,
            },
        )


if __name__ == "__main__":
    main()
