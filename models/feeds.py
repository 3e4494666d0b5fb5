"""What the models of a run are fed, from texts as a command line gives them.

    [MODEL:]NAME=FILE.npy      one array
    [MODEL:]NAME=FILE.npz      the array NAME of the file, or its only one
    [MODEL:]FILE.npz           every array of the file, by name
    [MODEL:]NAME=1,128         the shape of generated data

MODEL is a model's name or its number (from 1); without it, every model that has such an input is meant. Names
of inputs may hold colons themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from glake_infer.allocators.errors import InputError
from glake_infer.models.manifest import Value
from glake_infer.models.values import generate


@dataclass(frozen=True, eq=False)
class Override:
    """One text: which input of which models (None: all) gets which array or shape."""

    text: str
    model: str | None
    name: str
    value: Any


def parse_overrides(texts: Sequence[str], names: Sequence[str]) -> list[Override]:
    """Read what `--input` says, files included; raises InputError naming the text."""
    found = []
    for text in texts:
        left, equals, file = text.rpartition("=") if "=" in text else ("", "", text)
        model, rest = _split_model(left if equals else file, names)
        if not equals:
            if not rest.endswith(".npz"):
                raise InputError(
                    f"--input {text}: expected [MODEL:]NAME=FILE.npy, or an .npz file of arrays by name."
                )
            arrays = _read(text, Path(rest))
            found += [
                Override(f"--input {text} ({name})", model, name, array) for name, array in arrays.items()
            ]
            continue
        arrays = _read(text, Path(file))
        if len(arrays) > 1 and rest not in arrays:
            raise InputError(f"--input {text}: the file has no array {rest!r}; it has {', '.join(arrays)}.")
        found.append(
            Override(f"--input {text}", model, rest, arrays.get(rest, next(iter(arrays.values()), None)))
        )
    return found


def parse_shapes(texts: Sequence[str], names: Sequence[str]) -> list[Override]:
    """Read what `--shape` says; raises InputError naming the text."""
    found = []
    for text in texts:
        left, equals, sizes = text.rpartition("=")
        model, name = _split_model(left, names)
        try:
            shape = tuple(int(part) for part in sizes.split(",")) if sizes else ()
        except ValueError:
            equals = ""
        if not equals or not name or any(size < 0 for size in shape):
            raise InputError(
                f"--shape {text}: expected [MODEL:]NAME=N,N,... with sizes of 0 and more, as input_ids=1,128."
            )
        found.append(Override(f"--shape {text}", model, name, shape))
    return found


def feeds_of(
    model: str,
    inputs: Sequence[Value],
    known: Sequence[Value],
    overrides: Sequence[Override],
    shapes: Sequence[Override],
    rng: np.random.Generator,
    used: set[int],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make one model's feeds; returns them and the names of those that were generated.

    `used` collects the ids of the texts that meant this model.

    Sizes of symbolic axes follow from what is given: where `input_ids [batch, length]` has the shape 1,128,
    a generated `attention_mask [batch, past + length]` gets 1,129: undeclared sizes are 1, and sums are sums.
    """
    names = {value.name for value in known}
    arrays = _meant(model, names, overrides, used)
    wanted = _meant(model, names, shapes, used)
    symbols: dict[str, int] = {}
    for value in known:
        array = arrays.get(value.name)
        given = wanted.get(value.name) if array is None else np.shape(array)
        if given is not None and value.shape is not None and len(given) == len(value.shape):
            for declared, size in zip(value.shape, given, strict=True):
                if isinstance(declared, str):
                    symbols.setdefault(declared, int(size))
    feeds: dict[str, Any] = dict(arrays)
    for value in inputs:
        if value.name in arrays:
            continue
        shape = wanted.get(value.name)
        if shape is None and value.shape is not None:
            shape = tuple(axis if isinstance(axis, int) else size_of(axis, symbols) for axis in value.shape)
        feeds[value.name] = generate(value, shape, rng)
    return feeds, tuple(value.name for value in inputs if value.name not in arrays)


def size_of(axis: str | None, symbols: Mapping[str, int]) -> int:
    """The size of an axis that is not declared; exporters write sums such as `past_sequence_length + 1`."""
    if axis is None or axis in symbols:
        return symbols.get(axis or "", 1)
    parts = [part.strip() for part in axis.split("+")]
    return sum(int(part) if part.isdecimal() else symbols.get(part, 1) for part in parts)


def _meant(model: str, names: set[str], items: Sequence[Override], used: set[int]) -> dict[str, Any]:
    """{input: value} of the texts that mean this model; one that names the model beats one that does not."""
    found: Mapping[str, Any] = {}
    for item in sorted(items, key=lambda item: item.model is not None):
        if item.model in (None, model) and item.name in names:
            used.add(id(item))
            found = {**found, item.name: item.value}
    return dict(found)


def _split_model(text: str, names: Sequence[str]) -> tuple[str | None, str]:
    """Split `MODEL:` off where MODEL is the name or the number of one of the models."""
    head, colon, rest = text.partition(":")
    if colon and head in names:
        return head, rest
    if colon and head.isdecimal() and 1 <= int(head) <= len(names):
        return names[int(head) - 1], rest
    return None, text


def _read(text: str, path: Path) -> dict[str, Any]:
    """Arrays of an .npy or .npz file; an .npy file's array has the name ''."""
    if not path.is_file():
        raise InputError(f"--input {text}: there is no file {path}.")
    try:
        with path.open("rb") as file:  # numpy leaves a file open that it opened and then refused
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"": content}
            return {name: content[name] for name in content.files}
    except (ValueError, EOFError, BadZipFile) as error:
        raise InputError(
            f"--input {text}: {path} is not an .npy or .npz file of plain arrays. "
            f"Write it with numpy.save or numpy.savez."
        ) from error
