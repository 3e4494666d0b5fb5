"""`glake-infer links`: which links the GPUs have, and what they reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command

if TYPE_CHECKING:
    from glake_infer.models.bench.links import LinksReport


@command
def links(
    size: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of each copy.")] = "1GiB",
    json: output.Json = False,
) -> None:
    """Show every path of every GPU, and measure it: alone, and together with those before it.

    A path is one way between the host and a GPU: its own PCIe link, or a peer's. GLAKE_PATHS says which are used. Opens
    every GPU that the process sees.
    """
    from glake_infer.models.bench.links import examine_links

    with output.progress("measuring") as progress:
        report = examine_links(size=size, progress=progress)
    if json:
        output.print_json(report)
    else:
        _show(report)


def _show(report: LinksReport) -> None:
    named = output.table("To", "Via", "*GPU", "PCI", "Link", ">NUMA", "Peer")
    measured = output.table("To", "Via", ">To GPU", ">To host", ">All so far, to GPU", ">to host")
    for link in report.links:
        own = link.via == link.device
        output.add(
            named,
            link.device,
            "its own" if own else link.via,
            link.name,
            link.pci.lower(),
            link.speed or "-",
            "-" if link.numa is None else str(link.numa),
            "" if own else "yes" if link.peer_access else "no",
        )
        alone, together = (link.to_device, link.to_host), (link.together_to_device, link.together_to_host)
        cells = [output.rate(rate or None) for rate in (*alone, *together)]
        output.add(measured, link.device, "its own" if own else link.via, *cells)
    locked = {True: "yes", False: "NO: copies are slower (see `ulimit -l`, and the container)", None: "-"}
    kept = "kept" if report.figures_kept else "none kept yet"
    rows = [
        (
            "in flight",
            f"{output.size(report.in_flight_bound)} at most, of all GPUs together (GLAKE_IN_FLIGHT)",
        ),
        ("page-locked memory", locked[report.locked]),
        ("paths", f"{report.paths} (GLAKE_PATHS){_meaning(report.paths)}"),
        *((f"to {device}", ", ".join(via)) for device, via in report.used.items()),
        ("figures", f"{kept}: {report.figures_file}"),
    ]
    parts: list[Any] = [named, measured] if report.links else [report.note]
    output.show(*parts, output.facts(rows))


def _meaning(setting: str) -> str:
    return ": by peers on which the process has a pool" if setting == "auto" else ""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("links")(links)
