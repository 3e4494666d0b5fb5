"""`glake-infer zoo`: models to try things on, built here with random weights."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.convert import show as show_conversion
from glake_infer.cli.errors import command, fail


class Dtype(StrEnum):
    """Element types of a model."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@command
def zoo(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A model of the zoo.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="X.onnx, or X.glake for a package. Default: NAME.onnx.",
            show_default=False,
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the models.")] = False,
    head: Annotated[
        str, typer.Option(metavar="NAME", help="Seeds the head's weights; `none` leaves the head out.")
    ] = "cls",
    labels: Annotated[
        int | None, typer.Option(metavar="N", help="Outputs of the head.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seeds all weights.")] = 0,
    variant: Annotated[
        int, typer.Option(metavar="N", help="Which of the trunk's weights --changed draws anew.")
    ] = 0,
    changed: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the trunk's bytes that differ, 0 to 1.")
    ] = 0.0,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Element type. Default: by the name.", show_default=False)
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            metavar="KEY=N",
            help="Another size than the named model's, as layers=6.",
            show_default=False,
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Write a model of real architecture with seeded random weights.

    Models of equal name, sizes and seed have equal trunks, whatever their heads: a family of fine-tunes.
    Without NAME, or with --list, the models are listed.
    """
    from glake_infer.models import zoo

    if list_ or name is None:
        if not list_ and target is not None:
            fail("which model shall be written? `glake-infer zoo --list` shows their names.")
        entries = zoo.names()
        if json:
            output.print_json(
                [{"name": e.name, "description": e.description, "bytes": e.bytes} for e in entries]
            )
            return
        made = output.table("Name", "*Description", ">Weights")
        for entry in entries:
            output.add(made, entry.name, entry.description, output.size(entry.bytes))
        output.show(made)
        return
    spec = zoo.spec(
        name,
        head=None if head == "none" else head,
        labels=labels,
        seed=seed,
        variant=variant,
        changed=changed,
        dtype=dtype.value if dtype else None,
        **_sizes(sizes or []),
    )
    target = target or Path(f"{name}.onnx")
    with output.progress("writing") as progress:
        if target.suffix == ".glake":
            report = zoo.convert(spec, target, progress=progress)
            written: Any = report
        else:
            path = zoo.write(spec, target, progress=lambda done, total: progress(target.name, done, total))
            external = zoo.build(spec).weights.total_bytes >= zoo.INLINE_LIMIT
            files = [path, path.with_name(f"{path.stem}.onnx.data")] if external else [path]
            written = {
                "path": str(path),
                "files": [str(f) for f in files],
                "bytes": sum(f.stat().st_size for f in files),
            }
    if json:
        output.print_json(written)
    elif target.suffix == ".glake":
        show_conversion(report)
    else:
        output.show(f"{' + '.join(written['files'])}: {output.size(written['bytes'])}")


def _sizes(given: list[str]) -> dict[str, int]:
    sizes = {}
    for text in given:
        key, _, value = text.partition("=")
        try:
            sizes[key] = int(value)
        except ValueError:
            fail(f"--size {text}: expected KEY=N with a whole number, as --size layers=6.")
    return sizes


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("zoo")(zoo)
