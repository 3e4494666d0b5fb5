"""Waking a model that sleeps, beside raw copies of page-locked memory and what a user would do instead."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glake_infer.allocators.errors import GlakeError, InputError, MissingDependencyError
from glake_infer.holding import HostCopy
from glake_infer.models.bench.load import LeftOut, writable
from glake_infer.models.bench.processes import ask, told
from glake_infer.models.bench.subjects import missing, workshop
from glake_infer.models.progress import Progress

UsedPaths = Literal["own", "all"]
RAW_TURNS = 2
"""Raw copies are measured before and after."""


@dataclass(frozen=True)
class ResumeReport:
    """One side. Bytes, seconds and bytes per second; medians of all turns."""

    model: str
    side: str
    """"glake-infer"; "raw copy, one path" and "raw copy, all paths" (page-locked memory, no model); "torch" (`copy_` from
    a pinned tensor); "onnxruntime" (the session made anew, until it has answered)."""
    device: str
    bytes: int
    turns: tuple[float, ...]
    """Seconds of waking; for raw copies bytes per second."""
    rate: float
    """To the device."""
    resume: float | None = None
    suspend: float | None = None
    suspend_rate: float | None = None
    """For raw copies: the rate to the host."""
    paths: int | None = None
    """Of raw copies: how many."""
    host_copy: str | None = None
    """Of ours, as the rest."""
    used_paths: str | None = None
    freed: int | None = None
    """The bytes that `suspend` gave back."""
    pinned: int | None = None
    in_flight: int | None = None
    in_flight_bound: int | None = None
    verified: str | None = None
    right: bool | None = None
    """Whether all answers after waking were the same bits."""


def bench_resume(
    model: str | os.PathLike[str] | None = None,
    *,
    size: int | str | None = None,
    host_copy: HostCopy = "pinned",
    paths: UsedPaths = "own",
    device: str = "cpu",
    repeat: int = 5,
    shapes: Sequence[str] = (),
    trace: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[ResumeReport | LeftOut]:
    """Suspend and resume a model `repeat` times; see `bench_load` for the arguments, errors, and what is left."""
    if repeat < 1:
        raise InputError(f"repeat={repeat}: expected 1 or more.")
    if host_copy not in ("pinned", "store") or paths not in ("own", "all"):
        raise InputError(
            f"host_copy={host_copy!r}, paths={paths!r}: expected 'pinned' or 'store', 'own' or 'all'."
        )
    target = writable(trace)
    with workshop(model, size, device=device, folder=folder, progress=progress) as shop:
        (subject,) = shop.subjects
        about = {"device": shop.device, "shapes": list(shapes), "repeat": repeat, "bytes": subject.bytes}

        def report(side: str, answer: dict[str, Any], **more: Any) -> ResumeReport:
            size, turns = more.pop("bytes", subject.bytes), tuple(answer["resumes"])
            woken, slept = statistics.median(turns), statistics.median(answer["suspends"] or [0])
            return ResumeReport(
                subject.name, side, shop.device, size, turns, size / woken, woken,
                slept or None, size / slept if slept else None, **more,
            )  # fmt: skip

        def measured(which: UsedPaths) -> dict[str, Any]:
            request = {"task": "raw", "side": "raw copy", "device": shop.device, "paths": which}
            return ask(request, progress=told(progress, f"copying over {which} paths"))

        raws: dict[UsedPaths, list[dict[str, Any]]] = {"own": [measured("own")], "all": [measured("all")]}
        ours = ask(
            {**about, "task": "nap", "side": "glake-infer", "path": str(subject.package),
             "store": str(subject.store.root), "host_copy": host_copy, "trace": target},
            {"GLAKE_PATHS": paths},
            told(progress, "suspending and resuming"),
        )  # fmt: skip
        kept = ("bytes", "freed", "pinned", "in_flight", "in_flight_bound", "verified", "right")
        known = {name: ours[name] for name in kept}
        found: list[ResumeReport | LeftOut] = [
            report("glake-infer", ours, host_copy=host_copy, used_paths=paths, **known)
        ]
        twins = {
            "onnxruntime": {**about, "task": "make again", "path": str(subject.onnx)},
            "torch": {**about, "task": "copy"},
        }
        for side, request in twins.items():
            try:
                if side == "torch" and (reason := missing("torch")):
                    raise MissingDependencyError(reason)
                found.append(
                    report(side, ask({**request, "side": side}, progress=told(progress, f"timing {side}")))
                )
            except GlakeError as error:
                found.append(LeftOut(side, str(error)))
        for which, answers in raws.items():
            answers += [measured(which) for _ in range(RAW_TURNS - 1)]
            name = "raw copy, one path" if which == "own" else "raw copy, all paths"
            down, up = (tuple(answer[way] for answer in answers) for way in ("to_device", "to_host"))
            found.append(
                ResumeReport(
                    subject.name, name, shop.device, subject.bytes, down, statistics.median(down),
                    suspend_rate=statistics.median(up), paths=answers[0]["paths"],
                )
            )  # fmt: skip
        return found
