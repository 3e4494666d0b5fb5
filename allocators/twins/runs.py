"""How a trace is replayed on each twin; runs in the process of the replay only."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from .. import _native
from ..attach import import_onnxruntime
from ..errors import GlakeError, MissingDependencyError
from ..pool import Pool
from ..trace import Trace

__all__ = ["RUNS", "Run", "ort_allocator"]


@dataclass(frozen=True)
class Run:
    """What a replay measured."""

    peak_reserved: int
    seconds: float
    all_seconds: float
    peak_active: int | None = None
    driver_calls: int | None = None
    last_driver_calls: int | None = None
    loop: str = "native"


def _native_replay(
    allocator: _native.ReplayAllocator,
    trace: Trace,
    handles: list[int],
    repeat: int,
    between: Callable[[], None] | None = None,
) -> dict[str, Any]:
    found: dict[str, Any] = _native.replay(
        allocator, trace.operations, trace.slots, trace.bytes, trace.streams, handles, repeat, between
    )
    if found["failed_step"]:
        raise _failed(trace, found["failed_step"], found["failure"])
    return found


def _failed(trace: Trace, step: int, why: object) -> GlakeError:
    size = int(trace.bytes[step - 1])
    return GlakeError(
        f"the replay of {trace.name} ended at its operation {step} of {len(trace)}, a request of {size} bytes: {why}"
    )


@contextlib.contextmanager
def _streams(kind: str, index: int, count: int):  # type: ignore[no-untyped-def]
    """Yield the handles of `count` new streams of a CUDA device; none on the CPU."""
    if kind == "cpu" or count == 0:
        yield []
    else:
        maker = _cuda_async(index)
        yield [maker.make_stream() for _ in range(count)]


def _cuda_async(index: int) -> _native.CudaAsync:
    try:
        return _native.CudaAsync(index)
    except RuntimeError as error:
        raise GlakeError(f"device 'cuda:{index}' cannot be used: {error}") from error


def _glake(trace: Trace, kind: str, index: int, repeat: int, limit: int | None) -> Run:
    pool = Pool("cpu" if kind == "cpu" else f"cuda:{index}", limit=limit)
    before = 0

    def between() -> None:
        nonlocal before
        before = pool.stats().driver_calls

    with _streams(kind, index, trace.stream_count) as handles:
        start = pool.stats().driver_calls
        found = _native_replay(_native.replay_on_pool(pool._open()), trace, handles, repeat, between)
        stats = pool.stats()
    return Run(
        peak_reserved=stats.peak_reserved,
        peak_active=stats.peak_active,
        seconds=found["seconds"],
        all_seconds=found["all_seconds"],
        driver_calls=stats.driver_calls - start,
        last_driver_calls=stats.driver_calls - before,
    )


def _malloc(trace: Trace, kind: str, index: int, repeat: int, limit: int | None) -> Run:
    found = _native_replay(_native.replay_on_malloc(), trace, [], repeat)
    return Run(found["peak_sampled"], found["seconds"], found["all_seconds"])


def ort_allocator(kind: str, index: int, settings: dict[str, int] | None = None) -> int:
    """Return the address of the OrtAllocator of an arena of ONNX Runtime's.

    settings: register an arena with these settings (`CreateArenaCfgV2`) with ONNX Runtime's environment, where it
        takes the place of the device's allocator: only for processes that make no session on the pool.
        None: the arena that a session makes for itself.

    Raises `MissingDependencyError` or `GlakeError`.
    """
    runtime: Any = import_onnxruntime()
    name = "Cpu" if kind == "cpu" else "Cuda"
    provider = "CPUExecutionProvider" if kind == "cpu" else "CUDAExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise MissingDependencyError(
            f"this ONNX Runtime {runtime.__version__} has no {provider}. Install it with: "
            "pip install 'glake-infer[cuda]'"
        )
    # It is refused, having told us where ONNX Runtime's functions are.
    with contextlib.suppress(Exception):
        runtime.SessionOptions().register_custom_ops_library(_native.__file__)
    if settings is not None:
        try:
            _native.ort_register_arena(name, index, settings)
        except RuntimeError as error:
            raise MissingDependencyError(
                f"ONNX Runtime {runtime.__version__} made no arena with {settings}: {error}"
            ) from error
    try:
        return _native.ort_session_allocator(_tiny_model(), name, index, settings is not None)
    except RuntimeError as error:
        raise GlakeError(f"ONNX Runtime {runtime.__version__} does not show its arena: {error}") from error


def _tiny_model() -> bytes:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "tiny",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    data: bytes = model.SerializeToString()
    return data


def _ort(settings: dict[str, int]) -> Callable[..., Run]:
    def run(trace: Trace, kind: str, index: int, repeat: int, limit: int | None) -> Run:
        allocator = _native.replay_on_ort(ort_allocator(kind, index, settings))
        found = _native_replay(allocator, trace, [], repeat)
        return Run(
            peak_reserved=found["peak_sampled"],
            peak_active=found["peak_active"],
            seconds=found["seconds"],
            all_seconds=found["all_seconds"],
            driver_calls=found["driver_calls"],
        )

    return run


def _ort_mempool(trace: Trace, kind: str, index: int, repeat: int, limit: int | None) -> Run:
    settings = {"use_cuda_mempool": 1, "cuda_mempool_release_threshold": (1 << 63) - 1}
    address = ort_allocator(kind, index, settings)
    try:
        allocator = _native.replay_on_driver_pool(address)
    except RuntimeError as error:
        raise MissingDependencyError(
            f"ONNX Runtime {import_onnxruntime().__version__} made no memory pool arena with {settings}: {error}"
        ) from error
    found = _native_replay(allocator, trace, [], repeat)
    return Run(
        found["peak_reserved"], found["seconds"], found["all_seconds"], peak_active=found["peak_active"]
    )


def _async(trace: Trace, kind: str, index: int, repeat: int, limit: int | None) -> Run:
    twin = _cuda_async(index)
    handles = [twin.make_stream() for _ in range(trace.stream_count)]
    found = _native_replay(twin.replay(), trace, handles, repeat)
    return Run(
        found["peak_reserved"], found["seconds"], found["all_seconds"], peak_active=found["peak_active"]
    )


class _Python(Protocol):
    """An allocator that is called from Python."""

    def allocate(self, size: int, stream: int) -> int: ...
    def free(self, address: int, size: int, stream: int) -> None: ...


def _python_replay(twin: _Python, trace: Trace, handles: list[int], repeat: int) -> tuple[float, float]:
    steps = list(trace.steps())
    total = seconds = 0.0
    for _ in range(repeat):
        taken: dict[int, tuple[int, int, int]] = {}
        start = time.perf_counter()
        for number, (op, slot, size, stream) in enumerate(steps, 1):
            if op == "f":
                twin.free(*taken.pop(slot))
            else:
                handle = 0 if stream < 0 else handles[stream]
                try:
                    taken[slot] = twin.allocate(size, handle), size, handle
                except (MemoryError, RuntimeError) as error:
                    for left in taken.values():
                        twin.free(*left)
                    raise _failed(trace, number, error) from error
        for left in taken.values():
            twin.free(*left)
        seconds = time.perf_counter() - start
        total += seconds
    return seconds, total


def _package(name: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"the package {name!r} is needed for this allocator and cannot be imported ({error}). "
            f"Install it with: pip install {install}"
        ) from error


class _TorchTwin:
    def __init__(self, torch: Any, index: int) -> None:
        self._torch, self._index = torch, index

    def allocate(self, size: int, stream: int) -> int:
        if size == 0:
            return 0
        address: int = self._torch.cuda.caching_allocator_alloc(size, self._index, stream)
        return address

    def free(self, address: int, size: int, stream: int) -> None:
        if address:
            self._torch.cuda.caching_allocator_delete(address)


def _torch(trace: Trace, kind: str, index: int, repeat: int, limit: int | None) -> Run:
    torch: Any = _package("torch", "torch")
    if not (hasattr(torch, "cuda") and torch.cuda.is_available()):
        version = getattr(torch, "__version__", "of an unknown version")
        raise MissingDependencyError(f"PyTorch ({version}) sees no CUDA device: install a build with CUDA")
    torch.cuda.init()
    streams = [torch.cuda.Stream(index) for _ in range(trace.stream_count)]
    handles = [stream.cuda_stream for stream in streams]
    seconds, total = _python_replay(_TorchTwin(torch, index), trace, handles, repeat)
    stats = torch.cuda.memory_stats(index)
    return Run(
        peak_reserved=stats["reserved_bytes.all.peak"],
        peak_active=stats["active_bytes.all.peak"],
        seconds=seconds,
        all_seconds=total,
        driver_calls=stats.get("num_device_alloc", 0) + stats.get("num_device_free", 0),
        loop="python",
    )


class _Handle(NamedTuple):
    """A stream, by CUDA's stream protocol."""

    value: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.value


class _RmmTwin:
    """RMM's pool on the current device: it begins empty, and grows to twice its size or by what is asked for."""

    def __init__(self, rmm: Any, handles: list[int]) -> None:
        self._pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=0)
        streams = rmm.pylibrmm.stream
        self._streams = {handle: streams.Stream(_Handle(handle)) for handle in handles}
        self._streams[0] = streams.DEFAULT_STREAM
        self.peak = 0

    def allocate(self, size: int, stream: int) -> int:
        if size == 0:
            return 0
        address: int = self._pool.allocate(size, self._streams[stream])
        self.peak = max(self.peak, self._pool.pool_size())
        return address

    def free(self, address: int, size: int, stream: int) -> None:
        if address:
            self._pool.deallocate(address, size, self._streams[stream])


def _rmm(trace: Trace, kind: str, index: int, repeat: int, limit: int | None) -> Run:
    rmm: Any = _package("rmm", "rmm-cu13")
    maker = _cuda_async(index)  # says so where there is no such device
    cuda: Any = _package("cuda.bindings.runtime", "cuda-python")
    cuda.cudaSetDevice(index)  # a memory resource belongs to the device that is current when it is made
    handles = [maker.make_stream() for _ in range(trace.stream_count)]
    twin = _RmmTwin(rmm, handles)
    seconds, total = _python_replay(twin, trace, handles, repeat)
    peak = twin.peak
    del twin  # before the streams that it recorded events on
    return Run(peak, seconds, total, loop="python")


RUNS: dict[str, Callable[[Trace, str, int, int, int | None], Run]] = {
    "glake": _glake,
    "ort-arena": _ort({"arena_extend_strategy": 0}),
    "ort-arena-same": _ort({"arena_extend_strategy": 1}),
    "ort-mempool": _ort_mempool,
    "malloc": _malloc,
    "cuda-async": _async,
    "torch": _torch,
    "torch-expandable": _torch,
    "rmm": _rmm,
}
