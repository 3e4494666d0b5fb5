"""The picture that `glake-infer top` shows: lines of text that fit a width, and a height where there is one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from glake_infer.cli import output
from glake_infer.sharing.status import DeviceStatus, MachineStatus, ModelStatus, ProcessStatus
from glake_infer.window.figures import KINDS, labelled_models, private_of, processes_of, saving, split

GAP = 2
NARROWEST = 40
FEWEST = 3
"""Rows that a table has where there is no room for any."""

OLD = 5.0
"""Seconds after which a process's figures are marked as old."""

LOOKS = {
    "shared": ("█", "#", "blue"),
    "unused": ("▚", "%", "bright_black"),
    "own": ("▓", "=", "cyan"),
    "active": ("▒", "+", "yellow"),
    "idle": ("░", "-", "green"),
    "granted": ("╌", "~", "magenta"),
    "outside": ("▞", "x", "red"),
    "free": ("·", ".", "bright_black"),
}
"""How each kind of memory is drawn: a sign, the same in ASCII, a colour."""

STATES = {"running": "green", "awake": "", "idle": "yellow", "suspended": "bright_black"}
DIM = "bright_black"


def picture(
    status: MachineStatus,
    problems: Sequence[str] = (),
    *,
    width: int = 80,
    height: int | None = None,
    plain: bool = False,
    keys: str = "",
) -> list[Text]:
    """Lines for a machine. Where `height` leaves no room for all rows, the largest, and how many more there are.

    problems
        What kept somebody from answering.
    plain
        In ASCII alone.
    keys
        What can be typed, said at the top.
    """
    width = max(width, NARROWEST)
    lines = _head(status, problems, width, keys)
    for device in status.devices:
        lines += [Text(), *_device(device, width, plain)]
    if not status.devices:
        return [*lines, Text(), Text("No process has a pool yet.", DIM)]
    tables = [table for table in (_processes(status), _models(status)) if table.rows]
    rows = [len(table.rows) for table in tables]
    if height is not None:
        rows = _fitting(rows, height - len(lines) - 2 * len(tables))  # an empty line and a title each
    for table, count in zip(tables, rows, strict=True):
        lines += [Text(), *table.lines(width, count)]
    return lines


def _fitting(wanted: list[int], room: int) -> list[int]:
    """How many lines each table gets: what it wants, or its half and what the other leaves."""
    if sum(wanted) <= room or not wanted:
        return wanted
    if len(wanted) == 1:
        return [max(FEWEST, room)]
    first, second = wanted
    given = min(first, max(room // 2, room - second, FEWEST))
    return [given, min(second, max(room - given, FEWEST))]


def _head(status: MachineStatus, problems: Sequence[str], width: int, keys: str) -> list[Text]:
    count = len({process.pid for device in status.devices for process in device.processes})
    parts = [_many(count, "process", "es")]
    if broker := status.broker:
        parts.insert(0, f"broker {broker.pid}, up {_span(broker.uptime)}")
        if broker.lost:
            parts.append(f"{broker.lost} lost")
        if broker.resumed:
            parts.append(f"{broker.resumed} taken over")
    else:
        parts.insert(0, "no broker")
    left = Text.assemble(("glake-infer", "bold"), f"  {', '.join(parts)}")
    clock = time.strftime("%H:%M:%S", time.localtime(status.time))
    lines = [_apart(left, Text(f"{keys}  {clock}".strip(), DIM), width)]
    shown = problems if len(problems) <= FEWEST else problems[: FEWEST - 1]
    lines += [_cut(Text(f"! {clean(problem)}", "yellow"), width) for problem in shown]
    if len(shown) < len(problems):
        lines.append(Text(f"! ... {len(problems) - len(shown)} more", "yellow"))
    return lines


def _device(device: DeviceStatus, width: int, plain: bool) -> list[Text]:
    kinds = split(device)
    used = sum(size for kind, size in kinds.items() if kind != "free")
    name = clean(device.title or device.name)
    identity = "" if device.name in ("cpu", device.title) else f"  {clean(device.name)[:12]}"
    head = "CPU  " if device.name == "cpu" else ""
    left = Text.assemble((f"{head}{name}", "bold"), (identity, DIM))
    right = Text(f"{output.size(used)} of {output.size(device.limit)}")
    lines = [_apart(left, right, width), _bar(kinds, width, plain)]
    legend = []
    for kind, size in kinds.items():
        if size or kind == "free":
            sign, ascii_sign, colour = LOOKS[kind]
            legend.append(
                Text.assemble((ascii_sign if plain else sign, colour), f" {KINDS[kind]} {output.size(size)}")
            )
    lines += _flow(legend, width)
    if facts := _facts(device):
        lines += _flow([Text(fact, DIM) for fact in facts], width)
    return lines


def _facts(device: DeviceStatus) -> list[str]:
    facts = []
    saved = saving(device)
    if saved.processes:
        facts.append(f"sharing saves {output.size(saved.processes)}")
    if device.loads:
        facts.append(f"loads {device.loads}, {output.size(device.loaded_bytes)}{_rate(device)}")
    if device.hits:
        facts.append(f"hits {device.hits}, {output.size(device.hit_bytes)}")
    if device.evictions:
        facts.append(f"evicted {device.evictions}, {output.size(device.evicted_bytes)}")
    if device.refusals:
        facts.append(f"refused {device.refusals}")
    return facts


def _rate(device: DeviceStatus) -> str:
    if not device.load_seconds:
        return ""
    return f" at {output.size(int(device.loaded_bytes / device.load_seconds))}/s"


def _bar(kinds: dict[str, int], width: int, plain: bool) -> Text:
    """Cells in proportion; whatever there is has one at least."""
    total = sum(kinds.values())
    if not total:
        return Text(LOOKS["free"][plain] * width, LOOKS["free"][2])
    cells = {kind: max(1, round(size * width / total)) for kind, size in kinds.items() if size}
    while (over := sum(cells.values()) - width) and cells:
        largest = max(cells, key=lambda kind: cells[kind])
        cells[largest] = max(1, cells[largest] - over)
        if over > 0 and cells[largest] == 1:
            break  # more kinds than cells
    bar = Text(no_wrap=True)
    for kind, count in cells.items():
        bar.append(LOOKS[kind][plain] * count, LOOKS[kind][2])
    return bar


@dataclass
class _Column:
    """`keep`: columns with a higher number go first where there is no room. `least`: how narrow it may become."""

    title: str
    keep: int = 0
    right: bool = True
    least: int | None = None


@dataclass
class _Table:
    """Rows of plain cells, each with a style; the columns that a width has room for."""

    columns: list[_Column]
    rows: list[tuple[list[str], list[str]]] = field(default_factory=list)

    def add(self, cells: Sequence[str], styles: Sequence[str] = ()) -> None:
        self.rows.append((list(cells), [*styles, *[""] * (len(cells) - len(styles))]))

    def lines(self, width: int, count: int) -> list[Text]:
        """A title and `count` lines; where that is less than there are rows the last says how many more."""
        shown = self.rows if count >= len(self.rows) else self.rows[: max(count - 1, 1)]
        widths = self._widths(shown, width)
        made = [self._line([c.title for c in self.columns], ["bold"] * len(self.columns), widths)]
        made += [self._line(cells, styles, widths) for cells, styles in shown]
        if len(shown) < len(self.rows):
            made.append(Text(f"... {len(self.rows) - len(shown)} more", DIM))
        return made

    def _widths(self, rows: Sequence[tuple[list[str], list[str]]], width: int) -> list[int]:
        """Of each column; 0 for those that are left out."""
        natural = [
            max(cell_len(column.title), *(cell_len(cells[i]) for cells, _ in rows))
            for i, column in enumerate(self.columns)
        ]
        # A column whose cells say nothing is left out too.
        there = [
            i
            for i, c in enumerate(self.columns)
            if not c.keep or any(cells[i] not in ("", "-") for cells, _ in rows)
        ]

        def least(i: int) -> int:
            narrow = self.columns[i].least
            return natural[i] if narrow is None else min(narrow, natural[i])

        while sum(map(least, there)) + GAP * (len(there) - 1) > width:
            goes = max(there, key=lambda i: self.columns[i].keep)
            if not self.columns[goes].keep:
                break
            there.remove(goes)
        left = width - sum(map(least, there)) - GAP * (len(there) - 1)
        widths = [0] * len(self.columns)
        for i in there:
            more = max(0, min(left, natural[i] - least(i)))
            widths[i] = least(i) + more
            left -= more
        return widths

    def _line(self, cells: Sequence[str], styles: Sequence[str], widths: Sequence[int]) -> Text:
        line = Text(no_wrap=True)
        for cell, style, width, column in zip(cells, styles, widths, self.columns, strict=True):
            if width:
                if line:
                    line.append(" " * GAP)
                line.append(_padded(cell, width, column.right), style)
        line.rstrip()
        return line


def _processes(status: MachineStatus) -> _Table:
    table = _Table(
        [
            _Column("Process", right=False, least=16),
            _Column("PID"),
            _Column("On", keep=2, right=False),
            _Column("Pool"),
            _Column("Shared", keep=1),
            _Column("In use", keep=3),
            _Column("Idle", keep=4),
            _Column("Quota", keep=7),
            _Column("Hits", keep=5),
            _Column("Loads", keep=6),
            _Column("Rate", keep=8),
            _Column("Peak", keep=10),
            _Column("Models", keep=9),
            _Column("", keep=1, right=False),
        ]
    )
    several = len(status.devices) > 1
    for device, process in processes_of(status):
        pool, transfers, private = process.pool, process.transfers, private_of(process)
        rate = f"{output.size(int(transfers.bytes / transfers.seconds))}/s" if transfers.seconds else "-"
        table.add(
            [
                clean(process.name),
                str(process.pid),
                process.device if several else "",
                output.size(pool.reserved),
                _size(pool.shared),
                _size(private["own"] + private["active"]),
                _size(private["idle"]),
                _size(pool.quota or 0),
                _count(transfers.hits),
                _count(transfers.loads),
                rate,
                _size(pool.peak_reserved),
                _count(len(process.models)),
                _remark(device, process),
            ],
            [DIM if process.silent_seconds > OLD else "", DIM],
        )
    return table


def _remark(device: DeviceStatus, process: ProcessStatus) -> str:
    if process.silent_seconds > OLD:
        return f"silent {_span(process.silent_seconds)}"
    if device.governed and not process.connected:
        return "no broker"
    return f"{output.size(process.pool.offloaded)} on the host" if process.pool.offloaded else ""


def _models(status: MachineStatus) -> _Table:
    table = _Table(
        [
            _Column("Model", right=False, least=16),
            _Column("PID"),
            _Column("State", right=False),
            _Column("Shared", keep=1),
            _Column("Own", keep=4),
            _Column("Private", keep=6),
            _Column("Asleep", keep=3),
            _Column("Idle", keep=2),
            _Column("Runs", keep=5),
            _Column("Process", keep=7, right=False, least=10),
            _Column("Priority", keep=8),
        ]
    )
    for process, name, model in _largest_models(status):
        table.add(
            [
                clean(name),
                str(process.pid),
                model.state,
                _size(model.shared),
                _size(model.own),
                _size(model.private),
                _size(model.asleep),
                "-" if model.state == "running" else _span(model.idle_seconds),
                _count(model.runs),
                clean(process.name),
                str(model.priority) if model.priority else "-",
            ],
            ["", DIM, STATES[model.state]],
        )
    return table


def _largest_models(status: MachineStatus) -> list[tuple[ProcessStatus, str, ModelStatus]]:
    found = [
        (process, name, model)
        for _, process in processes_of(status)
        for name, model in labelled_models(process)
    ]
    return sorted(found, key=lambda each: -(each[2].shared + each[2].own + each[2].private))


def clean(text: str) -> str:
    """A name as one line that does nothing to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _size(count: int) -> str:
    return output.size(count) if count else "-"


def _count(count: int) -> str:
    """Of at most five digits: 99999, 100k."""
    if not count:
        return "-"
    unit = ""
    for larger in "kMG":
        if count < 100_000:
            break
        count, unit = count // 1000, larger
    return f"{count}{unit}"


def _many(count: int, thing: str, plural: str = "s") -> str:
    return f"{count} {thing}{'' if count == 1 else plural}"


def _span(seconds: float) -> str:
    """A time for people: 12 s, 3 min, 2 h, 5 d."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _padded(text: str, width: int, right: bool) -> str:
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "~"
    return " " * (width - length) + text if right else text + " " * (width - length)


def _cut(text: Text, width: int) -> Text:
    if text.cell_len > width:
        text.truncate(max(0, width - 3), overflow="crop")
        text.append("...")
    return text


def _apart(left: Text, right: Text, width: int) -> Text:
    """One at each end of a line; what is on the left is cut."""
    left = _cut(left.copy(), max(0, width - right.cell_len - GAP))
    return Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right)


def _flow(parts: Sequence[Text], width: int) -> list[Text]:
    """As many to a line as fit."""
    lines = [Text()]
    for part in parts:
        if lines[-1] and lines[-1].cell_len + GAP + part.cell_len > width:
            lines.append(Text())
        if lines[-1]:
            lines[-1].append(" " * GAP)
        lines[-1].append_text(_cut(part, width))
    return lines
