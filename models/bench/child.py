"""One side of a benchmark, in a process of its own: `python -m glake_infer.models.bench.child '{"side": ...}'`.

Prints JSON lines: {"progress": [done, in all]} now and then, and one answer. Libraries are imported by the sides that
need them: others' would take memory and time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Say = Callable[[dict[str, Any]], None]
Request = Mapping[str, Any]

TELLING = 0.05
"""Seconds between two words on how far it is."""

RAW = 256 << 20
"""Bytes of a raw copy, page-locked."""

RAW_ON_HOST = 64 << 20

SHOWN = 1000
"""Numbers of each output that are compared."""


class Ours:
    """Models of this package, on one pool."""

    def __init__(self, request: Request) -> None:
        from glake_infer.allocators.pool import Pool

        self._pool = Pool(request["device"])
        self._models: list[Any] = []

    def load(self, path: str, request: Request, progress: Callable[[int, int], None] | None = None) -> Any:
        """Load a package."""
        from glake_infer.models.load import load
        from glake_infer.store import Store

        model = load(
            path,
            self._pool,
            host_copy=request.get("host_copy", "store"),
            configure=_quieten,
            store=Store(request["store"]),
            progress=progress,
        )
        self._models.append(model)
        return model

    def feeds(self, model: Any, shapes: Sequence[str]) -> dict[str, Any]:
        """What a model is fed."""
        return _feeds(model.inputs, shapes)

    def run(self, model: Any, feeds: dict[str, Any]) -> list[Any]:
        """One answer."""
        return list(model.run(feeds).values())


class Plain:
    """ONNX Runtime as it comes."""

    def __init__(self, request: Request) -> None:
        from glake_infer.allocators.attach import import_onnxruntime

        self._ort = import_onnxruntime()
        self._providers: list[Any] = ["CPUExecutionProvider"]
        if request["device"] != "cpu":
            self._providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(_index(request))}))

    def load(self, path: str, request: Request, progress: Callable[[int, int], None] | None = None) -> Any:
        """Make a session of an ONNX file."""
        from glake_infer.models.load import check_providers

        options = self._ort.SessionOptions()
        _quieten(options)
        session = self._ort.InferenceSession(path, options, providers=self._providers)
        check_providers(session.get_providers(), self._providers)
        return session

    def feeds(self, session: Any, shapes: Sequence[str]) -> dict[str, Any]:
        """What a session is fed."""
        from glake_infer.models.values import value_of_argument

        return _feeds([value_of_argument(argument) for argument in session.get_inputs()], shapes)

    def run(self, session: Any, feeds: dict[str, Any]) -> list[Any]:
        """One answer."""
        return list(session.run(None, feeds))


SESSIONS: dict[str, type[Ours] | type[Plain]] = {"glake-infer": Ours, "onnxruntime": Plain}


def _quieten(options: Any) -> None:
    options.log_severity_level = 3


def _index(request: Request) -> int:
    return int(request["device"].partition(":")[2] or 0)


def _feeds(inputs: Sequence[Any], shapes: Sequence[str]) -> dict[str, Any]:
    import numpy as np

    from glake_infer.allocators.errors import InputError
    from glake_infer.models.feeds import feeds_of, parse_shapes

    given, used = parse_shapes(shapes, []), set[int]()
    feeds, _ = feeds_of("model", inputs, inputs, [], given, np.random.default_rng(0), used)
    if unknown := [each.text for each in given if id(each) not in used]:
        raise InputError(f"{unknown[0]}: no such input. Inputs are {', '.join(map(str, inputs))}.")
    return feeds


def _shown(outputs: Sequence[Any]) -> list[list[float]]:
    """The first numbers of each output, to be compared with another side's."""
    import numpy as np

    arrays = [np.asarray(output) for output in outputs]
    return [
        array.reshape(-1)[:SHOWN].astype(np.float64).tolist()
        for array in arrays
        if array.dtype.kind in "biuf"
    ]


def load_session(request: Request, say: Say) -> dict[str, Any]:
    """From files to an answer, once. A warm process has loaded and run a tiny model before."""
    side = None
    if request["start"] == "warm":
        side = SESSIONS[request["side"]](request)
        tiny = side.load(request["warming"], {**request, "store": request["warming_store"]})
        side.run(tiny, side.feeds(tiny, ()))
        start = time.monotonic_ns()
    else:
        start = request["begun"]
        side = SESSIONS[request["side"]](request)
    arrived = 0

    def progress(done: int, total: int) -> None:
        nonlocal arrived
        if done >= total:
            arrived = time.monotonic_ns()
        tell(done, total)

    tell = _telling(say)
    from glake_infer.transfers import timeline

    with timeline.record() as recorded:
        model = side.load(request["path"], request, progress)
        loaded = time.monotonic_ns()
        feeds = side.feeds(model, request["shapes"])
        begun = time.monotonic_ns()
        with timeline.span("session", "first run"):
            outputs = side.run(model, feeds)
        answered = time.monotonic_ns() - (begun - loaded)
    built = [span.end for span in recorded.spans if span.row == "session" and span.name.startswith("build ")]
    moved = [span for span in recorded.spans if span.row.startswith(("reader ", "link "))]
    if request.get("trace"):
        recorded.save(request["trace"])
    answer: dict[str, Any] = {
        "copying": (max(s.end for s in moved) - min(s.start for s in moved)) / 1e9 if moved else None,
        "to_weights": (arrived - start) / 1e9 if arrived else None,
        "to_session": ((built[-1] if built else loaded) - start) / 1e9,
        "to_answer": (answered - start) / 1e9,
        "outputs": _shown(outputs),
    }
    if request["side"] == "glake-infer":
        answer.update(_of_ours(model))
    return answer


def _of_ours(model: Any) -> dict[str, Any]:
    from glake_infer.transfers.device import in_flight
    from glake_infer.transfers.settings import transfer_settings

    store = model.package.store
    folders = (store.objects, store.prepared_objects)
    files = [
        str(folder.path(d)) for d in model._holding.addresses for folder in folders if folder.path(d).exists()
    ]
    return {
        "in_flight": in_flight()["peak"],
        "in_flight_bound": transfer_settings().in_flight,
        "paths": transfer_settings().paths,
        "verified": os.environ.get("GLAKE_VERIFY", "once"),
        "files": files,
    }


def _telling(say: Say) -> Callable[[int, int], None]:
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TELLING:
            last = now
            say({"progress": [done, total]})

    return tell


def nap(request: Request, say: Say) -> dict[str, Any]:
    """Suspend and resume a model over and over; the first time is for warming."""
    import numpy as np

    from glake_infer.transfers import timeline

    side = Ours(request)
    model = side.load(request["path"], request, _telling(say))
    feeds = side.feeds(model, request["shapes"])
    first, right, asleep, freed = side.run(model, feeds), True, 0, 0
    suspends, resumes = list[float](), list[float]()
    for turn in range(request["repeat"] + 1):
        last = turn == request["repeat"]
        with timeline.record() if last and request.get("trace") else contextlib.nullcontext() as recorded:
            start = time.perf_counter()
            with timeline.span("model", "suspend"):
                freed = model.suspend()
            slept = time.perf_counter()
            asleep = model.memory.asleep
            begun = time.perf_counter()
            with timeline.span("model", "resume"):
                model.resume()
            woken = time.perf_counter()
        if recorded is not None:
            recorded.save(request["trace"])
        found = side.run(model, feeds)
        right &= all(
            np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(first, found, strict=True)
        )
        if turn:
            suspends.append(slept - start)
            resumes.append(woken - begun)
        say({"progress": [turn + 1, request["repeat"] + 1]})
    return {
        "suspends": suspends, "resumes": resumes, "bytes": asleep, "freed": freed, "right": right,
        "pinned": model.memory.pinned, **_of_ours(model),
    }  # fmt: skip


def make_again(request: Request, say: Say) -> dict[str, Any]:
    """End a plain session and make it anew, over and over, until it answers; the first time is for warming."""
    side = Plain(request)
    session = side.load(request["path"], request)
    feeds = side.feeds(session, request["shapes"])
    side.run(session, feeds)
    ends, resumes = list[float](), list[float]()
    for turn in range(request["repeat"] + 1):
        start = time.perf_counter()
        del session
        gc.collect()
        ended = time.perf_counter()
        session = side.load(request["path"], request)
        side.run(session, feeds)
        if turn:
            ends.append(ended - start)
            resumes.append(time.perf_counter() - ended)
        say({"progress": [turn + 1, request["repeat"] + 1]})
    return {"suspends": ends, "resumes": resumes}


def raw(request: Request, say: Say) -> dict[str, Any]:
    """Bytes per second of copies from and to page-locked memory, over a GPU's own link or all; on the CPU, of memory."""
    if request["device"] == "cpu":
        import numpy as np

        source, target = np.ones(RAW_ON_HOST, np.uint8), np.zeros(RAW_ON_HOST, np.uint8)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            np.copyto(target, source)
            times.append(time.perf_counter() - start)
        rate = RAW_ON_HOST / min(times)
        return {"to_device": rate, "to_host": rate, "paths": 1}
    from glake_infer.models.bench.links import links_of
    from glake_infer.transfers.paths import measure

    with links_of(_index(request), all_paths=request["paths"] == "all") as links:
        to_device, to_host = measure(_index(request), links, 3, request.get("size") or RAW)
    return {"to_device": to_device, "to_host": to_host, "paths": len(links)}


def _torch(request: Request) -> Any:
    from glake_infer.allocators.errors import MissingDependencyError

    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(f"PyTorch cannot be imported: {error}") from error
    if request["device"] != "cpu" and not torch.cuda.is_available():
        raise MissingDependencyError("PyTorch has no CUDA here")
    torch.ones(1 << 20, device=request["device"]).sum().item()  # its context
    return torch


@contextlib.contextmanager
def _timed(torch: Any, request: Request) -> Iterator[list[float]]:
    found: list[float] = []
    start = time.perf_counter()
    yield found
    if request["device"] != "cpu":
        torch.cuda.synchronize(request["device"])
    found.append(time.perf_counter() - start)


def load_tensors(request: Request, say: Say) -> dict[str, Any]:
    """The copy alone: safetensors to PyTorch's tensors on the device. The process has used it before."""
    torch = _torch(request)
    if request["side"] == "safetensors":
        from safetensors.torch import load_file

        load_file(request["warming"], device=request["device"])
        with _timed(torch, request) as found:
            kept: Any = load_file(request["path"], device=request["device"])
    else:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        def load(path: str) -> Any:
            loader = SafeTensorsFileLoader(pg=SingleGroup(), device=request["device"], nogds=True)
            loader.add_filenames({0: [path]})
            buffer = loader.copy_files_to_device()
            return loader, buffer, [buffer.get_tensor(name) for name in buffer.key_to_rank_lidx]

        load(request["warming"])
        with _timed(torch, request) as found:
            kept = load(request["path"])
    del kept
    return {"to_weights": found[0], "to_session": None, "to_answer": None, "outputs": []}


def copy_tensors(request: Request, say: Say) -> dict[str, Any]:
    """PyTorch's copy of as many bytes from a pinned tensor of at most 1 GiB."""
    torch = _torch(request)
    size = min(1 << 30, request["bytes"])
    source = torch.zeros(size, dtype=torch.uint8)
    if request["device"] != "cpu":
        source = source.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=request["device"])
    resumes = []
    for turn in range(request["repeat"] + 1):
        with _timed(torch, request) as found:
            for done in range(0, request["bytes"], size):
                count = min(size, request["bytes"] - done)
                target[:count].copy_(source[:count], non_blocking=True)
        if turn:
            resumes += found
    return {"suspends": [], "resumes": resumes}


TASKS: dict[str, Callable[[Request, Say], dict[str, Any]]] = {
    "load": load_session,
    "nap": nap,
    "make again": make_again,
    "raw": raw,
    "tensors": load_tensors,
    "copy": copy_tensors,
}


def main() -> None:
    """Answer the request in the first argument."""
    from glake_infer.allocators.errors import GlakeError

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not get between the answers

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    request = json.loads(sys.argv[1])
    try:
        say(TASKS[request["task"]](request, say))
    except GlakeError as error:
        say({"error": type(error).__name__, "message": str(error)})
    except KeyboardInterrupt:
        sys.exit(130)
    os._exit(0)  # how a side ends is not what is measured, and may take long


if __name__ == "__main__":
    main()
