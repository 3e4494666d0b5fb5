"""`glake-infer bench`: what the parts cost here, beside what a user would run instead."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command
from glake_infer.cli.group import Group

if TYPE_CHECKING:
    from glake_infer.models.bench.load import LeftOut, LoadReport
    from glake_infer.models.bench.resume import ResumeReport

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="What the parts cost here, beside what a user would run instead."
)


Lines = Annotated[bool, typer.Option("--json", help="Print one JSON line per result.")]
Subject = Annotated[
    Path | None,
    typer.Argument(metavar="MODEL", help="A package (.glake) or an ONNX model.", show_default=False),
]
Bytes = Annotated[
    str | None,
    typer.Option(
        "--bytes", metavar="SIZE", help="Make a model with SIZE of weights, as 8GiB.", show_default=False
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda:N.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1,128", help="Shape of generated data.", show_default=False),
]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a timeline, for https://ui.perfetto.dev.", show_default=False),
]
Folder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where models are written, and removed again.", show_default=False),
]


class HostCopy(StrEnum):
    """What weights are brought back from."""

    PINNED = "pinned"
    STORE = "store"


class Paths(StrEnum):
    """Whose links carry the bytes of a GPU."""

    OWN = "own"
    ALL = "all"


@app.callback()
def _family() -> None:
    pass


@app.command()
@command
def pool(
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda:N.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line per size.")] = False,
) -> None:
    """Time an allocate and a free of an exact fit, called as ONNX Runtime calls them, on one thread.

    The twin runs in the same process, round by round in turn: on the CPU ONNX Runtime's own arena, on CUDA
    cudaMallocAsync. Medians, in nanoseconds per pair.
    """
    from glake_infer.allocators.twins.pairs import time_pool

    reports = time_pool(device)
    if json:
        for report in reports:
            print(json_module.dumps(output.plain(report)))
        return
    made = output.table(">Size", ">Pool", ">Twin", ">Pool / twin", "Twin")
    for report in reports:
        output.add(
            made,
            output.size(report.bytes),
            f"{report.ours_ns:.0f} ns",
            f"{report.twin_ns:.0f} ns",
            f"{report.ours_ns / report.twin_ns:.2f}",
            report.twin,
        )
    output.show(made)


@app.command()
@command
def load(
    model: Subject = None,
    size: Bytes = None,
    small: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Make a model of N weights of 10 KiB, as 10000, and one of as many bytes in large ones.",
            show_default=False,
        ),
    ] = None,
    device: Device = "cpu",
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Turns of each side.")] = 3,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the files from the page cache before each turn.")
    ] = False,
    shapes: Shapes = None,
    trace: Trace = None,
    folder: Folder = None,
    json: Lines = False,
) -> None:
    """Time a load, from the files to a session that has answered.

    Beside it: plain ONNX Runtime on the same model with external data, and the copy alone by safetensors and
    fastsafetensors where they are installed. A warm process has loaded and run a tiny model before; a cold one is timed
    from its start, with its imports. Every turn is a process of its own, and the sides take turns; medians. Goal: the
    bytes at 0.85 of the raw rate of one link in the same run, and 50 ms.
    """
    from glake_infer.models.bench.load import bench_load

    with output.progress("") as progress:
        reports = bench_load(
            model, size=size, small=small, device=device, repeat=repeat, cold_files=cold, shapes=shapes or (),
            trace=trace, folder=folder, progress=progress,
        )  # fmt: skip
    if not _lines(reports, json):
        _show_loads(reports, trace)


def _lines(reports: Sequence[Any], wanted: bool) -> bool:
    """Print reports as JSON lines, if wanted."""
    for report in reports if wanted else ():
        print(json_module.dumps(output.plain(report)))
    return wanted


def _show_loads(reports: Sequence[LoadReport | LeftOut], trace: Path | None) -> None:
    from glake_infer.models.bench.load import LeftOut

    loads = [report for report in reports if not isinstance(report, LeftOut)]
    made = output.table("*Side", "Start", ">Weights", ">Session", ">Answer", ">Rate", ">Goal")
    if len({report.model for report in loads}) > 1:
        made = output.table("Model", "*Side", "Start", ">Weights", ">Session", ">Answer", ">Rate", ">Goal")
    for report in loads:
        times = (report.to_weights, report.to_session, report.to_answer)
        cells = [
            report.side,
            report.start,
            *(output.duration(each) for each in times),
            output.rate(report.rate),
        ]
        cells.append(output.duration(report.goal))
        output.add(made, *([report.model] if len(made.columns) > len(cells) else []), *cells)
    first = loads[0]
    rows = []
    for report in {report.model: report for report in loads}.values():
        rows.append(
            (report.model, f"{report.weights} weights, {output.size(report.bytes)} on {report.device}")
        )
    what = "a copy in memory" if first.device == "cpu" else "one link, from page-locked memory"
    rows.append(("raw rate", f"{output.rate(first.link)} ({what})"))
    rows.append(
        ("files in the page cache", f"{min(report.cached for report in loads):.0%} or more before each turn")
    )
    if disks := [report.disk for report in loads if report.disk]:
        rows.append(("disk", f"{output.rate(min(disks))} to {output.rate(max(disks))}"))
    for report in loads:
        if report.in_flight_bound and report.start == "warm":
            peak = f"{output.size(report.in_flight or 0)} at most, of {output.size(report.in_flight_bound)}"
            rows.append(("in flight", peak))
            if report.copying:
                moved = f"{output.duration(report.copying)}, {output.rate(report.bytes / report.copying)}"
                rows.append((f"from files to the GPU, {report.weights} weights", moved))
            rows.append(("verified", report.verified or "-"))
            if report.difference is not None:
                rows.append(("difference from plain", output.number(report.difference)))
            break
    parts: list[Any] = [made, output.facts(rows)]
    _show_rest(parts, reports, trace)


def _show_rest(parts: list[Any], reports: Sequence[Any], trace: Path | None) -> None:
    """What was left out, and where the trace is."""
    from glake_infer.models.bench.load import LeftOut

    out = [f"{report.side}: {report.reason}" for report in reports if isinstance(report, LeftOut)]
    if out:
        parts.append(output.bullets("Left out", out))
    if trace is not None:
        parts.append(f"wrote {trace}: open it with https://ui.perfetto.dev")
    output.show(*parts)


@app.command()
@command
def resume(
    model: Subject = None,
    size: Bytes = None,
    host_copy: Annotated[
        HostCopy, typer.Option(help="Bring weights back from page-locked copies, or from the store's files.")
    ] = HostCopy.PINNED,
    paths: Annotated[Paths, typer.Option(help="Over the GPU's own link, or all peers' too.")] = Paths.OWN,
    device: Device = "cpu",
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="How often it sleeps and wakes.")] = 5,
    shapes: Shapes = None,
    trace: Trace = None,
    folder: Folder = None,
    json: Lines = False,
) -> None:
    """Time how a model is suspended and resumed.

    Beside it, in the same run: raw copies of page-locked memory over one path and over all, PyTorch's copy_ from a pinned
    tensor, and plain ONNX Runtime making its session anew until that has answered. Medians.
    """
    from glake_infer.models.bench.resume import bench_resume

    with output.progress("") as progress:
        reports = bench_resume(
            model, size=size, host_copy=host_copy.value, paths=paths.value, device=device, repeat=repeat,
            shapes=shapes or (), trace=trace, folder=folder, progress=progress,
        )  # fmt: skip
    if not _lines(reports, json):
        _show_resumes(reports, trace)


def _show_resumes(reports: Sequence[ResumeReport | LeftOut], trace: Path | None) -> None:
    from glake_infer.models.bench.load import LeftOut

    made = output.table("*Side", ">Suspend", ">Resume", ">Rate", ">To the host")
    rows: list[tuple[str, str]] = []
    for report in reports:
        if isinstance(report, LeftOut):
            continue
        raw = report.paths is not None
        output.add(
            made,
            report.side,
            output.duration(report.suspend),
            output.duration(report.resume),
            output.rate(report.rate),
            output.rate(report.suspend_rate) if raw else "",
        )
        if report.host_copy:
            rows += [
                (report.model, f"{output.size(report.bytes)} on {report.device}, {output.size(report.freed or 0)} freed"),
                ("from", f"{report.host_copy}, {output.size(report.pinned or 0)} page-locked"),
                ("paths", report.used_paths or ""),
                ("same answers", "yes" if report.right else "NO"),
            ]  # fmt: skip
    _show_rest([made, output.facts(rows)], reports, trace)


@app.command()
@command
def links(
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="cuda:N.")] = "cuda:0",
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Copies of each size.")] = 5,
    json: Lines = False,
) -> None:
    """Time copies of 1 MiB to 1 GiB over one path, and over two, three, ... all paths of a GPU.

    Raw: as many bytes in all, a share of them by one plain copy to each of so many GPUs at once, over its own link.
    `glake-infer links` shows the paths. Medians.
    """
    from glake_infer.models.bench.links import bench_links

    with output.progress("timing") as progress:
        reports = bench_links(device, repeat=repeat, progress=progress)
    if _lines(reports, json):
        return
    made = output.table(">Size", ">Paths", ">To GPU", ">x one", ">Raw", ">To host", ">x one", ">Raw")
    for report in reports:
        output.add(
            made,
            output.size(report.bytes),
            str(report.paths),
            output.rate(report.to_device),
            f"{report.ratio_to_device:.2f}",
            output.rate(report.raw_to_device),
            output.rate(report.to_host),
            f"{report.ratio_to_host:.2f}",
            output.rate(report.raw_to_host),
        )
    output.show(made)


def register(parent: typer.Typer) -> None:
    """Add the family to the application."""
    parent.add_typer(app, name="bench")
