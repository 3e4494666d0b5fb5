"""Traces of real sessions: record them, and replay them on the pool and on its twins.

    python -m benchmarks.traces record [--device cuda:0] [--seconds N] [--out FOLDER] [NAME ...]
    python -m benchmarks.traces replay [--device cuda:0] [--repeat 3] [--traces FOLDER ...] [--on NAME,NAME] [NAME ...]

A recording goes into benchmarks/traces, or into FOLDER; NAME is a scene's. A scene takes 60 seconds on the CPU and 12
on CUDA, less if it made 400 000 allocations and frees. Results of a replay go into benchmarks/results; NAME is a
trace's. Traces recorded on CUDA are replayed there only, if none is named.

`cpu-*.trace.gz` were recorded under ONNX Runtime 1.24.4, which asks the pool for all weights (Reserve), as it
does on CUDA; 1.32 asks on the CPU for prepacked ones only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import record as write_result
from benchmarks.scenes import SCENES, Shop
from glake_infer.allocators import GlakeError, MissingDependencyError, Pool, twins

TRACES = Path(__file__).parent / "traces"
MOST = 400_000  # allocations and frees in a trace: about 1 MiB compressed


def scenes(device: str) -> dict[str, Callable[[Shop], None]]:
    """The scenes of a device, by name."""
    if device == "cpu":
        return SCENES
    from benchmarks import cuda_scenes

    return cuda_scenes.SCENES


def record(name: str, device: str, seconds: float, out: Path) -> None:
    """Play a scene and save its trace; prints one JSON line."""
    import onnxruntime

    scene = scenes(device)[name]
    with tempfile.TemporaryDirectory() as folder, Pool(device) as pool:
        with pool.record() as recording:
            scene(Shop(pool, Path(folder), seconds, MOST))
            gc.collect()
        if recording.truncated:
            raise GlakeError(f"{name}: more events than a recording keeps; record fewer seconds")
        trace = recording.trace()
        out.mkdir(parents=True, exist_ok=True)
        target = out / f"{device.partition(':')[0]}-{name}.trace.gz"
        doc = (scene.__doc__ or "").strip().rstrip(".")
        recording.save(target, f"{doc}; on {device}, ONNX Runtime {onnxruntime.__version__}")
        found = {
            "recorded": str(target),
            "lines": len(trace),
            "streams": trace.stream_count,
            "file_bytes": target.stat().st_size,
            "peak_requested": trace.peak_requested,
            "onnxruntime": onnxruntime.__version__,
        }
        print(json.dumps(found), flush=True)


def record_all(names: list[str], device: str, seconds: float, out: Path) -> int:
    """Record scenes in a process each: models of one must not warm the pool for the next. Returns how many failed."""
    failed = 0
    for name in names:
        command = [sys.executable, "-m", "benchmarks.traces", "record", name, "--device", device]
        command += ["--seconds", str(seconds), "--out", str(out)]
        failed += subprocess.run(command).returncode != 0
    return failed


def replay(names: list[str], device: str, repeat: int, folders: list[Path], allocators: list[str]) -> None:
    """Replay traces on allocators of a device; one line each. What is not installed is said and left out."""
    found = {
        path.name.removesuffix(".trace.gz"): path for f in folders for path in sorted(f.glob("*.trace.gz"))
    }
    for name in names:
        if name not in found:
            print(f"there is no trace {name!r}: there are {', '.join(found) or 'none'}", file=sys.stderr)
    missing = set()
    for allocator in allocators:
        if allocator not in twins.names(device):
            choices = ", ".join(twins.names(device))
            print(f"there is no allocator {allocator!r} for {device}: choose from {choices}", file=sys.stderr)
            missing.add(allocator)
    for name, path in found.items():
        if name not in names if names else (device == "cpu" and name.startswith("cuda-")):
            continue
        for allocator in allocators:
            if allocator in missing:
                continue
            try:
                report = twins.replay(path, allocator, device, repeat=repeat)
            except GlakeError as error:
                print(f"{path.name} on {allocator}: {error}", file=sys.stderr)
                if isinstance(error, MissingDependencyError):
                    missing.add(allocator)
                continue
            write_result("traces", asdict(report))


def main() -> None:
    """As the docstring of the module says; without arguments: replay all on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traces")
    parser.add_argument("what", choices=["record", "replay"], nargs="?", default="replay")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path, default=TRACES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--traces", type=Path, action="append")
    parser.add_argument("--on", default="")
    chosen = parser.parse_intermixed_args(sys.argv[1:] if sys.argv[0].endswith("traces.py") else [])
    if chosen.what == "replay":
        allocators = [name for name in chosen.on.split(",") if name] or twins.names(chosen.device)
        replay(chosen.names, chosen.device, chosen.repeat, chosen.traces or [TRACES], allocators)
        return
    seconds = chosen.seconds or (60 if chosen.device == "cpu" else 12)
    known = scenes(chosen.device)
    if unknown := [name for name in chosen.names if name not in known]:
        parser.error(f"there is no scene {unknown[0]!r}: choose from {', '.join(known)}")
    if len(chosen.names) == 1:
        record(chosen.names[0], chosen.device, seconds, chosen.out)
    elif failed := record_all(chosen.names or list(known), chosen.device, seconds, chosen.out):
        sys.exit(f"{failed} scenes were not recorded")


if __name__ == "__main__":
    main()
