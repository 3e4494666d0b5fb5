"""The budget of page-locked copies of weights, of all models of the process together."""

from __future__ import annotations

import threading

from glake_infer.transfers.settings import transfer_settings


class HostCache:
    """Counts bytes of copies; the process has one, `host_cache`."""

    def __init__(self) -> None:
        """Empty."""
        self._lock = threading.RLock()  # a collection in a thread that has it may give copies back
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Of all copies."""
        return self._bytes

    def fits(self, size: int) -> bool:
        """Whether copies of `size` bytes are within the budget if there are no others."""
        budget = transfer_settings().host_cache
        return budget is None or size <= budget

    def excess(self, size: int) -> int:
        """By how many bytes copies of `size` more would be above the budget."""
        budget = transfer_settings().host_cache
        return 0 if budget is None else max(0, self._bytes + size - budget)

    def reserve(self, size: int) -> bool:
        """Count `size` bytes, if the budget has room for them."""
        with self._lock:
            if self.excess(size):
                return False
            self._bytes += size
            return True

    def give_back(self, size: int) -> None:
        """Count them no more."""
        with self._lock:
            self._bytes -= size


host_cache = HostCache()
