"""The broker: one process that holds one copy of every weight per machine and device, for the processes of one user.

protocol.py says what it does for a client, table.py what it knows. One thread serves all connections; weights are checked
in others. No CUDA: memory of GPUs is file descriptors here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from glake_infer.allocators.errors import GlakeError
from glake_infer.sharing.channel import peer
from glake_infer.sharing.connection import Connection, Times
from glake_infer.sharing.descriptors import Descriptor, Spare, raise_limit
from glake_infer.sharing.paths import Claim, check_socket, default_socket, listen, make_folder
from glake_infer.sharing.protocol import PROTOCOL, AnyMessage
from glake_infer.sharing.service import Service
from glake_infer.sharing.status import BrokerStatus, MachineStatus
from glake_infer.sharing.table import MAKE_SECONDS
from glake_infer.version import __version__

Result = TypeVar("Result")

GUARD = 30.0
"""Seconds after which the broker looks whether its socket is still there."""

ACCEPT = 0.1
"""Seconds without new connections, when there are no descriptors left at all."""

BACKLOG = 64
"""Connections that are taken in at once, before those that are there get their turn."""


@dataclass(frozen=True)
class Event:
    """Something that is worth a line in the log: its kind, that line, and the figures in it."""

    kind: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


def log_event(event: Event) -> None:
    """Give an event to Python's logging."""
    logging.getLogger("glake_infer.broker").info("%s: %s", event.kind, event.text)


class Broker:
    """Serves until it is stopped; `run` in this thread, `running` beside it."""

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        limits: Mapping[str, int] | None = None,
        limit: int | None = None,
        idle_exit: float | None = None,
        times: Times | None = None,
        patience: float = 10.0,
        make_seconds: float = MAKE_SECONDS,
        log: Callable[[Event], None] = log_event,
        any_descriptor: bool = False,
    ) -> None:
        """Nothing happens yet.

        socket
            Its path; by default that of this user (paths.default_socket).
        limits, limit
            Bytes for a device by its name (`cpu`, a GPU's UUID), and for those that are not named. None: what it has.
        idle_exit
            Seconds without any client after which it ends; None: never.
        times, patience, make_seconds
            Seconds that clients may take for what they owe; that a request for memory waits for models that are busy; and
            that a client may take to make chunks, apart from the time for their size.
        log
            Is called with every event, in the loop's thread.
        any_descriptor
            Take any file for memory of a device other than `cpu`. For tests.
        """
        self.path = Path(default_socket() if socket is None else socket)
        self._idle_exit = idle_exit
        self._times = times or Times()
        self._log_to = log
        self._service_options: dict[str, Any] = {
            "limits": dict(limits or {}),
            "limit": limit,
            "patience": patience,
            "make_seconds": make_seconds,
            "any_descriptor": any_descriptor,
        }
        self._begun = time.monotonic()
        self._connections: set[Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._listener: socket_type | None = None
        self._file: tuple[int, int] = (0, 0)
        self._lost = 0

    # Running.

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or `stop`; then the socket is gone.

        Raises GlakeError (another broker has the socket, or its place is not safe), OSError.
        """
        asyncio.run(self._serve(lambda: None))

    @contextlib.contextmanager
    def running(self) -> Iterator[Broker]:
        """Serve in a thread of its own for as long as the block lasts. Raises what `run` does."""
        ready = threading.Event()
        failed: list[BaseException] = []

        def serve() -> None:
            try:
                asyncio.run(self._serve(ready.set))
            except BaseException as error:
                failed.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=serve, name="glake-infer broker", daemon=True)
        thread.start()
        ready.wait()
        try:
            if not failed:
                yield self
        finally:
            self.stop()
            thread.join()
        if failed:
            raise failed[0]

    def stop(self) -> None:
        """End it, from any thread. Twice is fine."""
        if self._loop and self._stopping:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._stopping.set)

    def status(self, timeout: float = 10.0) -> MachineStatus:
        """All that can be seen, from any thread but the broker's. Raises GlakeError where it does not serve (any more)."""
        return self.do(self._status, timeout)

    def do(self, work: Callable[[], Awaitable[Result]], timeout: float = 10.0) -> Result:
        """Run a coroutine in the broker's thread and return what it does. Raises GlakeError as `status` does."""
        loop = self._loop
        if loop is None:
            raise GlakeError("the broker does not serve (any more).")

        async def doing() -> Result:
            return await work()

        waiting = doing()
        try:
            future = asyncio.run_coroutine_threadsafe(waiting, loop)
        except RuntimeError:
            waiting.close()
            raise GlakeError("the broker does not serve any more.") from None
        try:
            return future.result(timeout)
        except (TimeoutError, asyncio.CancelledError) as error:
            future.cancel()
            raise GlakeError("the broker did not say how it is doing.") from error

    async def _serve(self, ready: Callable[[], None]) -> None:
        self.path = Path(os.path.abspath(self.path))  # noqa: PTH100
        try:
            make_folder(self.path.parent)
        except OSError as error:
            raise GlakeError(
                f"the folder {self.path.parent} of the broker's socket cannot be made: {error.strerror}. Choose another "
                "path with --socket."
            ) from error
        check_socket(self.path)
        claim = Claim(self.path)
        loop = self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        spare = self._spare = Spare()
        service = self.service = Service(self._status, self._log, **self._service_options)
        try:
            descriptors = raise_limit()
            self._listen()
            self._catch_signals(loop)
            self._log("started", f"listening at {self.path}", socket=str(self.path), descriptors=descriptors)
            self._idle()
            ready()
            while not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), GUARD)
                    break
                self._guard()
        finally:
            self._unlisten()
            for connection in list(self._connections):
                connection.end("the broker ends")
            await service.close()
            spare.close()
            self._loop = None
            claim.close()
            self._log("stopped", f"no longer at {self.path}", socket=str(self.path))

    def _catch_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stopping.set)  # type: ignore[union-attr]

    # The socket.

    def _listen(self) -> None:
        self._listener = listen(self.path)
        status = self.path.lstat()
        self._file = status.st_dev, status.st_ino
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _unlisten(self) -> None:
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        if self._has_file():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._listener.close()
        self._listener = None

    def _has_file(self) -> bool | None:
        """Whether the file at the socket's path is ours; None if there is none."""
        try:
            status = self.path.lstat()
        except OSError:
            return None
        return (status.st_dev, status.st_ino) == self._file

    def _guard(self) -> None:
        """Come back to a path that somebody has cleaned away; give up one that somebody else has."""
        if self._listener is None or (there := self._has_file()):
            return
        try:
            if there is None:
                asyncio.get_running_loop().remove_reader(self._listener)
                self._listener.close()
                self._listener = None
                make_folder(self.path.parent)
                check_socket(self.path)
                self._listen()
                self._log("listening", f"{self.path} was removed, and is there again", socket=str(self.path))
                return
        except (GlakeError, OSError) as error:
            self._log("error", f"{self.path} was removed and cannot be made again: {error}")
        else:
            self._unlisten()
            self._log("error", f"{self.path} was taken by another program: no new clients come here")
        self._idle_exit = 0.0
        self._idle()

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            if self._listener is None:
                return
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._log("error", f"no connection could be accepted: {error}")
                self._refuse_one()
                return
            self._take_in(sock)

    def _refuse_one(self) -> None:
        """There are no descriptors left: take in one connection with the spare one, and say so."""
        listener = self._listener
        assert listener is not None
        sock = None
        if self._spare.free():
            try:
                sock, _ = listener.accept()
                sock.setblocking(False)
                connection = Connection(sock, self, self._times)
                self._connections.add(connection)
                connection.refuse(0, "full", FULL)
                connection.end(FULL)
            except OSError:
                if sock:
                    sock.close()
            finally:
                sock = None
                self._spare.take()
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(ACCEPT, self._accept_again, listener)

    def _accept_again(self, listener: socket_type) -> None:
        if self._listener is listener:
            asyncio.get_running_loop().add_reader(listener, self._accept)

    def _take_in(self, sock: socket_type) -> None:
        try:
            pid, user, _ = peer(sock)
            connection = Connection(sock, self, self._times)
        except OSError:
            sock.close()
            return
        self._connections.add(connection)
        if user != os.getuid():
            message = (
                f"this broker serves the processes of user {os.getuid()}, and process {pid} is of user {user}. Start a "
                "broker of your own."
            )
            self._log("refused", message, pid=pid, user=user)
            connection.refuse(0, "user", message)
            connection.finish(message)

    @property
    def count(self) -> int:
        """Connections now."""
        return len(self._connections)

    # What connections say.

    def received(self, connection: Connection, message: AnyMessage, descriptors: list[Descriptor]) -> None:
        """A request came."""
        stranger = connection.client is None
        self.service.received(connection, message, descriptors)
        if stranger and connection.client:
            self._idle()

    def ended(self, connection: Connection, why: str) -> None:
        """A connection is over."""
        self._connections.discard(connection)
        if client := connection.client:
            self.service.left(connection)
            facts = {"pid": client.pid, "name": client.name}
            if connection.said_bye or self._stopping is None or self._stopping.is_set():
                self._log("gone", f"{client.label} has ended", **facts)
            else:
                self._lost += 1
                self._log("lost", f"{client.label} was lost: {why or 'it ended without a word'}", **facts)
            self._idle()
        elif why and not connection.greeted:
            self._log("refused", f"a process was not let in: {why}")

    def complain(self, connection: Connection, what: str) -> None:
        """Something was wrong with a connection."""
        who = connection.client.label if connection.client else "a process"
        if connection.may_complain():
            self._log("wrong", f"{who}: {what}")

    def _idle(self) -> None:
        """End after a while without clients, if that was asked for."""
        if self._idle_exit is None:
            return
        if self._idle_timer:
            self._idle_timer.cancel()
            self._idle_timer = None
        if not self.service.clients and self._stopping:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self._idle_exit, self._stopping.set)

    # To be seen.

    async def _status(self) -> MachineStatus:
        devices = await self.service.devices()
        broker = BrokerStatus(
            pid=os.getpid(),
            release=__version__,
            protocol=PROTOCOL,
            socket=str(self.path),
            uptime=time.monotonic() - self._begun,
            resumed=self.service.resumed,
            lost=self._lost,
        )
        return MachineStatus(time=time.time(), broker=broker, devices=devices)

    def _log(self, kind: str, text: str, **facts: Any) -> None:
        with contextlib.suppress(Exception):  # a full disk, a closed pipe: no reason to end
            self._log_to(Event(kind, text, facts))


socket_type = socket.socket
FULL = "the broker has as many files open as it may. Raise its `ulimit -n`, or end some of its clients."
