"""One connection of a broker: non-blocking, with a time for everything that the other side is to do.

Messages are handed on in the order in which they came, answers to what was asked too: whatever they change is changed
before the next message is looked at.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from glake_infer.sharing import protocol
from glake_infer.sharing.channel import (
    DescriptorsLostError,
    Frames,
    OtherVersionError,
    ProtocolError,
    segments,
    send_some,
)
from glake_infer.sharing.descriptors import Descriptor, own
from glake_infer.sharing.entries import Client
from glake_infer.sharing.protocol import (
    Answer,
    Message,
    Refusal,
    Request,
)

Kind = TypeVar("Kind", bound=Answer)

MOST_QUEUED = 256 << 20
"""Bytes that may wait to be sent to one client."""

MOST_TASKS = 1024
"""Requests of one client that may wait at once."""

MOST_COMPLAINTS = 20
"""About one connection, in the log."""

FAREWELL = 1.0
"""Seconds in which a client may read why the connection ends."""

CROWDED = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)
"""Too many descriptors are on their way, or too many bytes: it passes."""


@dataclass(frozen=True)
class Times:
    """Seconds that a client may take."""

    hello: float = 10.0
    """To say Hello."""
    message: float = 10.0
    """From the beginning of a message to its end."""
    reading: float = 10.0
    """To read something, while there is something to be read."""
    answer: float = 5.0
    """To answer what the broker asks."""
    describe: float = 1.0
    """To say what it is doing; nothing happens to who does not."""


class Owner(Protocol):
    """Whose connection it is."""

    def received(
        self, connection: Connection, message: protocol.AnyMessage, descriptors: list[Descriptor]
    ) -> None:
        """A request came."""

    def ended(self, connection: Connection, why: str) -> None:
        """It is over; called once."""

    def complain(self, connection: Connection, what: str) -> None:
        """Something was wrong with it."""


@dataclass
class _Asked:
    future: asyncio.Future[Any]
    kind: type[Answer]
    apply: Callable[[Any], None]
    timer: asyncio.TimerHandle


class Connection:
    """A process at the other end. Everything happens in the loop's thread."""

    def __init__(self, sock: socket.socket, owner: Owner, times: Times) -> None:
        """Take over a connected socket, and listen to it."""
        self.client: Client | None = None
        self.device = ""
        self.grown = 0
        """Bytes that its quota grew by last."""
        self.greeted = False
        self.said_bye = False
        self.tasks: set[asyncio.Task[None]] = set()
        self.trimming: asyncio.Future[Any] | None = None
        self._socket = sock
        self._owner = owner
        self._times = times
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._queue: deque[tuple[memoryview, list[Descriptor]]] = deque()
        self._queued = 0
        self._writing = False
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._overdue: set[int] = set()
        self._ended = self._finishing = False
        self._why = ""
        self._complaints = 0
        self._greet_by: float | None = self._loop.time() + times.hello
        self._whole_by: float | None = None
        self._read_by: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)
        self._watch()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._ended

    @property
    def describes(self) -> bool:
        """Whether it has described itself whenever it was asked to."""
        return not self._overdue

    def may_complain(self) -> bool:
        """Whether what is wrong with it is still news."""
        self._complaints += 1
        return self._complaints <= MOST_COMPLAINTS

    def welcome(self) -> None:
        """It has said Hello."""
        self.greeted = True
        self._greet_by = None
        self._watch()

    # Sending.

    def send(self, message: Message, descriptors: Sequence[Descriptor] = ()) -> None:
        """Send it as soon as the other side reads it. Nothing happens where the connection is over."""
        if self._ended or self._finishing:
            return
        try:
            parts = list(segments(message, [each.number for each in descriptors]))
        except ProtocolError as error:
            to = message.to if isinstance(message, Answer) else 0
            parts = list(segments(Refusal(to=to, reason="message", message=str(error))))
        left = list(descriptors)
        for data, some in parts:
            self._queue.append((memoryview(data), left[: len(some)]))
            left = left[len(some) :]
            self._queued += len(data)
        self._flush()
        if self._queued > MOST_QUEUED and not self._ended:
            self.end("it does not read what it asked for")

    def refuse(self, to: int, reason: str, message: str, **more: Any) -> None:
        """Send a Refusal."""
        self.send(Refusal.model_validate({"to": to, "reason": reason, "message": message[:4096], **more}))

    def finish(self, why: str) -> None:
        """End it, once the other side has read what is on the way to it."""
        if self._ended or self._finishing:
            return
        self._finishing, self._why = True, why
        self._loop.remove_reader(self._socket)
        if self._queue:
            self._loop.call_later(FAREWELL, self.end, why)
        else:
            self.end(why)

    def _flush(self) -> None:
        crowded = False
        try:
            while self._queue:
                view, descriptors = self._queue[0]
                sent = send_some(self._socket, view, [each.number for each in descriptors])
                self._queued -= sent
                self._read_by = None
                if sent == len(view):
                    self._queue.popleft()
                else:
                    self._queue[0] = view[sent:], []
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno not in CROWDED:
                self.end(f"it is gone ({error.strerror})")
                return
            crowded = True
        if self._queue and self._read_by is None:
            self._read_by = self._loop.time() + self._times.reading
        waits = bool(self._queue) and not crowded
        if waits != self._writing:
            self._writing = waits
            if waits:
                self._loop.add_writer(self._socket, self._writable)
            else:
                self._loop.remove_writer(self._socket)
        if crowded:
            self._loop.call_later(0.01, self._writable)
        self._watch()
        if self._finishing and not self._queue:
            self.end(self._why)

    def _writable(self) -> None:
        if not self._ended:
            self._flush()

    # Receiving.

    def _readable(self) -> None:
        try:
            more = self._frames.receive(self._socket)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.end(f"it is gone ({error.strerror})")
            return
        if not more:
            self.end("in the middle of a message" if self._frames.partial else "")
            return
        try:
            self._hand_on()
        except OtherVersionError as error:
            self._give_up("version", str(error))
        except DescriptorsLostError as error:
            self._give_up("full", str(error))
        except ProtocolError as error:
            self._give_up("message", f"{error} The connection ends.")
        except Exception:
            self._owner.complain(self, f"a defect of the broker:\n{traceback.format_exc()}")
            self._give_up(
                "message", "the broker failed at what it received; its log says why. The connection ends."
            )

    def _hand_on(self) -> None:
        while not self._ended and not self._finishing:
            if (found := self._frames.next()) is None:
                break
            message, numbers = found
            descriptors = own(numbers)
            self._whole_by = None
            if isinstance(message, Answer):
                self._answered(message, descriptors)
            else:
                self._owner.received(self, message, descriptors)
        if self._frames.partial and self._whole_by is None:
            self._whole_by = self._loop.time() + self._times.message
        elif not self._frames.partial:
            self._whole_by = None
        self._watch()

    def _give_up(self, reason: str, message: str) -> None:
        self._owner.complain(self, message)
        self.refuse(0, reason, message)
        self.finish(f"what it sent could not be understood: {message}")

    # Asking.

    def ask(
        self,
        request: Request,
        kind: type[Kind],
        apply: Callable[[Kind], None] = lambda answer: None,
        *,
        patient: bool = False,
    ) -> asyncio.Future[Kind | None]:
        """Ask it something; the future never fails and gives None where there is no such answer.

        `apply` is called as soon as the answer is there, before any later message is looked at, whether anybody still waits
        for the future or not. Who does not answer in time is lost, unless we are `patient`.
        """
        future: asyncio.Future[Kind | None] = self._loop.create_future()
        if self._ended or self._finishing:
            future.set_result(None)
            return future
        number = next(self._ids)
        wait = self._times.describe if patient else self._times.answer
        timer = self._loop.call_later(wait, self._unanswered, number, patient)
        self._asked[number] = _Asked(future, kind, apply, timer)
        self.send(request.model_copy(update={"id": number}))
        return future

    def _answered(self, answer: protocol.AnyMessage, descriptors: list[Descriptor]) -> None:
        assert isinstance(answer, Answer)
        asked = self._asked.pop(answer.to, None)
        if asked is None:
            if answer.to in self._overdue:
                self._overdue.discard(answer.to)
            elif not isinstance(answer, Refusal):  # which is not answered by another one, for ever
                self._owner.complain(self, f"{answer.kind!r} came in answer to nothing.")
                self.refuse(
                    0, "message", f"{answer.kind!r} came in answer to {answer.to}, which nobody asked."
                )
            return
        asked.timer.cancel()
        if descriptors or not isinstance(answer, asked.kind):
            if not isinstance(answer, Refusal):
                what = "descriptors" if descriptors else repr(answer.kind)
                self._owner.complain(
                    self, f"{what} came in answer to what is answered by {asked.kind.__name__}."
                )
                self.refuse(0, "message", f"{what} came; expected {asked.kind.__name__} alone.")
            _resolve(asked.future, None)
            return
        asked.apply(answer)
        _resolve(asked.future, answer)

    def _unanswered(self, number: int, patient: bool) -> None:
        self._look_again()
        if (asked := self._asked.pop(number, None)) is None:
            return
        _resolve(asked.future, None)
        if patient:
            self._overdue.add(number)
        else:
            self.end("it does not answer")

    # Waiting for it.

    def spawn(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do something for it, for as long as it is there; whether it has not too much of that."""
        if len(self.tasks) >= MOST_TASKS:
            work.close()
            return False
        task = self._loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return True

    def _watch(self) -> None:
        """Set the timer to the first of what is due."""
        due = min((t for t in (self._greet_by, self._whole_by, self._read_by) if t is not None), default=None)
        if self._timer and (due is None or self._ended or self._timer.when() != due):
            self._timer.cancel()
            self._timer = None
        if due is not None and not self._timer and not self._ended:
            self._timer = self._loop.call_at(due, self._late)

    def _late(self) -> None:
        self._timer = None
        self._look_again()
        now = self._loop.time()
        if self._ended:
            return
        if self._greet_by is not None and self._greet_by <= now:
            self.end("it said nothing")
        elif self._whole_by is not None and self._whole_by <= now:
            self.end("it stopped in the middle of a message")
        elif self._read_by is not None and self._read_by <= now:
            self.end("it does not read what it is sent")
        else:
            self._watch()

    def _look_again(self) -> None:
        """Before it is said that nothing came: perhaps it was this process that stood still."""
        if not self._ended and not self._finishing:
            self._readable()

    def end(self, why: str = "") -> None:
        """End it now. Twice is fine."""
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._watch()
        self._queue.clear()
        self._frames.close()
        self._socket.close()
        asked, self._asked = list(self._asked.values()), {}
        for each in asked:
            each.timer.cancel()
            _resolve(each.future, None)
        for task in list(self.tasks):
            task.cancel()
        self._owner.ended(self, why)


def _resolve(future: asyncio.Future[Any], answer: Answer | None) -> None:
    if not future.done():
        future.set_result(answer)
