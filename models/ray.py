"""Ray Serve: replicas whose models lie in memory once per node, however many replicas there are.

    from ray import serve
    from glake_infer.models.ray import GlakeModel

    app = serve.deployment(GlakeModel, num_replicas=4).bind("sentiment.glake")
    handle = serve.run(app)
    handle.remote({"input_ids": ids}).result()   # -> {"logits": array}

Every replica is a process with a Runtime of its own, and all Runtimes of a node hold their weights through the node's
broker. docs/ray-serve.md tells how to run it on several nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from glake_infer.allocators.errors import (
    DriverError,
    GlakeError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
)
from glake_infer.models.joining import Failed, Feeds, Request, Results, run_together
from glake_infer.models.manifest import read_manifest
from glake_infer.models.model import Model, ModelClosedError
from glake_infer.models.node_packages import Packages, Reference, UnknownModelError, local_package
from glake_infer.models.runtime import Runtime
from glake_infer.process_memory import release_unused_heap
from glake_infer.residency import Residency
from glake_infer.store import Store

BROKER = "auto"
"""Which broker replicas use unless $GLAKE_BROKER or the argument says otherwise."""

_log = logging.getLogger("ray.serve")  # shows up in the replica's log


def import_serve() -> ModuleType:
    """Return the module `ray.serve`.

    Raises MissingDependencyError, with the command to run, if it is not installed.
    """
    try:
        return importlib.import_module("ray.serve")
    except ImportError as error:
        raise MissingDependencyError(
            f"Ray Serve is needed and cannot be imported ({error}). Install it with: pip install 'glake-infer[ray]'"
        ) from error


# --- one Runtime per process


@dataclass
class _Shared:
    runtime: Runtime
    limit: int | str | None
    broker: str | None
    users: int = 0
    kept: bool = False  # somebody has it who does not say when that ends


_lock = threading.Lock()
_shared: dict[str | None, _Shared] = {}


def replica_runtime(
    limit: int | str | None = None, *, device: str | None = None, broker: str | None = None
) -> Runtime:
    """Return this process's Runtime, for a deployment class, actor or task of your own. It is made at the first call.

    limit
        As for Runtime: of this process alone. The broker arbitrates among the processes of the node.
    device
        None: the GPU that Ray has assigned to this replica, or the CPU where it has assigned none.
    broker
        As for Pool; None: $GLAKE_BROKER, or "auto" without it: this node's, started where there is none.

    All that run in one process share its Runtime, so they must ask for the same. Raises InputError where they do
    not, and what Runtime does. It stays open until the process ends; after a `close()` the next call makes another.
    """
    with _lock:
        shared = _shared_runtime(limit, device, broker)
        shared.kept = True
        return shared.runtime


def _shared_runtime(limit: int | str | None, device: str | None, broker: str | None) -> _Shared:
    device = device or assigned_device()
    broker = broker or os.environ.get("GLAKE_BROKER") or BROKER
    found = _shared.get(device)
    if found is not None and not found.runtime._closed:
        if (limit, broker) != (found.limit, found.broker):
            raise InputError(
                f"limit={limit!r}, broker={broker!r}: this process has a Runtime on {found.runtime.pool.device} with "
                f"limit={found.limit!r}, broker={found.broker!r} already. Give all deployments of a process the same."
            )
        return found
    _shared[device] = _Shared(Runtime(limit, device=device, broker=broker), limit, broker)
    return _shared[device]


def _enter(limit: int | str | None, device: str | None, broker: str | None) -> _Shared:
    with _lock:
        shared = _shared_runtime(limit, device, broker)
        shared.users += 1
        return shared


def _leave(shared: _Shared) -> None:
    """Close the Runtime behind the last deployment, so that the broker sees it go."""
    with _lock:
        shared.users -= 1
        if not shared.users and not shared.kept:
            shared.runtime.close()


def _context() -> Any:
    """Ray's context where this process is a worker of Ray's, else None."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context if context.worker.mode == ray.WORKER_MODE else None


def assigned_device() -> str | None:
    """Where Ray wants this worker to compute: "cuda:N" as CUDA counts in this process, or "cpu".

    None outside of Ray's workers: there a Runtime chooses by itself. Of several GPUs it is the first.
    """
    context = _context()
    if context is None:
        return None
    assigned = context.get_accelerator_ids().get("GPU") or []
    if not assigned:
        return "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:  # Ray was told to leave it alone
        return f"cuda:{assigned[0]}"
    names = [name.strip() for name in visible.split(",")]
    return f"cuda:{names.index(assigned[0]) if assigned[0] in names else 0}"


def assigned_threads() -> int | None:
    """Threads for one run: the CPUs that Ray has assigned to this worker, at least one; None outside of workers."""
    context = _context()
    return None if context is None else max(1, int(context.get_assigned_resources().get("CPU", 1)))


# --- the deployment


class GlakeModel:
    """The class of a Ray Serve deployment: one model, or several, whose weights its node has once.

        serve.deployment(GlakeModel, num_replicas=4).bind("a.glake", limit="4GiB")

    Called with a dict of arrays (by a handle) it returns a dict of arrays. Over HTTP it takes a JSON object of lists and
    gives one; a GET tells what there is. With several models a request names one by Serve's multiplexed model id: Serve
    sends it where that model is loaded already, and the Runtime puts those to sleep that were not used for longest when
    memory is short, so their number has no bound.

    packages
        A package (loaded when the replica starts), a mapping of names to packages, or a folder of packages (loaded at
        the first request). Each is a path that all nodes have; an archive is taken into the node's own store, once.
    limit, device, broker
        As for `replica_runtime`.
    store
        The folder of the node's store, if it is not the default one.
    preload
        Names of models to load when the replica starts.
    max_batch_size, batch_wait_timeout_s
        Up to so many requests are joined along the first axis, waiting so many seconds for more, and run as one.
        Only those are that can be: the first axis of all inputs and outputs is free, other axes are equal.
    options
        For `Runtime.load`: sharing, threads (default: the CPUs of the replica), pin, priority, provider_options...

    `user_config` may change packages, limit, max_batch_size and batch_wait_timeout_s while requests go on: a new version
    of a model is loaded beside the old one, and takes only what differs from it. Subclass it for work before and after:
    `await self.run(feeds)`.
    """

    _left = True  # nothing is to be closed

    def __init__(
        self,
        packages: Reference | Mapping[str, Reference],
        *,
        limit: int | str | None = None,
        device: str | None = None,
        broker: str | None = None,
        store: Reference | None = None,
        preload: Iterable[str] = (),
        max_batch_size: int = 1,
        batch_wait_timeout_s: float = 0.01,
        **options: Any,
    ) -> None:
        """Load what is to be there from the start.

        Raises MissingDependencyError (no Ray Serve), and what `replica_runtime` and `Runtime.load` do: Serve then
        starts the replica again, and reports the error.
        """
        serve = import_serve()
        self._packages = Packages(packages)
        self._store = Store(Path(store)) if store is not None else Store()
        self._options = {"store": self._store, **options}
        if options.get("threads") is None:
            self._options["threads"] = assigned_threads()
        self._models: dict[str, Model] = {}
        self._loading = asyncio.Lock()
        self._failure: DriverError | None = None
        self._connected = True
        self._batch: Any = None
        self._serve = serve
        self._announced = self._announcer()
        _name_process(serve)
        self._shared = _enter(limit, device, broker)
        self._left = False
        try:
            self._set_batches(max_batch_size, batch_wait_timeout_s)
            only = [self._packages.only] if self._packages.only is not None else []
            for name in dict.fromkeys([*only, *preload]):
                self._models[name] = self._load(self._packages.find(name))
        except BaseException:
            self.close()
            raise

    @property
    def runtime(self) -> Runtime:
        """The Runtime of this process."""
        return self._shared.runtime

    @property
    def models(self) -> dict[str, Model]:
        """Those that are loaded now, by name."""
        return dict(self._models)

    async def __call__(self, request: Any) -> Any:
        """Answer a request from a handle (a mapping of arrays) or over HTTP."""
        over_http = isinstance(request, importlib.import_module("starlette.requests").Request)
        return await (self._respond(request) if over_http else self.run(request))

    async def run(
        self, feeds: Feeds, outputs: Sequence[str] | None = None, *, model: str | None = None
    ) -> Results:
        """Run a model on `feeds` and return its outputs as `Model.run` does, without holding up other requests.

        `model` is by default the one that the request names, or the only one. Raises UnknownModelError, and what
        `Runtime.load` and `Model.run` do.
        """
        name = model or self._serve.get_multiplexed_model_id() or self._packages.only or ""
        await self._need(name)
        if self._batch is None or not _in_replica(self._serve):
            return await asyncio.to_thread(self._run, name, feeds, outputs)
        done: Results | Failed = await self._batch(Request(name, feeds, outputs))
        if isinstance(done, Failed):
            raise done.error
        return done

    def statistics(self) -> dict[str, Any]:
        """What this replica holds, for dashboards: JSON, in bytes."""
        context = _context()
        return {
            "pid": os.getpid(),
            "node": context.get_node_id() if context else None,
            "device": self.runtime.pool.device,
            "connected": self._broker_connected(),
            "pool": asdict(self.runtime.pool.stats()),
            "models": {name: asdict(model.memory) for name, model in self.models.items() if not model.closed},
        }

    def check_health(self) -> None:
        """Serve asks this from time to time, and replaces the replica where it raises.

        It raises the DriverError of the last run: a GPU's context that failed once fails for good. Without its broker a
        replica serves on: it has its weights mapped. That is only logged.
        """
        if self._failure is not None:
            raise self._failure
        connected = self._broker_connected()
        if connected is not None and connected != self._connected:
            self._connected = connected
            if connected:
                _log.info("glake-infer: connected to the node's broker again")
            else:
                _log.warning(
                    "glake-infer: the node's broker is gone. This replica serves on with the weights that it has, and "
                    "connects to the next broker."
                )

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take over a new `user_config`; Serve calls this. After an error everything is as it was.

        Raises InputError for a setting that is not known, and what loading the packages does.
        """
        known = {"packages", "limit", "max_batch_size", "batch_wait_timeout_s"}
        if unknown := sorted(user_config.keys() - known):
            raise InputError(
                f"user_config has {unknown[0]!r}; what can be changed is {', '.join(sorted(known))}."
            )
        batching = tuple(
            user_config.get(name, now)
            for name, now in zip(("max_batch_size", "batch_wait_timeout_s"), self._batching, strict=True)
        )
        check_batching(*batching)
        before = self.runtime.pool.limit
        if "limit" in user_config:
            self.runtime.pool.limit = user_config["limit"]
        if "packages" in user_config:
            try:
                await self._replace(Packages(user_config["packages"]))
            except BaseException:
                self.runtime.pool.limit = before
                raise
        if batching != self._batching:
            self._set_batches(*batching)

    def close(self) -> None:
        """Close the models, and the Runtime behind the last deployment of this process. Closing twice is fine."""
        if self._left:
            return
        self._left = True
        for model in self._models.values():
            model.close()
        self._models.clear()
        with contextlib.suppress(GlakeError):
            _leave(self._shared)

    def __del__(self) -> None:
        """Close: Serve calls this when the replica ends."""
        self.close()

    # --- models

    def _load(self, reference: Reference) -> Model:
        try:
            return self.runtime.load(local_package(reference, self._store), **self._options)
        finally:
            release_unused_heap()  # preparing a model for the first time leaves much of it

    def _announcer(self) -> Any:
        """Load a model so that Serve knows of it, and sends further requests for it here."""

        async def announce(name: str) -> str:
            await self._ensure(name)
            return name

        return self._serve.multiplexed(max_num_models_per_replica=-1)(announce)

    async def _need(self, name: str) -> None:
        if self._serve.get_multiplexed_model_id() == name and _in_replica(self._serve):
            self._packages.find(name)  # before Serve is told that it is here
            await self._announced(name)
        await self._ensure(name)

    async def _ensure(self, name: str) -> None:
        if name in self._models:
            return
        async with self._loading:
            if name not in self._models:
                reference = self._packages.find(name)
                self._models[name] = await asyncio.to_thread(self._load, reference)

    async def _replace(self, packages: Packages) -> None:
        async with self._loading:
            fresh: dict[str, Model] = {}
            kept: dict[str, Model] = {}
            wanted = {*self._models, *([packages.only] if packages.only is not None else [])}
            try:
                for name in wanted:
                    try:
                        reference = packages.find(name)
                    except UnknownModelError:
                        continue
                    path = await asyncio.to_thread(local_package, reference, self._store)
                    old = self._models.get(name)
                    if old is not None and old.package.manifest.identity == read_manifest(path).identity:
                        kept[name] = old
                    else:
                        fresh[name] = await asyncio.to_thread(self._load, path)
            except BaseException:
                for model in fresh.values():
                    model.close()
                raise
            gone = [model for name, model in self._models.items() if name not in kept]
            self._packages, self._models = packages, {**kept, **fresh}
        for model in gone:
            await asyncio.to_thread(model.close)

    def _run(self, name: str, feeds: Feeds, outputs: Sequence[str] | None) -> Results:
        while True:
            model = self._models.get(name)
            if model is None:
                self._packages.find(name)
                raise GlakeError(
                    f"the model {name} was closed while a request for it was on its way. Send it again."
                )
            try:
                results = model.run(feeds, outputs)
            except ModelClosedError:
                if self._models.get(name) is model:
                    raise
                continue  # a new version took its place
            except DriverError as error:
                self._failure = error
                raise
            self._failure = None
            return results

    def _broker_connected(self) -> bool | None:
        share = Residency.of(self.runtime.pool).share
        return share.connected if share else None

    # --- batches

    def _set_batches(self, size: int, wait: float) -> None:
        check_batching(size, wait)
        self._batching = (size, wait)
        join = self._serve.batch(max_batch_size=size, batch_wait_timeout_s=wait)
        self._batch = join(self._run_many) if size > 1 else None

    async def _run_many(self, requests: list[Request]) -> list[Results | Failed]:
        return await asyncio.to_thread(self._run_batch, requests)

    def _run_batch(self, requests: list[Request]) -> list[Results | Failed]:
        return run_together(requests, self.models, self._run)

    # --- HTTP

    async def _respond(self, request: Any) -> Any:
        response = importlib.import_module("starlette.responses").Response

        def answer(status: int, content: Any) -> Any:
            return response(json.dumps(content), status_code=status, media_type="application/json")

        if request.method == "GET":
            return answer(200, {"models": self._packages.names(), "loaded": self._signatures()})
        try:
            feeds = json.loads(await request.body())
            if not isinstance(feeds, dict):
                raise InputError(
                    f"the body is a JSON {type(feeds).__name__}; expected an object of names and lists."
                )
            results = await self.run(feeds)
        except UnknownModelError as error:
            return answer(404, {"error": str(error)})
        except (InputError, json.JSONDecodeError, UnicodeDecodeError) as error:
            return answer(400, {"error": str(error)})
        except OutOfMemoryError as error:
            return answer(503, {"error": str(error)})
        content = await asyncio.to_thread(
            json.dumps, {name: array.tolist() for name, array in results.items()}
        )
        return response(content, media_type="application/json")

    def _signatures(self) -> dict[str, Any]:
        return {
            name: {"inputs": list(map(str, model.inputs)), "outputs": list(map(str, model.outputs))}
            for name, model in self.models.items()
        }


def check_batching(size: int, wait: float) -> None:
    """Raise InputError where batches cannot be like that."""
    if size < 1 or wait < 0:
        raise InputError(
            f"max_batch_size={size}, batch_wait_timeout_s={wait}: expected at least 1, and 0 seconds."
        )


def _in_replica(serve: ModuleType) -> bool:
    """Whether this is a replica, and not Serve's local testing mode."""
    try:
        serve.get_replica_context()
    except Exception:  # RayServeException
        return False
    return True


def _name_process(serve: ModuleType) -> None:
    """What the broker, and `glake-infer top`, call this process; $GLAKE_NAME goes first."""
    if _in_replica(serve):
        here = serve.get_replica_context()
        os.environ.setdefault("GLAKE_NAME", f"{here.app_name}/{here.deployment}/{here.replica_tag}")


def build(args: Mapping[str, Any]) -> Any:
    """Build an application of one deployment of GlakeModel, for a config file of Serve's.

        applications:
          - name: sentiment
            import_path: glake_infer.models.ray:build
            args: {packages: /models/sentiment.glake, limit: 4GiB}
            deployments: [{name: GlakeModel, num_replicas: 4, ray_actor_options: {num_gpus: 0.25}}]

    `args` are those of GlakeModel. Raises MissingDependencyError, InputError (no packages).
    """
    if "packages" not in args:
        raise InputError(f"args has {', '.join(args) or 'nothing'}; expected packages, a path or a mapping.")
    return import_serve().deployment(GlakeModel).bind(**args)
