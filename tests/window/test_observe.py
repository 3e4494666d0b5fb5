"""Asking: who answers, what is said of who does not, and several answers as one."""

import os
import socket
import threading
import time

import pytest
import scenes
from scenes import MiB

import glake_infer as gi
from glake_infer.sharing import protocol
from glake_infer.sharing.channel import ProtocolError
from glake_infer.sharing.protocol import HEADER, MAGIC
from glake_infer.window import observe as module
from glake_infer.window.figures import ungoverned
from glake_infer.window.observe import NobodyThereError, merge, observe, sources, watch


def left_behind(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(path))
        made.listen()


def test_what_is_told_comes_through(place, teller):
    status = scenes.crowd(3, 20)
    teller(place / "broker.sock", status)
    assert observe(place / "broker.sock") == status


def test_nobody_there(place):
    with pytest.raises(NobodyThereError, match="there is no socket"):
        observe(place / "broker.sock")
    with pytest.raises(NobodyThereError, match="there is no socket"):
        observe(place / "missing" / "broker.sock")
    left_behind(place / "left.sock")
    with pytest.raises(NobodyThereError, match="was left behind") as caught:
        observe(place / "left.sock")
    assert caught.value.left


def test_what_is_no_socket(place):
    (place / "file").write_text("x")
    for path in (place / "file", place):
        with pytest.raises(gi.GlakeError, match="is no socket"):
            observe(path)
    with pytest.raises(gi.GlakeError, match="cannot be opened"):
        observe(place / ("x" * 200))


def test_another_user_is_not_believed(place, teller, monkeypatch):
    teller(place / "broker.sock", scenes.nobody())
    monkeypatch.setattr(module, "peer", lambda sock: (1, 4242, 4242))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    with pytest.raises(gi.GlakeError, match="of user 4242, not 1000"):
        observe(place / "broker.sock")
    monkeypatch.setattr(os, "getuid", lambda: 0)  # root may look at everybody
    assert observe(place / "broker.sock") == scenes.nobody()


def test_a_socket_that_may_not_be_opened(place, monkeypatch):
    def refuse(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(gi.GlakeError, match="belongs to another user"):
        observe(place / "broker.sock")


def test_silence_has_an_end(place, server):
    server(place / "broker.sock", lambda channel: time.sleep(1))
    start = time.monotonic()
    with pytest.raises(gi.GlakeError, match=r"does not answer within 0\.2 s"):
        observe(place / "broker.sock", timeout=0.2)
    assert time.monotonic() - start < 0.9


def test_a_full_queue_is_silence(place):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(str(place / "broker.sock"))
        deaf.listen(0)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(str(place / "broker.sock"))
        with pytest.raises(gi.GlakeError, match="does not answer"):
            observe(place / "broker.sock", timeout=0.2)
        for each in waiting:
            each.close()


def test_other_versions_and_garbage(place, server):
    def old(channel):
        channel.receive()
        channel.socket.sendall(HEADER.pack(MAGIC, 99, 0, 2) + b"{}")

    server(place / "old.sock", old)
    with pytest.raises(ProtocolError, match="version 99"):
        observe(place / "old.sock")
    server(place / "garbage.sock", lambda channel: channel.socket.sendall(b"HTTP/1.1 400 Bad Request\r\n"))
    with pytest.raises(ProtocolError, match="no message of ours"):
        observe(place / "garbage.sock")


def test_who_refuses_or_hangs_up(place, server):
    def refuses(channel):
        hello, _ = channel.receive()
        channel.send(protocol.Refusal(to=hello.id, reason="user", message="not for you."))

    server(place / "refuses.sock", refuses)
    with pytest.raises(gi.GlakeError, match="refuses to answer: not for you"):
        observe(place / "refuses.sock")
    server(place / "hangs-up.sock", lambda channel: None)
    with pytest.raises(gi.GlakeError, match="ended the conversation"):
        observe(place / "hangs-up.sock")


def test_who_is_asked_whether_it_is_there_answers(place, server):
    answered = []

    def careful(channel):
        hello, _ = channel.receive()
        channel.send(protocol.Ping(id=77))
        answered.append(channel.receive()[0])
        channel.send(protocol.Welcome(to=hello.id, release="0", broker="0" * 16, limit=0, quota=0))
        asked, _ = channel.receive()
        channel.send(protocol.Offer(id=78))  # nothing for an observer
        channel.send(protocol.Statement(to=asked.id, status=scenes.nobody()))

    server(place / "broker.sock", careful)
    assert observe(place / "broker.sock") == scenes.nobody()
    assert answered == [protocol.Done(to=77)]


def test_a_process_has_the_number_that_it_has_here(place, teller):
    """In a container of its own it may call itself 1."""
    teller(place / "process-1.sock", scenes.lonely())
    (device,) = observe(place / "process-1.sock").devices
    assert [process.pid for process in device.processes] == [os.getpid()]


def test_where_is_looked(place, monkeypatch, tmp_path):
    assert sources() == [place / "broker.sock"]
    for name in ("process-2.sock", "process-1.sock", "other.sock", "process-3.log"):
        (place / name).touch()
    both = [place / "process-1.sock", place / "process-2.sock"]
    assert sources() == [place / "broker.sock", *both]
    assert sources(both[1]) == [both[1]]
    (tmp_path / "process-9.sock").touch()
    assert sources(tmp_path / "b.sock") == [tmp_path / "b.sock", tmp_path / "process-9.sock"]
    monkeypatch.setenv("GLAKE_BROKER", str(tmp_path / "b.sock"))
    assert sources() == [tmp_path / "b.sock", tmp_path / "process-9.sock", *both]
    for word in ("auto", "off", ""):
        monkeypatch.setenv("GLAKE_BROKER", word)
        assert sources()[0] == place / "broker.sock"


def test_watching_nobody_says_what_to_do(place):
    with pytest.raises(NobodyThereError, match="GLAKE_MONITOR=1") as caught:
        watch()
    assert "glake-infer broker`" in str(caught.value)
    with pytest.raises(NobodyThereError, match=f"broker --socket {place}/b.sock"):
        watch(place / "b.sock")
    with pytest.raises(NobodyThereError, match="the process has ended"):
        watch(place / "process-7.sock")


def test_watching_several(place, teller, server):
    mine = scenes.process(os.getpid(), "mine", [scenes.model()])
    teller(place / "broker.sock", scenes.machine(scenes.device([mine, scenes.process(5, "other")])))
    named = scenes.device().name
    itself = mine.model_copy(update={"name": "as it sees itself"})
    teller(place / "process-1.sock", scenes.machine(ungoverned(named, "", 1, [itself]), broker=None))
    left_behind(place / "process-2.sock")
    server(place / "process-3.sock", lambda channel: time.sleep(1))
    start = time.monotonic()
    watched = watch(timeout=0.3)
    assert time.monotonic() - start < 0.9
    (device,) = watched.status.devices
    assert [process.name for process in device.processes] == ["mine", "other"]
    assert watched.status.broker == scenes.BROKER
    assert watched.answered == (place / "broker.sock", place / "process-1.sock")
    assert len(watched.problems) == 1
    assert "process-3.sock does not answer" in watched.problems[0]
    assert not (place / "process-2.sock").exists()
    assert (place / "process-3.sock").exists()


def test_a_broker_that_was_left_behind_keeps_its_socket(place, teller):
    left_behind(place / "broker.sock")
    with pytest.raises(NobodyThereError):
        watch()
    assert (place / "broker.sock").exists()


def test_the_only_one_that_is_there_says_what_is_wrong(place, server):
    server(place / "broker.sock", lambda channel: channel.socket.sendall(b"garbage"))
    with pytest.raises(ProtocolError, match="no message of ours"):
        watch()


def test_asking_leaves_no_threads(place, teller):
    teller(place / "broker.sock", scenes.nobody())
    before = threading.active_count()
    descriptors = scenes.descriptors()
    for _ in range(30):
        watch()
    scenes.wait_until(lambda: threading.active_count() <= before and scenes.descriptors() <= descriptors)


def test_merging():
    broker = scenes.machine(scenes.device([scenes.process(1)]))
    alone = [scenes.process(n, connected=False, shared=0, device="cpu") for n in (2, 3)]
    each = [scenes.machine(ungoverned("cpu", "host memory", 1 << 40, [p]), broker=None) for p in alone]
    made = merge([each[0], broker, each[1]])
    assert made.broker == scenes.BROKER
    gpu, cpu = made.devices
    assert gpu == broker.devices[0]
    assert (cpu.governed, cpu.used) == (False, 600 * MiB)
    assert cpu.limit == sum(process.pool.limit for process in alone)
    assert [process.pid for process in cpu.processes] == [2, 3]
    assert merge([each[0]]) == each[0]


def test_what_processes_have_of_a_broker_that_is_gone_counts_once():
    orphans = [scenes.process(n, connected=False, shared=400 * MiB) for n in (1, 2, 3)]
    device = ungoverned("GPU-1", "", 1 << 40, orphans)
    assert (device.weights, device.used) == (400 * MiB, 1300 * MiB)
