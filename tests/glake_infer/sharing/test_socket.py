"""A broker's place: its socket, who may come there, who has it, and what happens when descriptors run out."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from scripted import GRANULE, Peer, hears, kinds, memfd, tokens_of, until

from glake_infer.allocators.errors import GlakeError, InputError
from glake_infer.sharing import broker as broker_module
from glake_infer.sharing import protocol as p
from glake_infer.sharing.broker import Broker
from glake_infer.sharing.channel import Channel
from glake_infer.sharing.paths import check_folder, check_socket, default_socket, make_folder

SERVE = """
import resource, sys
from glake_infer.sharing.broker import Broker
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
def log(event):
    print(event.kind, event.text, flush=True)
Broker(sys.argv[1], log=log).run()
"""

root_only = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.fixture
def process(place):
    """Start a broker in a process of its own."""
    started = []

    def start(name="b.sock", *arguments):
        command = [sys.executable, "-c", SERVE, str(place / name), *map(str, arguments)]
        made = subprocess.Popen(command, env=processes.environment(), stdout=subprocess.PIPE, text=True)
        started.append(made)
        assert made.stdout.readline().startswith("started")
        made.path = place / name
        return made

    yield start
    for each in started:
        each.kill()
        each.wait()
        each.stdout.close()


class TestPlace:
    def test_default(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert default_socket() == tmp_path / "glake-infer" / "broker.sock"
        for value in ("", str(tmp_path / "nowhere")):
            monkeypatch.setenv("XDG_RUNTIME_DIR", value)
            assert default_socket() == Path(f"/tmp/glake-infer-{os.getuid()}/broker.sock")
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        assert default_socket() == Path(f"/tmp/glake-infer-{os.getuid()}/broker.sock")

    def test_modes(self, place):
        before = os.umask(0)
        try:
            with Broker(place / "new" / "b.sock").running() as broker:
                assert stat.S_IMODE(broker.path.stat().st_mode) == 0o600
                assert stat.S_IMODE(broker.path.parent.stat().st_mode) == 0o700
                assert stat.S_IMODE(Path(f"{broker.path}.lock").stat().st_mode) == 0o600
        finally:
            os.umask(before)
        assert not broker.path.exists()

    def test_a_path_that_is_too_long(self, tmp_path):
        folder = tmp_path / ("x" * 60)
        with pytest.raises(InputError, match="107"):
            check_socket(folder / ("y" * 60))
        with pytest.raises(InputError), Broker(folder / ("y" * 60)).running():
            pass

    @pytest.mark.parametrize(
        "make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/nowhere"), os.mkfifo]
    )
    def test_another_kind_of_file(self, place, make):
        path = place / "b.sock"
        make(path)
        before = path.lstat()
        with pytest.raises(GlakeError, match="another kind of file"), Broker(path).running():
            pass
        assert path.lstat().st_ino == before.st_ino

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
    def test_a_folder_that_others_can_write_to(self, place, mode):
        place.chmod(mode)
        with pytest.raises(GlakeError, match="0700"), Broker(place / "b.sock").running():
            pass
        place.chmod(0o700)

    def test_folders_that_are_none(self, place):
        (place / "file").touch()
        with pytest.raises(GlakeError, match="no folder"):
            check_folder(place / "file")
        with pytest.raises(GlakeError, match="No such file"):
            check_folder(place / "nowhere")
        with (
            pytest.raises(GlakeError, match="Not a directory"),
            Broker(place / "file" / "x" / "b.sock").running(),
        ):
            pass

    @root_only
    def test_a_folder_of_another_user(self, place):
        os.chown(place, 1234, 1234)
        with pytest.raises(GlakeError, match="1234"):
            check_folder(place)
        os.chown(place, 0, 0)
        (place / "link").symlink_to(place)
        check_folder(place / "link")
        os.lchown(place / "link", 1234, 1234)
        with pytest.raises(GlakeError, match="1234"):
            check_folder(place / "link")

    def test_make_folder_leaves_what_is_there(self, place):
        place.chmod(0o755)
        make_folder(place)
        assert stat.S_IMODE(place.stat().st_mode) == 0o755


class TestTwo:
    def test_one_broker_at_a_socket(self, start, place):
        broker = start()
        with (
            pytest.raises(GlakeError, match=rf"process {os.getpid()}\).*b.sock"),
            Broker(broker.path).running(),
        ):
            pass
        Peer(broker.path).close()
        broker.stop()
        until(lambda: "stopped" in kinds(broker))
        with Broker(broker.path).running():
            Peer(broker.path).close()

    def test_two_processes(self, process):
        first = process()
        with pytest.raises(GlakeError, match=str(first.pid)), Broker(first.path).running():
            pass
        Peer(first.path).close()

    def test_many_start_at_once_and_one_serves(self, place):
        path = place / "b.sock"
        command = [sys.executable, "-c", SERVE, str(path)]
        options = {
            "env": processes.environment(),
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        started = [subprocess.Popen(command, **options) for _ in range(4)]
        try:
            until(lambda: sum(each.poll() is not None for each in started) == 3, 60)
            (serving,) = [each for each in started if each.poll() is None]
            for each in started:
                if each is not serving:
                    assert f"process {serving.pid}" in each.stderr.read()
            client = Peer(path)
            client.hello()
            client.close()
        finally:
            for each in started:
                each.kill()
                each.wait()
                each.stderr.close()

    def test_a_stale_socket(self, process):
        first = process()
        first.kill()
        first.wait()
        assert first.path.exists()
        with pytest.raises(ConnectionRefusedError):
            Channel.connect(first.path, 1)
        with Broker(first.path).running():
            Peer(first.path).close()

    def test_another_program_listens_there(self, place):
        path = place / "b.sock"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen(1)
            with pytest.raises(GlakeError, match="another program"), Broker(path).running():
                pass
            assert path.exists()

    def test_a_lock_file_that_was_removed(self, start, place):
        broker = start()
        Path(f"{broker.path}.lock").unlink()
        with pytest.raises(GlakeError, match="listens"), Broker(broker.path).running():
            pass
        Peer(broker.path).close()

    def test_a_lock_that_is_a_link(self, place):
        (place / "b.sock.lock").symlink_to(place / "target")
        with pytest.raises(OSError, match="symbolic links"), Broker(place / "b.sock").running():
            pass
        assert not (place / "target").exists()


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals(self, process, number):
        serving = process()
        client = Peer(serving.path)
        client.hello()
        serving.send_signal(number)
        assert serving.wait(10) == 0
        assert not serving.path.exists()
        assert client.ended.wait(5)
        client.close()

    def test_without_clients_if_asked_for(self, start, join):
        broker = start(idle_exit=0.3)
        client, observer = join(broker), join(broker, device=None)
        time.sleep(0.6)
        client.expect(p.Done, p.Ping())
        client.close()
        until(lambda: "stopped" in kinds(broker), 5)
        assert observer.ended.wait(5)

    def test_when_nobody_ever_came(self, start):
        broker = start(idle_exit=0.2)
        until(lambda: "stopped" in kinds(broker), 5)

    def test_one_that_comes_in_time(self, start, join):
        broker = start(idle_exit=0.5)
        join(broker).close()
        time.sleep(0.2)
        client = join(broker)
        time.sleep(0.7)
        client.expect(p.Done, p.Ping())

    def test_nothing_is_left(self, place, files, nothing_leaks):
        weight = files.add(100_000)
        with nothing_leaks():
            for _ in range(20):
                with Broker(place / "b.sock").running() as broker:
                    client = Peer(broker.path)
                    client.hello()
                    client.load(weight)
                    client.start(p.Acquire(chunks=list(client.has), wait=True))
                client.close()

    def test_somebody_removes_the_socket(self, start, join, monkeypatch):
        monkeypatch.setattr(broker_module, "GUARD", 0.1)
        broker = start()
        client = join(broker)
        broker.path.unlink()
        until(broker.path.exists)
        join(broker)
        client.expect(p.Done, p.Ping())
        hears(broker, "is there again")

    def test_somebody_takes_the_socket(self, start, join, monkeypatch):
        monkeypatch.setattr(broker_module, "GUARD", 0.1)
        broker = start()
        client = join(broker)
        broker.path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(broker.path))
            hears(broker, "taken by another program")
            client.expect(p.Done, p.Ping())
            client.close()
            until(lambda: "stopped" in kinds(broker))
            assert broker.path.exists()  # it is not ours


class TestUsers:
    def test_another_user_is_refused(self, start, join, monkeypatch):
        broker = start()
        with monkeypatch.context() as patch:
            patch.setattr(broker_module, "peer", lambda sock: (4711, os.getuid() + 1, 0))
            client = join(broker, hello=False)
            refusal = client.unexpected
            assert client.ended.wait(5)
        assert [(each.reason, "4711" in each.message) for each in refusal] == [("user", True)]
        join(broker)

    @root_only
    def test_for_real(self, start, place):
        """The modes keep others out; where they were changed, the broker does."""
        broker = start()
        code = """
import os, socket, sys
os.setgid(65534), os.setuid(65534)
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(5)
    sock.connect(sys.argv[1])
    print(sock.recv(10000)[12:].decode())
"""
        command = [sys.executable, "-c", code, str(broker.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "PermissionError" in done.stderr
        folders = [place, place.parent, *[f for f in place.parents if str(f).startswith("/tmp/")]]
        modes = {folder: folder.stat().st_mode for folder in folders}
        try:
            for folder in folders:
                folder.chmod(0o755)
            broker.path.chmod(0o666)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            for folder, mode in modes.items():
                folder.chmod(mode)
        assert '"reason":"user"' in done.stdout, done.stderr
        assert "65534" in done.stdout


class TestDescriptors:
    """They are as many as the system allows, and that is an end too."""

    def peers(self, path, count):
        found = []
        for _ in range(count):
            peer = Peer(path)
            found.append(peer)
        return found

    def test_too_many_connections(self, process):
        """Those who are in stay, others are told why they are not, and later there is room again."""
        serving = process("b.sock", 40)
        first = Peer(serving.path)
        first.hello()
        peers = self.peers(serving.path, 60)
        until(lambda: any(peer.ended.is_set() for peer in peers))
        time.sleep(1)
        refused = [peer for peer in peers if peer.ended.is_set()]
        assert 1 <= len(refused) < 60
        assert {each.reason for peer in refused for each in peer.unexpected} == {"full"}
        first.expect(p.Done, p.Ping())
        ticks = sum(map(int, Path(f"/proc/{serving.pid}/stat").read_text().split()[13:15]))
        time.sleep(1)
        spent = sum(map(int, Path(f"/proc/{serving.pid}/stat").read_text().split()[13:15])) - ticks
        assert spent < 50  # of 100: it does not spin
        for peer in [*peers, first]:
            peer.close()

        def comes():
            peer = Peer(serving.path)
            peer.start(p.Hello(release="1", pid=1, name="x", device=None))
            peer.ended.wait(0.3)
            peer.close()
            return not peer.unexpected

        until(comes)

    def test_more_descriptors_in_a_message_than_there_are(self, process, files):
        serving = process("b.sock", 60)
        client, other = Peer(serving.path), Peer(serving.path)
        client.hello()
        other.hello()
        tokens = tokens_of(client.place(*[files.add(10, group=i) for i in range(100)]))
        client.expect(p.Acquired, p.Acquire(chunks=tokens))
        before = len(list(Path(f"/proc/{serving.pid}/fd").iterdir()))
        fd = memfd(bytes(GRANULE))
        memories = [p.ChunkMemory(chunk=token, memory="1" * 16) for token in tokens]
        client.start(p.Loaded(chunks=memories), [fd] * 100)
        os.close(fd)
        assert client.ended.wait(5)
        assert [each.reason for each in client.unexpected] == ["full"]
        other.expect(p.Done, p.Ping())
        until(lambda: len(list(Path(f"/proc/{serving.pid}/fd").iterdir())) < before)
        assert other.load(files.add(10))[1:] == (1, 0)
        for peer in (client, other):
            peer.close()

    def test_a_file_that_cannot_be_opened_for_the_check(self, process, files):
        serving = process("b.sock", 30)
        client = Peer(serving.path)
        client.hello()
        tokens = tokens_of(client.place(files.add(10)))
        peers = self.peers(serving.path, 60)
        time.sleep(0.5)
        client.expect(p.Acquired, p.Acquire(chunks=tokens))
        memories = [p.ChunkMemory(chunk=tokens[0], memory="1" * 16)]
        fd = client.memory(tokens[0])
        number = client.start(p.Loaded(chunks=memories), [fd])
        os.close(fd)
        try:
            answer, _ = client.wait(number)
            assert answer.kind == "done" or answer.reason == "full"
        except Exception:
            assert [each.reason for each in client.unexpected] == ["full"]
        for peer in [*peers, client]:
            peer.close()

    def test_the_limit_is_raised(self, start, place):
        code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 500))
from glake_infer.sharing.broker import Broker
with Broker(sys.argv[1]).running():
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
        assert processes.run(code, str(place / "b.sock")).stdout == "(500, 500)\n"
