"""Machines that are only told of, for tests of what shows them."""

import random
import time
from pathlib import Path

from glake_infer.sharing.status import (
    BrokerStatus,
    ChunkStatus,
    DeviceStatus,
    MachineStatus,
    ModelStatus,
    PoolStatus,
    ProcessStatus,
    TransferStatus,
    WeightStatus,
)
from glake_infer.window.figures import ungoverned

MiB, GiB = 1 << 20, 1 << 30
STATES = ("awake", "running", "idle", "suspended")


def descriptors():
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_until(true, seconds=20):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def token(rng):
    return f"{rng.getrandbits(64):016x}"


def digest(rng):
    return f"{rng.getrandbits(256):064x}"


def model(name="bert", state="awake", chunks=(), shared=400 * MiB, own=3 * MiB, asleep=0, runs=17):
    return ModelStatus(
        name=name,
        state=state,
        shared=shared,
        own=own,
        private=64 << 10,
        asleep=asleep,
        pinned=False,
        priority=0,
        idle_seconds=0.0 if state == "running" else 12.5,
        runs=runs,
        chunks=list(chunks),
    )


def process(pid=4711, name="worker", models=(), chunks=(), shared=400 * MiB, device="cuda:0", **more):
    pool = PoolStatus(
        limit=8 * GiB,
        quota=512 * MiB,
        reserved=shared + 300 * MiB,
        active=shared + 220 * MiB,
        idle=80 * MiB,
        requested=shared + 200 * MiB,
        weights=shared + 20 * MiB,
        shared=shared,
        unused_weights=0,
        peak_reserved=shared + 350 * MiB,
        driver_calls=1234,
    )
    transfers = TransferStatus(loads=7, bytes=410 * MiB, seconds=0.21, hits=33, hit_bytes=2 * GiB)
    given = {"connected": True, "reconnections": 0, "transfers": transfers, "pool": pool, **more}
    return ProcessStatus(
        pid=pid,
        name=name,
        device=device,
        release="0.1.0",
        models=list(models),
        chunks=list(chunks),
        **given,
    )


def device(processes=(), chunks=(), name="GPU-5e0a3c1e-7d6c-4f0e-9c55-0d6f5f0e4a11", limit=40 * GiB):
    there = [chunk for chunk in chunks if chunk.state != "absent"]
    weights = sum(chunk.size for chunk in there)
    quotas = sum(p.pool.quota or 0 for p in processes)
    return DeviceStatus(
        name=name,
        title="NVIDIA H100 80GB HBM3",
        memory=80 * GiB,
        limit=limit,
        used=weights + quotas,
        weights=weights,
        unused=sum(chunk.size for chunk in there if not chunk.processes),
        quotas=quotas,
        loads=len(there),
        loaded_bytes=weights,
        load_seconds=weights / (20 * GiB),
        hits=5 * len(there),
        hit_bytes=5 * weights,
        refusals=2,
        evictions=12,
        evicted_bytes=300 * MiB,
        processes=list(processes),
        chunks=list(chunks),
    )


BROKER = BrokerStatus(
    pid=4242,
    release="0.1.0",
    protocol=1,
    socket="/run/user/1000/glake-infer/broker.sock",
    uptime=7994.0,
    resumed=0,
    lost=1,
)


def machine(*devices, broker=BROKER):
    return MachineStatus(time=1795763816.6, broker=broker, devices=list(devices))


def crowd(processes=64, chunks=400, seed=0, name="worker-{}", models=2):
    """A broker with many of everything: trunks that many have, heads that one has, and what nobody has any more."""
    rng = random.Random(seed)
    made = []
    pids = [5000 + 7 * i for i in range(processes)]
    having = {pid: [] for pid in pids}
    region = token(rng)
    for index in range(chunks):
        if index % 25 == 0:
            region = token(rng)
        size = rng.choice((2, 2, 4, 8, 16, 32, 64, 128)) * MiB
        kind = rng.random()
        if not pids or kind < 0.08:
            who = []
        elif kind < 0.35:
            who = [rng.choice(pids)]
        elif kind < 0.7:
            who = rng.sample(pids, min(len(pids), rng.randint(2, 6)))
        else:
            who = pids[:]
        state = "ready" if rng.random() < 0.93 else rng.choice(("absent", "loading"))
        if state == "absent":
            who = []
        weights, offset = [], 0
        while offset < size:
            length = min(size - offset, rng.choice((1, 3, 9, 18)) * MiB)
            weights.append(WeightStatus(digest=digest(rng), offset=offset, size=length))
            offset += length
        chunk = ChunkStatus(
            token=token(rng),
            region=region,
            size=size,
            used=size - 4096,
            state=state,
            processes=who,
            idle_seconds=0.0 if who else 77.0,
            weights=weights,
        )
        made.append(chunk)
        for pid in who:
            having[pid].append(chunk)
    found = []
    for index, pid in enumerate(pids):
        mine = having[pid]
        needed = [[c for i, c in enumerate(mine) if i % 3 != m % 3] for m in range(models)]
        loaded = [
            model(
                f"bert-{m}-{index % 5}",
                STATES[(index + m) % 4],
                [c.token for c in needed[m]],
                sum(c.size for c in needed[m]),
                runs=index * 1000 + m,
                asleep=100 * MiB if (index + m) % 4 > 1 else 0,
            )
            for m in range(models)
        ]
        found.append(
            process(
                pid,
                name.format(index),
                loaded,
                [c.token for c in mine],
                sum(c.size for c in mine),
            )
        )
    return machine(device(found, made, limit=76 * GiB))


def lonely():
    """A process that has no broker, as its own socket shows it."""
    own = process(
        99, "serve.py", [model(), model("bert", "suspended", asleep=403 * MiB)], shared=0, device="cpu"
    )
    pool = own.pool.model_copy(
        update={"quota": None, "weights": 150 * MiB, "unused_weights": 30 * MiB, "limit": 4 * GiB}
    )
    own = own.model_copy(update={"connected": False, "pool": pool})
    return machine(ungoverned("cpu", "AMD EPYC", 24 * GiB, [own]), broker=None)


def nobody():
    """A broker that nobody uses."""
    return machine()
