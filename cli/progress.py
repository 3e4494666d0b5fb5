"""Progress bars on stderr. Imports rich, so only `output.progress` imports this, when there is a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TransferSpeedColumn
from rich.text import Text

from glake_infer.allocators.sizes import format_bytes

FEW = 1 << 14
"""A total below this counts things, one above it bytes."""


class _Done(DownloadColumn):
    def render(self, task: Task) -> Text:
        if task.total is not None and task.total < FEW:
            return Text(f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")
        return super().render(task)


class _Rate(TransferSpeedColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None or (task.total is not None and task.total < FEW):
            return Text("")
        return Text(f"{format_bytes(int(speed))}/s", style="progress.data.speed")


class Bars:
    """One bar at a time: a new name of what is going on replaces the bar before it; a full one goes.

    `with Bars("exporting") as update:` gives a function `update(name, done, total)`.
    """

    def __init__(self, what: str) -> None:
        """Write `what` before every name."""
        self._what = what
        self._tasks: dict[str, TaskID] = {}
        self._shown = ""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            _Done(binary_units=True),
            _Rate(),
            console=Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Move the bar called `name`; from 0 on it begins anew."""
        bars, task = self._progress, self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = bars.add_task(f"{self._what} {name}".strip(), total=total)
        elif not done:
            bars.reset(task, total=total)
        if name != self._shown:
            for other in bars.task_ids:
                bars.update(other, visible=False)
            self._shown = name
        bars.update(task, completed=done, total=total, visible=done < total)
