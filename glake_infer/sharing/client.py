"""A process's part in a broker's memory, on one device.

A thread receives: answers, what the broker asks, and word of the native pool that shared chunks became absent. Another
does what the broker asks, as that may wait for the device. Any thread may ask the broker something.

The order of messages is the order of things: whatever makes a chunk absent, and the message that says so, happen under one
lock with every other message (`_sending`), so the broker never hears of the release of a chunk after the request that
brought it back.

When the broker is gone, everything that is mapped stays mapped. Requests wait for the next broker, which is told what this
process has; where none comes within `PATIENCE` seconds they raise BrokerGoneError, and the process goes on alone.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import logging
import os
import queue
import secrets
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from glake_infer.allocators.errors import (
    BrokerError,
    DriverError,
    GlakeError,
    InvalidPointerError,
    OutOfMemoryError,
    PoolInUseError,
)
from glake_infer.sharing import protocol
from glake_infer.sharing.channel import Channel, ProtocolError, close_all
from glake_infer.sharing.descriptors import Descriptor, raise_limit
from glake_infer.sharing.dialing import BLOCKED, dial, welcome
from glake_infer.sharing.protocol import ChunkMemory, RegionSpec
from glake_infer.sharing.refusals import BrokerGoneError, error_of
from glake_infer.sharing.status import PoolStatus, ProcessStatus, TransferStatus
from glake_infer.version import __version__

if TYPE_CHECKING:
    from glake_infer.allocators import _native

PATIENCE = 5.0
"""Seconds that a request waits for a broker that is gone."""

SILENCE = 15.0
"""Seconds without a word, while an answer is due, after which a broker counts as gone."""

ATTEMPTS = 3
"""How many brokers are asked the same, where one after the other goes before it answers."""

PARTING = 1.0
"""Seconds that a broker may take to see that a client has ended."""

STEADY = 2.0
"""Seconds that a connection lasts if it is worth to look for the next one at once."""

SLACK = 8 << 20
"""Bytes more than it needs that a pool takes where there is no broker to ask."""

Kind = TypeVar("Kind", bound=protocol.Answer)

log = logging.getLogger("glake_infer.broker")

describe: Callable[[], list[ProcessStatus]] | None = None
"""Says what this process is doing; set by whoever knows its models."""


@dataclass(eq=False)
class _Waiting:
    """Somebody who waits for an answer."""

    ready: threading.Event = field(default_factory=threading.Event)
    answer: protocol.Answer | None = None
    descriptors: list[int] = field(default_factory=list)
    abandoned: bool = False
    generation: int = 0


@dataclass(frozen=True)
class Forgotten:
    """A region that was given back, and the native pool's numbers of chunks that went with it."""

    region: str
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """What this process can tell a new broker: its regions, and its chunks by the native pool's number."""

    regions: list[RegionSpec]
    chunks: list[tuple[int, ChunkMemory]]


class Client:
    """The connection, and all that is done over it. Thread-safe."""

    _all: ClassVar[weakref.WeakSet[Client]] = weakref.WeakSet()

    def __init__(
        self,
        native: _native.Pool,
        device: protocol.Device,
        shown: str,
        socket: Path,
        *,
        starts: bool,
        held: Callable[[], Held],
        gone: Callable[[int], str | None],
        token_of: Callable[[int], str | None],
        number_of: Callable[[str], int | None],
        forgot: Callable[[Iterable[int]], None],
    ) -> None:
        """Connect, starting a broker if `starts` and there is none.

        held, token_of, number_of
            What the residency knows of chunks; called from any thread, must take no lock. `gone` is token_of for a chunk
            that became absent; `forgot` is told of chunks whose numbers are of no more use.

        Raises BrokerGoneError (nobody there), GlakeError (another version or user, or the broker refused).
        """
        self.socket = socket
        self.reconnections = 0
        self.loads = self.load_bytes = self.hits = self.hit_bytes = 0
        self.load_seconds = 0.0
        self._native = native
        self._device = device
        self._shown = shown
        self._starts = starts
        self._held, self._gone, self._forgot = held, gone, forgot
        self._token_of, self._number_of = token_of, number_of
        self._quota = self._welcomed = 0
        self._channel: Channel | None = None
        self._closed = False
        self._process = os.getpid()
        self._condition = threading.Condition()  # of _channel, _waiting
        self._sending = threading.Lock()
        self._greeting = False  # Hello is out, Welcome is not in: nothing else is sent, nothing is forgotten
        self._forgotten: collections.deque[Forgotten] = collections.deque()
        self._waiting: dict[int, _Waiting] = {}
        self._renewals = 0  # how often something was made that no broker knew of
        self._generation = 0  # of connections
        self._told: _Waiting | None = None  # the last word of what became absent
        self._ids = itertools.count(1)
        # When the last word came, since when there is no broker, and since when there was one.
        self._heard = self._since = self._connected = time.monotonic()
        self._complaint = ""
        self._delay = 0.0
        self._tasks: queue.SimpleQueue[tuple[Channel, protocol.Request] | None] = queue.SimpleQueue()
        self._event: Descriptor | None = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        try:
            self._connect(first=True)
            if not self._native.share(self._grow, self._event.number):
                raise PoolInUseError(
                    f"the pool on {shown} is at another broker than {socket}, with weights of models that sleep. Close them "
                    "first."
                )
            self._set_quota(self._welcomed)
        except BaseException:
            if self._channel:
                self._channel.close()
            self._event = None
            raise
        Client._all.add(self)
        self._threads = [
            threading.Thread(target=target, name=f"glake-infer broker {what}", daemon=True)
            for target, what in ((self._receive, "connection"), (self._work, "requests"))
        ]
        for thread in self._threads:
            thread.start()

    # What the residency asks for.

    def place(self, weights: Sequence[protocol.WeightSpec]) -> list[RegionSpec]:
        """Where these lie. Raises BrokerGoneError."""
        answer, *_ = self._ask(protocol.Place(weights=list(weights)), protocol.Placed)
        return answer.regions

    def forget(self, region: str, chunks: Iterable[int]) -> None:
        """The region's addresses were given back, and with them these chunks. Takes no lock; it is told soon."""
        self._forgotten.append(Forgotten(region, tuple(chunks)))
        self._wake()

    @property
    def generation(self) -> int:
        """Which connection this is: what was told to an earlier one may not be known to it."""
        return self._generation

    def acquire(
        self, chunks: Sequence[str], *, wait: bool, full: bool
    ) -> tuple[protocol.Acquired, list[int], int]:
        """Ask for chunks; the descriptors are the caller's. Returns also the generation that answered.

        Raises OutOfMemoryError, UnknownTokenError, BrokerGoneError.
        """
        message = protocol.Acquire(chunks=list(chunks), wait=wait, full=full)
        answer, descriptors, generation = self._ask(message, protocol.Acquired)
        told = [*(memory.chunk for memory in answer.given), *answer.make, *answer.pending]
        if len(answer.given) != len(descriptors) or sorted(told) != sorted(chunks):
            close_all(descriptors)
            raise BrokerError(
                f"the broker at {self.socket} gave {len(answer.given)} chunks with {len(descriptors)} descriptors, or "
                "told of other chunks than were asked for. It is none of ours, or has a defect: restart it."
            )
        return answer, descriptors, generation

    def loaded(
        self, chunks: Sequence[ChunkMemory], descriptors: Sequence[int], read: int, seconds: float
    ) -> int:
        """Hand in what was made; returns the generation that took it.

        Raises AlteredError, SupersededError, BrokerGoneError; it is not the broker's then.
        """
        message = protocol.Loaded(chunks=list(chunks), read=read, seconds=seconds)
        *_, generation = self._ask(message, protocol.Done, descriptors)
        self.loads += len(chunks)
        self.load_bytes += read
        self.load_seconds += seconds
        return generation

    def failed(self, chunks: Iterable[str]) -> None:
        """These are not made. Does not wait."""
        if (tokens := list(chunks)) and self.connected:
            with contextlib.suppress(BrokerGoneError):
                self._tell(protocol.Failed(chunks=tokens))

    def let_go(self, chunks: Iterable[str]) -> None:
        """These were given and not taken. Does not wait."""
        if (tokens := list(chunks)) and self.connected:
            with contextlib.suppress(BrokerGoneError):
                self._tell(protocol.Released(chunks=tokens))

    def took(self, chunks: int, size: int) -> None:
        """Count chunks that came without a load."""
        self.hits += chunks
        self.hit_bytes += size

    def flush(self) -> None:
        """Tell the broker what became absent, and wait until it has let go of it too, whichever thread told it."""
        with self._sending:
            self._send_gone()
            told = self._told
        if told:
            told.ready.wait(SILENCE)

    def collect(self) -> None:
        """Tell what became absent, if there is a broker to tell: what comes now is not to be taken for it."""
        with self._sending:
            self._send_gone()

    def renew(self) -> None:
        """Something was made while there was no broker: introduce it to the one that came meanwhile."""
        with self._condition:
            self._renewals += 1
            channel = self._channel
        if channel:
            with contextlib.suppress(OSError, ProtocolError), self._sending:
                channel.send(protocol.Bye())
            self._lost(channel, "some memory was made without it")

    @property
    def connected(self) -> bool:
        """Whether there is a broker just now."""
        return self._channel is not None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def quota(self) -> int:
        """Bytes of private memory that the broker allows."""
        return self._quota

    @property
    def transfers(self) -> TransferStatus:
        """Counters so far."""
        return TransferStatus(
            loads=self.loads,
            bytes=self.load_bytes,
            seconds=self.load_seconds,
            hits=self.hits,
            hit_bytes=self.hit_bytes,
        )

    def close(self, *, wait: bool = True, timeout: float = BLOCKED) -> None:
        """Say goodbye, in the thread that receives. Nothing of the broker's may be in use any more. Twice is fine.

        Without `wait` it takes no lock that Python code runs under, and may be called wherever a finalizer is.
        """
        if os.getpid() != self._process:
            return
        if not self._closed:
            if event := self._event:
                self._native.unshare(event.number)  # now: another may follow at once
            self._closed = True
            self._wake()
        if wait:
            with self._condition:
                self._condition.notify_all()
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(timeout)

    def _end(self) -> None:
        self.collect()  # what went with the last of the pool goes from the broker too
        self._tasks.put(None)
        with self._condition:
            channel, self._channel = self._channel, None
            waiting, self._waiting = list(self._waiting.values()), {}
            self._condition.notify_all()
        self._event = None
        for each in waiting:
            each.ready.set()
        if channel:
            with contextlib.suppress(OSError, ProtocolError), self._sending:
                channel.send(protocol.Bye())
                channel.finish(PARTING)
            channel.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError, BlockingIOError):
            if event := self._event:  # it stays open until it is written to
                os.eventfd_write(event.number, 1)

    # Asking.

    def _open(self) -> Channel:
        """The connection, waiting for one if need be. Raises BrokerGoneError."""
        with self._condition:
            while not self._channel:
                left = self._since + PATIENCE - time.monotonic()
                if self._closed or left <= 0 or os.getpid() != self._process:
                    raise BrokerGoneError(f"the broker at {self.socket} does not answer.")
                self._condition.wait(left)
            return self._channel

    def _send(self, message: protocol.Request, descriptors: Sequence[int], waits: bool) -> _Waiting | None:
        """Send under the lock of `_sending`. Raises BrokerGoneError."""
        with self._condition:
            channel = self._channel
            waiting = None
            number = next(self._ids)
            if channel and waits:
                waiting = self._waiting[number] = _Waiting(generation=self._generation)
        if not channel:
            raise BrokerGoneError(f"the broker at {self.socket} is gone.")
        try:
            channel.send(message.model_copy(update={"id": number}), descriptors)
        except ProtocolError:  # too large; nothing was sent
            with self._condition:
                self._waiting.pop(number, None)
            raise
        except OSError as error:
            self._lost(channel, f"it takes nothing: {error.strerror or error}")
            raise BrokerGoneError(f"the broker at {self.socket} is gone: {error}") from error
        return waiting

    def _tell(self, message: protocol.Request) -> None:
        with self._sending:
            self._send_gone()
            self._send(message, (), waits=False)

    def _ask(
        self, message: protocol.Request, kind: type[Kind], descriptors: Sequence[int] = ()
    ) -> tuple[Kind, list[int], int]:
        for attempt in range(ATTEMPTS, 0, -1):
            self._open()
            try:
                with self._sending:
                    self._send_gone()
                    asked = self._send(message, descriptors, waits=True)
                assert asked is not None
                waiting = asked
                answer = self._wait(waiting)
                break
            except BrokerGoneError:  # the next one knows nothing of the question
                if attempt == 1 or isinstance(message, protocol.Loaded):
                    raise
        if not isinstance(answer, kind):
            close_all(waiting.descriptors)
            raise BrokerError(f"the broker at {self.socket} answered {answer!r} to {type(message).__name__}.")
        return answer, waiting.descriptors, waiting.generation

    def _wait(self, waiting: _Waiting) -> protocol.Answer:
        try:
            waiting.ready.wait()
        except BaseException:  # Ctrl-C
            with self._condition:
                waiting.abandoned = True
                came = waiting.answer
            if came:
                self._give_back(came, waiting.descriptors)
            raise
        answer = waiting.answer
        if answer is None:
            raise BrokerGoneError(f"the broker at {self.socket} is gone.")
        if isinstance(answer, protocol.Refusal):
            close_all(waiting.descriptors)
            raise error_of(answer)
        return answer

    def _give_back(self, answer: protocol.Answer, descriptors: list[int]) -> None:
        """An answer that nobody waits for any more."""
        close_all(descriptors)
        descriptors.clear()
        if isinstance(answer, protocol.Acquired):
            self.let_go(memory.chunk for memory in answer.given)
            self.failed(answer.make)

    # What became absent.

    def _send_gone(self) -> None:
        """Tell what became absent, and what was forgotten, under the lock of `_sending`."""
        if self._greeting:
            return
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        gone: dict[bool, list[str]] = {True: [], False: []}
        for number, drop in self._native.take_gone():  # with all chunks of what was forgotten
            if token := self._gone(number):
                gone[drop].append(token)
        for drop, tokens in gone.items():
            if tokens:
                with contextlib.suppress(BrokerGoneError):
                    self._told = self._send(protocol.Released(chunks=tokens, drop=drop), (), waits=True)
        if forgotten:
            with contextlib.suppress(BrokerGoneError):
                self._send(protocol.Forget(regions=[each.region for each in forgotten]), (), waits=False)
            self._forgot([number for each in forgotten for number in each.chunks])

    # The pool asks for more private memory, in any thread, without its lock.

    def _grow(self, quota: int, full: bool) -> str:
        """Empty, or why there is no more."""
        try:
            self._ask(protocol.Grow(quota=quota, full=full), protocol.Granted)
        except BrokerGoneError:
            self._set_quota(quota + max(quota // 8, SLACK))  # nobody else asks for it either
        except OutOfMemoryError as error:
            return str(error)
        except GlakeError as error:
            return f"The broker at {self.socket} failed: {error}"
        return ""

    def _set_quota(self, quota: int) -> None:
        self._quota = self._native.set_quota(max(0, quota))

    # Receiving.

    def _receive(self) -> None:
        event = self._event
        assert event
        while not self._closed:
            channel = self._channel
            if channel is None:
                self._reconnect()
                continue
            try:
                poll = select.poll()
                poll.register(channel.socket, select.POLLIN)
                poll.register(event.number, select.POLLIN)
                while self._channel is channel and not self._closed:
                    self._listen(channel, poll, event.number)
            except Exception as error:  # whatever it is: without this thread nobody would get an answer
                self._lost(channel, str(error) or type(error).__name__)
            if self._channel is not channel:
                channel.close()
        self._end()

    def _listen(self, channel: Channel, poll: select.poll, event: int) -> None:
        """Take what comes, for a second at most."""
        while (found := channel.next()) is not None:  # it may have come with the last answer
            self._take(channel, *found)
        ready = dict(poll.poll(1000))
        if event in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(event)
            self.collect()
        if ready.keys() - {event}:
            if not channel.pull():
                self._lost(channel, "it ended")
            self._heard = time.monotonic()
        else:
            self._watch(channel)

    def _watch(self, channel: Channel) -> None:
        """Somebody waits, and the broker says nothing: is it there?"""
        silent = time.monotonic() - self._heard
        with self._condition:
            due = bool(self._waiting)
        if not due:
            self._heard = time.monotonic()
        elif silent > SILENCE:
            self._lost(channel, f"it said nothing for {SILENCE:.0f} s")
        elif silent > SILENCE / 3:
            with self._sending:
                self._send(protocol.Ping(), (), waits=False)

    def _take(
        self, channel: Channel, message: protocol.AnyMessage | protocol.Request, descriptors: list[int]
    ) -> None:
        if isinstance(message, protocol.Request):
            close_all(descriptors)
            self._tasks.put((channel, message))
            return
        if isinstance(message, protocol.Granted):
            self._set_quota(message.quota)
        with self._condition:
            waiting = self._waiting.pop(message.to, None)
            if waiting and not waiting.abandoned:
                waiting.answer, waiting.descriptors = message, descriptors
                waiting.ready.set()
                return
        self._give_back(message, descriptors)

    def _lost(self, channel: Channel, why: str) -> None:
        with self._condition:
            if self._channel is not channel:
                return
            self._channel = None
            self._since = time.monotonic()
            waiting, self._waiting = list(self._waiting.values()), {}
            self._condition.notify_all()
            self._wake()
        channel.end()  # whoever receives closes it
        for each in waiting:
            each.ready.set()
        if not self._closed:
            log.warning(
                "the broker at %s is gone (%s). What is loaded goes on; looking for another.",
                self.socket,
                why,
            )

    # Connecting.

    def _reconnect(self) -> None:
        if self._since - self._connected > STEADY:
            self._delay = 0.0
        while not self._closed and self._channel is None:
            with self._condition:
                if self._delay and not self._closed:
                    self._condition.wait(self._delay)
            self._delay = min(max(0.05, 2 * self._delay), 2.0)
            self.collect()  # nobody is there to be told: it is enough to know
            try:
                self._connect(first=False)
                self._complaint = ""
            except (GlakeError, OSError) as error:
                # That nobody is there was said; any other reason is new.
                if not isinstance(error, BrokerGoneError) and str(error) != self._complaint:
                    self._complaint = str(error)
                    log.warning("the broker at %s does not take this process back: %s", self.socket, error)

    def _connect(self, first: bool) -> None:
        channel = dial(self.socket, starts=self._starts, given_up=lambda: self._closed)
        descriptors: list[int] = []
        try:
            with self._sending:  # what becomes absent from here on is told after it
                self._send_gone()
                self._greeting = True
                renewals = self._renewals
                self._generation += 1
                resume = self._resume(descriptors)
                number = next(self._ids)
                hello = protocol.Hello(
                    id=number,
                    release=__version__,
                    pid=os.getpid(),
                    name=process_name(),
                    device=self._device,
                    resume=resume,
                )
                try:
                    channel.send(hello, descriptors)
                except ConnectionError as error:  # it was about to end
                    raise BrokerGoneError(
                        f"the broker at {self.socket} is gone: {error.strerror}."
                    ) from error
            answer = welcome(channel, number)
            self._welcomed = answer.quota
            self._set_quota(answer.quota)
            with self._sending, self._condition:
                self._greeting = False
                if self._renewals != renewals:  # it was not told of everything: once more
                    channel.close()
                    return
                self._channel = channel
                self._heard = self._connected = time.monotonic()
                self.reconnections += not first
                self._condition.notify_all()
        except BaseException:
            channel.close()
            raise
        finally:
            self._greeting = False
            close_all(descriptors)
        self._wake()
        if not first:
            log.warning(
                "reconnected to a broker at %s: it was told of %d chunks and %d regions%s.",
                self.socket,
                len(resume.chunks) if resume else 0,
                len(resume.regions) if resume else 0,
                f", and has {len(answer.disowned)} of them from others" if answer.disowned else "",
            )

    def _resume(self, descriptors: list[int]) -> protocol.Resume | None:
        held = self._held()
        chunks = []
        for number, memory in held.chunks:
            try:
                descriptors.append(self._descriptor(number))
            except InvalidPointerError:  # gone meanwhile
                continue
            chunks.append(memory)
        stats = self._native.stats()
        quota = max(stats["reserved"] - stats["shared"], self._quota)
        if not held.regions and not chunks and not quota:
            return None
        return protocol.Resume(regions=held.regions, chunks=chunks, quota=quota)

    def _descriptor(self, number: int) -> int:
        try:
            return self._native.descriptor(number)
        except DriverError:  # too many are open: this needs each of them twice
            raise_limit()
            return self._native.descriptor(number)

    # What the broker asks.

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            channel, request = task
            try:
                if isinstance(request, protocol.Give | protocol.Trim):
                    with self._sending:
                        if self._channel is channel:  # not what an earlier broker wanted
                            self._send_gone()
                            self._answer(channel, request, self._do(request))
                else:
                    answer = self._do(request)
                    with self._sending:
                        self._answer(channel, request, answer)
            except OSError as error:
                self._lost(channel, str(error))
            except Exception as error:  # a defect, or a device that is lost: the broker must not wait for us
                log.warning("what the broker asked (%s) failed: %s", type(request).__name__, error)
                refusal = protocol.Refusal(to=request.id, reason="message", message=str(error)[:4000])
                with contextlib.suppress(OSError), self._sending:
                    channel.send(refusal)

    def _answer(self, channel: Channel, request: protocol.Request, answer: protocol.Answer) -> None:
        if self._channel is channel:
            channel.send(answer.model_copy(update={"to": request.id}))

    def _give(self, request: protocol.Give) -> protocol.Given:
        numbers = [n for token in request.chunks if (n := self._number_of(token))]
        given = [self._gone(number) for number in self._native.give_up(numbers)]
        return protocol.Given(chunks=[token for token in given if token])

    def _do(self, request: protocol.Request) -> protocol.Answer:
        native = self._native
        if isinstance(request, protocol.Offer):
            offers = [
                protocol.Offered(chunk=token, awake=awake, priority=priority, idle_seconds=max(0.0, idle))
                for number, awake, priority, idle in native.offers()
                if (token := self._token_of(number))
            ]
            return protocol.Offers(
                chunks=offers, idle=self._idle(), busy=native.shared_busy(), running=native.running()
            )
        if isinstance(request, protocol.Give):
            return self._give(request)
        if isinstance(request, protocol.Trim):
            self._set_quota(max(0, self._quota - request.bytes))
            return protocol.Granted(quota=self._quota)
        if isinstance(request, protocol.Describe):
            return protocol.Description(process=self._describe())
        return protocol.Done()

    def _idle(self) -> int:
        stats = self._native.stats()
        shared_in_use = stats["shared"] - min(stats["shared"], stats["unused_weights"])
        return max(0, self._quota - max(0, stats["active"] - shared_in_use))

    def _describe(self) -> ProcessStatus:
        for status in describe() if describe else ():
            if status.device == self._shown:
                return status
        return self.describe_bare()

    def describe_bare(self) -> ProcessStatus:
        """What is known here, without models."""
        return ProcessStatus(
            pid=os.getpid(),
            name=process_name(),
            device=self._shown,
            release=__version__,
            connected=self.connected,
            reconnections=self.reconnections,
            pool=pool_status(self._native.stats(), self._quota),
            models=[],
            transfers=self.transfers,
            chunks=[memory.chunk for _, memory in self._held().chunks],
        )


def pool_status(stats: dict[str, int], quota: int | None) -> PoolStatus:
    """The part of a pool's figures that is shown."""
    names = PoolStatus.model_fields.keys() - {"quota"}
    return PoolStatus(quota=quota, **{name: stats[name] for name in names})


def process_name() -> str:
    """What this process is called: $GLAKE_NAME, or its program."""
    if name := os.environ.get("GLAKE_NAME"):
        return name[:200]
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    program = sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-", "-c", "-m") else sys.executable
    return str(spec.name.removesuffix(".__main__") if spec and spec.name else Path(program).name)[:200]


def new_memory() -> str:
    """A name for a piece of physical memory."""
    return secrets.token_hex(8)


def _forget_connections() -> None:
    """In a child of fork(): the connections are the parent's, and must end with it."""
    for client in list(Client._all):
        if client._channel:
            with contextlib.suppress(OSError):
                os.close(client._channel.socket.detach())
            client._channel = None


def _say_goodbye() -> None:
    """At the end of the process, whose memory goes with it."""
    for client in list(Client._all):
        client.close(timeout=PARTING)


os.register_at_fork(after_in_child=_forget_connections)
atexit.register(_say_goodbye)
