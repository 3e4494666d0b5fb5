"""A model's part in a residency (glake_infer/residency.py): what it holds, uses, and lets sleep."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from glake_infer.allocators.errors import GlakeError, OutOfMemoryError
from glake_infer.sharing.refusals import SupersededError
from glake_infer.sharing.share import GaveWayError
from glake_infer.transfers.device import Progress, TransferOptions

if TYPE_CHECKING:
    from glake_infer.allocators import _native
    from glake_infer.residency import Region, Residency

HostCopy = Literal["store", "pinned"]

SUPERSEDED = 5
"""How often a use begins anew because other processes were faster."""

GIVING_WAY = (0.05, 0.15)
"""Seconds that a use that gave way stays away: between these, so that two do not meet again."""


@dataclass(frozen=True)
class Weighed:
    """What a holding weighs now, in bytes."""

    shared: int
    """Weights that other models use too."""
    own: int
    asleep: int
    """Memory that the next use has to bring back first."""
    pinned: int
    """Page-locked host memory that keeps copies for that."""
    shared_with: dict[int, int]
    """Other models (by number) -> bytes of weights that they use too."""
    offloaded: int = 0
    """Of shared and own, what lies in memory of the host."""


class Holding:
    """A model's weights. Any thread may use it, several at a time.

    `addresses`: digest -> address, which stay as they are until `close`. Whatever reads them does so inside `with
    holding:`, which first brings back what is not there; the work on the device must be queued when the block ends. A
    use raises what `Residency.hold` does, with the holding as it was.
    """

    def __init__(
        self,
        table: Residency,
        native: _native.Pool,
        number: int,
        user: int,
        addresses: dict[str, int],
        chunks: tuple[int, ...],
        host_copy: HostCopy,
        priority: int = 0,
    ) -> None:
        """Use `Residency.hold`."""
        self._table = table
        self._native = native
        self._number = number
        self.user = user
        self.addresses = addresses
        self.chunks = chunks
        self.host_copy = host_copy
        self.priority = priority
        self.progress: Progress | None = None
        """Told how far a use's weights are."""
        self._cancelled = threading.Event()
        self.regions: frozenset[Region] = frozenset()
        self.closed = False
        self._unclosed = threading.Lock()  # taken once and for all by close()
        self._closing = False
        self._kept = -1  # the table's renewals when its copies were made
        self._keeping = threading.Lock()
        self.weighed = Weighed(0, 0, 0, 0, {})

    def __enter__(self) -> Holding:
        """Begin a use: waits for room while other uses go on, and for what other threads load. Ctrl-C ends the wait."""
        table = self._table
        if self._closing:
            raise GlakeError("the model is closed: its weights are gone. Load it again.")
        attempts, later = SUPERSEDED, not table.share
        while chunks := self._native.begin_use(self._number, later):
            try:
                table._bring(self, chunks, later=later, alone=not attempts)
                break
            except OutOfMemoryError:
                if not later:
                    raise
                later = False  # the device is fuller than the pool's limit says: wait for room, if others may make some
            except GaveWayError:
                # Whoever it was for comes first now, and has to see that this lets go of its chunks.
                time.sleep(random.uniform(*GIVING_WAY))
            except SupersededError:
                attempts -= 1
        try:
            self._settle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End a use."""
        self._native.end_use(self._number)
        if self._closing:
            self.close()

    @property
    def transfer(self) -> TransferOptions:
        """How its weights are brought: the arguments of a device's transfers."""
        return {"priority": self.priority, "progress": self.progress, "cancelled": self._cancelled.is_set}

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """A use whose weights may still be on their way inside the block, and are there when it has ended.

        Their addresses get memory meanwhile: nothing may read, or write, there yet. Where the block
        raises, what is on its way is stopped. Raises what a use does, at the beginning or the end.
        """
        table = self._table
        if table.share or self._closing:  # a broker's weights come in several steps
            with self:
                yield
            return
        chunks = self._native.begin_use(self._number, True)
        errors: list[BaseException] = []
        filling = table._fill_in_steps(self, chunks, later=True)

        claim, done = threading.Lock(), threading.Event()

        def bring() -> None:
            if not claim.acquire(blocking=False):  # another thread does it
                return
            try:
                table._loaded(self, chunks, filling)
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        if chunks:
            try:
                next(filling)
            except BaseException as error:
                filling.close()
                with contextlib.suppress(OutOfMemoryError):
                    table._failed(self, chunks, error)
                with self:  # the device is full: wait for room, if others may make some
                    yield
                return
        failure: BaseException | None = None
        try:
            try:
                if chunks:
                    with contextlib.suppress(RuntimeError):  # no more threads: it is done below
                        threading.Thread(target=bring, name="glake-infer weights", daemon=True).start()
                yield
            except BaseException as error:
                failure = error
                self._cancelled.set()
            try:
                if chunks:
                    bring()
                    _wait(done, self._cancelled)
            except BaseException as error:  # Ctrl-C: before what the block raised
                failure = error
            self._cancelled.clear()
            if errors:
                try:
                    table._failed(self, chunks, errors[0])
                except BaseException as error:
                    if failure is None and not isinstance(error, OutOfMemoryError):
                        raise
                if failure is not None:
                    raise failure
                self.__enter__()  # the device is full: wait for room, if others may make some
                self.__exit__(None, None, None)
                return
            try:
                if failure is not None:
                    raise failure
                self._settle()
            finally:
                self.__exit__(None, None, None)
        finally:
            failure = None  # its traceback holds this frame
            errors.clear()

    def _settle(self) -> None:
        """What a use does once its weights are there."""
        table = self._table
        keeps = self.host_copy == "pinned" and self._kept != table._renewals and table._copies
        if keeps or (table._unfilled and not table._unfilled.keys().isdisjoint(self.chunks)):
            table._fill_tails(self)
            with self._keeping:
                if keeps and self._kept != (renewals := table._renewals):
                    table._keep_copies(self)
                    self._kept = renewals

    def suspend(self) -> int:
        """Wait for uses in progress, then give back what no other awake holding needs; returns the bytes.

        Raises DriverError where the device does not answer; then nothing has gone.
        """
        freed = self._native.suspend(self._number)
        self._table.flush()
        return freed

    @property
    def suspended(self) -> bool:
        """Whether it was suspended, or not yet used. What the pool took by itself is in `weigh().asleep`."""
        return not self.closed and not self._native.user(self._number)["awake"]

    @property
    def idle_seconds(self) -> float:
        """Since the end of the last use; 0 during one."""
        return 0.0 if self.closed else float(self._native.user(self._number)["idle_seconds"])

    @property
    def busy(self) -> bool:
        """Whether uses are in progress."""
        return not self.closed and bool(self._native.user(self._number)["busy"])

    def set_policy(self, *, evictable: bool, priority: int) -> None:
        """Let the pool take its memory while it is idle, lower priorities first, or do not."""
        self.priority = priority
        if not self.closed:
            self._native.set_policy(self._number, evictable, priority)

    def weigh(self, patience: float = -1) -> Weighed:
        """Its bytes now; or as they were when this was last asked, if others need the tables for `patience` seconds."""
        self._table._refuse_child()
        return self._table._weigh(self, patience)

    def wake(self) -> None:
        """Be awake, without a use, where all of it is there."""
        self._native.begin_use(self._number)
        self._native.end_use(self._number)

    def released(self) -> None:
        """The references were given back, under the table's lock: for what is to be done besides."""

    def close(self, *, wait: bool = True) -> None:
        """Give the references back, once the uses in progress have ended. Closing twice is fine.

        Without `wait`, for finalizers, that may be done by another thread, soon after.
        """
        self._closing = True
        if os.getpid() != self._table._process:  # a child of fork(): they are the parent's
            return
        if not self.closed and not self.busy and self._unclosed.acquire(blocking=False):
            self.closed = True
            self._table._closing.append(self)
            self._table._give_back_closed(wait=wait)


def _wait(done: threading.Event, cancelled: threading.Event) -> None:
    """Until it is done; Ctrl-C ends it soon, and is raised after that.

    Not by joining a thread: one whose join() was interrupted counts as ended (Python 3.11).
    """
    interrupted: BaseException | None = None
    while not done.is_set():
        try:
            done.wait()
        except BaseException as error:  # whatever handlers of signals raise
            interrupted = error
            cancelled.set()
    if interrupted:
        raise interrupted
