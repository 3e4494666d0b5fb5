"""How an engine is to be built: the options of `glake-infer convert --engine`, checked."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glake_infer.allocators.errors import InputError
from glake_infer.models.manifest import Shapes, Value
from glake_infer.models.tensorrt.library import CARDS, Kind, check_kind

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""The smallest, the usual and the largest shape of each input: {"ids": ((1, 8), (1, 128), (8, 512))}."""

SYNTAX = "NAME=MIN:OPT:MAX, each like 1x128"
EMPTY_SYMBOLS = ("?", "unk", "None", "")
"""What exporters write for an axis that they know nothing of."""

EXAMPLE_SIZES = (1, 8, 64)
MOST_AXES = 8
MOST_SIZE = (1 << 31) - 1
MOST_BYTES = 1 << 62
CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What engine to build. Raises InputError where a value is out of its range."""

    kind: Kind
    profiles: tuple[Profile, ...] = ()
    """Optimization profiles: an engine runs shapes between one's smallest and largest, best at its usual ones."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities of the GPUs to build for ("8.6"). Empty: those of the named cards with TensorRT-RTX, this
    machine's GPU with the full TensorRT."""
    streaming: bool = False
    """Weights can be streamed from host memory, under a budget that is set when the engine runs."""
    workspace: int | None = None
    """Most bytes of scratch memory of a layer; None: what TensorRT takes (all of the GPU)."""
    allocator: Any = field(default=None, compare=False)
    """An IGpuAllocator for the builder, such as `gi.TensorRTAllocator(pool)`; only where a GPU is there to build with."""

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.workspace is not None and not (
            isinstance(self.workspace, int) and 0 <= self.workspace <= MOST_BYTES
        ):
            raise InputError(
                f"workspace={self.workspace!r} is no number of bytes: expected an integer from 0 to {MOST_BYTES}, or None "
                "for all that there is."
            )
        if isinstance(self.capabilities, str) or not all(map(_is_capability, self.capabilities)):
            raise InputError(
                f"capabilities={self.capabilities!r} are no compute capabilities: expected a tuple of texts such as '8.9'."
            )
        if isinstance(self.profiles, Mapping) or not all(map(_is_profile, self.profiles)):
            raise InputError(
                f"profiles={self.profiles!r} cannot be read: expected a tuple of dictionaries, each with the smallest, the "
                "usual and the largest shape of inputs in integers, such as ({'ids': ((1, 8), (1, 128), (8, 512))},)."
            )


def _is_capability(text: object) -> bool:
    return isinstance(text, str) and CAPABILITY.fullmatch(text) is not None


def _is_profile(profile: object) -> bool:
    """Whether it has three shapes for each of its inputs."""
    try:
        return isinstance(profile, Mapping) and all(
            isinstance(name, str)
            and len(shapes) == 3
            and all(abs(operator.index(axis)) <= MOST_SIZE for shape in shapes for axis in shape)
            for name, shapes in profile.items()
        )
    except TypeError:  # something that has no axes, or an axis that is no integer
        return False


def parse_profiles(texts: Iterable[str]) -> tuple[Profile, ...]:
    """Optimization profiles from the command line, `NAME=MIN:OPT:MAX` each; a name that comes again begins the next one."""
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]] = []
    for text in texts:
        name, equals, shapes = text.rpartition("=")
        parts = shapes.split(":")
        if not equals or not name or len(parts) != 3:
            raise InputError(f"--profile {text!r} cannot be read: expected {SYNTAX}.")
        if not profiles or name in profiles[-1]:
            profiles.append({})
        minimum, usual, maximum = (_shape(part, text) for part in parts)
        profiles[-1][name] = (minimum, usual, maximum)
    return tuple(profiles)


def _shape(part: str, text: str) -> Shape:
    axes = part.split("x")
    if (
        not all(axis.isascii() and axis.isdecimal() and len(axis) < 10 for axis in axes)
        or len(axes) > MOST_AXES
    ):
        raise InputError(f"--profile {text!r} cannot be read: {part!r} is no shape. Expected {SYNTAX}.")
    return tuple(int(axis) for axis in axes)


def parse_cards(texts: Iterable[str]) -> tuple[str, ...]:
    """Compute capabilities of cards by name, or as they are ("8.9"), each once."""
    found = []
    for text in texts:
        name = text.lower().removeprefix("rtx").strip(" -")
        if name in CARDS:
            found.append(CARDS[name])
        elif CAPABILITY.fullmatch(name):
            found.append(name)
        else:
            raise InputError(
                f"--card {text!r} is not known: expected one of {', '.join(CARDS)}, or a compute capability "
                "such as 8.9."
            )
    return tuple(dict.fromkeys(found))


def complete_profiles(
    profiles: Sequence[Profile], inputs: Sequence[Value], shape_tensors: Iterable[str] = ()
) -> tuple[dict[str, Shapes], ...]:
    """Check profiles against a model's inputs, and fill in what follows from equal symbols.

    Returns, for each profile, the shapes of every input that is dynamic, and the values of every shape tensor. Raises
    InputError that names the inputs that lack a profile, with the option to give.
    """
    values = {value.name: value for value in inputs}
    fed = set(shape_tensors)
    open_ones = [
        v for v in inputs if v.name in fed or v.shape is None or any(not isinstance(a, int) for a in v.shape)
    ]
    if open_ones and not profiles:
        raise _missing(open_ones, fed, "no optimization profile was given")
    return tuple(
        _complete(number, profile, values, open_ones, fed) for number, profile in enumerate(profiles, start=1)
    )


def _complete(
    number: int, profile: Profile, values: dict[str, Value], open_ones: list[Value], fed: set[str]
) -> dict[str, Shapes]:
    symbols: dict[str, tuple[int, int, int]] = {}
    made: dict[str, Shapes] = {}
    for name, shapes in profile.items():
        if name not in values:
            raise InputError(
                f"the profile names the input {name!r}, which the model does not have: it has "
                f"{', '.join(map(str, values.values())) or 'none'}."
            )
        value = values[name]
        minimum, usual, maximum = (tuple(int(axis) for axis in shape) for shape in shapes)
        _check(value, minimum, usual, maximum, is_shape=name in fed)
        made[name] = Shapes(min=minimum, opt=usual, max=maximum)
        if name not in fed:
            for axis, sizes in zip(
                value.shape or (), zip(minimum, usual, maximum, strict=True), strict=False
            ):
                if (
                    isinstance(axis, str)
                    and axis not in EMPTY_SYMBOLS
                    and symbols.setdefault(axis, sizes) != sizes
                ):
                    raise InputError(
                        f"profile {number} gives the axis {axis!r} of the input {name!r} the sizes {_sizes(sizes)}, and "
                        f"{_sizes(symbols[axis])} in another input. Equal symbols are equal sizes: give the same."
                    )
    for value in open_ones:
        if value.name in made or value.shape is None or value.name in fed:
            continue
        if all(isinstance(axis, int) or axis in symbols for axis in value.shape):
            rows = [
                (axis, axis, axis) if isinstance(axis, int) else symbols[str(axis)] for axis in value.shape
            ]
            made[value.name] = Shapes(
                min=tuple(r[0] for r in rows), opt=tuple(r[1] for r in rows), max=tuple(r[2] for r in rows)
            )
    if lacking := [value for value in open_ones if value.name not in made]:
        raise _missing(lacking, fed, f"profile {number} does not say their shapes")
    dynamic = {value.name for value in open_ones}
    return {name: made[name] for name in values if name in made and name in dynamic}


def _check(value: Value, minimum: Shape, usual: Shape, maximum: Shape, *, is_shape: bool) -> None:
    given = f"{_axes(minimum)}:{_axes(usual)}:{_axes(maximum)}"
    if not len(minimum) == len(usual) == len(maximum):
        raise InputError(f"the profile of the input {value.name!r}, {given}, has shapes of different ranks.")
    if any(not low <= middle <= high for low, middle, high in zip(minimum, usual, maximum, strict=True)):
        raise InputError(
            f"the profile of the input {value.name!r}, {given}, is not in order: expected the smallest, the usual and "
            "the largest shape."
        )
    if is_shape:
        if len(minimum) != (elements := _elements(value)):
            raise InputError(
                f"the profile {given} does not fit the input {value}: TensorRT reads shapes from its values, and expects "
                f"the smallest, the usual and the largest of its {elements} values, not its shape."
            )
        return
    if min(minimum, default=0) < 0:
        raise InputError(
            f"the profile of the input {value.name!r}, {given}, has a negative size: expected 0 or more."
        )
    if value.shape is None:
        return
    fits = len(minimum) == len(value.shape) and all(
        not isinstance(axis, int) or (low == axis == high)
        for axis, low, high in zip(value.shape, minimum, maximum, strict=True)
    )
    if not fits:
        raise InputError(
            f"the profile {given} does not fit the input {value}: expected {len(value.shape)} axes, and the sizes that are "
            "fixed as they are."
        )


def _missing(values: list[Value], fed: set[str], why: str) -> InputError:
    named = ", ".join(str(value) for value in values)
    options = []
    for value in values:
        axes: Iterable[int | str | None] = value.shape or (None,)
        if value.name in fed:
            axes = [None] * _elements(value)
        shapes = [_axes(axis if isinstance(axis, int) else size for axis in axes) for size in EXAMPLE_SIZES]
        option = f"{value.name}={':'.join(shapes)}"
        options.append(f"--profile '{option}'" if " " in option else f"--profile {option}")
    read = [repr(value.name) for value in values if value.name in fed]
    return InputError(
        f"inputs of the model have shapes that are not fixed, and {why}: {named}. TensorRT needs the smallest, the usual "
        f"and the largest shape of each, for example {' '.join(options)} (inputs with the same symbols may be left out)."
        + (f" Of {', '.join(read)}, whose values are sizes, it needs the values." if read else "")
    )


def _elements(value: Value) -> int:
    """Of an input that TensorRT reads shapes from; they have no axes that are not fixed."""
    return math.prod(axis if isinstance(axis, int) else 1 for axis in value.shape or ())


def _axes(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _sizes(sizes: tuple[int, int, int]) -> str:
    return ":".join(map(str, sizes))
