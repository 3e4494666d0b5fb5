"""The process of one replay: `python -m glake_infer.allocators.twins '{"trace": ...}'` prints one JSON line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from ..errors import GlakeError
from ..trace import read
from . import ReplayReport, check
from .runs import RUNS


def _replay(request: dict[str, Any]) -> ReplayReport:
    twin = check(request["allocator"], request["device"])
    trace = read(request["trace"])
    index = int(request["device"].partition(":")[2] or 0)
    kind = request["device"].partition(":")[0]
    run = RUNS[twin.name](trace, kind, index, request["repeat"], request["limit"])
    peak = trace.peak_requested
    return ReplayReport(
        trace=trace.name,
        allocator=twin.name,
        device=request["device"],
        peak_requested=peak,
        peak_active=run.peak_active,
        peak_reserved=run.peak_reserved,
        ratio=run.peak_reserved / peak if peak else None,
        seconds=run.seconds,
        all_seconds=run.all_seconds,
        repeat=request["repeat"],
        events=len(trace),
        allocations=trace.allocations,
        live_bytes=trace.live_bytes,
        driver_calls=run.driver_calls,
        last_driver_calls=run.last_driver_calls,
        loop=run.loop,
        reserved_by=twin.reserved,
    )


def main() -> None:
    """Answer the request in the first argument."""
    try:
        answer = dataclasses.asdict(_replay(json.loads(sys.argv[1])))
    except GlakeError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # what an allocator does at exit is not our subject


main()
