"""Prometheus metrics of a MachineStatus, over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glake_infer.allocators.errors import GlakeError, InputError
from glake_infer.sharing.status import DeviceStatus, MachineStatus, ProcessStatus, State
from glake_infer.window.figures import labelled_models, private_of, saving
from glake_infer.window.inherited import close_in_children

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

DEVICE = ("device",)
PROCESS = ("device", "pid", "name")
MODEL = ("device", "pid", "name", "model")

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "glake_device_info": ("What a device is; always 1.", ("device", "title")),
    "glake_device_memory_bytes": ("Memory that the device has.", DEVICE),
    "glake_device_limit_bytes": (
        "The most that weights and pools of all processes may take together.",
        DEVICE,
    ),
    "glake_device_used_bytes": (
        "What is taken of the limit: shared weights, and what processes were granted.",
        DEVICE,
    ),
    "glake_device_quota_bytes": ("Private memory that all processes were granted, used or not.", DEVICE),
    "glake_weights_bytes": (
        "Weights that are there, held once for all processes. used: a process has them; unused: none has, they go when "
        "other memory is needed.",
        (*DEVICE, "state"),
    ),
    "glake_saved_bytes": (
        "Memory that processes would take in addition if each had its own copy of the weights that it shares.",
        DEVICE,
    ),
    "glake_chunks": (
        "Pieces of memory for shared weights. absent: no memory now; loading: being filled; ready.",
        (*DEVICE, "state"),
    ),
    "glake_process_pool_bytes": (
        "Memory that a process's pool holds. shared: the broker's, other processes may have it too; own: weights that it "
        "alone has; active: activations and workspaces in use; idle: kept for the next run.",
        (*PROCESS, "kind"),
    ),
    "glake_process_offloaded_bytes": (
        "Weights of a process that lie in memory of the host, which its device reads over the link.",
        PROCESS,
    ),
    "glake_process_pool_limit_bytes": ("The bound on what a process's pool holds.", PROCESS),
    "glake_process_pool_peak_bytes": ("The most that a process's pool ever held.", PROCESS),
    "glake_process_quota_bytes": (
        "Private memory that the broker grants a process; absent without a broker.",
        PROCESS,
    ),
    "glake_process_connected": ("1 while a process is connected to a broker, else 0.", PROCESS),
    "glake_process_silent_seconds": (
        "How old a process's figures are; grows while it does not answer.",
        PROCESS,
    ),
    "glake_model_bytes": (
        "Memory of a model. shared: weights that other models of its process use too; own: weights that it alone uses "
        "there; private: copies that its session made; asleep: weights that are not there now.",
        (*MODEL, "kind"),
    ),
    "glake_model_state": (
        "1 for the state that a model is in, 0 for the others. running: runs are in progress; awake: all its weights are "
        "there; idle: some were taken to make room; suspended: put to sleep.",
        (*MODEL, "state"),
    ),
    "glake_model_idle_seconds": ("Time since a model's last run ended; 0 during one.", MODEL),
    "glake_broker_info": ("The broker that answers; always 1.", ("release", "protocol", "pid")),
    "glake_broker_uptime_seconds": ("Time since the broker started.", ()),
}
"""Name -> (help, labels)."""

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "glake_loads_total": ("Chunks of weights that were filled from files.", DEVICE),
    "glake_loaded_bytes_total": ("Bytes that were filled from files.", DEVICE),
    "glake_load_seconds_total": ("Time that filling took, summed over processes.", DEVICE),
    "glake_hits_total": ("Chunks that a process got without a load, as they were there.", DEVICE),
    "glake_hit_bytes_total": ("Bytes that processes got without a load.", DEVICE),
    "glake_refusals_total": ("Requests for memory that found no room within the limit.", DEVICE),
    "glake_evictions_total": ("Chunks whose memory was given back because other memory was needed.", DEVICE),
    "glake_evicted_bytes_total": (
        "Bytes of chunks that were given back because other memory was needed.",
        DEVICE,
    ),
    "glake_process_loads_total": ("Chunks that a process filled from files.", PROCESS),
    "glake_process_loaded_bytes_total": ("Bytes that a process filled from files.", PROCESS),
    "glake_process_load_seconds_total": ("Time that a process spent on filling chunks.", PROCESS),
    "glake_process_hits_total": ("Chunks that a process got from the broker without a load.", PROCESS),
    "glake_process_hit_bytes_total": ("Bytes that a process got from the broker without a load.", PROCESS),
    "glake_process_reconnections_total": ("Times that a process came over to another broker.", PROCESS),
    "glake_process_driver_calls_total": (
        "Calls of a process's pool to the driver, or the operating system, for memory.",
        PROCESS,
    ),
    "glake_model_runs_total": ("Runs of a model.", MODEL),
    "glake_broker_resumed_total": ("Processes that came over from an earlier broker.", ()),
    "glake_broker_lost_total": (
        "Processes that ended without saying so: killed, crashed, or hung.",
        (),
    ),
}
"""The same, of what only grows."""

Sample = tuple[str, tuple[str, ...], float]


def samples(status: MachineStatus) -> Iterator[Sample]:
    """Every metric's name, the values of its labels, and its value."""
    if broker := status.broker:
        yield "glake_broker_info", (broker.release, str(broker.protocol), str(broker.pid)), 1
        yield "glake_broker_uptime_seconds", (), broker.uptime
        yield "glake_broker_resumed_total", (), broker.resumed
        yield "glake_broker_lost_total", (), broker.lost
    for device in status.devices:
        yield from _device(device)
        for process in device.processes:
            yield from _process(device.name, process)


def _device(device: DeviceStatus) -> Iterator[Sample]:
    name = (device.name,)
    yield "glake_device_info", (device.name, device.title), 1
    yield "glake_device_memory_bytes", name, device.memory
    yield "glake_device_limit_bytes", name, device.limit
    yield "glake_device_used_bytes", name, device.used
    yield "glake_device_quota_bytes", name, device.quotas
    yield "glake_weights_bytes", (device.name, "used"), device.weights - device.unused
    yield "glake_weights_bytes", (device.name, "unused"), device.unused
    yield "glake_saved_bytes", name, saving(device).processes
    for state in ("absent", "loading", "ready"):
        yield "glake_chunks", (device.name, state), sum(chunk.state == state for chunk in device.chunks)
    yield "glake_loads_total", name, device.loads
    yield "glake_loaded_bytes_total", name, device.loaded_bytes
    yield "glake_load_seconds_total", name, device.load_seconds
    yield "glake_hits_total", name, device.hits
    yield "glake_hit_bytes_total", name, device.hit_bytes
    yield "glake_refusals_total", name, device.refusals
    yield "glake_evictions_total", name, device.evictions
    yield "glake_evicted_bytes_total", name, device.evicted_bytes


def _process(device: str, process: ProcessStatus) -> Iterator[Sample]:
    pool, transfers = process.pool, process.transfers
    labels = (device, str(process.pid), process.name)
    for kind, size in {"shared": pool.shared, **private_of(process)}.items():
        yield "glake_process_pool_bytes", (*labels, kind), size
    yield "glake_process_offloaded_bytes", labels, pool.offloaded
    yield "glake_process_pool_limit_bytes", labels, pool.limit
    yield "glake_process_pool_peak_bytes", labels, pool.peak_reserved
    if pool.quota is not None:
        yield "glake_process_quota_bytes", labels, pool.quota
    yield "glake_process_connected", labels, process.connected
    yield "glake_process_silent_seconds", labels, process.silent_seconds
    yield "glake_process_loads_total", labels, transfers.loads
    yield "glake_process_loaded_bytes_total", labels, transfers.bytes
    yield "glake_process_load_seconds_total", labels, transfers.seconds
    yield "glake_process_hits_total", labels, transfers.hits
    yield "glake_process_hit_bytes_total", labels, transfers.hit_bytes
    yield "glake_process_reconnections_total", labels, process.reconnections
    yield "glake_process_driver_calls_total", labels, pool.driver_calls
    for name, model in labelled_models(process):
        for kind in ("shared", "own", "private", "asleep"):
            yield "glake_model_bytes", (*labels, name, kind), getattr(model, kind)
        for state in get_args(State):
            yield "glake_model_state", (*labels, name, state), model.state == state
        yield "glake_model_idle_seconds", (*labels, name), model.idle_seconds
        yield "glake_model_runs_total", (*labels, name), model.runs


class StatusCollector(Collector):
    """Turns what `status` answers into metrics, at every scrape."""

    def __init__(self, status: Callable[[], MachineStatus]) -> None:
        """Nothing is asked yet."""
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing: what there is shows at a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per name, with all its samples."""
        families: dict[str, Metric] = {}
        for name, (text, labels) in GAUGES.items():
            families[name] = GaugeMetricFamily(name, text, labels=labels)
        for name, (text, labels) in COUNTERS.items():
            families[name] = CounterMetricFamily(name, text, labels=labels)
        for name, values, value in samples(self._status()):
            family = families[name]
            assert isinstance(family, GaugeMetricFamily | CounterMetricFamily)
            family.add_metric(values, float(value))
        yield from (family for family in families.values() if family.samples)


class MetricsServer:
    """Serves metrics until it is closed, in a thread of its own. Use as a context manager, or call `close()`."""

    def __init__(self, server: WSGIServer, host: str) -> None:
        """Use `serve`."""
        self._server = server
        self._pid = os.getpid()
        self._closed = False
        self.port = int(server.server_port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def close(self) -> None:
        """End it. Closing twice is fine."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._server.shutdown()
            self._server.server_close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(port: int, status: Callable[[], MachineStatus], host: str = "127.0.0.1") -> MetricsServer:
    """Serve the metrics of what `status` answers, at http://HOST:PORT/metrics; port 0: one that is free.

    Whoever reaches the port sees them: by default processes of this machine alone; host "0.0.0.0" (or "::") lets in
    others. Raises InputError (no port), GlakeError (the port is taken, or not ours to take).
    """
    if not 0 <= port <= 65535:
        raise InputError(f"the port for metrics cannot be {port}: expected 1 to 65535, or 0 for a free one.")
    registry = CollectorRegistry()
    registry.register(StatusCollector(status))
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GlakeError(
            f"metrics cannot be served at {host} port {port}: {reason}. Choose another port (0 takes a free one); "
            f"`ss -ltnp` shows who has this one."
        ) from error
    close_in_children(server.socket)
    return MetricsServer(server, host)
