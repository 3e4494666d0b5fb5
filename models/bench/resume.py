"""Waking a model that sleeps, beside raw copies of page-locked memory and what a user would do instead."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glake_infer.allocators.errors import InputError, MissingDependencyError
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
    resume: float | None
    rate: float
    """To the device."""
    suspend: float | None
    suspend_rate: float | None
    """For raw copies: the rate to the host."""
    paths: int | None
    """Of raw copies."""
    host_copy: str | None
    used_paths: str | None
    freed: int | None
    """The bytes that `suspend` gave back."""
    pinned: int | None
    in_flight: int | None
    in_flight_bound: int | None
    verified: str | None
    right: bool | None
    """Whether all answers after waking were the same bits."""
    turns: tuple[float, ...]


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
            found: dict[str, Any] = {
                "bytes": subject.bytes, "paths": None, "host_copy": None, "used_paths": None, "freed": None,
                "pinned": None, "in_flight": None, "in_flight_bound": None, "verified": None, "right": None, **more,
            }  # fmt: skip
            size, slept = found["bytes"], answer["suspends"] and statistics.median(answer["suspends"])
            woken = statistics.median(answer["resumes"])
            found |= {
                "resume": woken,
                "rate": size / woken if woken else 0.0,
                "turns": tuple(answer["resumes"]),
            }
            found |= {"suspend": slept or None, "suspend_rate": size / slept if slept else None}
            return ResumeReport(model=subject.name, side=side, device=shop.device, **found)

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
        plain = {**about, "task": "make again", "side": "onnxruntime", "path": str(subject.onnx)}
        answer = ask(plain, progress=told(progress, "making sessions anew"))
        found.append(report("onnxruntime", answer))
        if reason := missing("torch"):
            found.append(LeftOut("torch", reason))
        else:
            try:
                answer = ask(
                    {**about, "task": "copy", "side": "torch"}, progress=told(progress, "copying by torch")
                )
                found.append(report("torch", answer))
            except MissingDependencyError as error:
                found.append(LeftOut("torch", str(error)))
        for which, name in (("own", "raw copy, one path"), ("all", "raw copy, all paths")):
            answers = raws[which]  # type: ignore[index]
            answers += [measured(which) for _ in range(RAW_TURNS - 1)]  # type: ignore[arg-type]
            rates = [statistics.median(a[way] for a in answers) for way in ("to_device", "to_host")]
            found.append(
                ResumeReport(
                    model=subject.name, side=name, device=shop.device, bytes=subject.bytes, resume=None,
                    rate=rates[0], suspend=None, suspend_rate=rates[1], paths=answers[0]["paths"], host_copy=None,
                    used_paths=None, freed=None, pinned=None, in_flight=None, in_flight_bound=None, verified=None,
                    right=None, turns=tuple(a["to_device"] for a in answers),
                )
            )  # fmt: skip
        return found
