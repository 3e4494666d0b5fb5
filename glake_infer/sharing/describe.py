"""What a broker says of a device: its table, and what each client says of itself."""

from __future__ import annotations

from collections.abc import Sequence

from glake_infer.sharing.entries import Client
from glake_infer.sharing.status import DeviceStatus, PoolStatus, ProcessStatus, TransferStatus
from glake_infer.sharing.table import Table


def device_status(table: Table, processes: Sequence[ProcessStatus]) -> DeviceStatus:
    """All of it."""
    counters = table.counters
    return DeviceStatus(
        name=table.name,
        title=table.title,
        memory=table.memory,
        limit=table.limit,
        used=table.used,
        weights=table.weights,
        unused=table.unused,
        quotas=table.quotas,
        loads=counters.loads,
        loaded_bytes=counters.loaded_bytes,
        load_seconds=counters.load_seconds,
        hits=counters.hits,
        hit_bytes=counters.hit_bytes,
        refusals=counters.refusals,
        evictions=counters.evictions,
        evicted_bytes=counters.evicted_bytes,
        processes=list(processes),
        chunks=table.statuses(),
    )


def silent(client: Client, device: str) -> ProcessStatus:
    """What is known of a process that does not describe itself."""
    own = client.quota + sum(client.strays.values())
    shared = sum(chunk.size for chunk in client.has)
    pool = PoolStatus(
        limit=0, quota=client.quota, reserved=own + shared, active=0, idle=0, requested=0, weights=0,
        shared=shared, unused_weights=0, peak_reserved=0, driver_calls=0,
    )  # fmt: skip
    transfers = TransferStatus(loads=0, bytes=0, seconds=0.0, hits=0, hit_bytes=0)
    return ProcessStatus(
        pid=client.pid, name=client.name, device=device, release="", connected=True, reconnections=0, pool=pool,
        models=[], transfers=transfers, chunks=[chunk.token for chunk in client.has],
    )  # fmt: skip
