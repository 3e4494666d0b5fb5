"""Peers whose links carry bytes of a GPU: which are used, and their buffers, which come from the peers' pools."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from glake_infer.allocators.errors import GlakeError
from glake_infer.allocators.pool import Pool
from glake_infer.transfers import paths
from glake_infer.transfers.settings import transfer_settings

if TYPE_CHECKING:
    from glake_infer.allocators import _native

WORTH = 1.1
"""A peer's link is used if, together with it, a GPU's own is so much faster."""

_log = logging.getLogger("glake_infer")


class Relays:
    """Those of one GPU. Thread-safe."""

    def __init__(self, engine: _native.TransferEngine, index: int) -> None:
        """None is used before it is asked for."""
        self._engine = engine
        self._index = index
        self._lock = threading.RLock()
        self._staging: dict[int, tuple[_native.Pool, int]] = {}  # peer -> its pool, and the address there
        self._tried: set[int] = set()

    def ready(self) -> int:
        """Make the paths by peers that the settings want and that are not there; returns how many there are."""
        if transfer_settings().paths == "own":
            return 0
        with self._lock:
            for peer in self._wanted():
                if peer not in self._tried:
                    self._tried.add(peer)
                    try:
                        self._add(peer)
                    except GlakeError as error:
                        _log.warning("cuda:%d gets no path by cuda:%d: %s", self._index, peer, error)
            return len(self._staging)

    def _wanted(self) -> list[int]:
        count = paths.gpu_count()
        if count < 2:
            return []
        every = [peer for peer in range(count) if peer != self._index]
        if transfer_settings().paths == "all":
            return every
        return [peer for peer in every if Pool.current(f"cuda:{peer}") is not None]

    def _add(self, peer: int) -> None:
        from glake_infer.allocators import _native

        if not _native.cuda_peers(self._index, peer):
            return
        pool = _native.device_pool(f"cuda:{peer}")
        address = pool.allocate(paths.STAGING, "workspace", -1)
        try:
            figures = paths.figures(self._index, peer, address, paths.STAGING)
            if figures.gain < WORTH:
                pool.deallocate(address)
                return
            self._engine.add_cuda_relay(self._index, peer, address, paths.STAGING, figures.by_peer)
        except BaseException:
            pool.deallocate(address)
            raise
        self._staging[peer] = (pool, address)

    def leave(self, device: str) -> None:
        """Use no peer any more if one of them is this device; the next transfer makes the others' paths again."""
        with self._lock:
            if not any(device == f"cuda:{peer}" for peer in self._staging):
                self._tried.discard(int(device.removeprefix("cuda:")) if device != "cpu" else -1)
                return
            self._engine.remove_further_paths(self._index)
            for pool, address in self._staging.values():
                pool.deallocate(address)
            self._staging.clear()
            self._tried.clear()
