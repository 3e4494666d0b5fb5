"""Sums over a MachineStatus: what a device's memory is used for, who shares what, what sharing saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from glake_infer.sharing.status import ChunkStatus, DeviceStatus, MachineStatus, ModelStatus, ProcessStatus

KINDS = {
    "shared": "shared weights",
    "unused": "unused weights",
    "own": "private weights",
    "active": "activations",
    "idle": "idle",
    "granted": "granted",
    "outside": "without the broker",
    "free": "free",
}
"""What a device's memory is used for, and what people read for it; docs/window.md explains each."""


def ungoverned(name: str, title: str, memory: int, processes: Sequence[ProcessStatus]) -> DeviceStatus:
    """A device with processes as they see it: with no broker, or with none that answers.

    What they have of a broker's memory may be the same for all: it counts as much as one of them has.
    """
    pools = [process.pool for process in processes]
    shared = max((pool.shared for pool in pools), default=0)
    transfers = [process.transfers for process in processes]
    return DeviceStatus(
        name=name,
        title=title,
        memory=memory,
        limit=min(memory, sum(pool.limit for pool in pools)),
        used=shared + sum(pool.reserved - pool.shared for pool in pools),
        weights=shared,
        unused=0,
        quotas=0,
        loads=sum(each.loads for each in transfers),
        loaded_bytes=sum(each.bytes for each in transfers),
        load_seconds=sum(each.seconds for each in transfers),
        hits=sum(each.hits for each in transfers),
        hit_bytes=sum(each.hit_bytes for each in transfers),
        refusals=0,
        evictions=0,
        evicted_bytes=0,
        processes=list(processes),
        chunks=[],
        governed=False,
    )


def private_of(process: ProcessStatus) -> dict[str, int]:
    """Of what a process's pool has reserved, what is not the broker's: own weights, activations, idle."""
    pool = process.pool
    rest = max(0, pool.reserved - pool.shared)
    idle = min(max(0, pool.idle), rest)
    own = min(max(0, pool.weights - pool.shared), rest - idle)
    return {"own": own, "active": rest - idle - own, "idle": idle}


def split(device: DeviceStatus) -> dict[str, int]:
    """A device's limit by KINDS: bytes of each. More than the limit where `used` is more; then nothing is free."""
    kinds = dict.fromkeys(KINDS, 0)
    for process in device.processes:
        if device.governed and not process.connected:
            kinds["outside"] += process.pool.reserved
            continue
        for kind, size in private_of(process).items():
            kinds[kind] += size
    kinds["shared"] = device.weights - device.unused
    if device.governed:
        kinds["unused"] = device.unused
        kinds["granted"] = max(0, device.quotas - kinds["own"] - kinds["active"] - kinds["idle"])
    else:
        kinds["unused"] = min(kinds["idle"], sum(p.pool.unused_weights for p in device.processes))
        kinds["idle"] -= kinds["unused"]
    kinds["free"] = max(0, device.limit - sum(kinds.values()))
    return kinds


@dataclass(frozen=True)
class Saving:
    """Of chunks that somebody has: the memory that they take, and what they would take without sharing."""

    there: int
    by_process: int
    """If every process had a copy of its own."""
    by_model: int
    """If every model had."""

    @property
    def processes(self) -> int:
        """Saved because processes share."""
        return self.by_process - self.there

    @property
    def models(self) -> int:
        """Saved because models share, in one process or in several."""
        return max(self.by_process, self.by_model) - self.there


def saving(device: DeviceStatus) -> Saving:
    """What sharing saves on a device."""
    models = Counter(token for process in device.processes for m in process.models for token in set(m.chunks))
    there = by_process = by_model = 0
    for chunk in device.chunks:
        if chunk.state == "ready" and chunk.processes:
            sharers = len(set(chunk.processes))
            there += chunk.size
            by_process += chunk.size * sharers
            by_model += chunk.size * max(models[chunk.token], sharers)
    return Saving(there, by_process, by_model)


def sharers(chunk: ChunkStatus) -> int:
    """How many processes have a chunk."""
    return len(set(chunk.processes))


@dataclass(frozen=True)
class Matrix:
    """Who shares how much with whom. `cells[i][j]`: bytes that both have; on the diagonal, all that it has."""

    names: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    left_out: int = 0
    """How many have no row: those that have least."""


def matrix(holders: Iterable[tuple[str, Iterable[str]]], sizes: dict[str, int], most: int = 64) -> Matrix:
    """From (name, tokens of the chunks that it has) of each, and the size of each chunk."""
    rows = [(name, {token for token in tokens if token in sizes}) for name, tokens in holders]
    weights = [sum(sizes[token] for token in tokens) for _, tokens in rows]
    kept = sorted(sorted(range(len(rows)), key=lambda i: -weights[i])[:most])
    place = {row: column for column, row in enumerate(kept)}
    cells = [[0] * len(kept) for _ in kept]
    having: dict[str, list[int]] = {}
    for row in kept:
        cells[place[row]][place[row]] = weights[row]
        for token in rows[row][1]:
            having.setdefault(token, []).append(place[row])
    groups: Counter[tuple[int, ...]] = Counter()  # chunks that the same ones have count together
    for token, who in having.items():
        groups[tuple(who)] += sizes[token]
    for members, size in groups.items():
        for i, j in combinations(members, 2):
            cells[i][j] += size
            cells[j][i] += size
    return Matrix(tuple(rows[row][0] for row in kept), tuple(map(tuple, cells)), len(rows) - len(kept))


def process_chunks(device: DeviceStatus) -> dict[int, set[str]]:
    """By pid, the tokens of the chunks that each process has: as the broker says."""
    having: dict[int, set[str]] = {process.pid: set() for process in device.processes}
    for chunk in device.chunks:
        for pid in chunk.processes:
            having.setdefault(pid, set()).add(chunk.token)
    return having


@dataclass(frozen=True)
class Weight:
    """A weight, of which parts may lie in several chunks."""

    digest: str
    bytes: int
    chunks: tuple[str, ...]
    processes: tuple[int, ...]
    """Pids of those that have all of it."""
    models: int
    """How many models need all chunks in which it lies."""


def largest_weights(device: DeviceStatus, most: int = 20) -> list[Weight]:
    """The largest of the weights that are there, and how many more there are is `count_weights`."""
    sizes: Counter[str] = Counter()
    places: dict[str, list[ChunkStatus]] = {}
    for chunk in device.chunks:
        if chunk.state == "ready":
            for part in chunk.weights:
                sizes[part.digest] += part.size
                places.setdefault(part.digest, []).append(chunk)
    needs = [set(model.chunks) for process in device.processes for model in process.models]
    found = []
    for digest, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:most]:
        chunks = places[digest]
        tokens = {chunk.token for chunk in chunks}
        pids = set.intersection(*(set(chunk.processes) for chunk in chunks))
        models = sum(tokens <= needed for needed in needs)
        found.append(Weight(digest, size, tuple(tokens), tuple(sorted(pids)), models))
    return found


def count_weights(device: DeviceStatus) -> int:
    """How many distinct weights are there."""
    return len({part.digest for c in device.chunks if c.state == "ready" for part in c.weights})


def labelled_models(process: ProcessStatus) -> list[tuple[str, ModelStatus]]:
    """A process's models under names that differ: `a`, `a#2`."""
    seen: Counter[str] = Counter()
    taken = {model.name for model in process.models}
    found = []
    for model in process.models:
        seen[model.name] += 1
        name = model.name
        while seen[model.name] > 1 and (name := f"{model.name}#{seen[model.name]}") in taken:
            seen[model.name] += 1
        found.append((name, model))
    return found


def process_label(process: ProcessStatus) -> str:
    """`worker.py (4711)`."""
    return f"{process.name} ({process.pid})"


def processes_of(status: MachineStatus) -> list[tuple[DeviceStatus, ProcessStatus]]:
    """All of them, those that hold most first."""
    found = [(device, process) for device in status.devices for process in device.processes]
    return sorted(found, key=lambda each: (-each[1].pool.reserved, each[1].pid))
