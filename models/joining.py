"""Requests that come at the same time, run as one where that gives each of them the same results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glake_infer.allocators.errors import DriverError, GlakeError, InputError
from glake_infer.models.model import Model
from glake_infer.models.values import check_feeds

Feeds = Mapping[str, Any]
Results = dict[str, np.ndarray[Any, Any]]
Run = Callable[[str, Feeds, Sequence[str] | None], Results]
"""Runs the model of a name on feeds, for some of its outputs or all."""


@dataclass(frozen=True)
class Request:
    """What somebody asks a model."""

    name: str
    feeds: Feeds
    outputs: Sequence[str] | None


@dataclass(frozen=True)
class Failed:
    """Instead of results."""

    error: Exception


def run_together(
    requests: Sequence[Request], models: Mapping[str, Model], run: Run
) -> list[Results | Failed]:
    """Answer each request, in order; those that fit together are joined along the first axis and run as one.

    They fit where they ask the same of the same model, the first axis of all its inputs and outputs is free, and their other
    axes are equal. Where a joined run fails, or its outputs cannot be told apart, each is run alone: one bad
    request spoils no other. Raises nothing of the models'.
    """
    done: dict[int, Results | Failed] = {}
    groups: dict[Any, list[tuple[int, Feeds]]] = {}
    for number, request in enumerate(requests):
        try:
            model = models.get(request.name)
            fit = _fit(model, request) if model else None
        except InputError as error:
            done[number] = Failed(error)
            continue
        key, feeds = fit or (number, request.feeds)
        groups.setdefault(key, []).append((number, feeds))
    for members in groups.values():
        request = requests[members[0][0]]
        done.update(_run_joined(request, members, run) or _run_alone(request, members, run))
    return [done[number] for number in range(len(requests))]


def _fit(model: Model, request: Request) -> tuple[Any, Feeds] | None:
    """What requests must agree in to be run as one, and the checked feeds; None for one that is to run alone.

    Raises InputError for feeds that the model cannot take.
    """
    feeds = check_feeds(model.inputs, model.overridable, request.feeds)
    values = [*model.inputs, *model.outputs]
    if not feeds or any(not value.shape or isinstance(value.shape[0], int) for value in values):
        return None
    if feeds.keys() != {value.name for value in model.inputs}:
        return None  # weights were fed too
    if not all(isinstance(array, np.ndarray) and array.ndim for array in feeds.values()):
        return None
    if len({len(array) for array in feeds.values()}) != 1:
        return None
    shapes = tuple((name, array.dtype.str, array.shape[1:]) for name, array in sorted(feeds.items()))
    outputs = None if request.outputs is None else tuple(request.outputs)
    return (request.name, outputs, shapes), feeds


def _run_joined(
    request: Request, members: list[tuple[int, Feeds]], run: Run
) -> dict[int, Results | Failed] | None:
    """None where each is to be run alone."""
    if len(members) == 1:
        return None
    rows = [len(next(iter(feeds.values()))) for _, feeds in members]
    joined = {name: np.concatenate([feeds[name] for _, feeds in members]) for name in members[0][1]}
    try:
        results = run(request.name, joined, request.outputs)
    except DriverError as error:
        return {number: Failed(error) for number, _ in members}
    except GlakeError:  # too large together, or one of them is bad
        return None
    if not results or any(array.shape[:1] != (sum(rows),) for array in results.values()):
        return None
    ends = np.cumsum(rows)[:-1]
    parts = {name: np.split(array, ends) for name, array in results.items()}
    return {
        number: {name: part[index] for name, part in parts.items()}
        for index, (number, _) in enumerate(members)
    }


def _run_alone(request: Request, members: list[tuple[int, Feeds]], run: Run) -> dict[int, Results | Failed]:
    done: dict[int, Results | Failed] = {}
    for number, feeds in members:
        try:
            done[number] = run(request.name, feeds, request.outputs)
        except Exception as error:
            done[number] = Failed(error)
    return done
