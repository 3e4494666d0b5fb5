"""A process's own socket: it shows what the process holds, with a broker and without."""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
import socket as sockets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from glake_infer.allocators.errors import GlakeError
from glake_infer.sharing.channel import Channel, OtherVersionError, ProtocolError, close_all, peer
from glake_infer.sharing.paths import check_socket, default_socket, make_folder
from glake_infer.sharing.protocol import (
    AnyMessage,
    Done,
    Hello,
    Message,
    Ping,
    Refusal,
    Request,
    Statement,
    Status,
    Welcome,
)
from glake_infer.sharing.status import MachineStatus
from glake_infer.version import __version__
from glake_infer.window.inherited import close_in_children

if TYPE_CHECKING:
    from glake_infer.window.metrics import MetricsServer

MOST_OBSERVERS = 8
"""At one time; others are told to come back."""

PATIENCE = 5.0
"""Seconds for which an observer may keep us waiting."""


class Monitor:
    """Answers observers of the same user, and root, until it is closed. Use as a context manager, or call `close()`.

    It works in threads of its own and wakes no model. A process may have several.
    """

    path: Path
    """The socket. `glake-infer top` finds it by itself where its place was not chosen."""
    metrics: MetricsServer | None = None
    """The server of Prometheus metrics, where there is one; `.url` is what to scrape."""

    def __init__(
        self,
        describe: Callable[[], MachineStatus],
        *,
        metrics: int | None = None,
        host: str = "127.0.0.1",
        socket: str | os.PathLike[str] | None = None,
    ) -> None:
        """Begin to answer with what `describe` says.

        Raises GlakeError: a socket cannot be made there, others may write to its folder, somebody else answers there, or
        the port is taken.
        """
        self._describe = describe
        self._process = os.getpid()
        self._free = threading.BoundedSemaphore(MOST_OBSERVERS)
        self._token = secrets.token_hex(8)
        self._closed = False
        self._listener, self.path = _listen(None if socket is None else Path(socket))
        self._thread = threading.Thread(target=self._accept, name="glake-monitor", daemon=True)
        close_in_children(self._listener)
        with suppress(OSError):
            self._inode = self.path.stat().st_ino
        try:
            if metrics is not None:
                from glake_infer.window.metrics import serve

                self.metrics = serve(metrics, describe, host)
            self._thread.start()
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    def close(self) -> None:
        """End it and remove the socket. Closing twice is fine, and in a child of fork() does nothing."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        atexit.unregister(self.close)
        with suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
        with suppress(OSError):
            self._listener.shutdown(sockets.SHUT_RDWR)  # wakes the thread
        self._listener.close()
        if self.metrics:
            self.metrics.close()
        if self._thread.ident and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Monitor at {self.path}{', closed' if self._closed else ''}>"

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed or self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # no descriptor is free: whoever asks waits
                continue
            connection.settimeout(PATIENCE)
            if not self._free.acquire(blocking=False):
                channel = Channel(connection)
                with suppress(OSError):
                    channel.send(_refusal("full", "too many ask this process at once. Try again."))
                channel.close()
                continue
            try:
                threading.Thread(
                    target=self._serve, args=[connection], name="glake-monitor-answer", daemon=True
                ).start()
            except RuntimeError:  # no more threads
                connection.close()
                self._free.release()

    def _serve(self, connection: sockets.socket) -> None:
        channel = Channel(connection)
        try:
            with suppress(OSError):
                self._converse(channel)
        finally:
            channel.close()
            self._free.release()

    def _converse(self, channel: Channel) -> None:
        user = peer(channel.socket)[1]
        if user not in (os.getuid(), 0):
            channel.send(
                _refusal("user", f"this process shows itself to user {os.getuid()} alone, not to {user}.")
            )
            return
        known = False
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                received = channel.receive()
            except OtherVersionError as error:
                channel.send(_refusal("version", str(error)))
                return
            except ProtocolError as error:
                channel.send(_refusal("message", str(error)))
                return
            if received is None:
                return
            message, descriptors = received
            close_all(descriptors)
            answer = self._answer(message, known)
            channel.send(answer)
            if isinstance(answer, Refusal):
                return
            known = True
            until = time.monotonic() + 12 * PATIENCE

    def _answer(self, message: AnyMessage, known: bool) -> Message:
        number = message.id if isinstance(message, Request) else 0
        if isinstance(message, Hello) and not known:
            if message.device is None:
                return Welcome(to=number, release=__version__, broker=self._token, limit=0, quota=0)
            return _refusal(
                "message", "this is a process, not a broker: it shows itself, and shares nothing.", number
            )
        if known and isinstance(message, Status):
            try:
                return Statement(to=number, status=self._describe())
            except Exception as error:
                return _refusal("lost", f"the process could not describe itself: {error!r:.300}", number)
        if known and isinstance(message, Ping):
            return Done(to=number)
        expected = "status or ping" if known else "hello"
        return _refusal("message", f"expected {expected}, received {message.kind}.", number)


def _refusal(reason: str, text: str, to: int = 0) -> Refusal:
    return Refusal.model_validate({"to": to, "reason": reason, "message": text[:4000]})


def _listen(wanted: Path | None) -> tuple[sockets.socket, Path]:
    """A socket that listens, at its place. It gets there as a whole: whoever finds it can connect."""
    try:
        if wanted is None:
            folder = default_socket().parent
            make_folder(folder)
            names = (f"process-{os.getpid()}{f'-{n}' if n else ''}.sock" for n in itertools.count())
            path = next(check_socket(folder / name) for name in names if not _alive(folder / name))
        elif _alive(path := check_socket(wanted)):
            raise GlakeError(
                f"somebody answers at {path} already. Choose another path for this process's socket."
            )
        begun = path.with_name(f".{secrets.token_hex(4)}")
        listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC)
        try:
            listener.bind(os.fspath(begun))
            begun.chmod(0o600)
            listener.listen(16)
            begun.rename(path)
        except BaseException:
            listener.close()
            begun.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise GlakeError(
            f"a socket cannot be made at {wanted or folder}: {error.strerror or error}. Choose another place with "
            "gi.monitor(socket=...)."
        ) from error
    return listener, path


def _alive(path: Path) -> bool:
    """Whether somebody listens there: another monitor of ours, or a process of the same number in another container."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True
