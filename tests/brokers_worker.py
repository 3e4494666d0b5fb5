"""What runs in a Worker of brokers.py: names for what it is told to evaluate."""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import logging
import os
import pickle
import random
import resource
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import glake_infer as gi
from glake_infer.residency import Residency
from glake_infer.sharing import client, dialing

# Of a broker.

serving = None
_running = contextlib.ExitStack()


def start(path, options):
    """Serve in a thread, so that this one can be asked."""
    global serving
    from glake_infer.sharing.broker import Broker
    from glake_infer.sharing.connection import Times

    if times := options.pop("times", None):
        options["times"] = Times(**times)
    events = options.setdefault("log", _print)
    assert events
    serving = Broker(path, **options)
    _running.enter_context(serving.running())


def _print(event):
    print(f"{time.monotonic():.3f} {event.kind}: {event.text}", flush=True)


def stop():
    _running.close()


# Of a client.

runtime = None
models = {}
said = []
"""What the logger of the broker's connection said."""
_folder = Path()
_store = None


class _Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("glake_infer.broker").addHandler(_Said())
logging.getLogger("glake_infer.broker").setLevel(logging.INFO)


def workshop(folder):
    global _folder, _store
    _folder = Path(folder)
    _store = gi.Store(_folder / "store")


def open_runtime(broker=None, limit=None, device="cpu", **options):
    global runtime
    runtime = gi.Runtime(limit, device=device, broker=broker, store=_store, **options)


def open_patiently(*arguments, seconds=20):
    """The broker may be just gone."""
    until = time.monotonic() + seconds
    while True:
        try:
            open_runtime(*arguments)
            return
        except gi.BrokerError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def load(name, sharing="lean", **options):
    """Load a model; `a*` is one more of `a`."""
    options.setdefault("threads", 1)
    path = _folder / f"{name.rstrip('*')}.glake"
    models[name] = runtime.load(path, sharing=sharing, **options)


def run(name, seed=0):
    """Run it: the results are those of plain ONNX Runtime, bit for bit."""
    model = models[name]
    base = name.rstrip("*")
    results = model.run(_read(_folder / f"{base}.feeds{seed}.npz"))
    expected = _read(_folder / f"{base}.{model.sharing}{seed}.npz")
    assert results.keys() == expected.keys()
    for output, array in expected.items():
        if model.pool.device == "cpu":
            np.testing.assert_array_equal(results[output], array, err_msg=f"{name}: wrong output")
        else:
            np.testing.assert_allclose(results[output], array, atol=3e-3, err_msg=f"{name}: wrong output")
    return True


_files = {}


def _read(path):
    if path not in _files:
        with np.load(path) as found:
            _files[path] = dict(found)
    return _files[path]


def serve_models(*names, **options):
    """Load and run."""
    for name in names:
        load(name, **options)
        run(name)
    return transfers()


def close_model(name):
    models.pop(name).close()


def close_runtime():
    global runtime
    models.clear()
    if runtime:
        runtime.close()
    runtime = None


def share():
    return Residency.of(runtime.pool).share


def transfers():
    """(chunks loaded, chunks that came without a load) so far."""
    return (found.transfers.loads, found.transfers.hits) if (found := share()) else None


def held():
    """Tokens of the broker's chunks that are mapped here."""
    return sorted(memory.chunk for _, memory in share()._held().chunks)


def stats():
    return runtime.pool.stats()


def check():
    """Of a broker's table, or of this process's pool."""
    if serving:

        async def look():
            for device in serving.service._devices.values():
                device.table.check_invariants()

        serving.do(look)
    elif runtime:
        runtime.pool.check_invariants()


# Making things happen.


def patch(set_one=setattr, /, **values):
    """Set times of a broker's connection, wherever they are used."""
    for name, value in values.items():
        users = [module for module in (client, dialing) if hasattr(module, name)]
        assert users, name
        for module in users:
            set_one(module, name, value)


def stall(marker, go, when="before"):
    """From now on who fills chunks makes the file `marker` before (or after) it does, and waits for the file `go`."""
    original = Residency._fill

    def filling(self, holding, chunks):
        if when == "before":
            _stop(marker, go)
        done = original(self, holding, chunks)
        if when == "after":
            _stop(marker, go)
        return done

    Residency._fill = filling


def _stop(marker, go):
    Path(marker).touch()
    while not Path(go).exists():
        time.sleep(0.005)


def limit_descriptors(more=None):
    """Let this process open so many more files than it has; None: as many as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = hard
    if more is not None:
        soft = max(int(entry) for entry in os.listdir("/proc/self/fd")) + 1 + more  # noqa: PTH208
        # Holes below are open too.
        fill = []
        with contextlib.suppress(OSError):
            while (fd := os.dup(2)) < soft - more:
                fill.append(fd)
            os.close(fd)
        globals()["_fillers"] = fill
    else:
        for fd in globals().pop("_fillers", ()):
            os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def in_child(code):
    """Evaluate in a child of fork(); its answer is what it wrote."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        faulthandler.dump_traceback_later(10, exit=True)  # where it hangs
        try:
            value = repr(evaluate(code))
        except BaseException as error:
            value = type(error).__name__
        os.write(write, value.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:  # noqa: PTH123
        answer = file.read().decode()
    os.waitpid(child, 0)
    return answer


def linger():
    """Leave a child of fork() behind, which does nothing; returns its pid."""
    child = os.fork()
    if not child:
        time.sleep(600)
        os._exit(0)
    return child


def in_threads(*codes):
    """Evaluate several at once; raises what the first of them raised."""
    failed = []

    def work(code):
        try:
            evaluate(code)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(code,)) for code in codes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


# At random, until it is told to end.

_soaking = []
_ended = threading.Event()
failed = []
done = {}
"""How often each thing was done."""


def soak(seed, names, threads=2, sharings=("lean", "lean", "fast")):
    """Threads load models, run them, put them to sleep and close them. What a run answers is compared."""
    _ended.clear()
    for number in range(threads):
        made = threading.Thread(
            target=_soak, args=(random.Random(f"{seed} {number}"), number, names, sharings)
        )
        _soaking.append(made)
        made.start()


def _soak(choose, number, names, sharings):
    own = []
    try:
        while not _ended.is_set():
            what = choose.random()
            if not own or (what < 0.1 and len(own) < 4):
                key = choose.choice(names) + "*" * (4 * number + choose.randrange(4) + 1)
                if key in own:
                    continue
                load(key, sharing=choose.choice(sharings))
                own.append(key)
                kind = "load"
            elif what < 0.75:
                run(choose.choice(own), choose.randrange(2))
                kind = "run"
            elif what < 0.87:
                models[choose.choice(own)].suspend()
                kind = "suspend"
            elif what < 0.9:
                models[choose.choice(own)].resume()
                kind = "resume"
            elif what < 0.93:
                runtime.pool.trim()
                kind = "trim"
            else:
                close_model(own.pop(choose.randrange(len(own))))
                kind = "close"
            done[kind] = done.get(kind, 0) + 1
    except BaseException as error:
        failed.append("".join(traceback.format_exception(error)))


def end_soak():
    """Returns what was done; raises if anything failed."""
    _ended.set()
    while _soaking:
        _soaking.pop().join()
    if failed:
        raise AssertionError("\n".join(failed))
    return done


# Being told.


def evaluate(code):
    """Execute code here; the value of its last expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<told>", "exec"), globals())
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "<told>", "eval"), globals())


def serve(fd):
    faulthandler.register(signal.SIGUSR1)
    connection = Connection(fd)
    os.set_inheritable(fd, False)
    while True:
        try:
            code = connection.recv()
        except EOFError:
            break
        try:
            answer = (True, evaluate(code))
            data = pickle.dumps(answer)
        except BaseException as error:
            error.add_note("".join(traceback.format_exception(error)))
            try:
                data = pickle.dumps((False, error))
                pickle.loads(data)
            except Exception:
                data = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
        try:
            connection.send_bytes(data)
        except OSError:
            break
    stop()
