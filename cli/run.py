"""`glake-infer run`: several models together, in one process and one pool."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glake_infer.cli import output
from glake_infer.cli.errors import command

if TYPE_CHECKING:
    from rich.table import Table

    from glake_infer.models.runner import MemoryReport, ModelResult, RunReport

OUTPUTS_SHOWN = 8
OTHERS_SHOWN = 2


class Sharing(StrEnum):
    """How weights are held; see `gi.load`."""

    FAST = "fast"
    LEAN = "lean"


class Engine(StrEnum):
    """What runs a package; see `gi.load`."""

    AUTO = "auto"
    ONNXRUNTIME = "onnxruntime"
    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


@command
def run(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL", help="Packages (.glake) and ONNX models (.onnx).", show_default=False
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="[MODEL:]NAME=FILE", help="Feed an .npy or .npz file.", show_default=False
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", metavar="[MODEL:]NAME=1,128", help="Shape of generated data.", show_default=False
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Runs of each model.")] = 1,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at once, over all models.")] = 1,
    sharing: Annotated[
        Sharing,
        typer.Option(
            help="fast: weights as ONNX Runtime computes with them; lean: as they are stored. The same on a GPU."
        ),
    ] = Sharing.FAST,
    limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most that the pool may hold, as 4GiB.", show_default=False),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", metavar="DEVICE", help="Where to run: cpu, cuda (the first GPU), cuda:1."),
    ] = "cpu",
    broker: Annotated[
        str | None,
        typer.Option(
            metavar="SOCKET",
            help="Share weights with other processes: a broker's socket, auto (start one if need be), off. "
            "Default: $GLAKE_BROKER.",
            show_default=False,
        ),
    ] = None,
    intra_op: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Threads inside one run. Default: one per core.", show_default=False
        ),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            metavar="auto|none|SIZE",
            help="On a GPU, keep weights of each model in host memory: what does not fit (auto), or at least 6GiB, say.",
        ),
    ] = "none",
    engine: Annotated[
        Engine,
        typer.Option(help="What runs packages that have a TensorRT engine; auto: on a GPU, the engine."),
    ] = Engine.AUTO,
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Runs of one engine at once. Default: --threads.", show_default=False
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the last outputs to DIR/MODEL.npz.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seeds generated data.")] = 0,
    json: output.Json = False,
) -> None:
    """Load all models into one process and one pool, run them, and show where the memory is.

    Inputs that no --input feeds are generated; axes without a size are 1 unless --shape says more. MODEL:
    before an input's name is a model's name or number (1, 2, ...); without it every model with such an input
    is meant.

    A package with a TensorRT engine (convert --engine) runs it on a GPU, and its graph on the CPU.

    An .onnx model is converted to a temporary package that is removed once it is loaded; its weights stay in
    the store until the next `store gc`.
    """
    from glake_infer.models import runner

    with output.progress("") as progress:
        report = runner.run(
            models,
            inputs=inputs or (),
            shapes=shapes or (),
            repeat=repeat,
            threads=threads,
            sharing=sharing.value,
            limit=limit,
            device=device,
            broker=broker,
            intra_op=intra_op,
            offload=offload,
            engine=engine.value,
            concurrency=concurrency,
            save=save,
            seed=seed,
            progress=progress,
        )
    if json:
        output.print_json(report)
    else:
        show(report)


def show(report: RunReport) -> None:
    """Print latencies, outputs and memory."""
    latency = output.table("*Model", ">Runs", ">Median", ">Min", ">p95", ">Load")
    for model in report.models:
        output.add(
            latency,
            model.name,
            str(model.runs),
            *(output.duration(value) for value in (model.median, model.min, model.p95, model.load)),
        )
    parts: list[Any] = [
        latency,
        _outputs(report.models),
        _weights(report.models),
        _memory(report.memory, report.device),
    ]
    notes = [f"{model.name}: {note}" for model in report.models for note in model.notes]
    if notes:
        parts.append(output.bullets("Notes", notes))
    output.show(*parts)


def _outputs(models: tuple[ModelResult, ...]) -> Table:
    made = output.table("*Output", "Type", "*Shape", ">Mean", ">Min", ">Max")
    for model in models:
        for item in model.outputs[:OUTPUTS_SHOWN]:
            output.add(
                made,
                f"{model.name}:{item.name}",
                item.dtype,
                output.shape(item.shape) if item.shape is not None else "",
                *(output.number(value) for value in (item.mean, item.min, item.max)),
            )
        if len(model.outputs) > OUTPUTS_SHOWN:
            output.add(made, f"{model.name}: {len(model.outputs) - OUTPUTS_SHOWN} more", *[""] * 5)
    return made


def _weights(models: tuple[ModelResult, ...]) -> Table:
    """Who shares what with whom, and who sleeps."""
    offloads = any(model.memory.offloaded for model in models)
    heads = ["*Weights", ">Shared", "*with", ">Own", ">Private", ">Asleep", ">To wake"]
    made = output.table(*heads, *([">On the host", ">To read"] if offloads else []))
    for model in models:
        memory = model.memory
        others = list(memory.shared_with)
        asleep = (output.size(memory.asleep), output.duration(memory.waking)) if memory.asleep else ("-", "-")
        far = (
            (output.size(memory.offloaded), output.duration(memory.reading))
            if memory.offloaded
            else ("-", "-")
        )
        output.add(
            made,
            model.name,
            output.size(memory.shared),
            ", ".join(others) if len(others) <= OTHERS_SHOWN else f"{len(others)} others",
            output.size(memory.own),
            output.size(memory.private),
            *asleep,
            *(far if offloads else ()),
        )
    return made


def _memory(memory: MemoryReport, device: str) -> Table:
    made = output.table("Memory" if device == "cpu" else f"Memory on {device}", ">", "*")
    rows = [
        ("shared weights", memory.shared, "used by more than one model, held once"),
        ("own weights", memory.own, "used by one model"),
        ("asleep", memory.asleep, "of these, not there now: the next run brings them back"),
        ("on the host", memory.offloaded, "weights that runs read from there, beside the pool"),
        ("private copies", memory.private, "made by sessions while they were built"),
        (
            "activations",
            memory.activations,
            f"in use now; {output.size(memory.peak_activations)} at the peak",
        ),
        ("pool idle", memory.idle, "kept for the next run"),
        (
            "pool",
            memory.reserved,
            f"peak {output.size(memory.peak_reserved)}, limit {output.size(memory.limit)}",
        ),
        ("CUDA's libraries", memory.libraries, "outside the pool, while the sessions were built"),
        (
            "process" if device == "cpu" else "process, on the host",
            memory.process.total,
            f"{output.size(memory.process.files)} of it mapped from files",
        ),
    ]
    for name, count, remark in rows:
        if count or name not in ("asleep", "on the host", "CUDA's libraries"):
            output.add(made, name, output.size(count), remark)
    return made


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run")(run)
