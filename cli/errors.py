"""What a command does when something goes wrong: one message on stderr, an exit code, no traceback."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, ParamSpec

from glake_infer.allocators.errors import GlakeError

P = ParamSpec("P")

FAILED = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that its errors are reported, those of flushing its output too."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        with reported():
            function(*args, **kwargs)
            sys.stdout.flush()

    return wrapped


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn GlakeError, OSError, Ctrl-C and a closed pipe into a message and an exit code.

    GLAKE_DEBUG=1 lets every exception through. Other exceptions are defects of ours and keep their traceback.
    """
    try:
        yield
    except BrokenPipeError:
        # Whatever is still buffered would fail again when the interpreter flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except KeyboardInterrupt:
        if _debugging():
            raise
        complain("interrupted", mark="")
        sys.exit(INTERRUPTED)
    except (GlakeError, OSError) as error:
        if _debugging():
            raise
        fail(str(error) if isinstance(error, GlakeError) else explained(error))


def fail(message: str) -> NoReturn:
    """Print `error: message` to stderr and exit with code 2."""
    complain(message)
    sys.exit(FAILED)


def complain(message: str, mark: str = "error: ") -> None:
    """Print a line to stderr, `mark` in red where that is a terminal; the message is printed as it is."""
    from rich.console import Console
    from rich.text import Text

    with contextlib.suppress(OSError):
        Console(stderr=True, soft_wrap=True).print(Text.assemble((mark, "bold red"), message))


def explained(error: OSError) -> str:
    """One sentence about a file that could not be used."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"the operating system refused: {reason}."
    hint = {
        FileNotFoundError: "Check the path.",
        PermissionError: "Check the permissions of the file and of its folder.",
        IsADirectoryError: "Expected a file.",
        NotADirectoryError: "A part of the path is a file where a folder was expected.",
    }.get(type(error), "")
    other = f" -> {os.fsdecode(error.filename2)}" if error.filename2 is not None else ""
    return f"{os.fsdecode(error.filename)}{other}: {reason}. {hint}".rstrip()


def _debugging() -> bool:
    return os.environ.get("GLAKE_DEBUG", "") not in ("", "0")
