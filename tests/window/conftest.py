"""A place for sockets of a test's own, and servers that answer as they are told."""

import shutil
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from glake_infer.sharing import protocol
from glake_infer.sharing.channel import Channel


@pytest.fixture
def place(monkeypatch):
    """A folder for this test's sockets, which is also where default ones are; its path is short."""
    folder = Path(tempfile.mkdtemp(prefix="glake-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    for name in ("GLAKE_BROKER", "GLAKE_MONITOR", "GLAKE_NAME"):
        monkeypatch.delenv(name, raising=False)
    (folder / "glake-infer").mkdir(mode=0o700)
    yield folder / "glake-infer"
    shutil.rmtree(folder, ignore_errors=True)


class Server:
    """Hands every connection to `converse(channel)`."""

    def __init__(self, path, converse):
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(64)
        self._converse = converse
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(10)
            channel = Channel(connection)
            try:
                with suppress(OSError):
                    self._converse(channel)
            finally:
                channel.close()

    def close(self):
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def server():
    """Start a Server: `server(path, converse)`."""
    started = []

    def start(path, converse):
        started.append(Server(path, converse))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def teller(server):
    """Start a server that answers observers with a MachineStatus: `teller(path, status)`."""

    def start(path, status):
        def converse(channel):
            if (received := channel.receive()) is None:
                return
            hello, _ = received
            assert hello.device is None
            channel.send(protocol.Welcome(to=hello.id, release="0.1.0", broker="0" * 16, limit=0, quota=0))
            asked, _ = channel.receive()
            assert isinstance(asked, protocol.Status)
            channel.send(protocol.Statement(to=asked.id, status=status))

        return server(path, converse)

    return start
