"""`glake-infer inspect`: what is in models and packages, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command

if TYPE_CHECKING:
    from rich.table import Table

    from glake_infer.models.inspect import InspectedEngine, InspectedModel, InspectedWeight, Inspection

SIZES = (
    (1 << 10, "under 1 KiB"),
    (1 << 14, "1 to 16 KiB"),
    (1 << 18, "16 to 256 KiB"),
    (1 << 20, "256 KiB to 1 MiB"),
    (1 << 24, "1 to 16 MiB"),
    (1 << 28, "16 to 256 MiB"),
)
LARGEST = "256 MiB and more"
DUPLICATES_SHOWN = 8
MATRIX_COLUMNS = 5
VALUES_SHOWN = 12


@command
def inspect(
    paths: Annotated[
        list[Path], typer.Argument(metavar="X", help="ONNX models and packages.", show_default=False)
    ],
    weights: Annotated[bool, typer.Option("--weights", help="List every weight.")] = False,
    json: output.Json = False,
) -> None:
    """Show the weights of models and packages by type and size, what is twice inside, and what they share.

    Nothing is loaded into ONNX Runtime and nothing is written, except that a package is registered with the
    store at the place where it lies now.
    """
    from glake_infer.models.inspect import inspect as inspect_models

    found = inspect_models(paths)
    if json:
        output.print_json(as_json(found))
        return
    parts: list[Any] = []
    for model in found.models:
        parts += _model(model)
        if weights:
            parts.append(_weights(model))
    if len(found.models) > 1:
        parts += _shared(found)
    output.show(*parts)


def as_json(found: Inspection) -> dict[str, Any]:
    """The inspection with what its properties compute."""
    return {
        "bytes": found.bytes,
        "distinct_bytes": found.distinct_bytes,
        "shared": [{"a": a, "b": b, "bytes": count} for (a, b), count in found.shared().items()],
        "models": [
            {
                **output.plain(model),
                "bytes": model.bytes,
                "distinct_bytes": sum(model.distinct.values()),
                "by_dtype": {
                    dtype: {"weights": n, "bytes": total} for dtype, (n, total) in model.by_dtype.items()
                },
                "duplicates": [
                    {"digest": group[0].digest, "bytes": group[0].bytes, "names": [w.name for w in group]}
                    for group in model.duplicates
                ],
            }
            for model in found.models
        ],
    }


def _model(model: InspectedModel) -> list[Any]:
    distinct = sum(model.distinct.values())
    rows = [("inputs", _listed(model.inputs)), ("outputs", _listed(model.outputs))]
    rows.append(
        ("weights", f"{len(model.weights)} of {output.size(model.bytes)}, distinct {output.size(distinct)}")
    )
    if model.variants:
        rows += [(f"variant {name}", variant.purpose) for name, variant in model.variants.items()]
        rows.append(("runs", str(model.runs)))
    parts: list[Any] = [output.facts(rows, title=f"{model.path} ({model.kind})")]
    parts += [_engine(engine) for engine in model.engines.values()]
    if model.weights:
        parts.append(_classes(model))
    if model.duplicates:
        parts.append(_duplicates(model))
    if model.notes:
        parts.append(output.bullets("Notes", model.notes))
    return parts


def _engine(engine: InspectedEngine) -> Table:
    rows = [
        ("built by", f"{engine.kind} {engine.version}"),
        ("for compute capability", ", ".join(engine.capabilities)),
        ("inputs", _listed(engine.inputs)),
        ("outputs", _listed(engine.outputs)),
        ("plan", f"{output.size(engine.bytes)}, weights {output.size(engine.weights_bytes)}"),
        ("in the store for it", output.size(engine.own_bytes)),
    ]
    for number, profile in enumerate(engine.profiles, start=1):
        shapes = (f"{name}={':'.join(map(_axes, (s.min, s.opt, s.max)))}" for name, s in profile.items())
        rows.append((f"profile {number}", "\n".join(shapes)))
    if engine.streaming:
        rows.append(("weights", "can be streamed from host memory"))
    return output.facts(rows, title=f"Engine {engine.kind}")


def _axes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _listed(values: Any) -> str:
    lines = [str(value) for value in values[:VALUES_SHOWN]]
    if len(values) > VALUES_SHOWN:
        lines.append(f"and {len(values) - VALUES_SHOWN} more (--json lists them)")
    return "\n".join(lines) or "none"


def _classes(model: InspectedModel) -> Table:
    """Bytes by element type and size class."""
    made = output.table("Type", "Size of a weight", ">Weights", ">Bytes", ">Share")
    for dtype in model.by_dtype:
        groups: dict[str, list[InspectedWeight]] = {}
        for weight in sorted((w for w in model.weights if w.dtype == dtype), key=lambda w: w.bytes):
            groups.setdefault(size_class(weight.bytes), []).append(weight)
        for name, group in groups.items():
            total = sum(weight.bytes for weight in group)
            output.add(
                made, dtype, name, str(len(group)), output.size(total), f"{total / (model.bytes or 1):.1%}"
            )
    return made


def size_class(count: int) -> str:
    """The name of the class that a weight of `count` bytes belongs to."""
    return next((name for bound, name in SIZES if count < bound), LARGEST)


def _duplicates(model: InspectedModel) -> Table:
    made = output.table("*Equal weights", ">Copies", ">Each", ">Spared", title="Twice inside")
    for group in model.duplicates[:DUPLICATES_SHOWN]:
        spared = group[0].bytes * (len(group) - 1)
        names = f"{group[0].name}, {group[1].name}" + (", ..." if len(group) > 2 else "")
        output.add(made, names, str(len(group)), output.size(group[0].bytes), output.size(spared))
    if len(model.duplicates) > DUPLICATES_SHOWN:
        rest = model.duplicates[DUPLICATES_SHOWN:]
        spared = sum(group[0].bytes * (len(group) - 1) for group in rest)
        output.add(made, f"and {len(rest)} more groups", "", "", output.size(spared))
    return made


def _weights(model: InspectedModel) -> Table:
    made = output.table(">Bytes", "Type", "*Shape", "Digest", "*Name", title=f"Weights of {model.path}")
    for weight in model.weights:
        shape, count = output.shape(weight.shape), output.size(weight.bytes)
        output.add(made, count, weight.dtype, shape, weight.digest[:8], weight.name)
    return made


def _shared(found: Inspection) -> list[Any]:
    shared = found.shared()
    models = found.models
    parts: list[Any] = []
    if len(models) <= MATRIX_COLUMNS:
        made = output.table(
            "*Model",
            *(f">[{i + 1}]" for i in range(len(models))),
            title="Distinct bytes in both of two models",
        )
        for i, a in enumerate(models):
            cells = []
            for j, b in enumerate(models):
                both = (
                    sum(a.distinct.values())
                    if i == j
                    else shared.get((a.path, b.path), shared.get((b.path, a.path), 0))
                )
                cells.append(output.size(both))
            output.add(made, f"[{i + 1}] {Path(a.path).name}", *cells)
    else:  # a matrix would not fit the screen: the pairs that share something
        made = output.table("*Model", "*Model", ">Both", title="Distinct bytes in both of two models")
        for (first, second), both in sorted(shared.items(), key=lambda entry: -entry[1]):
            if both:
                output.add(made, Path(first).name, Path(second).name, output.size(both))
    parts.append(made)
    spared = found.bytes - found.distinct_bytes
    share = f"{output.size(spared)} or {spared / (found.bytes or 1):.1%} less"
    once = output.size(found.distinct_bytes)
    parts.append(f"Together {output.size(found.bytes)}; every distinct weight held once: {once} ({share}).")
    return parts


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("inspect")(inspect)
