"""The window on a real broker and real processes: figures that agree with each other."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest
import scenes
from prometheus_client.parser import text_string_to_metric_families

import glake_infer as gi
from glake_infer.models import zoo
from glake_infer.window.figures import saving, split
from glake_infer.window.observe import watch

WORKER = """
    import sys
    import glake_infer as gi
    from glake_infer.models import zoo
    folder, broker, *names = sys.argv[1:]
    pool = gi.Pool("cpu", limit="1GiB", broker=broker)
    monitor = gi.monitor()
    models = [gi.load(f"{folder}/{name}.glake", pool, store=gi.Store(folder + "/store"), sharing="lean") for name in names]
    for model in models:
        model.run(zoo.feeds(zoo.spec("bert-tiny"), 0, batch=1, length=8))
    models[-1].suspend()
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Two packages of one trunk, and their store."""
    folder = tmp_path_factory.mktemp("workshop")
    store = gi.Store(folder / "store")
    for name in "ab":
        zoo.convert(zoo.spec("bert-tiny", head=name), folder / f"{name}.glake", store=store)
    return folder


@pytest.fixture
def broker(place):
    """`glake-infer broker` at the default place, with metrics; gives their address."""
    command = [
        sys.executable,
        "-m",
        "glake_infer.cli",
        "broker",
        "--json",
        "--metrics",
        "0",
        "--limit",
        "2GiB",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if (event := json.loads(line))["event"] == "metrics":
                break
        scenes.wait_until((place / "broker.sock").exists)
        yield event["url"]
        process.terminate()
        process.stderr.read()


def test_who_shares_what(place, broker, workshop, python, tmp_path):
    names = {"first": "ab", "second": "a", "outside": "b"}
    workers = {}
    for name, models in names.items():
        where = "off" if name == "outside" else str(place / "broker.sock")
        environment = {**os.environ, "GLAKE_NAME": name}
        workers[name] = python(WORKER, workshop, where, *models, stdin=-1, env=environment)
    for worker in workers.values():
        assert worker.stdout.readline() == "ready\n", worker.stderr.read()

    watched = watch()
    assert watched.problems == ()
    assert len(watched.answered) == 4
    assert watched.status.broker.socket == str(place / "broker.sock")
    (device,) = watched.status.devices
    shown = {process.name: process for process in device.processes}
    assert shown.keys() == names.keys()  # each once
    assert {p.pid for p in shown.values()} == {worker.pid for worker in workers.values()}
    assert [shown[name].connected for name in names] == [True, True, False]
    for name, models in names.items():
        assert [model.name for model in shown[name].models] == list(models)
        assert [model.state for model in shown[name].models][-1] == "suspended"
    assert shown["first"].models[0].state == "awake"
    assert shown["first"].models[0].chunks

    kinds = split(device)
    assert kinds["outside"] == shown["outside"].pool.reserved
    assert kinds["shared"] + kinds["unused"] == device.weights > 1 << 20
    assert sum(kinds.values()) == device.limit == 2 << 30
    chunks = {chunk.token: chunk for chunk in device.chunks}
    for name in ("first", "second"):
        process = shown[name]
        mine = {token for token, chunk in chunks.items() if process.pid in chunk.processes}
        assert mine <= set(process.chunks)
        assert process.pool.shared == sum(chunks[token].size for token in mine)
        for model in process.models:
            assert set(model.chunks) <= chunks.keys()
    assert device.loads == sum(shown[name].transfers.loads for name in ("first", "second")) > 0
    assert saving(device).by_process == sum(shown[name].pool.shared for name in ("first", "second"))

    with urllib.request.urlopen(broker, timeout=30) as answer:
        families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    weights = families["glake_weights_bytes"].samples
    assert sum(sample.value for sample in weights) == device.weights
    runs = {(s.labels["name"], s.labels["model"]): s.value for s in families["glake_model_runs"].samples}
    assert runs == {("first", "a"): 1, ("first", "b"): 1, ("second", "a"): 1}

    target = tmp_path / "report.html"
    for command in (["top"], ["report", "-o", str(target)]):
        done = subprocess.run(
            [sys.executable, "-m", "glake_infer.cli", *command], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert "first" in target.read_text()

    for worker in workers.values():
        worker.communicate("\n", timeout=60)
        assert worker.returncode == 0
    scenes.wait_until(lambda: not watch().status.devices[0].processes)
    assert not list(place.glob("process-*"))
