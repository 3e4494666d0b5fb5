"""`glake-infer convert`: an ONNX model becomes a package, its weights go to the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command

if TYPE_CHECKING:
    from glake_infer.models.convert import ConvertReport


@command
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX model.", show_default=False)],
    target: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="X.glake",
            help="The package. Default: beside the model.",
            show_default=False,
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Convert an ONNX model into a package.

    Weights of 1 KiB and more go to the store ($GLAKE_STORE), once per distinct content: a weight that another
    package has already brought takes no space again.
    """
    from glake_infer.models.convert import convert as convert_model

    with output.progress("converting") as progress:
        report = convert_model(model, target, progress=progress)
    if json:
        output.print_json(report)
    else:
        show(report)


def show(report: ConvertReport) -> None:
    """Print what a conversion did."""
    size = output.size
    rows = [
        ("weights", f"{report.weights} of {size(report.weight_bytes)}"),
        ("distinct", f"{report.distinct_weights} of {size(report.distinct_bytes)}"),
        ("  in the store already", size(report.stored_bytes)),
        ("  new in the store", size(report.new_bytes)),
        ("kept in the graph", f"{size(report.small_bytes)} (weights under 1 KiB)"),
        ("constants lifted", str(report.constants)),
        ("variants", ", ".join(report.variants)),
        ("runs", str(report.runs)),
        ("time", output.duration(report.seconds)),
    ]
    parts: list[Any] = [f"{report.source} -> {report.package}", output.facts(rows)]
    if report.notes:
        parts.append(output.bullets("Notes", report.notes))
    output.show(*parts)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert")(convert)
