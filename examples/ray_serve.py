"""Ray Serve on one machine: two fine-tunes, two replicas each, and their weights in memory once.

    pip install 'glake-infer[cpu,ray]'
    python examples/ray_serve.py

It builds two models with random weights, serves them with plain ONNX Runtime and then with glake-infer, asks every replica
through handles and over HTTP, compares the outputs, and shows what the operating system counts. With `--device cuda` the
replicas share the first GPU. Nothing is fetched, and nothing stays behind but the node's broker, which ends after a
minute without clients.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
from ray import serve

import glake_infer as gi
from glake_infer.models import zoo
from glake_infer.models.ray import GlakeModel
from glake_infer.window.observe import broker_socket, observe

HEADS = {"sentiment": 2, "topics": 14}
"""The models: heads with so many labels over one trunk."""


class PlainModel:
    """What a team would write without glake-infer."""

    def __init__(self, path: str, device: str) -> None:
        import onnxruntime

        providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run the model."""
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def statistics(self) -> dict[str, Any]:
        """Say who answers."""
        return {"pid": os.getpid()}


def proportional_memory(pid: int) -> int:
    """Bytes of a process: a page that n processes have counts 1/n for each."""
    found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def find_replicas(handle: Any, count: int) -> list[dict[str, Any]]:
    """Ask until every replica has answered."""
    found: dict[int, dict[str, Any]] = {}
    until = time.monotonic() + 20
    while len(found) < count and time.monotonic() < until:
        answers = [handle.statistics.remote() for _ in range(4 * count)]
        found.update((answer["pid"], answer) for answer in (answer.result() for answer in answers))
    return [found[pid] for pid in sorted(found)]


def broker_memory() -> tuple[int, int] | None:
    """Bytes of this node's broker: of its process, and of the weights that it holds for all."""
    try:
        status = observe(broker_socket())
    except gi.GlakeError:
        return None  # GLAKE_BROKER=off
    assert status.broker is not None
    return proportional_memory(status.broker.pid), sum(device.weights for device in status.devices)


def post(url: str, feeds: dict[str, Any]) -> dict[str, Any]:
    """Ask over HTTP."""
    body = json.dumps({name: array.tolist() for name, array in feeds.items()}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
        return {name: np.array(values, np.float32) for name, values in json.load(answer).items()}


def mib(size: int) -> str:
    """So many MiB."""
    return f"{size / (1 << 20):.1f} MiB"


def main() -> int:
    """Run the example; 1 where an output differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="bert-small", help="one of the zoo's (default: bert-small)")
    parser.add_argument("--replicas", type=int, default=2, help="of each model (default: 2)")
    parser.add_argument("--requests", type=int, default=12, help="to each model, by each way (default: 12)")
    arguments = parser.parse_args()
    began = time.perf_counter()
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="glake-ray-") as folder:
        os.environ["GLAKE_STORE"] = f"{folder}/store"  # Ray's processes on this machine inherit it
        specs = {name: zoo.spec(arguments.model, head=name, labels=n) for name, n in HEADS.items()}
        for name, spec in specs.items():
            zoo.write(spec, f"{folder}/{name}.onnx")
            gi.convert(f"{folder}/{name}.onnx", f"{folder}/{name}.glake")
        replicas = arguments.replicas * len(specs)
        ray.init(
            num_cpus=replicas, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20
        )
        try:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            return compare(folder, specs, arguments, f"http://127.0.0.1:{port}", began)
        finally:
            for name in specs:
                serve.delete(name)  # replicas end in good order, and leave the broker
            ray.shutdown()


def compare(folder: str, specs: dict[str, Any], arguments: Any, address: str, began: float) -> int:
    """Serve the models both ways and print what came of it."""
    cuda = arguments.device == "cuda"
    options: dict[str, Any] = {
        "num_replicas": arguments.replicas,
        "graceful_shutdown_wait_loop_s": 0.2,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 1 / (2 * len(specs) * arguments.replicas) if cuda else 0},
    }  # fmt: skip
    feeds = {name: zoo.feeds(spec, 1, batch=2, length=32) for name, spec in specs.items()}
    expected: dict[str, Any] = {}
    memory: dict[str, list[int]] = {}
    worst = 0.0
    for kind in ("plain ONNX Runtime", "glake-infer"):
        handles = {}
        start = time.perf_counter()
        for name in specs:
            if kind == "glake-infer":
                deployed = serve.deployment(GlakeModel, **options).bind(f"{folder}/{name}.glake")
            else:
                deployed = serve.deployment(PlainModel, **options).bind(
                    f"{folder}/{name}.onnx", arguments.device
                )
            handles[name] = serve.run(deployed, name=name, route_prefix=f"/{name}")
        print(
            f"{kind}: {len(specs)} models, {arguments.replicas} replicas each, up in {time.perf_counter() - start:.1f} s"
        )
        if kind == "plain ONNX Runtime":
            expected = {name: handle.remote(feeds[name]).result() for name, handle in handles.items()}
        memory[kind] = []
        for name, handle in handles.items():
            answers = [handle.remote(feeds[name]) for _ in range(arguments.requests)]
            results = [answer.result() for answer in answers]
            if kind == "glake-infer":
                results += [post(f"{address}/{name}", feeds[name]) for _ in range(arguments.requests)]
            for result in results:
                for output, array in expected[name].items():
                    worst = max(worst, float(np.abs(result[output] - array).max()))
        for name, handle in handles.items():
            for replica in find_replicas(handle, arguments.replicas):
                memory[kind].append(proportional_memory(replica["pid"]))
                print(f"  {name:<10} pid {replica['pid']:<8} {mib(memory[kind][-1]):>10}", end="")
                print(f"   weights {mib(replica['pool']['weights'])}" if "pool" in replica else "")
        if kind == "plain ONNX Runtime":
            for name in specs:
                serve.delete(name)
        elif broker := broker_memory():
            memory[kind].append(broker[0])
            print(
                f"  {'broker':<25} {mib(broker[0]):>10}   holds {mib(broker[1])} of weights, once for all of them"
            )
    plain, ours = (sum(sizes) for sizes in memory.values())
    print(
        f"all replicas: {mib(plain)} with plain ONNX Runtime, {mib(ours)} with glake-infer: {ours / plain:.2f}x"
    )
    print(f"largest difference of an output: {worst:.1e}; all took {time.perf_counter() - began:.1f} s")
    return 0 if worst <= (1e-5 if cuda else 0.0) else 1


if __name__ == "__main__":
    sys.exit(main())
