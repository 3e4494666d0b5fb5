"""Messages and file descriptors over a Unix stream socket; protocol.py has the wire's format."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from glake_infer.allocators.errors import GlakeError
from glake_infer.sharing.protocol import (
    DESCRIPTORS_AT_ONCE,
    HEADER,
    MAGIC,
    MOST_BYTES,
    MOST_DESCRIPTORS,
    PROTOCOL,
    AnyMessage,
    Message,
    decode,
    encode,
)

ROOM = socket.CMSG_SPACE(4 * 253)
"""For the descriptors of one recvmsg."""

READ = 1 << 18


class ProtocolError(GlakeError):
    """What came cannot be understood, and nothing behind it either: close the connection."""


class OtherVersionError(ProtocolError):
    """It comes from another version of the protocol; `text` is its body, if there was one to read."""

    def __init__(self, version: int, text: str = "") -> None:
        """Name both versions."""
        self.version = version
        self.text = text
        super().__init__(
            f"the other side speaks version {version} of the broker's protocol, this one version {PROTOCOL}. "
            "Run the broker and its clients from the same version of glake-infer."
        )


class DescriptorsLostError(ProtocolError):
    """The system had no room for the descriptors that came with a message."""

    def __init__(self) -> None:
        """Say what to do."""
        super().__init__(
            "file descriptors that came with a message were lost: this process has as many open as it may. Raise "
            "`ulimit -n`."
        )


def close_all(descriptors: Sequence[int]) -> None:
    """Close them, whatever happens."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def frame(message: Message, descriptors: int = 0, version: int = PROTOCOL) -> bytes:
    """A message's bytes. Raises ProtocolError where it is larger than messages may be."""
    body = encode(message)
    if len(body) > MOST_BYTES or descriptors > MOST_DESCRIPTORS:
        raise ProtocolError(
            f"a message of {len(body)} bytes and {descriptors} descriptors is larger than the {MOST_BYTES} bytes and "
            f"{MOST_DESCRIPTORS} that are allowed."
        )
    return HEADER.pack(MAGIC, version, descriptors, len(body)) + body


def segments(message: Message, descriptors: Sequence[int] = ()) -> Iterator[tuple[bytes, Sequence[int]]]:
    """What to give to sendmsg, one after the other: bytes, and the descriptors that go with the first of them."""
    data = frame(message, len(descriptors))
    start = 0
    for first in range(DESCRIPTORS_AT_ONCE, len(descriptors), DESCRIPTORS_AT_ONCE):
        yield data[start : start + 1], descriptors[first - DESCRIPTORS_AT_ONCE : first]
        start += 1
    rest = len(descriptors) - max(0, (len(descriptors) - 1) // DESCRIPTORS_AT_ONCE) * DESCRIPTORS_AT_ONCE
    yield data[start:], descriptors[len(descriptors) - rest :]


def send_some(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
    """One sendmsg; returns how many bytes went. The descriptors go with the first byte."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    return sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


class Frames:
    """Assembles messages from what recvmsg gives. Owns the descriptors that it has not handed out yet."""

    def __init__(self) -> None:
        """Empty."""
        self._data = bytearray()
        self._descriptors: list[int] = []
        self._lost = False

    @property
    def partial(self) -> bool:
        """Whether the beginning of a message is there."""
        return bool(self._data)

    def receive(self, sock: socket.socket) -> bool:
        """One recvmsg; False at the end of the stream. Raises OSError as that does (BlockingIOError)."""
        data, ancillary, flags, _ = sock.recvmsg(READ, ROOM, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = content[: len(content) - len(content) % 4]
                self._descriptors += array.array("i", whole)
        if flags & socket.MSG_CTRUNC:
            self._lost = True
        self._data += data
        return bool(data)

    def next(self) -> tuple[AnyMessage, list[int]] | None:
        """The next whole message and its descriptors, which are the caller's; None if there is none yet.

        Raises ProtocolError; then the stream is of no more use.
        """
        if self._lost:
            raise DescriptorsLostError
        if len(self._descriptors) > MOST_DESCRIPTORS + DESCRIPTORS_AT_ONCE:
            raise ProtocolError("more descriptors came than any message has.")
        if len(self._data) < HEADER.size:
            if self._data and not MAGIC.startswith(bytes(self._data[: len(MAGIC)])):
                raise ProtocolError("what came is no message of ours.")
            return None
        magic, version, count, length = HEADER.unpack_from(self._data)
        if magic != MAGIC:
            raise ProtocolError("what came is no message of ours.")
        if length > MOST_BYTES or count > MOST_DESCRIPTORS:
            raise ProtocolError(
                f"a message of {length} bytes and {count} descriptors was announced; {MOST_BYTES} and "
                f"{MOST_DESCRIPTORS} are allowed."
            )
        whole = len(self._data) >= HEADER.size + length
        if version != PROTOCOL:
            body = bytes(self._data[HEADER.size : HEADER.size + length]) if whole else b""
            raise OtherVersionError(version, body.decode(errors="replace"))
        if not whole:
            return None
        if len(self._descriptors) < count:
            raise ProtocolError(
                f"a message came with {len(self._descriptors)} descriptors of {count} that it announced."
            )
        try:
            message = decode(bytes(self._data[HEADER.size : HEADER.size + length]))
        except (ValidationError, RecursionError) as error:
            first = (
                error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "too deep"}
            )
            where = ".".join(map(str, first["loc"]))
            raise ProtocolError(f"a message is not as the protocol says: {where}: {first['msg']}.") from None
        del self._data[: HEADER.size + length]
        taken, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        if not self._data and self._descriptors:
            close_all(taken)
            raise ProtocolError("descriptors came that no message announced.")
        return message, taken

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self._descriptors)
        self._descriptors = []
        self._data.clear()


class Channel:
    """A blocking connection. One thread receives, any may send."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self.socket = sock
        self._frames = Frames()
        self._sending = threading.Lock()

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout: float) -> Channel:
        """Connect to a broker of this user; operations take at most `timeout` seconds.

        Raises OSError (nobody there), ProtocolError (the socket is another user's).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(timeout)
            sock.connect(os.fspath(path))
            if (user := peer(sock)[1]) not in (os.getuid(), 0):
                raise ProtocolError(
                    f"{Path(path)} belongs to user {user}, not to {os.getuid()}: weights are shared by processes of one "
                    "user only. Use another socket."
                )
            return cls(sock)
        except BaseException:
            sock.close()
            raise

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send it all. Raises OSError where the other side is gone or does not read; then the connection is of no use."""
        with self._sending:
            for data, some in segments(message, descriptors):
                view, rest = memoryview(data), some
                while view:
                    view, rest = view[send_some(self.socket, view, rest) :], ()

    def pull(self) -> bool:
        """Take in what has come, waiting for some; False at the end. Raises OSError."""
        return self._frames.receive(self.socket)

    def next(self) -> tuple[AnyMessage, list[int]] | None:
        """The next message of what was taken in, and its descriptors, which are the caller's. Raises ProtocolError."""
        return self._frames.next()

    def receive(self) -> tuple[AnyMessage, list[int]] | None:
        """The next message and its descriptors, which are the caller's; None at the end.

        Raises ProtocolError, OSError (TimeoutError: nothing came for as long as the timeout).
        """
        while True:
            if (found := self.next()) is not None:
                return found
            if not self.pull():
                return None

    def finish(self, timeout: float) -> None:
        """Send no more, and let the other side read to the end: without that it may only see a broken connection."""
        self.socket.shutdown(socket.SHUT_WR)
        self.socket.settimeout(timeout)
        while self.pull():
            self._frames.close()

    def end(self) -> None:
        """End the connection, from any thread: whoever receives sees its end, and is to close it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection; for who receives."""
        self.end()
        self._frames.close()
        self.socket.close()


def peer(sock: socket.socket) -> tuple[int, int, int]:
    """The pid, uid and gid of the process at the other end."""
    size = struct.calcsize("3i")
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
