"""Engines whose library is only an allocator's caller: blocks are asked for through TensorRT's C++ interface, and filled."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np
from trampoline import Trampoline

import glake_infer as gi
from glake_infer.checking import File
from glake_infer.digest import digest_of
from glake_infer.engine_weights import EngineWeights
from glake_infer.plan_bytes import TRAILER, Stretch
from glake_infer.residency import Residency


@contextlib.contextmanager
def engine_pool():
    """A pool on the host, of whose memory nothing is left at the end."""
    with gi.Pool("cpu", "256MiB") as pool:
        yield pool
        Residency.settle(pool)
        pool.check_invariants()
        pool.trim()
        assert (pool.stats().active, pool.stats().reserved) == (0, 0)


class Plan:
    """A plan of objects in a store: a header, weights one behind the other at steps of 128 bytes, a trailer."""

    def __init__(self, folder, weights, header=b"plan" * 100):
        self.stretches = []
        self.bytes = b""
        block = b""
        for weight in weights:
            block += weight + bytes(-len(weight) % 128)
        self.block = block
        self._add(folder, header)
        for weight in weights:
            self._add(folder, weight)
            if gap := -len(weight) % 128:
                self._add(folder, bytes(gap))
        self._add(folder, b"\0\1\2\3"[:TRAILER])

    def weave(self, folder, weights, row):
        """Put matrices of equal shape, with rows of `row` bytes, side by side in front of the trailer."""
        rows = len(weights[0]) // row
        matrices = [np.frombuffer(weight, np.uint8).reshape(rows, row) for weight in weights]
        trailer = self.stretches.pop()
        self.bytes = self.bytes[: -trailer.bytes]
        for number, weight in enumerate(weights):
            digest = digest_of(weight)
            (folder / digest).write_bytes(weight)
            file = File(folder / digest, digest, len(weight))
            self.stretches.append(
                Stretch(len(self.bytes) + number * row, row, file, 0, rows, row * len(weights))
            )
        woven = np.hstack(matrices).tobytes()
        self.bytes += woven
        self.block += woven
        self._add(folder, b"\0\1\2\3"[:TRAILER])
        return self

    def _add(self, folder, data):
        digest = digest_of(data)
        path = folder / digest
        path.write_bytes(data)
        self.stretches.append(Stretch(len(self.bytes), len(data), File(path, digest, len(data))))
        self.bytes += data


class Engine:
    """What deserializing a plan leaves: a block with the plan's weights."""

    def __init__(self, allocator, plan, alignment=512):
        self._caller = Trampoline(allocator)
        self.plan = plan
        self.address = self._caller.allocate_async(len(plan.block), alignment)
        if self.address:
            assert self.address % alignment == 0
            ctypes.memmove(self.address, plan.block, len(plan.block))

    def read(self):
        return ctypes.string_at(self.address, len(self.plan.block))

    def destroy(self):
        assert self._caller.deallocate_async(self.address)


def random_weights(seed, *sizes):
    rng = np.random.default_rng(seed)
    return [rng.bytes(size) for size in sizes]


def load(allocator, pool, plan, *, known=True, **options):
    """Load a plan whose stretches are `known`, or not, as `gi.load` does; the engine has its `holding` and `report`."""
    stretches = plan.stretches if known else ()
    with EngineWeights.of(pool).loading(
        allocator, plan_bytes=len(plan.bytes), stretches=stretches, **options
    ) as loading:
        engine = Engine(allocator, plan)
    engine.holding, engine.report = loading.holding, loading.report
    return engine
