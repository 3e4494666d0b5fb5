"""One copy of every weight for several processes on a GPU, by the driver's figures."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import glake_infer as gi
from glake_infer import cuda
from glake_infer.models import zoo

sys.path.append(str(Path(__file__).parent.parent))
from kernels import DEVICE, INDEX
from processes import environment

pytestmark = pytest.mark.gpu

MiB = 1 << 20
HEADS = {"a": 2, "b": 17, "c": 900}

BROKER = """
import logging, sys
from glake_infer.sharing.broker import Broker
logging.basicConfig(level=logging.INFO)
Broker(sys.argv[1], limit=int(sys.argv[2]) or None).run()
"""

WORKER = """
import json, logging, sys
import numpy as np
import glake_infer as gi
from glake_infer.models import zoo
from glake_infer.residency import Residency

logging.basicConfig(level=logging.INFO)
folder, socket, device, heads = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
exact = {"use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
models = {}
with gi.Runtime(device=device, broker=socket, store=gi.Store(folder + "/store")) as runtime:
    share = Residency.of(runtime.pool).share
    for line in sys.stdin:
        command, _, name = line.strip().partition(" ")
        answer = {}
        try:
            if command == "load":
                models[name] = runtime.load(f"{folder}/{name}.glake", provider_options=exact)
            elif command == "run":
                spec = zoo.spec("bert-mini", head=name, labels=heads[name])
                outputs = models[name].run(zoo.feeds(spec, 0, batch=2, length=12))
                answer["outputs"] = [array.tolist() for array in outputs.values()]
            elif command == "suspend":
                answer["freed"] = models[name].suspend()
            elif command == "close":
                models.pop(name).close()
            elif command == "pin":
                models[name].pinned = True
            elif command == "allocate":
                models[""] = runtime.pool.allocate(int(name))
            elif command == "free":
                runtime.pool.deallocate(models.pop(""))
            elif command == "quit":
                break
        except gi.GlakeError as error:
            answer["error"] = [type(error).__name__, str(error)]
        stats = runtime.pool.stats()
        runtime.pool.check_invariants()
        answer |= {"shared": stats.shared, "reserved": stats.reserved, "transfers": share.transfers.model_dump(),
                   "connected": share.connected, "reconnections": share.reconnections, "quota": share.quota}
        print(json.dumps(answer), flush=True)
"""


class Worker:
    def __init__(self, folder, socket):
        command = [sys.executable, "-c", WORKER, str(folder), str(socket), DEVICE, json.dumps(HEADS)]
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the worker ended in {command!r}"
        return json.loads(line)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    store = gi.Store(folder / "store")
    for head, labels in HEADS.items():
        zoo.write(zoo.spec("bert-mini", head=head, labels=labels), folder / f"{head}.onnx")
        gi.convert(folder / f"{head}.onnx", folder / f"{head}.glake", store=store)
    return folder


@pytest.fixture
def start(family, tmp_path):
    """Starts a broker (with a limit), and workers; ends them all."""
    tmp_path.chmod(0o700)
    socket = tmp_path / "b.sock"
    started, workers = [], []

    def broker(limit=0):
        process = subprocess.Popen([sys.executable, "-c", BROKER, str(socket), str(limit)], env=environment())
        started.append(process)
        until = time.monotonic() + 20
        while not socket.exists():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        return process

    def worker():
        workers.append(made := Worker(family, socket))
        return made

    broker.worker, broker.socket = worker, socket
    yield broker
    for made in workers:
        with contextlib.suppress(OSError):
            made.kill()
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def expected(family):
    """Plain ONNX Runtime's."""
    import onnxruntime as ort

    answers = {}
    for head, labels in HEADS.items():
        options = {"device_id": INDEX, "use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
        session = ort.InferenceSession(
            str(family / f"{head}.onnx"),
            providers=[("CUDAExecutionProvider", options), "CPUExecutionProvider"],
        )
        feeds = zoo.feeds(zoo.spec("bert-mini", head=head, labels=labels), 0, batch=2, length=12)
        answers[head] = session.run(None, feeds)
    return answers


def right(answer, expected):
    assert "error" not in answer, answer["error"]
    for ours, theirs in zip(answer["outputs"], expected, strict=True):
        np.testing.assert_allclose(np.array(ours, dtype=theirs.dtype), theirs, rtol=1e-4, atol=1e-5)
    return answer


def free():
    return cuda.free_memory(INDEX)


def settled(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_second_process_loads_nothing_and_adds_no_weights(start, expected):
    start()
    first, second = start.worker(), start.worker()
    first("load a")
    mine = right(first("run a"), expected["a"])
    assert mine["transfers"]["bytes"] > 20 * MiB
    second("load a")
    theirs = right(second("run a"), expected["a"])
    assert theirs["outputs"] == mine["outputs"]
    assert theirs["transfers"]["loads"] == 0
    assert theirs["transfers"]["hit_bytes"] == theirs["shared"] == mine["shared"] > 20 * MiB
    both = free()
    assert first("suspend a")["shared"] == 0
    assert free() - both < 8 * MiB  # private memory: the second still has the weights
    second("suspend a")
    settled(lambda: free() - both > 20 * MiB)
    assert right(first("run a"), expected["a"])["outputs"] == mine["outputs"]
    assert right(second("run a"), expected["a"])["outputs"] == mine["outputs"]


def test_fine_tunes_share_their_trunk_between_processes(start, expected):
    start()
    workers = {head: start.worker() for head in HEADS}
    loaded = {}
    for head, worker in workers.items():
        worker(f"load {head}")
        loaded[head] = right(worker(f"run {head}"), expected[head])["transfers"]["bytes"]
    assert loaded["b"] < loaded["a"] / 4
    assert loaded["c"] < loaded["a"] / 4


def test_the_brokers_memory_outlives_whoever_made_it(start, expected):
    start()
    first = start.worker()
    first("load a")
    mine = right(first("run a"), expected["a"])
    first.kill()
    second = start.worker()
    second("load a")
    theirs = right(second("run a"), expected["a"])
    assert theirs["transfers"]["loads"] == 0
    assert theirs["outputs"] == mine["outputs"]


def test_a_broker_that_dies_leaves_its_clients_working_and_they_tell_the_next(start, expected):
    broker = start()
    first, second = start.worker(), start.worker()
    for worker in (first, second):
        worker("load a")
        right(worker("run a"), expected["a"])
    before = free()
    os.kill(broker.pid, signal.SIGKILL)
    broker.wait()
    right(first("run a"), expected["a"])
    start()
    settled(lambda: first("stats")["reconnections"] == 1 and second("stats")["reconnections"] == 1)
    third = start.worker()
    third("load a")
    assert right(third("run a"), expected["a"])["transfers"]["loads"] == 0
    for worker in (first, second, third):
        right(worker("run a"), expected["a"])
    third.kill()
    settled(lambda: abs(free() - before) < 3 * MiB)
    for worker in (first, second):
        worker("close a")
        worker.kill()
    settled(lambda: free() > before)


def test_no_broker_for_long_and_one_that_comes_after(start, expected):
    broker = start()
    first = start.worker()
    first("load a")
    os.kill(broker.pid, signal.SIGKILL)
    broker.wait()
    first("load b")  # alone, after PATIENCE
    right(first("run b"), expected["b"])
    start()
    settled(lambda: first("stats")["connected"])
    second = start.worker()
    second("load b")
    assert right(second("run b"), expected["b"])["transfers"]["loads"] == 0


def test_one_limit_for_all(start, expected):
    start(200 * MiB)
    first, second = start.worker(), start.worker()
    first("load a")
    right(first("run a"), expected["a"])
    shared = first("stats")["shared"]
    second("load c")
    right(second("run c"), expected["c"])
    answer = second(f"allocate {180 * MiB}")  # both models must go for it
    assert "error" not in answer, answer
    assert first("stats")["shared"] < shared / 2
    refused = first("run a")
    assert refused["error"][0] == "BrokerMemoryError", refused
    assert "limit" in refused["error"][1]
    second("free")
    right(first("run a"), expected["a"])
    right(second("run c"), expected["c"])
    first("pin a")
    right(first("run a"), expected["a"])
    refused = second(f"allocate {180 * MiB}")
    assert refused["error"][0] == "OutOfMemoryError", refused
    assert "broker" in refused["error"][1]
    right(first("run a"), expected["a"])
