"""One side of the demo, in a process of its own: `python -m glake_infer.models.demo_child ROLE` .

Talks JSON lines over stdin and stdout: {"do": "load" | "run" | "measure" | "trim" | "close", ...} and
one answer to each.
ROLE is "plain" (ONNX Runtime as everybody uses it), "fast" or "lean" (four models on one pool).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from glake_infer.allocators.attach import import_onnxruntime
from glake_infer.process_memory import measure, release_unused_heap

MADV_POPULATE_READ = 22

Feeds = dict[str, np.ndarray[Any, Any]]


class Plain:
    """ONNX Runtime as it comes: a session per model, each with its own arena and its own weights."""

    def __init__(self) -> None:
        self._ort = import_onnxruntime()
        self._sessions: list[Any] = []

    def load(self, paths: list[str]) -> None:
        """Make a session of each ONNX file."""
        for path in paths:
            options = self._ort.SessionOptions()
            quieten(options)
            self._sessions.append(
                self._ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            )

    def run(self, model: int, feeds: Feeds) -> list[Any]:
        """Return the outputs of one run."""
        return list(self._sessions[model].run(None, feeds))

    def pool(self) -> dict[str, int]:
        """Return nothing: there is no pool."""
        return {}

    def trim(self) -> None:
        """Nothing to do: an arena gives nothing back."""

    def close(self) -> None:
        """End the sessions."""
        self._sessions.clear()


class Pooled:
    """Four packages on one pool, their equal weights held once."""

    def __init__(self, sharing: Any) -> None:
        import_onnxruntime()  # its libraries belong to the baseline on both sides
        from glake_infer.allocators.pool import Pool
        from glake_infer.models.load import load
        from glake_infer.models.model import Model

        self._load, self._sharing = load, sharing
        self._pool = Pool(device="cpu")
        self._models: list[Model] = []

    def load(self, paths: list[str]) -> None:
        """Load each package."""
        for path in paths:
            self._models.append(self._load(path, self._pool, sharing=self._sharing, configure=quieten))

    def run(self, model: int, feeds: Feeds) -> list[Any]:
        """Return the outputs of one run."""
        return list(self._models[model].run(feeds).values())

    def pool(self) -> dict[str, int]:
        """Return the pool's statistics."""
        return asdict(self._pool.stats())

    def trim(self) -> None:
        """Give the pool's idle memory back."""
        self._pool.trim()

    def close(self) -> None:
        """Close the models and the pool."""
        for model in self._models:
            model.close()
        self._models.clear()
        self._pool.close()


def quieten(options: Any) -> None:
    """Make idle threads sleep at once: processes take turns, and spinning threads would slow the other."""
    options.add_session_config_entry("session.force_spinning_stop", "1")


def serve(role: str, say: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until stdin ends."""
    side: Plain | Pooled = Plain() if role == "plain" else Pooled(role)
    feeds: list[Feeds] = []
    say({})
    for line in sys.stdin:
        request = json.loads(line)
        action = request["do"]
        if action == "load":
            with np.load(request["feeds"]) as file:
                feeds = _unpacked({name: file[name] for name in file.files})
            start = time.perf_counter()
            side.load(request["paths"])
            say({"seconds": time.perf_counter() - start})
        elif action == "run":
            feed = feeds[request["feed"]]
            start = time.perf_counter()
            outputs = side.run(request["model"], feed)
            seconds = time.perf_counter() - start
            wanted = outputs if request.get("outputs", True) else []
            say({"seconds": seconds, "outputs": [np.asarray(output).tolist() for output in wanted]})
        elif action == "measure":
            release_unused_heap()
            touch_weights(Path(os.environ["GLAKE_STORE"]))
            say({"memory": measure().total, "pool": side.pool()})
        elif action in ("trim", "close"):
            getattr(side, action)()
            say({})


def touch_weights(store: Path) -> None:
    """Map every page of the store's objects that the pool has mapped, so that all are counted.

    A session has touched only some rows of its embeddings; plain ONNX Runtime holds all of them in its heap.
    Kernels before 5.14 refuse, and the figure is what the runs have touched.
    """
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, *_, name = line.split(maxsplit=5)
        if access == "r--s" and name.startswith(f"{store}/"):
            first, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(first, end - first, MADV_POPULATE_READ)


def _unpacked(arrays: Feeds) -> list[Feeds]:
    """From "0/input_ids", "0/attention_mask", "1/input_ids", ... to a list of feeds."""
    feeds: dict[int, Feeds] = {}
    for key, array in arrays.items():
        number, _, name = key.partition("/")
        feeds.setdefault(int(number), {})[name] = array
    return [feeds[number] for number in sorted(feeds)]


def main() -> None:
    """Serve on stdin; errors go to the parent as one message."""
    from glake_infer.allocators.errors import GlakeError

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not get between the answers

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        serve(sys.argv[1], say)
    except GlakeError as error:
        say({"error": str(error)})
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
