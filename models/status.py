"""What this process shows of itself: its pools and their models. It wakes none, and waits for no load."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import asdict
from functools import cache

from glake_infer.allocators import pool as pools
from glake_infer.allocators.devices import cpu_memory
from glake_infer.allocators.errors import GlakeError
from glake_infer.allocators.pool import Pool
from glake_infer.models import model as models
from glake_infer.models.model import Model
from glake_infer.residency import PAGE, Residency
from glake_infer.sharing import client
from glake_infer.sharing.address import device_named
from glake_infer.sharing.status import (
    MachineStatus,
    ModelStatus,
    ProcessStatus,
    State,
    TransferStatus,
)
from glake_infer.version import __version__
from glake_infer.window.figures import ungoverned
from glake_infer.window.monitor import Monitor

MONITOR = "GLAKE_MONITOR"
PATIENCE = 0.1
"""Seconds that a look at a model waits for a load."""
NO_TRANSFERS = TransferStatus(loads=0, bytes=0, seconds=0, hits=0, hit_bytes=0)


def process_statuses() -> list[ProcessStatus]:
    """This process on each device on which it has an open pool."""
    found = []
    for reference in pools._handles.valuerefs():  # without its lock, which is held while a device is opened
        pool = reference()
        if pool is not None:
            with Residency.looking:
                try:
                    found.append(_process_status(pool))
                except GlakeError:
                    continue  # closed meanwhile, or of a parent process
    return found


def machine_status() -> MachineStatus:
    """The machine as this process sees it: itself alone."""
    devices = [ungoverned(*_device(process.device), [process]) for process in process_statuses()]
    return MachineStatus(time=time.time(), broker=None, devices=devices)


def monitor(
    metrics: int | None = None,
    socket: str | os.PathLike[str] | None = None,
    host: str = "127.0.0.1",
) -> Monitor:
    """Show what this process holds, until the Monitor is closed: to `glake-infer top` and `glake-infer report`.

    metrics
        Serve Prometheus metrics on this port too; 0 takes a free one (`.metrics.url` says which).
    host
        Where: "127.0.0.1" lets in this machine alone, "0.0.0.0" whoever reaches the port.
    socket
        The socket; by default one that those commands find by themselves. Only this user, and root, may ask there.

    The environment variable GLAKE_MONITOR=1 does the same when the first model is loaded. Raises GlakeError (the port
    or the socket is taken, or cannot be made there).
    """
    return Monitor(machine_status, metrics=metrics, socket=socket, host=host)


def monitor_if_asked() -> None:
    """Begin to show this process, once, if GLAKE_MONITOR asks for it. A failure is said on stderr, and no more."""
    global _asked
    if os.environ.get(MONITOR, "") in ("", "0") or _asked == os.getpid():
        return
    with _asking:
        if _asked == os.getpid():
            return
        _asked = os.getpid()
        try:
            _monitors.append(monitor())
        except GlakeError as error:
            print(
                f"glake-infer: {MONITOR} is set, and this process cannot be shown: {error}", file=sys.stderr
            )


_asking = threading.Lock()
_asked = 0  # the process that did
_monitors: list[Monitor] = []


def _process_status(pool: Pool) -> ProcessStatus:
    table = Residency._tables.get(pool)
    share = table.share if table else None
    loaded = [m for m in (ref() for ref in models._by_number.valuerefs()) if m is not None]
    mine = sorted((m for m in loaded if m.pool.device == pool.device), key=lambda model: model._number)
    found = [status for model in mine if (status := _model_status(model))]
    if share:
        return share.describe().model_copy(update={"models": found})
    return ProcessStatus(
        pid=os.getpid(),
        name=client.process_name(),
        device=pool.device,
        release=__version__,
        connected=False,
        reconnections=0,
        pool=client.pool_status(asdict(pool.stats()), None),
        models=found,
        transfers=table.transfers if table else NO_TRANSFERS,
    )


def _model_status(model: Model) -> ModelStatus | None:
    """None while it is being loaded, and once it is closed."""
    holding = model._holding
    if holding is None or model.closed:
        return None
    try:
        weighed = holding.weigh(PATIENCE)
        state: State = "awake"
        if holding.busy:
            state = "running"
        elif holding.suspended:
            state = "suspended"
        elif weighed.asleep:
            state = "idle"
        return ModelStatus(
            name=model.name,
            state=state,
            shared=weighed.shared,
            own=weighed.own,
            private=model._private_bytes(),
            asleep=weighed.asleep,
            pinned=model.pinned,
            priority=model.priority,
            idle_seconds=holding.idle_seconds,
            runs=model.runs,
            chunks=share.tokens(holding.chunks) if (share := model._residency.share) else [],
        )
    except GlakeError:  # closed meanwhile: its number is gone
        return None


@cache
def _device(name: str) -> tuple[str, str, int]:
    """A device's name that all processes know, its title, and its memory."""
    if name == "cpu":
        return name, "host memory", cpu_memory()
    device = device_named(name, PAGE)
    return device.name, device.title, device.memory


client.describe = process_statuses  # for the broker, which asks the connection
