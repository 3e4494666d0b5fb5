"""What an allocate and a free of an exact fit cost, on the pool and on its twin, in the same run."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DeviceNotFoundError, GlakeError
from .runs import ort_allocator

__all__ = ["SIZES", "PairReport", "time_pool"]

SIZES = (256, 64 << 10, 4 << 20, 64 << 20)
ROUNDS = 31


@dataclass(frozen=True, slots=True)
class PairReport:
    """One size: nanoseconds of a pair of Alloc and Free on one thread, medians.

    Attributes:
        device: "cpu" or "cuda:N".
        bytes: of the request.
        ours_ns: through our OrtAllocator's function pointers.
        twin_ns: on the twin.
        twin: "ort-arena" (a session's own CPU arena, through its OrtAllocator) or "cuda-async"
            (cudaMallocAsync and cudaFreeAsync on one stream, release threshold at its maximum).
        pairs: in a round.
        rounds: of each, alternating.
    """

    device: str
    bytes: int
    ours_ns: float
    twin_ns: float
    twin: str
    pairs: int
    rounds: int


def time_pool(
    device: str = "cpu", *, sizes: tuple[int, ...] = SIZES, rounds: int = ROUNDS
) -> list[PairReport]:
    """Time pairs of Alloc and Free of the device's pool and of its twin.

    The device's pool is made if there is none. Raises `MissingDependencyError` (the twin on the CPU is ONNX
    Runtime's), `DeviceNotFoundError`, `GlakeError`.
    """
    from .. import _native

    kind, _, index = device.partition(":")
    if kind == "cpu":
        name, other, pairs, keep = "ort-arena", ort_allocator("cpu", 0), 20_000, None
        ours = _native.ort_allocator()
    elif kind == "cuda":
        from ..pool import Pool

        pool = Pool.current(device) or Pool(device)  # makes the device's pool, and checks the device
        try:
            twin = _native.CudaAsync(int(index or 0))
        except RuntimeError as error:
            raise GlakeError(f"device {device!r} cannot be used: {error}") from error
        name, other, pairs, keep = "cuda-async", twin.face(twin.make_stream()), 2_000, (twin, pool)
        ours = _cuda_face(device)
    else:
        raise DeviceNotFoundError(f"there is no device {device!r}. Valid names: 'cpu', 'cuda' and 'cuda:N'.")
    reports = []
    for size in sizes:
        mine, theirs = _native.time_pairs([ours, other], size, pairs, rounds)
        reports.append(PairReport(device, size, mine, theirs, name, pairs, rounds))
    del keep
    return reports


def _cuda_face(device: str) -> int:
    from .. import _native

    return _native.ort_allocator(device)
