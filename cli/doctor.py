"""`glake-infer doctor`: what is installed, what works here, what to install for the rest."""

from __future__ import annotations

from typing import Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command


@command
def doctor(json: output.Json = False) -> None:
    """Show versions, devices, what works on this machine, and what to install for the rest."""
    from glake_infer.models.doctor import examine

    report = examine()
    if json:
        output.print_json(report)
        return
    versions = output.table("Package", "Version", "*")
    for package in report.packages:
        output.add(versions, package.name, package.version or "-", package.detail)
    size = output.size
    limit = (
        f", limited to {size(report.cgroup_limit)} by the cgroup" if report.cgroup_limit is not None else ""
    )
    rows = [
        ("CPU", f"{report.cpu}, {report.cores} cores"),
        ("memory", f"{size(report.memory)}, {size(report.memory_available)} available{limit}"),
    ]
    for gpu in report.gpus:
        memory = f", {size(gpu.memory)}" if gpu.memory else ""
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        rows.append((f"cuda:{gpu.index}", f"{gpu.name}{memory}{capability}"))
    if not report.gpus:
        rows.append(("GPU", report.gpu_note))
    elif report.gpu_note:
        rows.append(("driver", report.gpu_note))
    rows.append(("store", report.store))
    rows.append(("free disk there", size(report.store_free)))
    checks = output.table("Check", "", "*Detail")
    for check in report.checks:
        checks.add_row(check.name, "[green]ok[/]" if check.ok else "[red]no[/]", check.detail)
    parts: list[Any] = [versions, output.facts(rows), checks]
    if report.warnings:
        parts.append(output.bullets("Warnings", report.warnings))
    if report.advice:
        parts.append(output.bullets("To get more", report.advice))
    output.show(*parts)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("doctor")(doctor)
