"""Prometheus metrics: over HTTP, of everything, under names that the dashboard and the docs know."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import scenes
from prometheus_client.parser import text_string_to_metric_families

import glake_infer as gi
from glake_infer.window.figures import labelled_models
from glake_infer.window.metrics import COUNTERS, GAUGES, samples, serve

DOCS = Path(__file__).parents[2] / "docs"


def scrape(url):
    """{name: {labels: value}} of what is served, checked for doubles."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.status == 200
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith((".", "process.", "ready.")), family
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            values = found.setdefault(sample.name, {})
            assert key not in values, sample
            values[key] = sample.value
    return found


def labels(**values):
    return tuple(sorted(values.items()))


@pytest.mark.parametrize(
    "status", [scenes.nobody(), scenes.lonely(), scenes.crowd(3, 30), scenes.crowd()], ids=["none", "one", "three", "64"]
)  # fmt: skip
def test_everything_is_served(status):
    with serve(0, lambda: status) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/metrics"
        found = scrape(server.url)
    assert not [name for name in found if not name.startswith("glake_")]
    assert set(found) <= GAUGES.keys() | COUNTERS.keys()
    for name, values, value in samples(status):
        names = (GAUGES | COUNTERS)[name][1]
        assert found[name][labels(**dict(zip(names, values, strict=True)))] == value
    if status.broker and status.devices:
        assert set(found) == GAUGES.keys() | COUNTERS.keys()


def test_what_is_served_is_the_state_now():
    states = iter([scenes.nobody(), scenes.lonely()])
    with serve(0, lambda: next(states)) as server:
        assert "glake_model_state" not in scrape(server.url)
        assert "glake_broker_info" not in scrape(server.url)


def test_figures_add_up():
    status = scenes.crowd(4, 40)
    (device,) = status.devices
    with serve(0, lambda: status) as server:
        found = scrape(server.url)
    name = device.name
    weights = found["glake_weights_bytes"]
    assert sum(weights.values()) == device.weights
    assert weights[labels(device=name, state="unused")] == device.unused
    assert found["glake_device_used_bytes"] == {labels(device=name): device.used}
    for process in device.processes:
        mine = [v for k, v in found["glake_process_pool_bytes"].items() if dict(k)["pid"] == str(process.pid)]
        assert sum(mine) == process.pool.reserved
        for model_name, model in labelled_models(process):
            states = {
                dict(k)["state"]: value
                for k, value in found["glake_model_state"].items()
                if (dict(k)["pid"], dict(k)["model"]) == (str(process.pid), model_name)
            }
            assert [state for state, value in states.items() if value] == [model.state]
            assert len(states) == 4
    assert found["glake_loaded_bytes_total"] == {labels(device=name): device.loaded_bytes}


def test_hostile_names_are_one_label_each():
    names = ['a"} 1\nevil 2', "back\\slash", "\x1b[31mred", "漢字", ""]
    processes = [
        scenes.process(n, name, [scenes.model(name), scenes.model(name)]) for n, name in enumerate(names)
    ]
    status = scenes.machine(scenes.device(processes))
    with serve(0, lambda: status) as server:
        found = scrape(server.url)
    assert {dict(key)["name"] for key in found["glake_process_connected"]} == set(names)
    assert len(found["glake_model_runs_total"]) == 2 * len(names)
    assert "evil" not in found


def test_a_port_that_is_taken():
    with serve(0, scenes.nobody) as server:
        with pytest.raises(gi.GlakeError, match=f"port {server.port}: Address already in use.*another port"):
            serve(server.port, scenes.nobody)
        assert scrape(server.url)
    for port in (-1, 65536):
        with pytest.raises(gi.InputError, match="expected 1 to 65535"):
            serve(port, scenes.nobody)
    with pytest.raises(gi.GlakeError, match=r"cannot be served at nowhere\.invalid"):
        serve(0, scenes.nobody, "nowhere.invalid")


def test_closing_frees_the_port_and_the_threads():
    before = threading.active_count()
    for _ in range(5):
        server = serve(0, scenes.nobody)
        scrape(server.url)
        server.close()
        server.close()
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", server.port)) != 0
    assert threading.active_count() <= before + 1


def test_this_machine_alone_unless_told_otherwise():
    with serve(0, scenes.nobody) as server:
        assert server._server.socket.getsockname()[0] == "127.0.0.1"
    with serve(0, scenes.nobody, "0.0.0.0") as server:
        assert server._server.socket.getsockname()[0] == "0.0.0.0"


def test_many_at_once():
    status = scenes.crowd(8, 50)
    with serve(0, lambda: status) as server:
        results = []
        threads = [threading.Thread(target=lambda: results.append(scrape(server.url))) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 16
    assert all(result == results[0] for result in results)


def test_a_failure_is_a_failed_scrape(capfd):
    def fails():
        raise gi.GlakeError("no answer")

    with serve(0, fails) as server, pytest.raises(urllib.error.HTTPError) as caught:
        scrape(server.url)
    assert caught.value.code == 500
    caught.value.close()


# The dashboard and the page on it.


def dashboard():
    return json.loads((DOCS / "grafana.json").read_text())


def test_the_dashboard_names_metrics_and_labels_that_exist():
    known = GAUGES | COUNTERS
    used = set()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            for name, selector in re.findall(r"(glake_\w+)(\{[^}]*\})?", target["expr"]):
                assert name in known, f"{panel['title']}: {name}"
                used.add(name)
                for label, value in re.findall(r'(\w+)!?=~?"([^"]*)"', selector):
                    assert label in (*known[name][1], "instance"), f"{panel['title']}: {name} has no {label}"
                    if label in ("state", "kind"):
                        assert value in known[name][0] or value in ("used", "unused"), (name, value)
            for names in re.findall(r"by \(([^)]*)\)", target["expr"]):
                for label in names.split(", "):
                    assert any(label in entry[1] for entry in known.values()) or label == "instance", label
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label in target["expr"] or label == "instance", f"{panel['title']}: {label}"
    assert used >= {
        "glake_device_limit_bytes",
        "glake_weights_bytes",
        "glake_model_state",
        "glake_hits_total",
    }


def test_the_dashboard_is_one():
    made = dashboard()
    assert made["id"] is None
    assert made["schemaVersion"] >= 39
    names = [variable["name"] for variable in made["templating"]["list"]]
    assert names == ["datasource", "instance", "device"]
    numbers = [panel["id"] for panel in made["panels"]]
    assert len(set(numbers)) == len(numbers)
    cells = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]


def test_the_page_names_every_metric():
    page = (DOCS / "window.md").read_text()
    for name in GAUGES | COUNTERS:
        assert f"`{name}`" in page, name
    for name in re.findall(r"`(glake_\w+)`", page):
        assert name in GAUGES | COUNTERS, name
