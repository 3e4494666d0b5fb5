"""The map of a device's memory in the report: an SVG in which every byte that is used has its place, to scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from glake_infer.allocators.sizes import format_bytes
from glake_infer.sharing.status import ChunkStatus, DeviceStatus, ProcessStatus
from glake_infer.window.figures import KINDS, private_of, process_label, sharers

WIDTH = 1200
ROW = 24
"""Of the map, in its own units."""

MOST_ROWS = 24
LEGIBLE = 5.5
"""Units that a letter of a label takes."""

SHADES = (
    (1, "s1", "one"),
    (2, "s2", "2"),
    (4, "s3", "3 or 4"),
    (8, "s4", "5 to 8"),
    (1 << 62, "s5", "more"),
)
"""Up to so many sharers: the class, and what the legend says."""


@dataclass(frozen=True)
class _Cell:
    """A piece of memory in the map."""

    kind: str
    size: int
    data: str
    label: str = ""


def draw(number: int, device: DeviceStatus) -> Iterator[str]:
    """Everything that is used, to scale, from the left and from the top; a piece goes on in the next row."""
    cells = [*_chunk_cells(device), *_pool_cells(device)]
    total = sum(cell.size for cell in cells)
    if not total:
        return
    rows = max(2, min(MOST_ROWS, math.ceil(len(cells) / 24)))
    scale = WIDTH * rows / total  # units for a byte, over all rows
    shapes: list[str] = []
    marks: list[str] = []
    at, label, labelled = 0.0, "", True
    for cell in cells:
        end = at + cell.size * scale
        if cell.label != label:
            # Another process begins: a mark, and its name in the first piece that has room.
            label, labelled = cell.label, False
            row = min(int((at + 1e-6) // WIDTH), rows - 1)
            marks.append(
                f'<rect class=mark x="{at - row * WIDTH:.2f}" y="{row * (ROW + 2)}" width="1.6" height="{ROW}"/>'
            )
        while end - at > 1e-6:
            row = min(int((at + 1e-6) // WIDTH), rows - 1)
            stop = min(end, (row + 1) * WIDTH) if row < rows - 1 else end
            x, y, width = at - row * WIDTH, row * (ROW + 2), stop - at
            shapes.append(
                f'<rect class="{cell.kind}" x="{x:.2f}" y="{y}" width="{max(width, 0.05):.2f}" height="{ROW}" {cell.data}/>'
            )
            if not labelled and width > LEGIBLE * (len(cell.label) + 2):
                marks.append(f'<text x="{x + 5:.1f}" y="{y + 16}">{escape(cell.label)}</text>')
                labelled = True
            at = stop
    height = rows * (ROW + 2)
    yield (
        f"<h3>Map of what is used <span class=dim>to scale, {format_bytes(round(total / rows))} a row"
        "</span></h3>"
        f'<svg class=map data-device="{number}" viewBox="0 0 {WIDTH} {height}" role=img aria-label="map of memory">'
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="5" height="5" style="fill:var(--unused);stroke:none"/>'
        '<rect width="1.2" height="5" style="fill:var(--unused-line);stroke:none"/></pattern>'
        '<pattern id="stripes" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="8" height="8" style="fill:var(--c1);stroke:none"/>'
        '<rect width="3" height="8" style="fill:var(--c3);stroke:none"/></pattern></defs>'
        f"{''.join(shapes)}{''.join(marks)}</svg>"
    )
    yield _legend(device)


def _legend(device: DeviceStatus) -> str:
    kinds = {_shade(chunk) for chunk in device.chunks if chunk.state != "absent"}
    pools = {kind for process in device.processes for kind in _pool_kinds(device, process)}
    names = [*((shade, text) for _, shade, text in SHADES), ("unused", "none"), ("loading", "being loaded")]
    parts = [f'<span><i class="{kind}"></i>{name}</span>' for kind, name in names if kind in kinds]
    if kinds:
        parts.insert(0, "<span class=dim>weights, by how many processes have them:</span>")
    parts += [f'<span><i class="{kind}"></i>{name}</span>' for kind, name in KINDS.items() if kind in pools]
    absent = [chunk for chunk in device.chunks if chunk.state == "absent"]
    if absent:
        size = format_bytes(sum(chunk.size for chunk in absent))
        parts.append(f"<span class=dim>{chunks(len(absent))} of {size} without memory now</span>")
    return f"<div class=legend>{''.join(parts)}</div>"


def _shade(chunk: ChunkStatus) -> str:
    if chunk.state == "loading":
        return "loading"
    count = sharers(chunk)
    return next(kind for most, kind, _ in SHADES if count <= most) if count else "unused"


def _chunk_cells(device: DeviceStatus) -> Iterator[_Cell]:
    """Region by region, in the order of addresses; regions that most have first."""
    regions: dict[str, list[int]] = {}
    for number, chunk in enumerate(device.chunks):
        if chunk.state != "absent":
            regions.setdefault(chunk.region, []).append(number)

    def rank(numbers: list[int]) -> float:
        sizes = sum(device.chunks[n].size for n in numbers)
        return -sum(device.chunks[n].size * sharers(device.chunks[n]) for n in numbers) / sizes

    for numbers in sorted(regions.values(), key=rank):
        for number in numbers:
            chunk = device.chunks[number]
            yield _Cell(_shade(chunk), chunk.size, f'data-c="{number}"')


def _pool_cells(device: DeviceStatus) -> Iterator[_Cell]:
    if not device.governed and device.weights:  # of a broker that was not asked, so nobody says more of them
        head = f"{KINDS['shared']}, {format_bytes(device.weights)}"
        yield _Cell(
            "s3", device.weights, f'data-pid="0" data-head="{head}" data-text="in a broker\'s memory"'
        )
    for process in sorted(device.processes, key=lambda p: -p.pool.reserved):
        label = process_label(process)
        for kind, size in _pool_kinds(device, process).items():
            head = escape(f"{KINDS[kind]}, {format_bytes(size)}", quote=True)
            data = f'data-pid="{process.pid}" data-head="{head}" data-text="{escape(label, quote=True)}"'
            yield _Cell(kind, size, data, label)


def _pool_kinds(device: DeviceStatus, process: ProcessStatus) -> dict[str, int]:
    """What a process has for itself, by KINDS."""
    private = private_of(process)
    kinds = {kind: private[kind] for kind in ("active", "own", "idle")}
    if not device.governed:
        kinds["unused"] = min(kinds["idle"], process.pool.unused_weights)
        kinds["idle"] -= kinds["unused"]
    elif process.connected and process.pool.quota is not None:
        kinds["granted"] = max(0, process.pool.quota - sum(kinds.values()))
    return {kind: size for kind, size in kinds.items() if size}


def chunks(count: int) -> str:
    """`1 chunk`, `2 chunks`."""
    return f"{count} chunk{'' if count == 1 else 's'}"
