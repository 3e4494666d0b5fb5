"""A process's own socket: it shows the process to its user, and nothing disturbs it."""

import contextlib
import os
import signal
import socket
import stat
import threading
from contextlib import closing, suppress

import pytest
import scenes
from scenes import wait_until

import glake_infer as gi
from glake_infer.models import status as module
from glake_infer.sharing import protocol
from glake_infer.sharing.channel import Channel, OtherVersionError, frame
from glake_infer.sharing.protocol import HEADER, MAGIC, MOST_BYTES
from glake_infer.window import monitor as monitors
from glake_infer.window.monitor import Monitor
from glake_infer.window.observe import NobodyThereError, observe, watch

HELLO = protocol.Hello(id=7, release="0", pid=1, name="test", device=None)


@pytest.fixture
def monitor(place):
    with Monitor(scenes.lonely) as made:
        yield made


def talk(path, *messages):
    """Send messages and bytes; what comes back until the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        channel = Channel(sock)
        try:
            for message in messages:
                sock.sendall(message if isinstance(message, bytes) else frame(message))
        except BrokenPipeError:
            pass
        sock.shutdown(socket.SHUT_WR)
        found = []
        with suppress(ConnectionResetError):  # it ended before it had read everything
            while (received := channel.receive()) is not None:
                found.append(received[0])
        return found


def test_it_answers_and_goes(place):
    with Monitor(scenes.lonely) as monitor:
        assert monitor.path == place / f"process-{os.getpid()}.sock"
        mode = monitor.path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        shown = observe(monitor.path)
        assert shown.devices[0].processes[0].name == "serve.py"
        assert [entry.name for entry in place.iterdir()] == [monitor.path.name]
        assert str(monitor.path) in repr(monitor)
    assert not list(place.iterdir())
    monitor.close()
    with pytest.raises(NobodyThereError):
        observe(monitor.path)


def test_the_folder_is_made_for_this_user_alone(place):
    place.rmdir()
    with Monitor(scenes.lonely):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_a_process_may_have_several(place):
    with Monitor(scenes.lonely) as first, Monitor(scenes.lonely) as second:
        assert second.path == place / f"process-{os.getpid()}-1.sock"
        watched = watch()
        assert watched.answered == (second.path, first.path)
        assert len(watched.status.devices[0].processes) == 1


def test_a_place_of_its_own(place, tmp_path):
    path = place / "mine.sock"
    with Monitor(scenes.lonely, socket=path):
        assert observe(path).devices
        with pytest.raises(gi.GlakeError, match=r"somebody answers at .*mine\.sock already"):
            Monitor(scenes.lonely, socket=path)
        assert observe(path).devices
    (place / "file").write_text("keep")
    with pytest.raises(gi.GlakeError, match="not a socket"):
        Monitor(scenes.lonely, socket=place / "file")
    assert (place / "file").read_text() == "keep"
    with pytest.raises(gi.GlakeError, match="name has"):
        Monitor(scenes.lonely, socket=place / ("x" * 100))
    with pytest.raises(gi.GlakeError, match="missing"):
        Monitor(scenes.lonely, socket=place / "missing" / "x.sock")
    open_to_all = place / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(gi.GlakeError, match="others may write"):
        Monitor(scenes.lonely, socket=open_to_all / "x.sock")


def test_what_a_killed_process_left_is_taken_over(place):
    path = place / "mine.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(str(path))
        old.listen()
    with Monitor(scenes.lonely, socket=path):
        assert observe(path).devices


def test_a_refused_port_leaves_no_socket(place):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(gi.GlakeError, match="cannot be served"):
            Monitor(scenes.lonely, metrics=taken.getsockname()[1])
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([b"GET / HTTP/1.1\r\n\r\n" + b"x" * 64], "message"),
        ([HEADER.pack(MAGIC, 99, 0, 2) + b"{}"], "version"),
        ([HEADER.pack(MAGIC, protocol.PROTOCOL, 0, MOST_BYTES + 1)], "message"),
        ([HEADER.pack(MAGIC, protocol.PROTOCOL, 3, 2) + b"{}"], "message"),
        ([HEADER.pack(MAGIC, protocol.PROTOCOL, 0, 4) + b"\xff\xfe{]"], "message"),
        ([HEADER.pack(MAGIC, protocol.PROTOCOL, 0, 17) + b'{"kind": "hellx"}'], "message"),
        ([protocol.Status(id=3)], "message"),
        ([HELLO, HELLO], "message"),
        ([HELLO, protocol.Forget(id=3, regions=[])], "message"),
        ([HELLO, protocol.Done(to=3)], "message"),
        ([HELLO.model_copy(update={"device": protocol.Device(name="cpu", memory=1, granule=4096)})], "message"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_politely(monitor, sent, reason):
    *before, last = talk(monitor.path, *sent)
    assert isinstance(last, protocol.Refusal)
    assert last.reason == reason
    assert last.message
    assert all(isinstance(message, protocol.Welcome) for message in before)
    assert observe(monitor.path).devices


def test_a_whole_conversation(monitor):
    welcome, done, statement = talk(monitor.path, HELLO, protocol.Ping(id=8), protocol.Status(id=9))
    assert (welcome.to, done.to, statement.to) == (7, 8, 9)
    assert statement.status == scenes.lonely()


def test_descriptors_that_nobody_asked_for_are_closed(monitor):
    before = scenes.descriptors()
    for _ in range(5):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(monitor.path))
            channel = Channel(sock)
            channel.send(HELLO, [0, 1, 2])
            assert isinstance(channel.receive()[0], protocol.Welcome)
    wait_until(lambda: scenes.descriptors() == before)


def test_half_a_message_and_the_end(monitor):
    whole = frame(HELLO)
    for length in range(0, len(whole), 7):
        assert talk(monitor.path, whole[:length]) == []
    assert observe(monitor.path).devices


def test_another_user_is_refused(monitor, monkeypatch):
    monkeypatch.setattr(monitors, "peer", lambda sock: (1, 4242, 4242))
    (refusal,) = talk(monitor.path, HELLO, protocol.Status(id=1))
    assert refusal.reason == "user"
    assert "4242" in refusal.message


@pytest.mark.parametrize("room", [1, 0])
def test_who_hangs_keeps_others_from_nothing_for_long(place, monkeypatch, room):
    monkeypatch.setattr(monitors, "PATIENCE", 2.0)
    with Monitor(scenes.lonely) as monitor, contextlib.ExitStack() as hanging:
        for _ in range(monitors.MOST_OBSERVERS - room):
            each = hanging.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            each.connect(str(monitor.path))
        if not room:
            with pytest.raises(gi.GlakeError, match="too many ask"):
                observe(monitor.path)

        def answers():
            try:
                return observe(monitor.path).devices
            except gi.GlakeError:
                return False

        assert answers() or not room
        wait_until(answers)


def test_who_cannot_be_described_says_so(place):
    def fails():
        raise gi.DriverError("the GPU fell off")

    with (
        Monitor(fails) as monitor,
        pytest.raises(gi.GlakeError, match=r"could not describe itself.*fell off"),
    ):
        observe(monitor.path)


def test_a_thousand_times_leave_nothing(place):
    before = (threading.active_count(), scenes.descriptors())
    for turn in range(1000):
        with Monitor(scenes.lonely) as monitor:
            if turn % 50 == 0:
                assert observe(monitor.path).devices
    # Fewer where something of an earlier test ended meanwhile.
    wait_until(lambda: threading.active_count() <= before[0] and scenes.descriptors() <= before[1])
    assert not list(place.iterdir())


def test_other_versions_are_told_which_this_is(monitor, monkeypatch):
    from glake_infer.sharing import channel

    monkeypatch.setattr(channel, "PROTOCOL", 2)  # of both sides of this process, but frame()'s default stays
    with pytest.raises(OtherVersionError, match="version 1"):
        observe(monitor.path)


SHOWN = """
    import sys, time
    import glake_infer as gi
    pool = gi.Pool("cpu", limit="1GiB")
    monitor = gi.monitor()
    address = pool.allocate("3MiB")
    print(monitor.path, flush=True)
    sys.stdin.readline()
"""


def test_another_process_is_seen_and_leaves_nothing(place, python):
    process = python(SHOWN, stdin=-1)
    path = process.stdout.readline().strip()
    watched = watch()
    assert [str(answered) for answered in watched.answered] == [path]
    (device,) = watched.status.devices
    (shown,) = device.processes
    assert (device.name, device.governed, device.limit) == ("cpu", False, 1 << 30)
    assert shown.pid == process.pid
    assert shown.pool.active >= 3 << 20
    assert not shown.connected
    process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert not list(place.iterdir())


def test_what_a_killed_process_left_is_removed_by_who_looks(place, python):
    process = python(SHOWN, stdin=-1)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(place.iterdir())) == 1
    with pytest.raises(NobodyThereError):
        watch()
    assert not list(place.iterdir())


def test_a_stopped_process_is_named(place, python):
    process = python(SHOWN, stdin=-1)
    path = process.stdout.readline().strip()
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(gi.GlakeError, match=f"{path} does not answer within 0.3 s"):
        watch(timeout=0.3)
    process.send_signal(signal.SIGCONT)
    assert watch().status.devices


FORKED = """
    import os, sys, time
    import glake_infer as gi
    monitor = gi.monitor(metrics=0)
    child = os.fork()
    if not child:
        monitor.close()          # the parent's
        time.sleep(60)
    print(child, monitor.path, monitor.metrics.port, flush=True)
    sys.stdin.readline()
    os._exit(0)                  # as a crash: nothing is tidied up
"""


def test_a_forked_child_keeps_no_socket_open(place, python):
    process = python(FORKED, stdin=-1)
    child, path, port = process.stdout.readline().split()
    try:
        assert observe(path, timeout=10).devices == []
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(timeout=30)
        with pytest.raises(NobodyThereError, match="left behind"):
            observe(path, timeout=10)
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", int(port))) != 0
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_the_environment_asks(place, monkeypatch, capfd):
    monkeypatch.setattr(module, "_asked", 0)
    monkeypatch.setattr(module, "_monitors", [])
    module.monitor_if_asked()
    monkeypatch.setenv("GLAKE_MONITOR", "0")
    module.monitor_if_asked()
    assert not list(place.iterdir())
    monkeypatch.setenv("GLAKE_MONITOR", "1")
    threads = [threading.Thread(target=module.monitor_if_asked) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (made,) = module._monitors
    assert [entry.name for entry in place.iterdir()] == [made.path.name]
    made.close()
    module.monitor_if_asked()
    assert not list(place.iterdir())
    assert capfd.readouterr().err == ""


def test_where_it_cannot_be_the_process_goes_on(place, monkeypatch, capfd):
    monkeypatch.setattr(module, "_asked", 0)
    monkeypatch.setenv("GLAKE_MONITOR", "1")
    place.chmod(0o777)
    module.monitor_if_asked()
    assert (
        "GLAKE_MONITOR is set, and this process cannot be shown: others may write" in capfd.readouterr().err
    )


def test_the_public_name(place):
    with gi.monitor(metrics=0) as monitor:
        assert monitor.metrics.url.startswith("http://127.0.0.1:")
        assert watch().status.broker is None
