"""`glake-infer store ls|verify|gc`: looking after the store of weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import FAILED, command
from glake_infer.cli.group import Group

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    cls=Group,
    rich_markup_mode="markdown",
    help="Look after the store of weights ($GLAKE_STORE).",
    no_args_is_help=True,
)


@app.command("ls")
@command
def ls(
    objects: Annotated[bool, typer.Option("--objects", help="List every object, the largest first.")] = False,
    json: output.Json = False,
) -> None:
    """List the packages of the store and what they take."""
    from glake_infer.maintenance import ls as list_store
    from glake_infer.store import Store

    listing = list_store(Store())
    if json:
        output.print_json(
            {
                **output.plain(listing),
                "bytes": listing.bytes,
                "unreferenced_bytes": listing.unreferenced_bytes,
            }
        )
        return
    parts: list[Any] = []
    if listing.packages:
        made = output.table("*Package", ">Weights")
        for path, total in sorted(listing.packages.items()):
            output.add(made, path, output.size(total))
        parts.append(made)
    if listing.missing_packages:
        parts.append(
            output.bullets("Gone from where they were (the next gc forgets them)", listing.missing_packages)
        )
    if objects and listing.objects:
        made = output.table("Digest", ">Bytes", ">Packages")
        for entry in sorted(listing.objects, key=lambda entry: -entry.bytes):
            output.add(made, entry.digest[:16], output.size(entry.bytes), str(len(entry.packages)))
        parts.append(made)
    rows = [
        ("store", listing.root),
        ("objects", f"{len(listing.objects)} of {output.size(listing.bytes)}"),
        ("  no package needs", output.size(listing.unreferenced_bytes)),
        ("prepared for this machine", output.size(listing.prepared_bytes)),
    ]
    if listing.packages:
        separate = sum(listing.packages.values())
        rows.insert(2, ("  if every package had its own", output.size(separate)))
    output.show(*parts, output.facts(rows))


@app.command("verify")
@command
def verify(
    remove: Annotated[bool, typer.Option("--remove", help="Delete damaged objects.")] = False,
    json: output.Json = False,
) -> None:
    """Read every object and compare its bytes with its name.

    Exit code 2 if an object that a package needs is damaged or missing. Converting or importing that package
    again restores it, once --remove has deleted what is damaged.
    """
    from glake_infer.maintenance import ls as list_store
    from glake_infer.maintenance import verify as verify_store
    from glake_infer.store import Store

    store = Store()
    with output.progress("verifying") as show_progress:
        done = 0
        total = 0
        if sys.stderr.isatty():
            listing = list_store(store)
            total = listing.bytes + listing.prepared_bytes

        def count(amount: int) -> None:
            nonlocal done
            done += amount
            show_progress("", done, total)

        report = verify_store(store, remove=remove, progress=count)
    if json:
        output.print_json({**output.plain(report), "ok": report.ok})
    else:
        parts: list[Any] = [f"{report.checked} objects of {output.size(report.bytes)} were read."]
        if report.damaged:
            parts.append(_hurt("Damaged" + (", deleted now" if remove else ""), report.damaged))
        if report.missing:
            parts.append(_hurt("Missing", report.missing))
        if report.derived:
            parts.append(
                f"{len(report.derived)} damaged objects were derived on this machine; they were deleted and are made "
                "again at the next load."
            )
        if report.ok:
            parts.append("Every object that a package needs is right.")
        else:
            first = "" if remove or not report.damaged else "Run `glake-infer store verify --remove`, then c"
            parts.append(f"{first or 'C'}onvert (or import) the packages named here again.")
        output.show(*parts)
    if not report.ok:
        sys.stdout.flush()
        sys.exit(FAILED)


def _hurt(title: str, objects: Mapping[str, Sequence[str]]) -> Table:
    made = output.table("Object", "*Packages that it hurts", title=title)
    for digest, packages in objects.items():
        output.add(made, digest[:16], "\n".join(packages) or "none")
    return made


@app.command("gc")
@command
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Fail instead of waiting for converts and loads.")
    ] = False,
    json: output.Json = False,
) -> None:
    """Remove the objects that no package needs, and what killed processes left.

    Waits for running converts and loads, so it never takes what they need. Models that are loaded already
    keep their weights. A package that was moved to another folder must be seen there once before, by
    `glake-infer inspect`.
    """
    from glake_infer.maintenance import gc as collect
    from glake_infer.store import Store

    report = collect(Store(), dry_run=dry_run, wait=not no_wait)
    if json:
        output.print_json(report)
        return
    rows = [
        (
            "would remove" if dry_run else "removed",
            f"{report.objects} objects of {output.size(report.bytes)}",
        ),
        ("kept", f"{report.kept_objects} objects of {output.size(report.kept_bytes)}"),
        ("prepared graphs", f"{report.prepared} of packages that are gone"),
        ("compiled engines", f"{report.compiled} that are in no package"),
        ("left by killed processes", str(report.temporary)),
    ]
    parts: list[Any] = [output.facts(rows)]
    if report.vanished:
        parts.append(output.bullets("Packages that are gone", report.vanished))
    if report.moved:
        parts.append(
            output.bullets("Packages that were renamed", [f"{a} -> {b}" for a, b in report.moved.items()])
        )
    output.show(*parts)


def register(parent: typer.Typer) -> None:
    """Add the family to the application."""
    parent.add_typer(app, name="store")
