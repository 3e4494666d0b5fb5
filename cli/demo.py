"""`glake-infer demo`: four models on one pool beside plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from glake_infer.models.demo import DemoReport, Side

TITLES = {"plain": "plain ORT", "fast": "glake fast", "lean": "glake lean"}


@command
def demo(
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep models, packages and store in this new folder.", show_default=False
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Convert four models with one trunk, run them together, and compare with plain ONNX Runtime.

    Takes about a minute and about 2 GiB of disk, which are given back unless --keep names a folder for them.
    """
    from glake_infer.models import demo as logic

    with output.progress("") as progress:
        report = logic.demo(keep=keep, progress=progress)
    if json:
        output.print_json(report)
    else:
        show(report)


def show(report: DemoReport) -> None:
    """Print what the demo found."""
    size = output.size
    made = output.table("", *(f">{TITLES[side.name]}" for side in report.sides))

    def row(name: str, value: Callable[[Side], str]) -> None:
        output.add(made, name, *(value(side) for side in report.sides))

    row("memory, all four loaded", lambda side: size(side.memory))
    row("  of the distinct weights", lambda side: f"{side.memory / report.distinct_bytes:.2f}x")
    row("latency, median", lambda side: output.duration(side.latency))
    row("  of plain ORT's, paired", lambda side: f"{side.ratio:.3f}x")
    row("loading, first time", lambda side: output.duration(side.load))
    row("largest difference", lambda side: "-" if side.name == "plain" else f"{side.difference:.1e}")
    stored = ", ".join(size(count) for count in report.stored)
    intro = (
        f"Four models ({', '.join(report.models)}) of one trunk: {size(report.weight_bytes)} of weights, "
        f"{size(report.distinct_bytes)} of them distinct. Converting them added to the store: {stored}."
    )
    legend = (
        "Memory is what the operating system counts (proportional set size, every weight touched, and "
        "what the pool keeps), less what the same process had before loading. Each side ran every model "
        f"{report.runs} times, in turn with plain ONNX Runtime. All took {output.duration(report.seconds)}."
    )
    parts: list[Any] = [intro, made, legend]
    if report.folder:
        parts.append(
            f"Kept in {report.folder}. Try: "
            f"GLAKE_STORE={report.folder}/store glake-infer run {report.folder}/*.glake"
        )
    output.show(*parts)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo")(demo)
