"""What can be seen of the machine's memory: processes, their models, the chunks and who has them. Bytes and seconds.

Every process describes itself (`ProcessStatus`); a broker adds what it knows of the whole (`MachineStatus`). A process
without a broker answers with a MachineStatus of itself alone.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

State = Literal["running", "awake", "idle", "suspended"]


class Part(BaseModel):
    """Closed to unknown fields, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelStatus(Part):
    """A loaded model."""

    name: str
    state: State
    """running: runs are in progress; awake: all its weights are there; idle: the pool took some of them by itself;
    suspended: put to sleep."""
    shared: int
    """Weights that other models of this process use too."""
    own: int
    private: int
    """Copies that the session made for itself."""
    asleep: int
    """Of its weights, what is not there now."""
    pinned: bool
    priority: int
    idle_seconds: float
    runs: int
    """Ever."""
    chunks: list[str] = []
    """Tokens of the broker's chunks that it needs."""


class PoolStatus(Part):
    """The pool of a process on one device; PoolStats says what each figure is."""

    limit: int
    quota: int | None
    """Bytes of private memory that the broker allows; None without one."""
    reserved: int
    active: int
    idle: int
    requested: int
    weights: int
    """Weights as asked for: private ones, mapped files, and the mapped part of the shared ones."""
    shared: int
    """The part of reserved that is a broker's: other processes may have it too."""
    unused_weights: int
    peak_reserved: int
    driver_calls: int
    offloaded: int = 0
    """Weights in memory of the host, beside reserved."""


class TransferStatus(Part):
    """Loads of weights so far."""

    loads: int
    """Chunks that this process filled from files, ever."""
    bytes: int
    seconds: float
    """That it took."""
    hits: int
    """Chunks that it got from the broker with no load, ever."""
    hit_bytes: int


class ProcessStatus(Part):
    """A process on one device."""

    pid: int
    name: str
    device: str
    """As the process calls it: cpu, cuda:0."""
    release: str
    connected: bool
    """To a broker."""
    reconnections: int
    pool: PoolStatus
    models: list[ModelStatus]
    transfers: TransferStatus
    chunks: list[str] = []
    """Tokens of the broker's chunks that it has mapped."""
    silent_seconds: float = 0.0
    """How old these figures are: of a process that does not answer, the last that it gave."""


class WeightStatus(Part):
    """A weight in a chunk."""

    digest: str
    offset: int
    """In the chunk."""
    size: int
    """Bytes of it in the chunk."""


class ChunkStatus(Part):
    """A chunk that a broker knows."""

    token: str
    region: str
    size: int
    used: int
    state: Literal["absent", "loading", "ready"]
    processes: list[int]
    """Pids of those that have it mapped, or make it."""
    idle_seconds: float
    """Since a process let go of it last; 0 while one has it."""
    weights: list[WeightStatus]


class DeviceStatus(Part):
    """What a broker knows of one device."""

    name: str
    title: str
    memory: int
    limit: int
    used: int
    """Chunks that are there, and the quotas of all clients."""
    weights: int
    """Chunks that are there."""
    unused: int
    """The part of weights that no process has."""
    quotas: int
    loads: int
    """Chunks that were made, ever."""
    loaded_bytes: int
    load_seconds: float
    hits: int
    """Chunks that were given to a process with no load, ever."""
    hit_bytes: int
    refusals: int
    """Requests for memory that found no room, ever."""
    evictions: int
    """Chunks whose memory was given back because other memory was needed, ever."""
    evicted_bytes: int
    processes: list[ProcessStatus]
    chunks: list[ChunkStatus]
    governed: bool = True
    """By a broker, whose figures these are. False: the sums of processes that have none."""


class BrokerStatus(Part):
    """The broker itself."""

    pid: int
    release: str
    protocol: int
    socket: str
    uptime: float
    resumed: int
    """Clients that came over from an earlier broker."""
    lost: int
    """Clients that ended without saying so: killed, crashed, or hung."""


class MachineStatus(Part):
    """Everything."""

    time: float
    """Unix time."""
    broker: BrokerStatus | None
    devices: list[DeviceStatus]
