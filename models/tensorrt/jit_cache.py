"""What TensorRT-RTX compiles for a GPU when it first runs an engine, kept on disk for the next process.

    ROOT/tensorrt/jit/PLAN/KEY    the BLAKE3 of the rest (64 characters), then the serialized cache

PLAN is the digest of the engine's plan: `store gc` removes the caches of engines that are in no package. KEY stands for
the library's version and the GPU's name. A file that is damaged, or that TensorRT does not take
(another driver, say), is as good as none, and is replaced. `ROOT` is the store's folder; the files may be deleted at
any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

from glake_infer.digest import DIGEST_LENGTH, digest_of
from glake_infer.models.tensorrt.library import LOGGER
from glake_infer.store import Store, temporary_sibling

_log = logging.getLogger(LOGGER)


class JitCache:
    """The runtime cache of one engine's contexts. Thread-safe."""

    def __init__(self, store: Store, plan: str, version: str, gpu: str) -> None:
        """Of the plan with this digest."""
        self.path = store.compiled / plan / digest_of(f"{version}\n{gpu}".encode())
        self._lock = threading.Lock()
        self._cache: Any = None
        self._written = ""

    def give_to(self, config: Any) -> None:
        """Make contexts of an IRuntimeConfig use it; the first time it is read from disk."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                if blob := self._read():
                    if self._cache.deserialize(blob):
                        self._written = digest_of(blob)
                    else:
                        _log.info("TensorRT does not take the runtime cache %s: it is made anew", self.path)
            config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what has come since it was last written. A disk that does not take it costs the next process some time."""
        with self._lock:
            if self._cache is None:
                return
            blob = self._cache.serialize()
            data = b"" if blob is None else bytes(blob)
            if not data or (digest := digest_of(data)) == self._written:
                return
            try:
                _write(self.path, digest.encode() + data)
            except OSError as error:
                _log.warning("the runtime cache %s cannot be written: %s", self.path, error.strerror)
                return
            self._written = digest

    def _read(self) -> bytes:
        try:
            content = self.path.read_bytes()
        except OSError:
            return b""
        digest, blob = content[:DIGEST_LENGTH], content[DIGEST_LENGTH:]
        if digest_of(blob).encode() != digest:
            _log.info("the runtime cache %s is damaged: it is made anew", self.path)
            return b""
        return blob


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
