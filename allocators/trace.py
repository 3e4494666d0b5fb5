"""Traces: what an allocator was asked for, as text.

A line is `op id bytes stream`: op `a` allocate, `r` reserve (what lives as long as a session), `f` free.
The id names the allocation until it is freed; the stream is a number, -1 when none was given. At a free,
bytes and stream repeat those of the allocation, or are 0 and -1. Lines that begin with `#` and empty lines
mean nothing. A name that ends with `.gz` is compressed.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from .errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Step", "Trace", "from_steps", "read", "write"]

MOST_BYTES = 1 << 62
FORMAT = "`op id bytes stream`, where op is a (allocate), r (reserve) or f (free)"


class Step(NamedTuple):
    """A line of a trace."""

    op: str  # a, r, f
    id: int
    bytes: int
    stream: int  # -1: none


@dataclass(frozen=True, eq=False)
class Trace:
    """A valid trace, as columns for the replay.

    Attributes:
        name: the file's name, without folder and suffixes.
        operations: the letters, as bytes.
        slots: dense numbers of the allocations; one that was freed is given out again.
        bytes: as asked for; a free repeats its allocation's.
        streams: dense numbers of the streams in order of appearance, -1 for none.
        stream_count: how many streams there are.
        allocations: how many allocations there are.
        peak_requested: the largest sum of the bytes that are alive.
        live_bytes: what is alive after the last line.
    """

    name: str
    operations: npt.NDArray[np.uint8]
    slots: npt.NDArray[np.uint32]
    bytes: npt.NDArray[np.uint64]
    streams: npt.NDArray[np.int32]
    stream_count: int
    allocations: int
    peak_requested: int
    live_bytes: int

    def __len__(self) -> int:
        return len(self.operations)

    def steps(self) -> Iterator[Step]:
        """Give the lines again; the slots are their ids."""
        for operation, slot, size, stream in zip(
            self.operations.tolist(),
            self.slots.tolist(),
            self.bytes.tolist(),
            self.streams.tolist(),
            strict=True,
        ):
            yield Step(chr(operation), slot, size, stream)


def read(path: str | os.PathLike[str]) -> Trace:
    """Read and check a trace.

    Raises `InputError`, with the number of the line and what was expected, for an unknown operation, an id
    that is alive already or that is not, a number out of its range, a line that is cut short, and a file
    that is no text or cannot be read.
    """
    path = Path(path)
    try:
        with _opened(path, "r") as file:
            return _from_lines(path, file)
    except FileNotFoundError as error:
        raise InputError(f"there is no trace {path}: name a file that `pool.record()` saved") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(
            f"trace {path} cannot be read: {error}. A trace is a text file of lines {FORMAT}, or one compressed "
            "with gzip whose name ends with .gz; record or copy it again."
        ) from error


def write(
    path: str | os.PathLike[str], steps: Iterable[Step | tuple[str, int, int, int]], comment: str = ""
) -> Path:
    """Write a trace, compressed where the name ends with `.gz`; an existing file is replaced at the end.

    Raises OSError, with nothing left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with _opened(temporary, "w") as file:
            file.writelines(f"# {line}\n" for line in comment.splitlines())
            file.writelines(f"{op} {id} {size} {stream}\n" for op, id, size, stream in steps)  # noqa: A001
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def from_steps(steps: Iterable[Step | tuple[str, int, int, int]], name: str = "trace") -> Trace:
    """Check steps and make a trace of them; raises `InputError` as `read` does."""
    return _from_lines(Path(name), (" ".join(map(str, step)) + "\n" for step in steps))


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[IO[str]]:
    if path.suffix == ".gz":  # no time in the header: the same trace has the same bytes
        with (
            path.open(mode + "b") as raw,
            gzip.GzipFile(filename="", fileobj=cast(Any, raw), mode=mode + "b", mtime=0) as packed,
        ):
            import io

            with io.TextIOWrapper(cast(Any, packed), encoding="utf-8") as file:
                yield file
    else:
        with path.open(mode, encoding="utf-8") as file:
            yield file


def _from_lines(path: Path, lines: Iterable[str]) -> Trace:
    import numpy as np

    operations, slots, sizes, streams = bytearray(), [], [], []
    alive: dict[int, tuple[int, int]] = {}  # id -> slot, bytes
    unused: list[int] = []
    numbers: dict[int, int] = {-1: -1}
    live = peak = allocations = made = 0

    def bad(number: int, what: str, line: str) -> InputError:
        return InputError(
            f"trace {path}, line {number}: {what}. Received {line.strip()[:80]!r}; expected {FORMAT}."
        )

    for number, line in enumerate(lines, 1):
        if line.startswith("#") or not line.strip():
            continue
        parts = line.split()
        if len(parts) != 4:
            raise bad(number, f"{len(parts)} fields instead of 4 (was the file cut short?)", line)
        operation = parts[0]
        if operation not in ("a", "r", "f"):
            raise bad(number, f"there is no operation {operation!r}", line)
        try:
            name, size, stream = map(int, parts[1:])
        except ValueError:
            raise bad(number, "id, bytes and stream are no whole numbers", line) from None
        if name < 0 or not 0 <= size < MOST_BYTES or stream < -1:
            raise bad(number, "id and bytes are at least 0 (bytes below 2**62), a stream at least -1", line)
        if operation == "f":
            if name not in alive:
                raise bad(
                    number, f"id {name} is freed and not alive: it was freed before, or never allocated", line
                )
            slot, asked = alive.pop(name)
            if size not in (0, asked):
                raise bad(
                    number, f"id {name} was allocated with {asked} bytes, a free repeats them or says 0", line
                )
            unused.append(slot)
            live -= asked
            size = asked
        else:
            if name in alive:
                raise bad(number, f"id {name} is allocated again and was not freed", line)
            if unused:
                slot = unused.pop()
            else:
                slot, made = made, made + 1
            alive[name] = slot, size
            allocations += 1
            live += size
            peak = max(peak, live)
        operations.append(ord(operation))
        slots.append(slot)
        sizes.append(size)
        streams.append(numbers.setdefault(stream, len(numbers) - 1))
    name_only = path.name.removesuffix(".gz").removesuffix(".trace")
    return Trace(
        name=name_only,
        operations=np.frombuffer(bytes(operations), np.uint8),
        slots=np.array(slots, np.uint32),
        bytes=np.array(sizes, np.uint64),
        streams=np.array(streams, np.int32),
        stream_count=len(numbers) - 1,
        allocations=allocations,
        peak_requested=peak,
        live_bytes=live,
    )
