"""`glake-infer trace`: replay recorded allocations on the pool and on other allocators, and draw them."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command, fail
from glake_infer.cli.group import Group

if TYPE_CHECKING:
    from glake_infer.allocators.twins import ReplayReport

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Recorded allocations: replay them on the pool and on other allocators, draw them.",
)


@app.command()
@command
def replay(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE", help="Files that pool.record() saved.", show_default=False),
    ],
    allocator: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            help="glake, ort-arena, ort-arena-same; on the CPU also malloc; on CUDA also ort-mempool, "
            "cuda-async, torch, torch-expandable, rmm.",
        ),
    ] = "glake",
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda:N.")] = "cpu",
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Replays of each trace.")] = 1,
    limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Limit of the pool, as 4GiB.", show_default=False),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line per trace and allocator.")
    ] = False,
) -> None:
    """Replay traces, as fast as the allocator goes, and show the memory that it held.

    Requested is the largest sum of live bytes as asked for, reserved the most that the allocator took from the
    device. The time is that of the last replay. Every replay runs in a process of its own.
    """
    from glake_infer.allocators import twins
    from glake_infer.allocators.sizes import parse_bytes

    chosen = [name.strip() for name in allocator.split(",") if name.strip()]
    if not chosen:
        fail("--allocator names none: expected a name, or several with commas between them.")
    for name in chosen:
        twins.check(name, device)
    bound = None if limit is None else parse_bytes(limit)
    reports: list[ReplayReport] = []
    total = len(traces) * len(chosen)
    with output.progress("replaying") as progress:
        for path in traces:
            for name in chosen:
                progress("traces", len(reports), total)
                report = twins.replay(path, name, device, repeat=repeat, limit=bound)
                reports.append(report)
                if json:
                    print(json_module.dumps(output.plain(report)), flush=True)
    if not json:
        _show(reports)


def _show(reports: list[ReplayReport]) -> None:
    made = output.table("*Trace", "Allocator", ">Requested", ">Reserved", ">Ratio", ">Calls", ">Time")
    for report in reports:
        output.add(
            made,
            report.trace,
            report.allocator,
            output.size(report.peak_requested),
            output.size(report.peak_reserved),
            "-" if report.ratio is None else f"{report.ratio:.3f}",
            "-" if report.driver_calls is None else str(report.driver_calls),
            output.duration(report.seconds),
        )
    output.show(made)


@app.command()
@command
def plot(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A file that pool.record() saved.", show_default=False)
    ],
    target: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The picture: X.png or X.svg.", show_default=False
        ),
    ],
    allocator: Annotated[str, typer.Option(metavar="NAME", help="Only glake shows its addresses.")] = "glake",
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda:N.")] = "cpu",
    json: output.Json = False,
) -> None:
    """Replay a trace on the pool and draw memory over time and the address space at the peak."""
    from glake_infer.models.trace_plot import plot as draw

    if allocator != "glake":
        fail(
            f"--allocator {allocator}: only glake can be drawn. Compare others with `glake-infer trace replay`."
        )
    with output.progress("replaying") as progress:
        report = draw(trace, target, device=device, progress=progress)
    if json:
        output.print_json(report)
    else:
        output.show(f"wrote {target}")


def register(parent: typer.Typer) -> None:
    """Add the family to the application."""
    parent.add_typer(app, name="trace")
