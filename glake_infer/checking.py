"""Checks of objects before, or while, their bytes are used: in threads, and only of files that are not known to be right.

A file that was checked is right until its seal changes (glake_infer/verified.py): this process remembers it, and the
store's record, unless GLAKE_VERIFY=always.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from glake_infer.allocators.errors import StoreError
from glake_infer.transfers import timeline
from glake_infer.transfers.device import CancelledError
from glake_infer.verified import ATTEMPTS, Seal, Verified, examine, records_are_trusted, seal_of

MOST_REMEMBERED = 1 << 16
"""Files that this process knows to be right."""

THREADS = 16
"""At most, of each load: the checks of a link of 55 GB/s take eight cores."""


@dataclass(frozen=True)
class File:
    """An object's file. `root`: of the store whose record is asked and told, if any is."""

    path: Path
    digest: str
    length: int
    root: Path | None = None


class AlteredObjectError(StoreError):
    """An object's bytes are not those that its name promises; `digest` names it. Nothing was mapped for it."""

    def __init__(self, digest: str, path: object, unreadable: str | None = None) -> None:
        """State which object it was, and why it cannot be read; models/package.py adds which packages are hurt."""
        super().__init__(
            f"{path} cannot be read: {unreadable}."
            if unreadable is not None
            else f"{path} does not hold the bytes that its name stands for."
        )
        self.digest = digest
        self.unreadable = unreadable is not None


class Checker:
    """What a process knows of files. Thread-safe. Raises AlteredObjectError, and InputError for GLAKE_VERIFY."""

    def __init__(self) -> None:
        """Know nothing."""
        self._lock = threading.Lock()
        self._seals: dict[tuple[Path, str], Seal] = {}
        self._records: dict[Path, Verified] = {}

    def look(self, files: Iterable[File]) -> None:
        """See that files are there and have their size; no byte is read."""
        records_are_trusted()
        for file in files:
            _look(file)

    def check(self, files: Iterable[File]) -> None:
        """Check files, and return when they are right."""
        self.beside(files, lambda failed: None)

    def beside(
        self,
        files: Iterable[File],
        work: Callable[[Callable[[], bool]], object],
        begun: Checking | None = None,
    ) -> None:
        """Check files while `work` reads them, and return when both are done; again where a file changed meanwhile.

        An error of either ends the other soon, and is raised: `work` gets a function that says whether a file was found
        altered, and then raises CancelledError. What it read is not to be used then. `begun`: checks of these files, and
        the work, are on their way.
        """
        files = list(files)
        for _ in range(ATTEMPTS):
            checking, begun = begun or self.begin(files), None
            with checking:
                try:
                    work(lambda checking=checking: checking.failed)  # type: ignore[misc]
                except CancelledError:
                    if checking.failed:
                        checking.result()
                    raise
                changed = checking.result()
            if not changed:
                return
        raise AlteredObjectError(changed[0].digest, changed[0].path)

    def begin(self, files: Iterable[File]) -> Checking:
        """Begin to check files; no thread is started where all are known."""
        seals = {(file.path, file.digest): (file, _look(file)) for file in files}
        trusts = records_are_trusted()
        with self._lock:
            todo = [each for key, each in seals.items() if self._seals.get(key) != each[1]]
            records = {f.root: self._record_of(f.root) for f, _ in todo if f.root and trusts}
        for record in records.values():
            record.refresh()
        known = [(f, s) for f, s in todo if f.root in records and records[f.root].holds(f.digest, s)]
        self._remember(known)
        done = {file for file, _ in known}
        return Checking(self, list(seals.values()), deque(each for each in todo if each[0] not in done))

    def _record_of(self, root: Path) -> Verified:
        return self._records.setdefault(root, Verified(root))

    def _remember(self, found: Iterable[tuple[File, Seal]]) -> None:
        with self._lock:
            for file, seal in found:
                if len(self._seals) >= MOST_REMEMBERED:
                    self._seals.pop(next(iter(self._seals)))
                self._seals[file.path, file.digest] = seal

    def _found(self, found: list[tuple[File, Seal]], started: int) -> None:
        """Files were right; `started`: when they began to be read, at the earliest."""
        self._remember(found)
        if not records_are_trusted():
            return
        for root in {file.root for file, _ in found if file.root}:
            with self._lock:
                record = self._record_of(root)
            record.add((f.digest, seal) for f, seal in found if f.root == root and seal.tells(started))


class _StoppedError(Exception):
    """Nobody waits for the check any more."""


class Checking:
    """Checks that go on in threads. Leaving the `with` block ends them."""

    def __init__(
        self, checker: Checker, seals: list[tuple[File, Seal]], todo: deque[tuple[File, Seal]]
    ) -> None:
        """Use `Checker.begin`."""
        self._checker = checker
        self._seals = seals
        self._todo = todo
        self._right: list[tuple[File, Seal]] = []
        self._changed: list[File] = []
        self._errors: list[BaseException] = []
        self._stopped = False
        self._running = 0
        self._threads: list[threading.Thread] = []
        self._ended = threading.Condition()
        self._started = time.time_ns()
        most = min(THREADS, len(os.sched_getaffinity(0)))
        self._share = sum(file.length for file, _ in todo) // most
        try:
            for number in range(min(most, len(todo))):
                self._start_thread(number)
        except BaseException as error:
            if isinstance(error, RuntimeError):  # no more threads: `result` does what is left
                return
            self._stopped = True
            raise

    @property
    def failed(self) -> bool:
        """Whether a file was found altered: `result` raises."""
        return bool(self._errors)

    def result(self) -> list[File]:
        """Wait for all checks; returns the files that changed since they began, which may be right or not.

        Raises AlteredObjectError as soon as a file is altered or cannot be read.
        """
        self._check_all()
        self._wait()
        if self._errors:
            raise self._errors[0]
        changed = self._changed + [file for file, seal in self._seals if _look(file) != seal]
        return list(dict.fromkeys(changed))

    def cancel(self) -> None:
        """End all checks: soon, and before this returns. What was found right is remembered."""
        self._stopped = True
        self._wait()
        right, self._right = self._right, []
        if right:
            self._checker._found(right, self._started)

    def __enter__(self) -> Checking:
        """Use it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what goes on."""
        self.cancel()

    def _wait(self) -> None:
        with self._ended:
            self._ended.wait_for(lambda: not self._running)
        for thread in self._threads:  # they have nothing left to do but to end
            thread.join()

    def _start_thread(self, number: int) -> None:
        with self._ended:
            self._running += 1
        thread = threading.Thread(target=self._work, name=f"check {number}", daemon=True)
        try:
            thread.start()
        except BaseException:
            self._thread_ended()
            raise
        self._threads.append(thread)

    def _thread_ended(self) -> None:
        with self._ended:
            self._running -= 1
            self._ended.notify()

    def _work(self) -> None:
        try:
            self._check_all()
        finally:
            self._thread_ended()

    def _check_all(self) -> None:
        try:
            while not self._stopped:
                try:
                    file, seal = self._todo.popleft()
                except IndexError:
                    return
                self._check(file, seal)
        except _StoppedError:
            pass
        except Exception as error:
            self._errors.append(error)
            self._stopped = True

    def _check(self, file: File, seal: Seal) -> None:
        # Each thread has a file of its own; one that is more than a thread's share of all has blake3's threads too.
        alone = file.length <= self._share
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with timeline.span(threading.current_thread().name, f"check {file.digest[:8]}", file.length):
                    found, verdict = examine(fd, file.digest, file.length, self._go_on, alone=alone)
            finally:
                os.close(fd)
        except OSError as error:
            raise AlteredObjectError(file.digest, file.path, error.strerror) from error
        if verdict == "changed" or found != seal:
            self._changed.append(file)
        elif verdict == "altered":
            raise AlteredObjectError(file.digest, file.path)
        else:
            self._right.append((file, seal))

    def _go_on(self, done: int) -> None:
        if self._stopped:
            raise _StoppedError


def _look(file: File) -> Seal:
    try:
        seal = seal_of(os.stat(file.path))  # noqa: PTH116  half the time of Path.stat
    except OSError as error:
        raise AlteredObjectError(file.digest, file.path, error.strerror) from error
    if seal.size != file.length:
        raise AlteredObjectError(file.digest, file.path)
    return seal
