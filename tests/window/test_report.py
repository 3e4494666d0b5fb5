"""The report: one page that is complete, safe and to scale."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
import scenes
from scenes import MiB

from glake_infer.window import memory_map
from glake_infer.window.figures import matrix, process_chunks, split
from glake_infer.window.report import page, write_report

VOID = {"meta", "br", "rect"}


class Page(HTMLParser):
    """The elements of a page, checked for being closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open, self._raw = [], [], [], None
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


SCENES = {
    "nobody": scenes.nobody,
    "no client": lambda: scenes.machine(scenes.device()),
    "lonely": scenes.lonely,
    "few": lambda: scenes.crowd(6, 60),
    "without chunks": lambda: scenes.crowd(3, 0),
    "without processes": lambda: scenes.crowd(0, 20),
    "crowd": scenes.crowd,
    "two devices": lambda: scenes.machine(*scenes.crowd(3, 20).devices, *scenes.lonely().devices),
}


@pytest.fixture(scope="module", params=SCENES)
def scene(request):
    status = SCENES[request.param]()
    return status, page(status)


def data_of(text):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_it_is_one_well_formed_page_without_network(scene):
    _, text = scene
    made = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|@import|<link|<img|<iframe|url\((?!#)", text)
    assert not [a for _, a in made.elements if {"src", "href", "action"} & a.keys()]
    (policy,) = made.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "$" not in re.sub(r"\$\{", "", text)
    assert len(text) < 2 << 20


def test_the_map_is_to_scale(scene):
    status, text = scene
    for number, device in enumerate(status.devices):
        (found,) = re.findall(rf'<svg class=map data-device="{number}".*?</svg>', text, re.DOTALL) or [""]
        if not found:
            assert not device.used
            continue
        parts = {}
        for rect in Page(found).all("rect"):
            if "data-c" in rect or "data-pid" in rect:
                key = rect.get("data-c") or (rect["data-pid"], rect["class"])
                parts[key] = parts.get(key, 0.0) + float(rect["width"])
                assert (
                    0 <= float(rect["x"]) <= float(rect["x"]) + float(rect["width"]) <= memory_map.WIDTH + 0.1
                )
        there = {str(n): c.size for n, c in enumerate(device.chunks) if c.state != "absent"}
        assert {key for key in parts if isinstance(key, str)} == there.keys()
        kinds = split(device)
        drawn = sum(there.values()) + sum(kinds[k] for k in ("own", "active", "idle", "granted"))
        drawn += 0 if device.governed else kinds["unused"]
        unit = sum(parts.values()) / drawn
        for key, size in there.items():
            assert parts[key] == pytest.approx(size * unit, abs=0.2)
        rows = round(float(re.search(r'viewBox="0 0 \d+ (\d+)"', found)[1]) / (memory_map.ROW + 2))
        assert sum(parts.values()) == pytest.approx(rows * memory_map.WIDTH, rel=0.01)
        for kind in ("own", "active", "idle", "granted"):
            width = sum(w for key, w in parts.items() if isinstance(key, tuple) and key[1] == kind)
            assert width == pytest.approx(kinds[kind] * unit, rel=0.01, abs=2)


def test_a_chunk_has_the_colour_of_how_many_have_it():
    status = scenes.crowd(12, 120)
    (device,) = status.devices
    shades = {}
    for rect in Page(page(status)).all("rect"):
        if "data-c" in rect:
            chunk = device.chunks[int(rect["data-c"])]
            shades.setdefault(rect["class"], set()).add(
                "loading" if chunk.state == "loading" else len(chunk.processes)
            )
    assert shades["unused"] == {0}
    assert shades["s1"] == {1}
    assert shades["s2"] == {2}
    assert shades["s3"] <= {3, 4}
    assert shades["s4"] <= {5, 6, 7, 8}
    assert shades["s5"] == {12}
    assert shades["loading"] == {"loading"}


def test_what_pointing_at_a_chunk_says():
    status = scenes.crowd(3, 20)
    (device,) = status.devices
    (data,) = data_of(page(status))["devices"]
    assert len(data["chunks"]) == len(device.chunks)
    assert data["names"] == {str(p.pid): p.name for p in device.processes}
    for told, chunk in zip(data["chunks"], device.chunks, strict=True):
        assert told["pids"] == sorted(set(chunk.processes))
        assert told["size"] == chunk.size
        assert [tuple(w) for w in told["weights"]] == [(w.digest[:16], w.size) for w in chunk.weights]
        users = [p.pid for p in device.processes for m in p.models if chunk.token in m.chunks]
        assert len(told["models"]) == len(users)
    models = [m for p in device.processes for m in p.models]
    assert [{device.chunks[n].token for n in needs} for needs in data["needs"]] == [
        set(m.chunks) for m in models
    ]


def test_who_shares_how_much_with_whom():
    status = scenes.crowd(6, 60)
    (device,) = status.devices
    processes, models = data_of(page(status))["matrices"]
    sizes = {c.token: c.size for c in device.chunks if c.state == "ready"}
    having = process_chunks(device)
    for i, first in enumerate(device.processes):
        for j, second in enumerate(device.processes[: i + 1]):
            both = having[first.pid] & having[second.pid]
            assert processes["cells"][i][j] == sum(sizes.get(token, 0) for token in both)
    assert len(models["names"]) == 12
    text = "".join(Page(page(status)).text)
    assert "Shared between processes" in text
    assert "Shared between models" in text
    assert "Largest weights" in text


def test_a_crowd_is_cut_to_what_can_be_read():
    text = page(scenes.crowd(64, 400))
    processes, models = data_of(text)["matrices"]
    assert len(processes["names"]) == 64
    assert len(models["names"]) == 64
    assert "64 with less are left out" in text
    assert len(re.findall(r'<tr data-pid="\d+" data-device="0">', text)) == 64
    assert len(re.findall(r"data-model=", text)) == 128


EVIL = ['</script><script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='x", "&lt;b&gt;", "]]>",
        "$body ${data}", "‮drow", "\x00\x1b[31m"]  # fmt: skip


def test_names_are_names_and_nothing_else():
    rng = scenes.random.Random(0)
    chunk = scenes.ChunkStatus(
        token="<b>", region="<i>", size=8 * MiB, used=1, state="ready", processes=list(range(len(EVIL))),
        idle_seconds=0, weights=[scenes.WeightStatus(digest=scenes.digest(rng), offset=0, size=1)],
    )  # fmt: skip
    processes = [
        scenes.process(n, name, [scenes.model(name, chunks=["<b>"]), scenes.model(name)], ["<b>"])
        for n, name in enumerate(EVIL)
    ]
    device = scenes.device(processes, [chunk]).model_copy(update={"title": EVIL[0], "name": EVIL[1]})
    broker = scenes.BROKER.model_copy(update={"socket": EVIL[0], "release": EVIL[1]})
    text = page(scenes.machine(device, broker=broker))
    made = Page(text)
    plain = Page(page(scenes.machine(device.model_copy(update={"title": "x", "name": "y"}))))
    tags = [tag for tag, _ in made.elements if tag in ("script", "img", "b", "i")]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not [a for _, a in made.elements for name in a if name.startswith("on")]
    assert len(made.all("tr")) == len(plain.all("tr"))
    shown = "".join(made.text)
    for name in EVIL:
        assert name.replace("\x00", "�") in shown or name in shown, name
    assert data_of(text)["devices"][0]["names"]["0"] == EVIL[0]
    assert html.escape(EVIL[0]) in text


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    written = write_report(scenes.lonely(), target)
    assert (written.path, written.bytes) == (target, target.stat().st_size)
    before = target.read_bytes()

    def fails(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(target), "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        write_report(scenes.nobody(), target)
    assert target.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    with pytest.raises(OSError, match="directory"):
        write_report(scenes.nobody(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_largest_matrix_is_quick():
    made = matrix(
        ((str(n), [str(t) for t in range(400)]) for n in range(256)), {str(t): 1 for t in range(400)}
    )
    assert len(made.names) == 64
    assert made.left_out == 192
