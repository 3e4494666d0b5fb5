"""`glake-infer convert`: an ONNX model becomes a package, its weights go to the store."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command, fail

if TYPE_CHECKING:
    from glake_infer.models.convert import ConvertReport
    from glake_infer.models.tensorrt.convert import EngineReport
    from glake_infer.models.tensorrt.options import EngineOptions


class EngineKind(StrEnum):
    """Which TensorRT builds the engine."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


@command
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX model.", show_default=False)],
    target: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="X.glake",
            help="The package. Default: beside the model.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        EngineKind | None,
        typer.Option(
            help="Build a TensorRT engine as well. tensorrt-rtx needs no GPU to build.", show_default=False
        ),
    ] = None,
    profiles: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME=MIN:OPT:MAX",
            help="The smallest, usual and largest shape of an input, as ids=1x8:1x128:8x512; an option for each input. "
            "Naming an input again begins the next profile.",
            show_default=False,
        ),
    ] = None,
    cards: Annotated[
        list[str] | None,
        typer.Option(
            "--card",
            metavar="CARD",
            help="Build for a10, l4, 3090, 4090, or a compute capability as 8.9; may be given several times. "
            "Default: all four (tensorrt-rtx), this GPU (tensorrt).",
            show_default=False,
        ),
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="An engine whose weights can stream from host memory.")
    ] = False,
    workspace: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most scratch memory of a layer, as 2GiB.", show_default=False),
    ] = None,
    json: output.Json = False,
) -> None:
    """Convert an ONNX model into a package.

    Weights of 1 KiB and more go to the store ($GLAKE_STORE), once per distinct content: a weight that another
    package has already brought takes no space again. An engine's weights are those of the model, as far as its
    plan holds their bytes.
    """
    from glake_infer.models.convert import convert as convert_model

    options = engine_options(engine, profiles or [], cards or [], streaming=streaming, workspace=workspace)
    with output.progress("converting") as progress:
        report = convert_model(model, target, engine=options, progress=progress)
    if json:
        output.print_json(report)
    else:
        show(report)


def engine_options(
    engine: EngineKind | None,
    profiles: list[str],
    cards: list[str],
    *,
    streaming: bool,
    workspace: str | None,
) -> EngineOptions | None:
    """What the options say; options without an engine are an error."""
    if engine is None:
        given = {"--profile": profiles, "--card": cards, "--streaming": streaming, "--workspace": workspace}
        if names := [name for name, value in given.items() if value]:
            fail(
                f"there is no engine for {', '.join(names)}: give --engine tensorrt-rtx or --engine tensorrt too."
            )
        return None
    from glake_infer.allocators.sizes import parse_bytes
    from glake_infer.models.tensorrt.library import check_kind
    from glake_infer.models.tensorrt.options import EngineOptions, parse_cards, parse_profiles

    return EngineOptions(
        kind=check_kind(engine.value),
        profiles=parse_profiles(profiles),
        capabilities=parse_cards(cards),
        streaming=streaming,
        workspace=None if workspace is None else parse_bytes(workspace),
    )


def show(report: ConvertReport) -> None:
    """Print what a conversion did."""
    size = output.size
    rows = [
        ("weights", f"{report.weights} of {size(report.weight_bytes)}"),
        ("distinct", f"{report.distinct_weights} of {size(report.distinct_bytes)}"),
        ("  in the store already", size(report.stored_bytes)),
        ("  new in the store", size(report.new_bytes)),
        ("kept in the graph", f"{size(report.small_bytes)} (weights under 1 KiB)"),
        ("constants lifted", str(report.constants)),
        ("variants", ", ".join(report.variants)),
        ("runs", str(report.runs)),
        ("time", output.duration(report.seconds)),
    ]
    parts: list[Any] = [f"{report.source} -> {report.package}", output.facts(rows)]
    parts += [_engine(engine) for engine in report.engines]
    if report.kept_engines:
        parts.append(f"The model is the same: its {' and '.join(report.kept_engines)} engine stays.")
    if report.notes:
        parts.append(output.bullets("Notes", report.notes))
    output.show(*parts)


def _engine(engine: EngineReport) -> Any:
    size = output.size
    weights = size(engine.weights_bytes) if engine.weights_bytes else "not told by the plan"
    return output.facts(
        [
            ("built by", f"{engine.kind} {engine.version}"),
            ("for compute capability", ", ".join(engine.capabilities)),
            ("plan", size(engine.bytes)),
            ("  weights", f"{weights}{', can be streamed' if engine.streaming else ''}"),
            ("  found in the store", f"{size(engine.found_bytes)} (weights of the model)"),
            ("  own, in the store already", size(engine.stored_bytes)),
            ("  own, new in the store", size(engine.new_bytes)),
            ("profiles", str(engine.profiles)),
            ("time", output.duration(engine.seconds)),
        ],
        title=f"Engine {engine.kind}",
    )


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert")(convert)
