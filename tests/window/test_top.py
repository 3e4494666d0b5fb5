"""`glake-infer top` and `report`: in a pipe, in a terminal, with nobody and with many."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
import scenes
from rich.cells import cell_len

from glake_infer.cli.top_view import picture
from glake_infer.sharing.status import MachineStatus

SCENES = {
    "nobody": scenes.nobody,
    "no client": lambda: scenes.machine(scenes.device()),
    "one": lambda: scenes.crowd(1, 10),
    "lonely": scenes.lonely,
    "many": scenes.crowd,
    "two devices": lambda: scenes.machine(*scenes.crowd(3, 20).devices, *scenes.lonely().devices),
}


def lines(status, *arguments, **options):
    return [line.plain for line in picture(status, *arguments, **options)]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 250])
@pytest.mark.parametrize("name", SCENES)
def test_every_line_fits(name, width):
    status = SCENES[name]()
    for plain in (False, True):
        for line in lines(status, ["x" * 200], width=width, plain=plain):
            assert cell_len(line) <= width, line
            assert line == line.rstrip(), line
            assert not plain or line.isascii(), line


@pytest.mark.parametrize("height", [10, 16, 24, 30, 50, 200])
@pytest.mark.parametrize("name", SCENES)
def test_a_terminal_gets_as_many_rows_as_it_has(name, height):
    status = SCENES[name]()
    found = lines(status, width=80, height=height)
    least = len(lines(status, width=80, height=1))
    assert len(found) <= max(height, least)
    if name == "many" and height in (24, 30, 50):
        assert len(found) == height
        more = [int(line.split()[1]) for line in found if line.startswith("... ")]
        shown = sum("worker-" in line for line in found)
        models = sum(line.startswith("bert-") for line in found)
        assert more == [64 - shown, 128 - models]
    if name == "many" and height == 200:
        assert sum(line.startswith("worker-") for line in found) == 64


def test_without_a_height_everything_is_shown():
    found = lines(scenes.crowd(), width=140)
    assert sum(line.startswith("worker-") for line in found) == 64
    assert sum(line.startswith("bert-") for line in found) == 128
    assert not any(line.startswith("...") for line in found)


def test_wider_terminals_show_more():
    heads = [
        next(x for x in lines(scenes.crowd(), width=w) if x.startswith("Process")).split()
        for w in (60, 80, 140)
    ]
    assert set(heads[0]) < set(heads[1]) < set(heads[2])
    assert {"Quota", "Rate", "Peak"} <= set(heads[2])


def test_the_largest_come_first():
    status = scenes.crowd()
    order = {p.name: p.pool.reserved for p in status.devices[0].processes}
    names = [line.split()[0] for line in lines(status, width=80) if line.startswith("worker-")]
    sizes = [order[name] for name in names]
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_said():
    status = scenes.crowd(6, 60)
    text = "\n".join(
        lines(status, ["/run/process-9.sock does not answer within 5 s."], width=100, keys="q: quit")
    )
    assert "broker 4242, up 2 h, 6 processes, 1 lost" in text
    assert "q: quit" in text
    assert "! /run/process-9.sock does not answer" in text
    for word in (
        "shared weights",
        "unused weights",
        "granted",
        "free",
        "sharing saves",
        "hits",
        "refused 2",
        "suspended",
    ):
        assert word in text, word
    assert "no broker" in "\n".join(lines(scenes.lonely()))


def test_who_is_silent_or_outside_is_marked():
    processes = [
        scenes.process(1, "asleep", silent_seconds=75.0),
        scenes.process(2, "outside", connected=False, shared=0),
        scenes.process(3, "well"),
    ]
    found = lines(scenes.machine(scenes.device(processes)), width=80)
    remarks = {line.split()[0]: line for line in found if line.startswith(("asleep", "outside", "well"))}
    assert remarks["asleep"].endswith("silent 1 min")
    assert remarks["outside"].endswith("no broker")
    assert not remarks["well"].endswith(("min", "broker"))


def test_names_do_nothing_to_a_terminal():
    names = ["\x1b[2Jgone", "two\nlines", "a\tb", "[red]markup[/]", "漢" * 60, "\u202eright"]
    processes = [scenes.process(n, name, [scenes.model(name)]) for n, name in enumerate(names)]
    text = "\n".join(lines(scenes.machine(scenes.device(processes)), width=80))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]markup[/]" in text
    for line in text.split("\n"):
        assert cell_len(line) <= 80
    assert len(text.split("\n")) == len(lines(scenes.machine(scenes.device(processes)), width=80))


def test_the_bar_shows_whatever_there_is():
    """A kind of few bytes has a cell, and the bar fits however many kinds there are."""
    for width in range(40, 200, 7):
        for status in (scenes.crowd(1, 3), scenes.crowd()):
            bar = lines(status, width=width)[3]
            assert len(bar) == width
            assert {"█", "▓", "▒", "░", "╌", "·"} <= set(bar)


# The commands.


def command(*arguments):
    return [sys.executable, "-m", "glake_infer.cli", *arguments]


def run(*arguments, code=0, **environment):
    done = subprocess.run(
        command(*arguments), env={**os.environ, "COLUMNS": "80", **environment}, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", ["nobody", "one", "many"])
def test_a_pipe_gets_one_picture(place, teller, name):
    teller(place / "broker.sock", SCENES[name]())
    out, err = run("top")
    assert err == ""
    assert out.splitlines() == lines(SCENES[name](), width=80)
    wide, _ = run("top", "--once", "--interval", "60", COLUMNS="140")
    assert wide.splitlines() == lines(SCENES[name](), width=140)


def test_json_is_the_whole_status(place, teller):
    status = scenes.crowd(4, 30)
    teller(place / "broker.sock", status)
    out, err = run("top", "--json")
    assert err == ""
    assert MachineStatus.model_validate_json(out) == status
    out, _ = run("top", "--json", "--once", "--interval", "60")
    assert MachineStatus.model_validate_json(out) == status


def test_json_lines_until_it_is_ended(place, teller):
    teller(place / "broker.sock", scenes.lonely())
    with subprocess.Popen(
        command("top", "--json", "--interval", "0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(3):
            assert json.loads(process.stdout.readline())["broker"] is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupted\n"


def test_nobody_to_ask(place):
    for arguments in (["top"], ["top", "--json"], ["report"], ["top", "--socket", str(place / "x.sock")]):
        out, err = run(*arguments, code=2)
        assert out == ""
        assert "glake-infer broker" in err
        assert "GLAKE_MONITOR=1" in err


def test_another_socket(place, teller, tmp_path):
    teller(place / "mine.sock", scenes.crowd(1, 5))
    out, _ = run("top", "--socket", str(place / "mine.sock"))
    assert "worker-0" in out
    out, _ = run("top", GLAKE_BROKER=str(place / "mine.sock"))
    assert "worker-0" in out


def test_the_report(place, teller, tmp_path):
    teller(place / "broker.sock", scenes.crowd(3, 20))
    target = tmp_path / "r.html"
    out, err = run("report", "-o", str(target))
    assert (out.count("\n"), err) == (1 + (len(str(target)) > 50), "") or str(target) in out.replace("\n", "")
    assert target.read_text().startswith("<!DOCTYPE html>")
    out, _ = run("report", "-o", str(target), "--json")
    assert json.loads(out) == {"path": str(target), "bytes": target.stat().st_size}
    _, err = run("report", "-o", str(tmp_path / "missing" / "r.html"), code=2)
    assert "missing" in err


def test_a_report_says_who_is_not_in_it(place, teller, server, tmp_path):
    teller(place / "broker.sock", scenes.crowd(1, 5))
    server(place / "process-5.sock", lambda channel: channel.socket.sendall(b"garbage"))
    _, err = run("report", "-o", str(tmp_path / "r.html"))
    assert err.startswith("not in the report: ")


class Terminal:
    """`glake-infer top` in a terminal of its own."""

    def __init__(self, *arguments, rows=24, columns=80):
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        environment |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            command("top", *arguments), stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.seen = ""

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds):
        ready, _, _ = select.select([self.master], [], [], seconds)
        if ready:
            self.seen += os.read(self.master, 1 << 16).decode(errors="replace")

    def until(self, pattern, seconds=30):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert self.process.poll() is None, (self.seen, self.process.stderr.read())
            assert time.monotonic() < end, self.seen
            self.read(0.1)
        self.seen = ""

    def press(self, keys):
        os.write(self.master, keys.encode())

    def ended(self):
        end = time.monotonic() + 15
        while self.process.poll() is None:
            assert time.monotonic() < end
            self.read(0.05)
        self.read(0)
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode, self.process.stderr.read().decode()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    made = []

    def start(*arguments, **options):
        made.append(Terminal(*arguments, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_live_until_a_key(place, teller, terminal, key):
    teller(place / "broker.sock", scenes.crowd())
    shown = terminal("--interval", "0.2")
    shown.until(r"\x1b\[\?1049h")  # the alternate screen
    shown.until(r"worker-\d+")
    shown.until(r"worker-\d+")
    shown.press(key)
    assert shown.ended() == (0, "")
    assert "\x1b[?1049l" in shown.seen


def test_live_follows_what_changes_and_the_window(place, teller, terminal):
    shown_by = teller(place / "broker.sock", scenes.crowd(2, 10, name="first-{}"))
    shown = terminal("--interval", "0.1")
    shown.until("first-1")
    shown.resize(40, 140)
    shown.until("Quota")
    shown_by.close()
    (place / "broker.sock").unlink()
    shown.until("nobody answers")
    teller(place / "broker.sock", scenes.crowd(2, 10, name="second-{}"))
    shown.until("second-1")
    shown.press("q")
    assert shown.ended() == (0, "")


def test_q_is_heard_while_nobody_answers(place, teller, server, terminal):
    told = teller(place / "broker.sock", scenes.crowd(2, 10))
    shown = terminal("--interval", "0.1")
    shown.until("worker-1")
    told.close()
    (place / "broker.sock").unlink()
    over = threading.Event()
    server(place / "broker.sock", lambda channel: over.wait(6))
    time.sleep(0.5)
    start = time.monotonic()
    shown.press("q")
    assert shown.ended() == (0, "")
    assert time.monotonic() - start < 4
    over.set()
