"""Draw a trace: memory over time, and who holds which addresses at the peak."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glake_infer.allocators.errors import InputError, MissingDependencyError
from glake_infer.allocators.pool import Pool
from glake_infer.allocators.sizes import format_bytes
from glake_infer.allocators.snapshot import Snapshot
from glake_infer.allocators.trace import Trace, read
from glake_infer.models.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PlotReport", "draw", "plot", "sample"]

SAMPLES = 1500
ROWS = 14
WIDE = 12.0  # inches
FORMATS = (".png", ".svg", ".pdf")
COLOURS = {
    "weights": "#4e79a7",
    "activations": "#f28e2c",
    "workspace": "#59a14f",
    "cached": "#d9d9d9",
    "free": "#ffffff",
}
MEANINGS = {
    "weights": "weights, in use",
    "activations": "activations, in use",
    "workspace": "workspace, in use",
    "cached": "kept for a request of its size",
    "free": "free",
}


@dataclass(frozen=True)
class Samples:
    """Bytes after the calls with the given numbers (from 1)."""

    calls: tuple[int, ...]
    requested: tuple[int, ...]
    active: tuple[int, ...]
    reserved: tuple[int, ...]


@dataclass(frozen=True)
class PlotReport:
    """What was drawn; in bytes."""

    trace: str
    output: Path
    device: str
    peak_requested: int
    peak_active: int
    peak_reserved: int
    peak_call: int
    """The number of the call after which the most was requested: the moment of the address space."""
    segments: int


def plot(
    trace: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PlotReport:
    """Replay a trace on the device's pool and draw it into `target` (.png, .svg or .pdf).

    The device must have no open pool of this process. Raises `InputError` (no trace, no such format),
    `MissingDependencyError` (matplotlib), `PoolExistsError`, `OutOfMemoryError`. Nothing stays allocated, and
    an existing file is replaced only at the end.
    """
    target = Path(target)
    if target.suffix.lower() not in FORMATS:
        raise InputError(
            f"{target.name!r} cannot be drawn: expected a name that ends with {', '.join(FORMATS)}"
        )
    _matplotlib()
    found = read(trace)
    samples, snapshot, moment, stats = sample(found, device, progress)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        draw(found, samples, snapshot, moment, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return PlotReport(
        trace=found.name,
        output=target,
        device=device,
        peak_requested=found.peak_requested,
        peak_active=stats[0],
        peak_reserved=stats[1],
        peak_call=moment,
        segments=len(snapshot.segments),
    )


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingDependencyError(
            f"matplotlib is needed to draw and cannot be imported ({error}). "
            "Install it with: pip install 'glake-infer[plot]'"
        ) from error
    return matplotlib


def _peak(trace: Trace) -> int:
    """Number of the call after which the most is requested."""
    live = most = at = 0
    for number, step in enumerate(trace.steps(), 1):
        live += -step.bytes if step.op == "f" else step.bytes
        if live > most:
            most, at = live, number
    return at


def sample(
    trace: Trace, device: str, progress: Progress | None = None
) -> tuple[Samples, Snapshot, int, tuple[int, int]]:
    """Replay on the device's pool: samples, the snapshot at the peak, its call, (peak active, peak reserved)."""
    moment = _peak(trace)
    every = max(1, len(trace) // SAMPLES)
    rows: list[tuple[int, int, int, int]] = []
    taken: dict[int, int] = {}
    snapshot = Snapshot({"segments": []}, device=device)
    with Pool(device) as pool:
        live = 0
        try:
            for number, step in enumerate(trace.steps(), 1):
                if step.op == "f":
                    pool.deallocate(taken.pop(step.id))
                    live -= step.bytes
                else:
                    taken[step.id] = pool.allocate(step.bytes, "weights" if step.op == "r" else "activations")
                    live += step.bytes
                if number % every == 0 or number in (1, moment, len(trace)):
                    stats = pool.stats()
                    rows.append((number, live, stats.active, stats.reserved))
                    if progress is not None:
                        progress(trace.name, number, len(trace))
                if number == moment:
                    snapshot = pool.snapshot()
            stats = pool.stats()
        finally:
            for address in taken.values():
                pool.deallocate(address)
    columns = [tuple(column) for column in zip(*rows, strict=True)] or [(), (), (), ()]
    return Samples(*columns), snapshot, moment, (stats.peak_active, stats.peak_reserved)


def draw(trace: Trace, samples: Samples, snapshot: Snapshot, moment: int, target: Path) -> None:
    """Draw both panels into a file whose name's suffix says the format."""
    matplotlib = _matplotlib()
    figure = matplotlib.figure.Figure(figsize=(WIDE, 9.5), layout="constrained")
    over_time, space = figure.subplots(2, 1, height_ratios=[1, 1.25])
    figure.suptitle(f"{trace.name}: {trace.allocations:,} allocations", fontsize=14)
    _draw_time(over_time, samples, moment)
    _draw_space(space, snapshot, moment)
    figure.savefig(target, dpi=110)


def _unit(most: int) -> tuple[int, str]:
    return (1 << 30, "GiB") if most >= 1 << 30 else (1 << 20, "MiB")


def _draw_time(axes: Axes, samples: Samples, moment: int) -> None:
    unit, name = _unit(max(samples.reserved, default=0))
    calls = samples.calls

    def scaled(values: Sequence[int]) -> list[float]:
        return [value / unit for value in values]

    axes.fill_between(calls, scaled(samples.reserved), color="#d9d9d9", linewidth=0, step="post")
    for values, colour, label in (
        (samples.reserved, "#7f7f7f", "reserved"),
        (samples.active, "#f28e2c", "active"),
        (samples.requested, "#1f4e79", "requested"),
    ):
        label = f"{label}, at most {max(values, default=0) / unit:.2f} {name}"
        axes.plot(calls, scaled(values), color=colour, linewidth=1.1, drawstyle="steps-post", label=label)
    axes.axvline(moment, color="#e15759", linewidth=1, linestyle="--")
    axes.annotate("peak, shown below", (moment, 1), xycoords=("data", "axes fraction"), color="#e15759", fontsize=9,
                  xytext=(4, -11), textcoords="offset points")  # fmt: skip
    axes.set_xlim(0, max(calls, default=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("calls (allocate and free)")
    axes.set_ylabel(name)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.9)
    axes.set_title("Memory over time", loc="left", fontsize=11)
    axes.grid(alpha=0.25)


def _pieces(snapshot: Snapshot, row: int) -> Iterator[tuple[int, int, int, str]]:
    """Give (row, from, length, colour's name) of every range, the segments one behind the other, folded."""
    place = 0
    for segment in sorted(snapshot.segments, key=lambda segment: segment.address):
        for part in segment.ranges:
            name = part.tag if part.state == "active" else part.state
            left = part.bytes
            while left:
                line, start = divmod(place, row)
                length = min(left, row - start)
                yield line, start, length, name
                place += length
                left -= length


def _draw_space(axes: Axes, snapshot: Snapshot, moment: int) -> None:
    total = sum(part.bytes for segment in snapshot.segments for part in segment.ranges)
    row = max(1, -(-total // ROWS))
    unit, name = _unit(row)
    bars: dict[str, dict[int, list[tuple[float, float]]]] = {}
    sums: dict[str, int] = {}
    for line, start, length, colour in _pieces(snapshot, row):
        bars.setdefault(colour, {}).setdefault(line, []).append((start / unit, length / unit))
        sums[colour] = sums.get(colour, 0) + length
    for colour in sorted(bars, key=list(COLOURS).index if set(bars) <= set(COLOURS) else None):
        for line, spans in bars[colour].items():
            axes.broken_barh(
                spans, (line + 0.1, 0.8), facecolors=COLOURS.get(colour, "#af7aa1"),
                edgecolors="#777777", linewidth=0.25, hatch="////" if colour == "free" else None,
            )  # fmt: skip
    place = 0
    for segment in sorted(snapshot.segments, key=lambda segment: segment.address):
        line, start = divmod(place, row)
        axes.plot([start / unit] * 2, [line + 0.02, line + 0.98], color="black", linewidth=1.2)
        place += sum(part.bytes for part in segment.ranges)
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=COLOURS.get(colour, "#af7aa1"), edgecolor="#777777", linewidth=0.5,
              hatch="////" if colour == "free" else None,
              label=f"{MEANINGS.get(colour, colour)}: {format_bytes(sums[colour])}")
        for colour in [*COLOURS, *sorted(set(sums) - set(COLOURS))] if colour in sums
    ]  # fmt: skip
    rows = max(1, -(-total // row))
    axes.set_xlim(0, row / unit)
    axes.set_ylim(rows, 0)
    axes.set_yticks(
        [line + 0.5 for line in range(rows)], [format_bytes(line * row) for line in range(rows)], fontsize=8
    )
    axes.set_xlabel(f"{name} from the start of the row; a black line begins a segment")
    axes.set_title(
        f"Addresses after call {moment:,}: {len(snapshot.segments)} segments, one behind the other",
        loc="left",
        fontsize=11,
    )
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=9, frameon=False
    )
