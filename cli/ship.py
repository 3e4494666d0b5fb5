"""`glake-infer export` and `import`: packages for other tools and other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command, fail


@command
def export(
    package: Annotated[Path, typer.Argument(metavar="X.glake", help="The package.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write an ordinary ONNX model with external data here.",
            show_default=False,
        ),
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option(
            "--archive", metavar="FILE", help="Write one file for `glake-infer import`.", show_default=False
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Write a package as an ordinary ONNX model, or as one archive.

    With -o, DIR/X.onnx and DIR/X.onnx.data hold real copies of everything, for any other ONNX tool. With
    --archive, one self-contained FILE carries the package to another machine.
    """
    from glake_infer.models.archive import export_archive
    from glake_infer.models.export import export as export_model

    if (folder is None) == (archive is None):
        fail("export needs one of -o DIR (an ONNX model) and --archive FILE (for `glake-infer import`).")
    with output.progress("exporting") as progress:
        if archive is not None:
            report = export_archive(package, archive, progress=progress)
        else:
            assert folder is not None
            report = export_model(package, folder, progress=progress)
    if json:
        output.print_json(report)
    else:
        output.show(f"{package} -> {report.target}: {report.weights} weights, {output.size(report.bytes)}")


@command
def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="An archive made by `glake-infer export`.", show_default=False),
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="X.glake",
            help="The package. Default: the archive's name, in this folder.",
            show_default=False,
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Take an archive into the store and write its package.

    Every weight's digest is checked on the way; weights that the store holds already are not written again.
    """
    from glake_infer.models.archive import import_archive

    with output.progress("importing") as progress:
        report = import_archive(file, target, progress=progress)
    if json:
        output.print_json(report)
    else:
        output.show(
            f"{file} -> {report.package}: {report.weights} weights, {output.size(report.distinct_bytes)} distinct, "
            f"{output.size(report.new_bytes)} new in the store"
        )


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("export")(export)
    app.command("import")(import_)
