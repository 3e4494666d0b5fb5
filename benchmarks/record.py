"""One JSON line per result, with the machine, the versions and the date."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def gpu() -> dict[str, Any]:
    """Describe the first GPU and its driver; empty where there is none."""
    from glake_infer.allocators import _native

    driver = Path("/proc/driver/nvidia/version")
    if not driver.exists() or _native.cuda_device_count() == 0:
        return {}
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", driver.read_text())
    return {"gpu": _native.cuda_device_name(0), "driver": found[0] if found else ""}


def machine() -> dict[str, Any]:
    """Describe where this runs."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **gpu(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in (
        "glake-infer",
        "onnxruntime",
        "onnxruntime-gpu",
        "torch",
        "rmm-cu13",
        "onnx",
        "numpy",
        "tensorrt-rtx",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record(benchmark: str, result: dict[str, Any]) -> None:
    """Print one line and append it to `results/BENCHMARK.jsonl`."""
    line = json.dumps(
        {
            "benchmark": benchmark,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": versions(),
            **result,
        }
    )
    print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(line + "\n")
