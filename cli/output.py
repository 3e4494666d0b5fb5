"""What commands print: tables of 80 columns, numbers with units, or one JSON document."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document (bytes, seconds) instead of tables.")
]
"""The option that every command has."""


def size(count: int) -> str:
    """Bytes for people."""
    from glake_infer.allocators.sizes import format_bytes

    return format_bytes(count)


def duration(seconds: float | None) -> str:
    """Seconds for people, three digits."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:#.3g} ms".replace(". ", " ") if seconds < 0.9995 else f"{seconds:.2f} s"


def rate(value: float | None) -> str:
    """Bytes per second for people, in GB/s as links are sold."""
    return "-" if value is None else f"{value / 1e9:.3g} GB/s"


def number(value: float | None) -> str:
    """Four significant digits."""
    return "-" if value is None else f"{value:.4g}"


def shape(axes: Sequence[int | str | None] | None) -> str:
    """`[1, n, ?]`; `?` is an axis of any size, `[...]` a tensor of any rank."""
    return "[...]" if axes is None else f"[{', '.join('?' if axis is None else str(axis) for axis in axes)}]"


def print_json(value: Any) -> None:
    """Write `value` (dataclasses and all) as the one document on stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` in JSON's types: dataclasses and manifest parts become objects, infinities and NaN null."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(*columns: str, title: str = "") -> Table:
    """A table without lines. A column whose name begins with `>` is right-aligned, with `*` may be folded."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", title=title or None,
                 title_justify="left", title_style="bold")  # fmt: skip
    for name in columns:
        made.add_column(
            name.lstrip(">*"),
            justify="right" if name.startswith(">") else "left",
            no_wrap=not name.startswith("*"),
            overflow="fold",
        )
    return made


def facts(rows: Sequence[tuple[str, str]], title: str = "") -> Table:
    """Two columns: what, and the value."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False, title=title or None,
                 title_justify="left", title_style="bold")  # fmt: skip
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name), Text(value))
    return made


def add(target: Table, *cells: str) -> None:
    """Add a row of plain text (names of weights and files may hold brackets, which are no markup)."""
    from rich.text import Text

    target.add_row(*(Text(cell) for cell in cells))


def show(*parts: Table | str) -> None:
    """Print tables and paragraphs to stdout, an empty line between them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    with console.capture() as captured:
        for index, part in enumerate(parts):
            if index:
                console.print()
            console.print(Text(part) if isinstance(part, str) else part)
    sys.stdout.write(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE))


def bullets(title: str, lines: Sequence[str]) -> Table:
    """A heading and one paragraph per line, each behind a dash."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False, title=title or None,
                 title_justify="left", title_style="bold")  # fmt: skip
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for line in lines:
        made.add_row("-", Text(line))
    return made


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with bytes and rate on stderr, while that is a terminal; yields what convert and export call.

    Called as (what is going on, bytes done, bytes in all); each new name starts a new bar.
    """
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from glake_infer.cli.progress import Bars

    with Bars(what) as update:
        yield update
