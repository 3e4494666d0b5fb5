"""Weights that lie in no block of ours, as a model holds them: streamed ones, and those of a deferred engine.

What TensorRT puts into blocks of the pool has a Holding of its own (glake_infer/engine_weights.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from glake_infer.allocators.errors import GlakeError, ModelError
from glake_infer.holding import Weighed


class OwnWeights:
    """What a Holding does, for weights that come and go with calls of TensorRT. Any thread may use it.

    `with weights:` goes around what queues work; the first use brings the weights back.
    """

    addresses: dict[str, int]
    chunks: tuple[int, ...] = ()
    """None that others could have."""

    def __init__(
        self, weights_bytes: int, wake: Callable[[], None], sleep: Callable[[], None], offloaded: int = 0
    ) -> None:
        """They are there now. `sleep` and `wake` let them go and bring them back; no use is in progress then."""
        self.addresses = {}
        self.closed = False
        self._bytes = weights_bytes
        self._offloaded = offloaded
        self._wake, self._sleep = wake, sleep
        self._condition = threading.Condition()
        self._uses = 0
        self._changing = False
        self._awake = True
        self._last = time.monotonic()

    def __enter__(self) -> OwnWeights:
        """Begin a use. Raises what bringing the weights back does; they are away then."""
        with self._condition:
            self._condition.wait_for(lambda: not self._changing)
            if self.closed:
                raise GlakeError("the model is closed: its weights are gone. Load it again.")
            if self._awake:
                self._uses += 1
                return self
            self._changing = True
        self._change(self._wake, awake=True, uses=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End a use."""
        with self._condition:
            self._uses -= 1
            self._last = time.monotonic()
            self._condition.notify_all()

    def suspend(self) -> int:
        """Wait for uses in progress, then let the weights go; returns the bytes of the device."""
        with self._condition:
            self._condition.wait_for(lambda: not self._changing and not self._uses)
            if not self._awake or self.closed:
                return 0
            self._changing = True
        self._change(self._sleep, awake=False)
        return self._bytes - self._offloaded

    def _change(self, action: Callable[[], None], *, awake: bool, uses: int = 0) -> None:
        try:
            action()
        except BaseException:
            with self._condition:
                self._changing = False
                self._condition.notify_all()
            raise
        with self._condition:
            self._changing, self._awake = False, awake
            self._uses += uses
            self._condition.notify_all()

    @property
    def suspended(self) -> bool:
        """Whether they are away."""
        return not self.closed and not self._awake

    @property
    def idle_seconds(self) -> float:
        """Since the end of the last use; 0 during one."""
        return 0.0 if self.closed or self._uses else time.monotonic() - self._last

    @property
    def busy(self) -> bool:
        """Whether uses are in progress."""
        return bool(self._uses)

    def set_policy(self, *, evictable: bool, priority: int) -> None:
        """Nothing: the pool cannot take them by itself."""

    def weigh(self, patience: float = -1) -> Weighed:
        """What it weighs now."""
        asleep = 0 if self._awake else self._bytes - self._offloaded
        return Weighed(0, self._bytes, asleep, 0, {}, self._offloaded)

    def close(self, *, wait: bool = True) -> None:
        """Nothing more is used."""
        del wait
        self.closed = True
        self._wake = self._sleep = lambda: None  # theirs hold the engine


def streamed(engine: Any, budget: int, before: Callable[[], None]) -> OwnWeights:
    """Weights of an engine with WEIGHT_STREAMING, `budget` bytes of which stay on the device; `before` ends its contexts.

    TensorRT keeps all of them in the host's memory. Asleep, the budget is 0.
    """
    size = int(engine.streamable_weights_size)

    def sleep() -> None:
        before()  # the budget cannot change while there are contexts
        set_budget(engine, 0)

    return OwnWeights(size, lambda: set_budget(engine, budget), sleep, size - min(budget, size))


def set_budget(engine: Any, budget: int) -> None:
    """Set the bytes of streamable weights that may be on the device; no context of the engine exists.

    Raises ModelError where TensorRT does not take it: there was no room, say.
    """
    engine.weight_streaming_budget_v2 = budget
    got = int(engine.weight_streaming_budget_v2)
    if got > budget or (budget and not got):  # the one of before
        raise ModelError(
            f"TensorRT did not take a budget of {budget} bytes for weights on the device; it is {got}. Give a larger "
            "`offload`, or make room in the pool."
        )


def deferred(weights_bytes: int, load: Callable[[], None], engine: Any) -> OwnWeights:
    """Weights of an engine that was deserialized with `defer_weights_loading`; `load` has brought them once."""

    def unload() -> None:
        if not engine.unload_weights():
            raise ModelError("TensorRT did not let the engine's weights go.")

    return OwnWeights(weights_bytes, load, unload)
