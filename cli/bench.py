"""`glake-infer bench`: what the parts cost here, beside what a user would run instead."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command
from glake_infer.cli.group import Group

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="What the parts cost here, beside what a user would run instead."
)


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


def register(parent: typer.Typer) -> None:
    """Add the family to the application."""
    parent.add_typer(app, name="bench")
