"""`glake-infer broker`: the process that holds one copy of every weight for all processes of a user."""

from __future__ import annotations

import json as json_module
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glake_infer.cli.errors import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from glake_infer.sharing.broker import Event


@command
def broker(
    socket: Annotated[
        Path | None,
        typer.Option(
            "--socket",
            metavar="PATH",
            help="Listen here. Default: glake-infer/broker.sock in $XDG_RUNTIME_DIR, or in a folder of your own in /tmp.",
            show_default=False,
        ),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="[DEVICE=]SIZE",
            help="The most that weights and pools of all processes may take together, as 20GiB or cuda:0=20GiB; may be "
            "repeated. Default: what the device has.",
            show_default=False,
        ),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(
            "--exit-when-idle",
            metavar="SECONDS",
            min=0,
            help="End after so long without any process. Default: never.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        int | None,
        typer.Option(
            "--metrics",
            metavar="PORT",
            min=0,
            max=65535,
            help="Serve Prometheus metrics to this machine at this port.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Log one JSON object per line instead of plain lines.")
    ] = False,
) -> None:
    """Hold one copy of every weight, for all processes of this user on this machine.

    Processes that load models with broker="auto", or --broker auto, come to it by themselves, and start one that ends when
    they do if there is none. What a process that is killed had, and what makes room within a limit, stays here until its
    memory is needed; what a process gives back (close, suspend, trim) goes, if no other has it.

    It runs until SIGTERM or Ctrl-C. Processes go on without it: what they have loaded stays, and they come back to the next
    one. What happens is logged to stderr; `glake-infer top` shows who holds what.
    """
    from glake_infer.sharing.broker import Broker, Event
    from glake_infer.sharing.limits import parse_limits

    every, named = parse_limits(limits or ())
    log: Callable[[Event], None] = _json_line if json else _line
    serving = Broker(socket, limit=every, limits=named, idle_exit=idle, log=log)
    if metrics is None:
        serving.run()
        return
    from glake_infer.window.metrics import serve

    with serve(metrics, serving.status) as server:
        log(Event("metrics", f"served at {server.url}", {"url": server.url}))
        serving.run()


def _line(event: Event) -> None:
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    _write(f"{moment} {event.kind}: {event.text}\n")


def _json_line(event: Event) -> None:
    entry = {"time": time.time(), "event": event.kind, "text": event.text, **event.facts}
    _write(json_module.dumps(entry) + "\n")


def _write(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("broker")(broker)
