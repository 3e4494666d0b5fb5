"""The command line, `glake-infer`: one module per command or family of commands.

Commands call glake_infer.models and format what it returns. Heavy modules (onnx, numpy, ONNX Runtime) are
imported inside the functions that need them, so that every `--help` is quick and works without them.

Exit codes: 0 done; 2 an error that the message explains (also a usage error, also damage that
`store verify` found); 130 interrupted; 141 the reader of our output went away.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from glake_infer.cli import convert, demo, doctor, inspect, run, ship, store, zoo
from glake_infer.cli.errors import reported

app = typer.Typer(
    name="glake-infer",
    help="Run many ONNX models in one process: one pool of memory, every equal weight held once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from glake_infer.version import __version__

        typer.echo(f"glake-infer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _family in (convert, run, inspect, ship, store, zoo, demo, doctor):
    _family.register(app)


def main() -> None:
    """Run the command line; never returns."""
    signal.signal(signal.SIGTERM, _terminate)
    with reported():
        app()
    sys.exit(0)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that temporary files are removed on the way out."""
    sys.exit(128 + number)
