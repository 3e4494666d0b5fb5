"""Engines of a library that stands in for TensorRT, on the CPU's pool."""

import contextlib
import gc as garbage
import itertools
import sys

import pytest
import standin_tensorrt as standin
from engine_packages import linear, matrices

import glake_infer as gi
from glake_infer.models.tensorrt import runtimes
from glake_infer.models.tensorrt.device import HostDevice
from glake_infer.models.tensorrt.load import EngineSettings, load_engine
from glake_infer.residency import Residency


class CapturingDevice(HostDevice):
    """A device whose graphs are lists of runs of the stand-in."""

    captures = True

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.graphs = {}
        self.numbers = itertools.count(1)
        self.expected = False  # whether the pool knows that a capture goes on

    def begin_capture(self, stream):
        assert self.expected
        self.module.capture = []

    def end_capture(self, stream, *, keep=True):
        runs, self.module.capture = self.module.capture, None
        if not keep:
            return 0
        self.graphs[number := next(self.numbers)] = runs
        return number

    def launch(self, graph, stream):
        self.module.events.append("launch")
        for run in self.graphs[graph]:
            assert run()

    def destroy(self, graph):
        self.module.events.append("destroy")
        del self.graphs[graph]


@pytest.fixture(params=["tensorrt-rtx"])
def trt(request, monkeypatch):
    module = standin.make(request.param)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def pool():
    with gi.Pool("cpu", "512MiB") as pool:
        yield pool
        garbage.collect()
        Residency.settle(pool)
        pool.check_invariants()
        pool.trim()
        assert pool.stats().reserved == 0


@pytest.fixture
def load(trt, pool, store):
    opened = []

    def make(path, kind="tensorrt-rtx", **settings):
        with store.using():
            opened.append(load_engine(gi.Package(path, store), pool, kind, EngineSettings(**settings)))
        return opened[-1]

    yield make
    for model in opened:
        model.close()
    opened.clear()
    garbage.collect()
    assert not trt.engines
    assert not trt.contexts


@pytest.fixture
def graphs(trt, monkeypatch):
    """Runs may go into CUDA graphs."""
    device = CapturingDevice(trt)
    monkeypatch.setattr(runtimes, "device_of", lambda pool: device)

    @contextlib.contextmanager
    def foreign_capture(pool):
        device.expected = True
        yield
        device.expected = False

    monkeypatch.setattr(gi.Pool, "foreign_capture", foreign_capture)
    return device


@pytest.fixture
def weights():
    return matrices(0)


@pytest.fixture
def model(tmp_path, store, load, weights):
    return load(linear(tmp_path, store, weights))
