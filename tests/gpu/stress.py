"""The corruption test: many streams on one CUDA pool with a tight limit, and every byte checked.

    python tests/gpu/stress.py direct --seconds 60              # the pool itself
    python tests/gpu/stress.py sessions --seconds 180           # ONNX Runtime's sessions, with the former as extra load
    python tests/gpu/stress.py direct --seconds 20 --ignore-streams   # must find corruption

direct: each thread has a stream. It allocates, queues on the stream a delay, a pattern, a delay and a comparison, and
frees at once, while all of it is still queued. Memory that another stream gets before the comparison is done, and
without being ordered behind it, shows as wrong words.

sessions: threads run shared sessions at random shapes and compare every output, bit for bit, with what plain ONNX
Runtime gave in another process.

Prints one JSON line; exits with 1 if a wrong value, a fault or a leak was found.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from glake_infer import Pool
from glake_infer.allocators import OutOfMemoryError

KiB, MiB = 1024, 1024 * 1024
MODELS = ("bert-mini", "resnet-tiny", "llama-tiny", "bert-small", "resnet18", "bert-mini-fp16")
CASES = 10  # shapes per model
SLACK = 64 * MiB  # what the driver may keep for modules, local memory and events


class Load:
    """Threads that do `step` until the time is over; the first error ends all of them."""

    def __init__(self, seconds):
        self.deadline = time.monotonic() + seconds
        self.errors = []
        self.lock = threading.Lock()
        self.counts = {
            "checks": 0,
            "wrong": 0,
            "refused": 0,
            "wrong_outputs": 0,
            "wrong_words": 0,
            "wrong_tensors": 0,
        }
        self.threads = []

    def add(self, work, *arguments):
        def run():
            try:
                work(self, *arguments)
            except BaseException:
                self.errors.append(traceback.format_exc())

        self.threads.append(threading.Thread(target=run, daemon=True))

    def running(self):
        return time.monotonic() < self.deadline and not self.errors

    def count(self, **more):
        with self.lock:
            for name, number in more.items():
                self.counts[name] += number

    def run(self):
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(self.deadline - time.monotonic() + 60)
            if thread.is_alive():
                self.errors.append(f"{thread.name} hangs")
        return {**self.counts, "errors": self.errors[:3]}


def random_size(rng, largest):
    """Sizes over all magnitudes from 4 bytes on; multiples of 4."""
    return int(2 ** rng.uniform(2, largest.bit_length() - 1)) // 4 * 4


class DirectBlocks:
    """One thread's stream and what it holds on it."""

    def __init__(self, pool, seed, values, largest):
        self.pool, self.rng, self.values, self.largest = pool, random.Random(seed), values, largest
        self.stream = kernels.new_stream()
        self.wrong = kernels.counter()
        self.held = []

    def step(self):
        """Queue one round; False if the pool had no room."""
        rng, stream = self.rng, self.stream
        size = random_size(rng, self.largest if rng.random() < 0.7 else 32 * KiB)
        try:
            address = self.pool.allocate(size, stream=stream.ptr)
        except OutOfMemoryError:
            self.release(all_of_them=True)
            return False
        value = next(self.values) & 0xFFFFFFFF
        if rng.random() < 0.3:
            kernels.spin(stream, rng.uniform(0, 3e-4))
        kernels.fill(stream, address, size, value)
        if rng.random() < 0.5:
            kernels.spin(stream, rng.uniform(0, 1e-3))
        if rng.random() < 0.2:
            self.held.append((address, size, value))  # checked and freed later
        else:
            kernels.compare(stream, address, size, value, self.wrong)
            self.pool.deallocate(address)
        self.release(all_of_them=len(self.held) > 8)
        return True

    def release(self, all_of_them=False):
        while self.held and (all_of_them or self.rng.random() < 0.2):
            address, size, value = self.held.pop(self.rng.randrange(len(self.held)))
            kernels.compare(self.stream, address, size, value, self.wrong)
            self.pool.deallocate(address)

    def finish(self):
        """Wait, and return how many words were wrong."""
        self.release(all_of_them=True)
        self.stream.synchronize()
        wrong, self.wrong = int(self.wrong.get()[0]), kernels.counter()
        return wrong

    def new_stream(self):
        """Destroy the stream while its work is queued, and go on with another."""
        self.release(all_of_them=True)
        old, self.stream = self.stream, kernels.new_stream()
        del old


def direct_work(load, pool, seed, values, largest):
    blocks = DirectBlocks(pool, seed, values, largest)
    for number in itertools.count(1):
        if not load.running():
            break
        load.count(**{"checks" if blocks.step() else "refused": 1})
        if number % 64 == 0:  # bounds what is queued
            wrong = blocks.finish()
            load.count(wrong=wrong, wrong_words=wrong)
        if number % 1000 == 999:
            blocks.new_stream()
        if number % 500 == 0 and blocks.rng.random() < 0.3:
            pool.trim()
    wrong = blocks.finish()
    load.count(wrong=wrong, wrong_words=wrong)


def torch_work(load, pool):
    """PyTorch's tensors from the same pool, on a stream of their own."""
    import torch

    rng, stream = random.Random(99), torch.cuda.Stream()
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    mem_pool = pool.torch_mem_pool()
    while load.running():
        size, value = random_size(rng, 16 * MiB) // 4 + 1, rng.randrange(1, 2**20)
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(mem_pool):
                first = torch.full((size,), value, dtype=torch.int32, device="cuda")
                wrong += (first * 2 != 2 * value).sum()
            load.count(checks=1)
        except torch.OutOfMemoryError:
            load.count(refused=1)
            time.sleep(0.01)
        first = None  # a MemPool that goes before its tensors leaves their segments in PyTorch's cache
        if rng.random() < 0.01:
            stream.synchronize()
            del mem_pool
            mem_pool = pool.torch_mem_pool()
    stream.synchronize()
    load.count(wrong=int(wrong.item()), wrong_tensors=int(wrong.item()))


def direct(pool, seconds, threads):
    """The pool alone. Returns counts."""
    load, values = Load(seconds), itertools.count(1)
    for seed in range(threads):
        load.add(direct_work, pool, seed, values, 64 * MiB)
    return load.run()


def write_cases(folder, count):
    """Models and their feeds, into a folder."""
    from glake_infer.models import zoo

    rng = random.Random(7)
    cases = []
    for number in range(count):
        spec = zoo.spec(MODELS[number % len(MODELS)], seed=number)
        path = zoo.write(spec, folder / f"{number}.onnx")
        feeds = []
        for seed in range(CASES):
            name = spec.name
            if name.startswith("bert"):
                sizes = {"batch": rng.randint(1, 16), "length": rng.randint(4, 384)}
            elif name.startswith("resnet"):
                sizes = {"batch": rng.randint(1, 12), "length": rng.choice((48, 64, 96, 128, 160, 224))}
            else:
                sizes = {
                    "batch": rng.randint(1, 4),
                    "length": rng.randint(1, 192),
                    "past": rng.choice((0, 17, 64)),
                }
            feeds.append(zoo.feeds(spec, seed, **sizes))
        cases.append((str(path), feeds))
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    return cases


def session(ort, path, device_index, pool=None, **provider):
    """A session on CUDA, on the pool or as ONNX Runtime comes, with everything that costs bits switched off."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if pool is not None:
        pool.attach(options, cuda_graph="enable_cuda_graph" in provider)
    settings = {
        "device_id": str(device_index),
        "use_tf32": "0",
        "cudnn_conv_algo_search": "DEFAULT",
        **provider,
    }
    made = ort.InferenceSession(
        path, options, providers=[("CUDAExecutionProvider", settings), "CPUExecutionProvider"]
    )
    assert made.get_providers()[0] == "CUDAExecutionProvider", made.get_providers()
    return made


def write_references(folder, device_index):
    """What plain ONNX Runtime gives; None where it does not give the same twice."""
    from glake_infer.allocators import import_onnxruntime

    ort = import_onnxruntime()
    references = []
    for path, feeds in pickle.loads((folder / "cases.pickle").read_bytes()):
        plain = session(ort, path, device_index)
        outputs = []
        for feed in feeds:
            first, second = plain.run(None, feed), plain.run(None, feed)
            outputs.append(first if same(first, second) else None)
        references.append(outputs)
        del plain
    (folder / "references.pickle").write_bytes(pickle.dumps(references))


def same(a, b):
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a, b, strict=True)
    )


def session_work(load, pool, seed, sessions, cases, references):
    rng = random.Random(seed)
    while load.running():
        model = rng.randrange(len(sessions))
        case = rng.randrange(CASES)
        expected = references[model][case]
        if expected is None:
            continue
        try:
            outputs = sessions[model].run(None, cases[model][1][case])
        except Exception as error:
            if not isinstance(pool.explain(error), OutOfMemoryError):
                raise
            load.count(refused=1)
            continue
        right = same(outputs, expected)
        load.count(checks=1, wrong=int(not right), wrong_outputs=int(not right))


def plain_sessions(pool, seconds, threads, count, device_index):
    """The twin: the same sessions and threads on ONNX Runtime's own arena. What is wrong here is not the pool's."""
    from glake_infer.allocators import import_onnxruntime

    ort = import_onnxruntime()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases = write_cases(folder, count)
        subprocess.run([sys.executable, __file__, "reference", scratch, "--device", pool.device], check=True)
        references = pickle.loads((folder / "references.pickle").read_bytes())
        made = [session(ort, path, device_index) for path, _ in cases]
        load = Load(seconds)
        for seed in range(threads):
            load.add(session_work, pool, seed, made, cases, references)
        result = load.run()
        made.clear()
    return {**result, "lost": 0}


def sessions(pool, seconds, threads, count, device_index, *, extra=2, with_torch=True):
    """ONNX Runtime's sessions beside `extra` streams of the direct test and a thread of PyTorch."""
    from glake_infer.allocators import import_onnxruntime

    ort = import_onnxruntime()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases = write_cases(folder, count)
        names = [MODELS[number % len(MODELS)] for number in range(count)]
        subprocess.run([sys.executable, __file__, "reference", scratch, "--device", pool.device], check=True)
        references = pickle.loads((folder / "references.pickle").read_bytes())
        stable = sum(output is not None for outputs in references for output in outputs)

        def round_of(length, used=cases, **more):
            made = [session(ort, path, device_index, pool) for path, _ in used]
            expected = [
                outputs
                for case, outputs in zip(cases, references, strict=True)
                if any(case is one for one in used)
            ]
            load = Load(length)
            for seed in range(threads):
                load.add(session_work, pool, seed, made, used, expected)
            for seed in range(more.get("extra", 0)):
                load.add(direct_work, pool, 100 + seed, itertools.count(1), 16 * MiB)
            if more.get("torch"):
                load.add(torch_work, pool)
            result = load.run()
            made.clear()
            return result

        # Without a tight limit first: it shows how much is needed, and loads what the driver keeps.
        warm = round_of(min(20.0, seconds / 4), extra=extra, torch=with_torch)
        print(json.dumps({"part": "sessions without a limit", **warm}), flush=True)
        peak = pool.stats().peak_active
        settle(pool)
        free_before = kernels.free_memory()
        pool.limit = int(peak * 0.75)
        # Without convolutions: ONNX Runtime's (conv.cc, UpdateState) notes a new input shape before it allocates the
        # output, so that after a refused request it runs the plan of another shape, with wrong outputs or a fault.
        lean = [case for case, name in zip(cases, names, strict=True) if not name.startswith("resnet")]
        result = round_of(seconds, lean, extra=extra, torch=with_torch)
        settle(pool)
        for name in ("wrong", "wrong_outputs", "wrong_words", "wrong_tensors"):
            result[name] += warm[name]
        result["errors"] += warm["errors"]
        result.update(stable_cases=stable, limit=pool.limit, lost=free_before - kernels.free_memory())
    return result


def settle(pool):
    gc.collect()
    kernels.synchronize()
    pool.trim()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("direct", "sessions", "plain", "reference"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--sessions", type=int, default=6)
    parser.add_argument("--ignore-streams", action="store_true", help="switch the cross-stream guard off")
    arguments = parser.parse_args()
    index = int(arguments.device.partition(":")[2] or 0)
    kernels.cupy().cuda.Device(index).use()
    if arguments.part == "reference":
        write_references(arguments.folder, index)
        return
    kernels.load()
    free_before = kernels.free_memory()
    limit = "384MiB" if arguments.part == "direct" else None
    options = {"_ignore_streams": True} if arguments.ignore_streams else {}
    pool = Pool(arguments.device, limit, **options)
    start = time.monotonic()
    try:
        if arguments.part == "direct":
            result = direct(pool, arguments.seconds, arguments.threads)
            settle(pool)
            result["lost"] = free_before - kernels.free_memory()
        elif arguments.part == "plain":
            result = plain_sessions(pool, arguments.seconds, arguments.threads, arguments.sessions, index)
        else:
            with_torch = find_spec("torch") is not None
            result = sessions(
                pool,
                arguments.seconds,
                arguments.threads,
                arguments.sessions,
                index,
                with_torch=with_torch,
            )
        stats = pool.stats()
        result.update(active=stats.active, reserved=stats.reserved, peak_reserved=stats.peak_reserved)
        pool.check_invariants()
    except Exception as error:  # after a fault every call on the device fails
        result = {
            "checks": 0,
            "wrong": 0,
            "errors": [f"{type(error).__name__}: {error}"],
            "active": 0,
            "lost": 0,
        }
    result = {
        "part": arguments.part,
        "threads": arguments.threads,
        "ignore_streams": arguments.ignore_streams,
        "seconds": round(time.monotonic() - start, 1),
        **result,
    }
    print(json.dumps(result), flush=True)
    bad = (
        result["wrong"]
        or result["errors"]
        or result["active"]
        or result["lost"] > SLACK
        or not result["checks"]
    )
    sys.stdout.flush()
    os._exit(1 if bad else 0)  # after a fault the libraries' destructors would end the process their own way


if __name__ == "__main__":
    main()
