"""Brokers and the processes that share weights by them, each a real one; and what the system says of them.

A Worker is a process that evaluates what it is told: `worker("load('a')")` gives the value of the last expression, or raises
what it raised. Its names are those of `brokers_worker.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnxruntime as ort
import processes

import glake_infer as gi
from glake_infer.models import zoo
from glake_infer.process_memory import measure
from glake_infer.window.observe import observe

MEMFD = "/memfd:glake"
F_GET_SEALS = 1034
PATIENT = 60.0


class Ended(Exception):
    """The process is no more."""


def until(check, seconds=20.0, what=None):
    """Wait for something to come true, and return it."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, what() if callable(what) else what or "it did not come to be"
        time.sleep(0.01)
    return found


class Worker:
    """A process of its own."""

    def __init__(self, setup="", name="worker", journal=None, **environment):
        """Start it, and let it evaluate `setup`."""
        ours, theirs = socket.socketpair()
        output = open(journal, "ab") if journal else None  # noqa: SIM115, PTH123
        environment = {k: str(v) for k, v in environment.items() if v is not None}
        with theirs, output or contextlib.nullcontext():
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import brokers_worker; brokers_worker.serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                env={**processes.environment(), "GLAKE_NAME": name, **environment},
                stdout=output,
                stderr=output,
            )
        self._connection = Connection(ours.detach())
        self.pid = self.process.pid
        self.name = name
        self.waiting = 0
        self._ready = not setup
        if setup:
            self.begin(setup)

    def begin(self, code):
        """Let it evaluate something, and do not wait."""
        with contextlib.suppress(OSError):  # it has ended: `result` says so
            self._connection.send(textwrap.dedent(code))
        self.waiting += 1
        return self

    def ready(self, seconds=0.0):
        """Whether an answer is there."""
        return self._connection.poll(seconds)

    def result(self, seconds=PATIENT):
        """The answer to what was begun first and not answered yet."""
        self.waiting -= 1
        try:
            if not self._connection.poll(seconds):
                self.process.send_signal(signal.SIGUSR1)  # it writes where its threads are
                time.sleep(0.5)
                self.process.kill()
                raise AssertionError(f"{self.name} says nothing for {seconds} s")
            fine, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise Ended(f"{self.name}: {self.process.wait(10)}") from error
        if not fine:
            raise value
        return value

    def __call__(self, code, seconds=PATIENT):
        while self.waiting:
            self.result()
        return self.begin(code).result(seconds)

    @property
    def alive(self):
        return self.process.poll() is None

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        """By signal 9."""
        self.process.kill()
        self.process.wait()
        self._connection.close()

    def end(self, seconds=PATIENT):
        """Let it end by itself, as a program does that comes to its end."""
        self._connection.close()
        return self.process.wait(seconds)

    def memfds(self):
        return memfds(self.pid)

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208

    def threads(self):
        return len(os.listdir(f"/proc/{self.pid}/task"))  # noqa: PTH208

    def resident(self):
        """Bytes of its own, that no file and no memfd backs."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no RssAnon")


class BrokerWorker(Worker):
    """A broker in a process of its own; as a Worker it can be asked for its tables."""

    def __init__(self, path, journal=None, **options):
        """Start it; it listens when this returns."""
        self.path = path
        super().__init__(f"start({str(path)!r}, {options!r})", "broker", journal)
        self.result()

    def status(self):
        """What an observer sees."""
        return observe(self.path, 10)

    @property
    def cpu(self):
        """What an observer sees of the host's memory."""
        return next(device for device in self.status().devices if device.name == "cpu")

    def check(self):
        """Its table contradicts itself nowhere."""
        self("check()")

    def clients(self):
        return sorted(process.pid for device in self.status().devices for process in device.processes)

    def ready_chunks(self):
        """{token: the processes that have it} of chunks that are there."""
        return {c.token: sorted(c.processes) for c in self.cpu.chunks if c.state == "ready"}


# What the system says.


def memfds(*pids, sealed=False):
    """{inode: (size, bytes that it takes)} of our memfds that these processes have open."""
    found = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(entry.readlink()).startswith(MEMFD) and (not sealed or _is_sealed(entry)):
                        status = entry.stat()
                        found[status.st_ino] = (status.st_size, status.st_blocks * 512)
    return found


def _is_sealed(entry):
    fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return bool(fcntl.fcntl(fd, F_GET_SEALS) & 8)
    finally:
        os.close(fd)


def handles(pid):
    """Descriptors of NVIDIA's driver that a process has open."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(entry.readlink()).startswith("/dev/nvidia")
    return count


def taken(found):
    """Bytes that memfds take."""
    return sum(blocks for _, blocks in found.values())


def machine_bytes(*pids):
    """What processes cost together: proportional sizes, and every memfd once, mapped or not."""
    own = sum((m := measure(pid)).total - m.pool for pid in pids)
    return own + taken(memfds(*pids))


def is_socket(path):
    try:
        return stat.S_ISSOCK(Path(path).lstat().st_mode)
    except FileNotFoundError:
        return False


# Models.


def make_workshop(folder, specs, batch=2, length=8, seeds=2, fast=True):
    """Packages of zoo models in a store, and what plain ONNX Runtime answers."""
    store = gi.Store(folder / "store")
    for name, spec in specs.items():
        zoo.write(spec, folder / f"{name}.onnx")
        gi.convert(folder / f"{name}.onnx", folder / f"{name}.glake", store=store)
        for seed in range(seeds):
            feeds = zoo.feeds(spec, seed, batch=batch, length=length)
            np.savez(folder / f"{name}.feeds{seed}.npz", **feeds)
            for sharing in ("fast", "lean") if fast else ("lean",):
                np.savez(
                    folder / f"{name}.{sharing}{seed}.npz",
                    **_plain(folder / f"{name}.onnx", feeds, sharing),
                )
    return folder


def _plain(path, feeds, sharing):
    """Lean computes as ONNX Runtime does without prepacked weights."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1" if sharing == "lean" else "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


# A machine: a broker, and workers.


class Machine:
    """Brokers at one socket, and workers, which all end with it."""

    def __init__(self, folder, workshop, device="cpu"):
        self.folder, self.workshop, self.device = folder, workshop, device
        self.path = folder / "b.sock"
        self.started = []
        self.broker = None

    def start(self, **options):
        """Start a broker at the socket."""
        self.broker = BrokerWorker(self.path, self.folder / "broker.log", **options)
        self.started.append(self.broker)
        return self.broker

    def worker(
        self, broker="", setup="", name=None, opened=True, opens="open_runtime", limit=None, **environment
    ):
        """Start a worker; its Runtime is open unless said otherwise. It is ready when it first answers."""
        name = name or f"w{len(self.started)}"
        broker = str(self.path if broker == "" else broker) if broker is not None else None
        lines = [f"workshop({str(self.workshop)!r})", setup]
        if opened:
            lines.append(f"{opens}({broker!r}, {limit!r}, {self.device!r})")
        journal = self.folder / f"{name}.log"
        environment = {"GLAKE_CHECK_INVARIANTS": "1", "GLAKE_BROKER": None, **environment}
        made = Worker("\n".join(lines), name, journal, **environment)
        self.started.append(made)
        return made

    def workers(self, count, **options):
        """Start several at once."""
        made = [self.worker(**options) for _ in range(count)]
        for worker in made:
            worker.result()
        return made

    def close(self):
        for worker in self.started:
            if worker.alive:
                worker.signal(signal.SIGCONT)
            worker.kill()

    def audit(self, workers=(), strays=False):
        """What the broker says agrees with what the system says, and nobody's tables contradict themselves."""
        self.broker.check()
        for worker in workers:
            worker("check()")
        until(lambda: not self.differences(workers, strays), what=lambda: self.differences(workers, strays))

    def differences(self, workers=(), strays=False):
        """What does not agree, just now."""
        found = []
        alive = {worker.pid for worker in workers if worker.alive}
        devices = self.broker.status().devices
        for device in devices:
            loading = [c for c in device.chunks if c.state == "loading"]
            ready = [c for c in device.chunks if c.state == "ready"]
            if loading:
                found.append(f"{len(loading)} chunks are loading")
            if device.weights != sum(chunk.size for chunk in ready):
                found.append(f"weights: {device.weights}, chunks: {[chunk.size for chunk in ready]}")
            if device.used != device.weights + device.quotas:
                found.append(f"used {device.used} = {device.weights} + {device.quotas}?")
            if device.used > device.limit and not strays:
                found.append(f"used {device.used}, limit {device.limit}")
            if {process.pid for process in device.processes} != alive:
                found.append(f"processes: {[p.pid for p in device.processes]}; expected {sorted(alive)}")
            if has := {pid for chunk in ready for pid in chunk.processes} - alive:
                found.append(f"chunks of processes that are gone: {has}")
            if device.name == "cpu":
                found += self._memory_differences(ready, workers, strays)
            elif (count := handles(self.broker.pid)) != len(ready):
                found.append(f"the broker has {count} handles of the driver, and says {len(ready)} chunks")
        return found

    def _memory_differences(self, ready, workers, strays):
        found = []
        ours = memfds(self.broker.pid)
        if sorted(size for size, _ in ours.values()) != sorted(chunk.size for chunk in ready):
            found.append(f"the broker has {sorted(ours.values())}, and says {[c.size for c in ready]}")
        for worker in workers:
            theirs = memfds(worker.pid, sealed=True)
            if not strays and (extra := theirs.keys() - ours.keys()):
                found.append(f"{worker.name} has {len(extra)} chunks that the broker does not know of")
            told = sum(chunk.size for chunk in ready if worker.pid in chunk.processes)
            has = sum(size for inode, (size, _) in theirs.items() if inode in ours)
            if told != has:
                found.append(f"{worker.name} has {has} bytes of the broker's, which says {told}")
        return found
