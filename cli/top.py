"""`glake-infer top`: who holds which memory, live."""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glake_infer.allocators.errors import GlakeError
from glake_infer.cli import output
from glake_infer.cli.errors import command, complain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.text import Text

    from glake_infer.sharing.status import MachineStatus
    from glake_infer.window.observe import Watched

Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        metavar="PATH",
        help="Ask this broker, or process. Default: $GLAKE_BROKER, else this user's broker, and every process that "
        "shows itself.",
        show_default=False,
    ),
]


@command
def top(
    socket: Socket = None,
    interval: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.1, help="Ask again after so long. [default: 1]", show_default=False
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Show one picture and end, as where stdout is no terminal.")
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON document (bytes, seconds); with --interval one line each time."
        ),
    ] = False,
) -> None:
    """Show the memory of this machine's processes: who holds it, who shares it, which models sleep.

    Asks this user's broker, and processes that show themselves: those with GLAKE_MONITOR=1 in their environment, or that
    called gi.monitor(). `q` ends it.
    """
    from glake_infer.window.observe import watch

    if json:
        _print_json(socket, None if once else interval)
    elif once or not sys.stdout.isatty():
        _print_once(watch(socket))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _live(socket, interval or 1.0)


def _print_json(socket: Path | None, interval: float | None) -> None:
    from glake_infer.window.observe import watch

    status: MachineStatus | None = watch(socket).status
    if interval is None:
        output.print_json(status)
        return
    while True:
        if status:
            print(json_module.dumps(output.plain(status)), flush=True)
        time.sleep(interval)
        try:
            status = watch(socket).status
        except GlakeError as error:  # who went may come back
            status = None
            complain(str(error), mark="")


def _print_once(watched: Watched) -> None:
    from rich.console import Console

    from glake_infer.cli.top_view import picture

    console = Console(highlight=False, soft_wrap=True)
    lines = picture(watched.status, watched.problems, width=console.width, plain=_plain(console))
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    sys.stdout.write(captured.get())


def _live(socket: Path | None, interval: float) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    from glake_infer.window.observe import watch

    console = Console(highlight=False)
    asker = _Asker(socket, watch(socket))
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(Group(*asker.picture(console)), refresh=True)
            until = time.monotonic() + interval
            asker.ask()
            size = console.size
            while (left := until - time.monotonic()) > 0 or asker.busy:
                if pressed(min(max(left, 0.0), 0.1) or 0.1) in ("q", "Q", "\x1b", "\x04"):
                    return
                if console.size != size or (asker.busy and left < -interval):
                    break  # another window; or nobody answers, which is said


class _Asker:
    """Asks in a thread of its own, so that `q` is heard while somebody does not answer."""

    def __init__(self, socket: Path | None, first: Watched) -> None:
        self._socket = socket
        self._last = first
        self._problem = ""
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def ask(self) -> None:
        if not self.busy:
            self._thread = threading.Thread(target=self._ask, name="top", daemon=True)
            self._thread.start()

    def _ask(self) -> None:
        from glake_infer.window.observe import watch

        try:
            self._last, self._problem = watch(self._socket), ""
        except GlakeError as error:
            self._problem = str(error)

    def picture(self, console: Console) -> list[Text]:
        from glake_infer.cli.top_view import picture

        problems = [self._problem] if self._problem else list(self._last.problems)
        old = time.time() - self._last.status.time
        if self._problem or old > 10:
            problems.append(f"what follows is {old:.0f} s old.")
        width, height = console.size
        return picture(
            self._last.status, problems, width=width, height=height, plain=_plain(console), keys="q: quit"
        )


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give a function that waits so many seconds for a key; "" where none came, or there is no keyboard."""
    import select
    import termios
    import tty

    if not sys.stdin.isatty():

        def nothing(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield nothing
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 1).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("top")(top)
