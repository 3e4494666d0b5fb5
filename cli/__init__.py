"""The command line, `glake-infer`: one module per command or family of commands.

Commands call glake_infer.models and format what it returns. Heavy modules (onnx, numpy, ONNX Runtime) are
imported inside the functions that need them, so that every `--help` is quick and works without them.

Exit codes: 0 done; 2 an error that the message explains (also a usage error, also damage that
`store verify` found); 130 interrupted; 141 the reader of our output went away.
"""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType

import typer

from glake_infer.cli import (
    bench,
    broker,
    convert,
    demo,
    doctor,
    inspect,
    links,
    report,
    run,
    ship,
    store,
    top,
    trace,
    zoo,
)
from glake_infer.cli.errors import reported
from glake_infer.cli.group import Group
from glake_infer.version import __version__

app = typer.Typer(
    name="glake-infer",
    cls=Group,
    help="Run many ONNX models in one process: one pool of memory, every equal weight held once.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(
    cls=Group,
    epilog="`glake-infer --version` prints the version. GLAKE_DEBUG=1 shows the traceback of an error.",
)
def _root() -> None:
    pass


for _family in (
    convert,
    run,
    inspect,
    ship,
    store,
    broker,
    top,
    report,
    zoo,
    demo,
    doctor,
    links,
    trace,
    bench,
):
    _family.register(app)


def main() -> None:
    """Run the command line; never returns."""
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    with reported():
        if sys.argv[1:] == [
            "--version"
        ]:  # as an option of typer's it would cost every --help 0.15 s (pydantic)
            print(f"glake-infer {__version__}")
        else:
            app()
    sys.exit(0)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that temporary files are removed on the way out."""
    sys.exit(128 + number)
