"""`glake-infer report`: the memory of this machine's processes as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command, complain
from glake_infer.cli.top import Socket


@command
def report(
    socket: Socket = None,
    target: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page.")] = Path(
        "report.html"
    ),
    json: output.Json = False,
) -> None:
    """Write one HTML page: a map of the memory, who shares what with whom, and what sharing saves.

    It needs nothing beside itself: no network, no other file. Who is asked is as for `glake-infer top`.
    """
    from glake_infer.window.observe import watch
    from glake_infer.window.report import write_report

    watched = watch(socket)
    for problem in watched.problems:
        complain(problem, mark="not in the report: ")
    written = write_report(watched.status, target)
    if json:
        output.print_json(written)
    else:
        processes = sum(len(device.processes) for device in watched.status.devices)
        output.show(f"{target}: {processes} processes, {output.size(written.bytes)}")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("report")(report)
