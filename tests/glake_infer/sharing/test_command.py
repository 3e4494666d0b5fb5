"""`glake-infer broker` as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import processes
import pytest
from scripted import GRANULE, MiB, Peer, until

from glake_infer.allocators.errors import DeviceNotFoundError, InputError
from glake_infer.sharing import protocol as p
from glake_infer.sharing.limits import parse_limits


@pytest.fixture
def command(place):
    """Start the command; `.path` is its socket."""
    started = []

    def start(*arguments):
        full = [
            sys.executable,
            "-m",
            "glake_infer.cli",
            "broker",
            "--socket",
            str(place / "b.sock"),
            *arguments,
        ]
        made = subprocess.Popen(
            full, env=processes.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        made.path = place / "b.sock"
        started.append(made)
        return made

    yield start
    for each in started:
        each.kill()
        each.wait()
        each.stdout.close()
        each.stderr.close()


def ends(serving, number=signal.SIGTERM):
    """Its lines, when it was told to end."""
    serving.send_signal(number)
    out, err = serving.communicate(timeout=20)
    assert out == ""
    assert serving.returncode == 0, err
    assert "Traceback" not in err
    return err.splitlines()


def test_it_logs_who_comes_and_goes(command, files):
    serving = command("--limit", "3MiB")
    until(lambda: answers(serving.path), 30)
    a, b = Peer(serving.path, "a"), Peer(serving.path, "b\nfaked line")
    assert a.hello().limit == 3 * MiB
    b.hello()
    a.load(files.add(10))
    b.refused(p.Grow(quota=4 * MiB), "memory")
    a.release(*a.has)
    b.grow(3 * MiB)
    a.bye()
    b.close()
    until(lambda: not clients_of(serving))
    lines = ends(serving)
    kinds = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\w+): .*", line)[1] for line in lines]
    assert kinds == ["started", "came", "came", "refusal", "evicted", "gone", "lost", "stopped"]
    assert "b?faked line" in lines[2]
    assert "4194304" in lines[3]


def answers(path):
    try:
        Peer(path).close()
    except OSError:
        return False
    return True


def clients_of(serving):
    observer = Peer(serving.path, device=None)
    observer.hello()
    count = sum(len(device.processes) for device in observer.status_of().devices)
    observer.close()
    return count


def test_json_lines(command):
    serving = command("--json", "--metrics", "0")
    until(lambda: answers(serving.path), 30)
    client = Peer(serving.path, "a", pid=77)
    client.hello()
    client.bye()
    until(lambda: not clients_of(serving))
    lines = [json.loads(line) for line in ends(serving)]
    assert [line["event"] for line in lines] == ["metrics", "started", "came", "gone", "stopped"]
    assert lines[2]["pid"] == 77
    assert all(isinstance(line["time"], float) for line in lines)


def test_metrics(command):
    serving = command("--metrics", "0")
    until(lambda: answers(serving.path), 30)
    url = re.search(r"http://\S+", serving.stderr.readline())[0]
    client = Peer(serving.path)
    client.hello()
    client.grow(GRANULE)
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert f"{float(GRANULE)}" in answer.read().decode()
    client.close()
    ends(serving, signal.SIGINT)


def test_it_ends_when_nobody_is_there(command):
    serving = command("--exit-when-idle", "0.2")
    assert serving.wait(30) == 0
    assert not serving.path.exists()


def test_a_second_one(command):
    first = command()
    until(lambda: answers(first.path), 30)
    second = command()
    assert second.wait(30) == 2
    err = second.stderr.read()
    assert err.startswith("error: another broker")
    assert str(first.pid) in err


@pytest.mark.parametrize(
    "arguments", [["--limit", "much"], ["--limit", "0"], ["--limit", "x=5MiB"], ["--metrics", "-1"]]
)
def test_wrong_arguments(command, arguments):
    serving = command(*arguments)
    assert serving.wait(30) == 2
    assert not serving.path.exists()
    assert "Traceback" not in serving.stderr.read()


def test_help(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "glake_infer.cli", "broker", "--help"],
        env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for option in ("--socket", "--limit", "--exit-when-idle", "--metrics", "--json"):
        assert option in done.stdout


class TestLimits:
    def test_limits(self):
        assert parse_limits([]) == (None, {})
        assert parse_limits(["20GiB", "cpu=1MiB", "GPU-5=7"]) == (20 << 30, {"cpu": MiB, "GPU-5": 7})

    @pytest.mark.parametrize(
        "wrong",
        [["0"], ["-5"], ["5PB"], ["1GiB", "2GiB"], ["cpu=1", "cpu=2"], ["gpu=1"], ["cuda:x=1"], ["=5"]],
    )
    def test_wrong(self, wrong):
        with pytest.raises(InputError):
            parse_limits(wrong)

    def test_a_gpu_that_is_not_here(self):
        with pytest.raises(DeviceNotFoundError, match="cuda:999"):
            parse_limits(["cuda:999=5GiB"])
