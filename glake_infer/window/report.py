"""One HTML page of a machine's memory: a map of it, who shares what, and what sharing saves. Needs no network."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from glake_infer.allocators.sizes import format_bytes
from glake_infer.sharing.status import DeviceStatus, MachineStatus, ProcessStatus
from glake_infer.version import __version__
from glake_infer.window.figures import (
    KINDS,
    Matrix,
    count_weights,
    labelled_models,
    largest_weights,
    matrix,
    private_of,
    process_chunks,
    process_label,
    saving,
    split,
)
from glake_infer.window.memory_map import chunks, draw

NUMBERED = 12
"""Up to so many rows a matrix has figures in its cells; larger ones are shades alone."""

WHO = 4
"""Processes that are named in a row; of more, how many."""


@dataclass(frozen=True)
class ReportWritten:
    """What `write_report` made."""

    path: Path
    bytes: int


def write_report(status: MachineStatus, path: str | os.PathLike[str]) -> ReportWritten:
    """Write the page to `path`, whole or not at all. Raises OSError."""
    target = Path(path)
    text = page(status).encode()
    begun = target.with_name(f".{target.name[:48]}.{secrets.token_hex(4)}.tmp")
    try:
        begun.write_bytes(text)
        begun.replace(target)
    except OSError:
        begun.unlink(missing_ok=True)
        raise
    return ReportWritten(target, len(text))


def page(status: MachineStatus) -> str:
    """The page's HTML."""
    host = platform.node() or "this machine"
    matrices: list[Matrix] = []
    sections = [_head(status, host)]
    for number, device in enumerate(status.devices):
        sections += _device(number, device, matrices)
    if not status.devices:
        sections.append("<h2>No process has a pool</h2><p>So there is nothing to show yet.</p>")
    sections.append(_explained())
    data = {
        "devices": [_data(device) for device in status.devices],
        "matrices": [
            {"names": made.names, "cells": [row[: i + 1] for i, row in enumerate(made.cells)]}
            for made in matrices
        ],
    }
    template = Template((Path(__file__).with_name("report.html")).read_text())
    return template.substitute(
        title=escape(f"Memory of {host}"), body="\n".join(sections), data=_script_safe(data)
    )


def _script_safe(data: Any) -> str:
    """JSON that ends no script, whatever the names in it are."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(device: DeviceStatus) -> dict[str, Any]:
    """What the map's tooltips say."""
    place = {chunk.token: number for number, chunk in enumerate(device.chunks)}
    users: dict[str, list[str]] = {}
    needs = []
    for process in device.processes:
        for name, model in labelled_models(process):
            needs.append([place[token] for token in model.chunks if token in place])
            for token in dict.fromkeys(model.chunks):
                users.setdefault(token, []).append(f"{name} in {process_label(process)}")
    chunks = [
        {
            "token": chunk.token[:8],
            "region": chunk.region[:8],
            "size": chunk.size,
            "used": chunk.used,
            "state": chunk.state,
            "idle": chunk.idle_seconds,
            "pids": sorted(set(chunk.processes)),
            "models": users.get(chunk.token, []),
            "weights": [(weight.digest[:16], weight.size) for weight in chunk.weights],
        }
        for chunk in device.chunks
    ]
    return {"names": {p.pid: p.name for p in device.processes}, "chunks": chunks, "needs": needs}


# The parts of the page.


def _head(status: MachineStatus, host: str) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(status.time))
    pids = {process.pid for device in status.devices for process in device.processes}
    models = sum(len(process.models) for device in status.devices for process in device.processes)
    savings = [saving(device) for device in status.devices]
    there = sum(each.there for each in savings)
    saved = sum(each.processes for each in savings)
    tiles = [
        (str(len(pids)), "processes" if len(pids) != 1 else "process"),
        (str(models), "models" if models != 1 else "model"),
        (format_bytes(sum(device.used for device in status.devices)), "taken by all of them"),
    ]
    if status.broker:
        tiles.append((format_bytes(sum(device.weights for device in status.devices)), "of it shared weights"))
        share = f" of {format_bytes(there + saved)}" if saved else ""
        tiles.append((format_bytes(saved), f"saved by sharing{share}"))
    broker = status.broker
    told = (
        f"broker {broker.pid} (glake-infer {escape(broker.release)}) at <code>{escape(broker.socket)}</code>, up "
        f"{_span(broker.uptime)}, {broker.resumed} clients taken over, {broker.lost} lost"
        if broker
        else "no broker: processes as they show themselves"
    )
    shown = "".join(f"<div class=tile><b>{value}</b><span>{name}</span></div>" for value, name in tiles)
    return f"<h1>Memory of {escape(host)}</h1><p class=dim>{when} &middot; {told}</p><div class=tiles>{shown}</div>"


def _device(number: int, device: DeviceStatus, matrices: list[Matrix]) -> Iterator[str]:
    kinds = split(device)
    used = sum(size for kind, size in kinds.items() if kind != "free")
    name = "CPU" if device.name == "cpu" else escape(device.name)
    title = escape(device.title or device.name)
    yield (
        f"<h2>{title} <span class=dim>{name if name != title else ''}</span> <span class='dim right'>"
        f"{format_bytes(used)} of {format_bytes(device.limit)}</span></h2>"
    )
    yield _bar(kinds)
    yield from draw(number, device)
    if device.chunks:
        yield _saving(device)
    yield _counters(device)
    if device.processes:
        yield _processes(number, device)
        yield _models(number, device)
    if device.governed and len(device.processes) > 1:
        yield from _matrices(device, matrices)
    if device.chunks:
        yield _weights(device)


def _bar(kinds: dict[str, int]) -> str:
    total = sum(kinds.values()) or 1
    parts = "".join(
        f'<i class="{kind}" style="flex:{size / total:.6f} 0 0"></i>' for kind, size in kinds.items() if size
    )
    legend = "".join(
        f'<span><i class="{kind}"></i>{KINDS[kind]} {format_bytes(size)}</span>'
        for kind, size in kinds.items()
        if size or kind == "free"
    )
    return f"<div class=bar>{parts}</div><div class=legend>{legend}</div>"


def _saving(device: DeviceStatus) -> str:
    saved = saving(device)
    rows = [
        ("a copy for every model would take", saved.by_model, "s1"),
        ("a copy for every process would take", saved.by_process, "s2"),
        ("there is", saved.there, "s4"),
    ]
    most = max(size for _, size, _ in rows) or 1
    bars = "".join(
        f'<span>{text}</span><i class="{shade}" style="width:{100 * size / most:.2f}%"></i><b>{format_bytes(size)}</b>'
        for text, size, shade in rows
    )
    return f"<h3>Saved by sharing: {format_bytes(saved.processes)}</h3><div class=saving>{bars}</div>"


def _counters(device: DeviceStatus) -> str:
    rate = (
        f" at {format_bytes(int(device.loaded_bytes / device.load_seconds))}/s" if device.load_seconds else ""
    )
    facts = [
        ("loaded from files", f"{chunks(device.loads)}, {format_bytes(device.loaded_bytes)}{rate}"),
        ("found there", f"{chunks(device.hits)}, {format_bytes(device.hit_bytes)}"),
    ]
    if device.governed:
        facts += [
            ("given back for others", f"{chunks(device.evictions)}, {format_bytes(device.evicted_bytes)}"),
            ("requests refused", str(device.refusals)),
        ]
    facts.append(("memory of the device", format_bytes(device.memory)))
    return f"<h3>So far</h3><dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in facts)}</dl>"


def _processes(number: int, device: DeviceStatus) -> str:
    rows = []
    for process in sorted(device.processes, key=lambda p: (-p.pool.reserved, p.pid)):
        pool, private, transfers = process.pool, private_of(process), process.transfers
        rate = f"{format_bytes(int(transfers.bytes / transfers.seconds))}/s" if transfers.seconds else "-"
        rows.append(
            _row(
                f'data-pid="{process.pid}" data-device="{number}"',
                [f"{escape(process.name)}{_remark(device, process)}"],
                [
                    str(process.pid),
                    str(len(process.models)),
                    format_bytes(pool.reserved),
                    *map(_size, (pool.shared, private["own"], private["active"], private["idle"])),
                    "-" if pool.quota is None else format_bytes(pool.quota),
                    format_bytes(pool.peak_reserved),
                    str(transfers.hits),
                    str(transfers.loads),
                    rate,
                ],
            )
        )
    heads = ["PID", "Models", "Pool", "Shared weights", "Private weights", "Activations", "Idle", "Quota", "Peak", "Hits",
             "Loads", "Rate"]  # fmt: skip
    return f"<h3>Processes</h3>{_table(['Process'], heads, rows)}"


def _remark(device: DeviceStatus, process: ProcessStatus) -> str:
    if process.silent_seconds > 5:
        return f" <span class=dim>silent for {_span(process.silent_seconds)}</span>"
    if device.governed and not process.connected:
        return " <span class=dim>without the broker</span>"
    return ""


def _models(number: int, device: DeviceStatus) -> str:
    rows = []
    place = 0
    for process in device.processes:
        for name, model in labelled_models(process):
            cells = (model.shared, model.own, model.private, model.asleep)
            idle = "-" if model.state == "running" else _span(model.idle_seconds)
            texts = [
                escape(name),
                escape(process_label(process)),
                f'<span class="pill {model.state}">{model.state}</span>',
            ]
            numbers = [*map(_size, cells), idle, str(model.runs), str(model.priority)]
            data = f'data-pid="{process.pid}" data-device="{number}" data-model="{place}"'
            rows.append((-(model.shared + model.own + model.private), _row(data, texts, numbers)))
            place += 1
    if not rows:
        return ""
    heads = ["Shared", "Own", "Private", "Asleep", "Idle for", "Runs", "Priority"]
    ordered = [row for _, row in sorted(rows, key=lambda each: each[0])]
    return f"<h3>Models</h3>{_table(['Model', 'Process', 'State'], heads, ordered)}"


def _matrices(device: DeviceStatus, matrices: list[Matrix]) -> Iterator[str]:
    sizes = {chunk.token: chunk.size for chunk in device.chunks if chunk.state == "ready"}
    having = process_chunks(device)
    processes = matrix(((process_label(p), having[p.pid]) for p in device.processes), sizes)
    models = matrix(
        (
            (f"{name} in {process_label(process)}", model.chunks)
            for process in device.processes
            for name, model in labelled_models(process)
            if model.chunks
        ),
        sizes,
    )
    for title, made in (("Shared between processes", processes), ("Shared between models", models)):
        if len(made.names) > 1:
            matrices.append(made)
            yield f"<h3>{title}</h3>{_matrix(len(matrices) - 1, made)}"


def _matrix(number: int, made: Matrix) -> str:
    small = len(made.names) > NUMBERED
    most = max(map(max, made.cells)) or 1
    step = 5 if small else 1
    numbers = [str(i) if i == 1 or i % step == 0 else "" for i in range(1, len(made.names) + 1)]
    head = "".join(f"<th class=col>{number}</th>" for number in numbers)
    rows = []
    for i, cells in enumerate(made.cells):
        parts = []
        for j, size in enumerate(cells):
            share = size / most
            names = " ".join(name for name, there in (("hi", share > 0.55), ("self", i == j)) if there)
            attributes = (f' class="{names}"' if names else "") + (
                f' style="--v:{share:.2f}"' if size else ""
            )
            parts.append(f"<td{attributes}>{'' if small else _size(size)}</td>")
        label = escape(made.names[i])
        rows.append(f"<tr><th class=row><b>{i + 1}</b>{label}</th>{''.join(parts)}</tr>")
    left = f"<p class=note>{made.left_out} with less are left out.</p>" if made.left_out else ""
    kind = "matrix small" if small else "matrix"
    return (
        f'<div class=wide><table class="{kind}" data-matrix="{number}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{left}"
    )


def _weights(device: DeviceStatus) -> str:
    found = largest_weights(device)
    if not found:
        return ""
    names = {process.pid: process_label(process) for process in device.processes}
    rows = []
    for weight in found:
        who = [names.get(pid, str(pid)) for pid in weight.processes]
        if not who:
            text = "none"
        elif len(who) == len(device.processes) > WHO:
            text = f"all {len(who)}"
        else:
            text = ", ".join(who[:WHO]) + (f" and {len(who) - WHO} more" if len(who) > WHO else "")
        rows.append(
            _row(
                "",
                [f"<code>{escape(weight.digest[:16])}</code>", escape(text)],
                [str(len(weight.chunks)), str(len(who)), str(weight.models), format_bytes(weight.bytes)],
            )
        )
    count = count_weights(device)
    more = f" <span class=dim>{len(found)} of {count}</span>" if count > len(found) else ""
    heads = ["Chunks", "Processes", "Models", "Bytes"]
    return f"<h3>Largest weights{more}</h3>{_table(['Digest', 'Who has it'], heads, rows)}"


def _explained() -> str:
    return (
        "<h3>What the words mean</h3><dl>"
        "<dt>shared weights</dt><dd>memory that the broker owns: one copy of each distinct weight, whoever uses it</dd>"
        "<dt>unused weights</dt><dd>of these, what no process has: it goes when other memory is needed</dd>"
        "<dt>private weights</dt><dd>weights in a process's own pool; on the CPU without a broker, mapped files, whose "
        "pages the system holds once for all processes</dd>"
        "<dt>activations</dt><dd>what runs, and the sessions' workspaces, use now</dd>"
        "<dt>idle</dt><dd>kept by a process's pool for its next run</dd>"
        "<dt>granted</dt><dd>a process may take it without asking, and has not</dd>"
        "<dt>chunk</dt><dd>a piece of memory that is mapped whole; processes share whole chunks</dd>"
        "<dt>saved by sharing</dt><dd>what the chunks would take if every process had its own, less what they take</dd>"
        f"</dl><p class=note>glake-infer {__version__}. Pointing at a process or a model shows its chunks in the map.</p>"
    )


# Pieces of HTML. What `_row` gets is escaped already.


def _row(attributes: str, texts: Sequence[str], numbers: Sequence[str]) -> str:
    cells = "".join(f"<td>{text}</td>" for text in texts) + "".join(
        f"<td class=n>{text}</td>" for text in numbers
    )
    return f"<tr {attributes}>{cells}</tr>" if attributes else f"<tr>{cells}</tr>"


def _table(texts: Sequence[str], numbers: Sequence[str], rows: Iterable[str]) -> str:
    heads = "".join(f"<th>{text}</th>" for text in texts) + "".join(
        f"<th class=n>{text}</th>" for text in numbers
    )
    return (
        f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _size(count: int) -> str:
    return format_bytes(count) if count else "-"


def _span(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"
