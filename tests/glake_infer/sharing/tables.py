"""A table of a broker, and clients that do as they should."""

import itertools

from glake_infer.layout import PIECE
from glake_infer.sharing.entries import Client
from glake_infer.sharing.protocol import ChunkMemory, WeightSpec
from glake_infer.sharing.table import Table

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
GRANULE = 64 * KiB


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def digest(name):
    return f"{name:0>64}" if isinstance(name, int) else name.encode().hex().rjust(64, "0")


def weight(name, size, group=0, path="/store", **more):
    d = digest(name)
    return WeightSpec(digest=d, length=size, group=group, path=f"{path}/{d}", **{"mapped": size, **more})


def large(name, size, prefix, changed=()):
    """A large weight whose pieces are those of all of its prefix but for the changed ones."""
    pieces = [digest(f"{name if i in changed else prefix}{i}") for i in range(-(-size // PIECE))]
    return weight(name, size, pieces=pieces)


def is_sound(digest, pieces):
    return True


class Case:
    """A table, and clients that do as they should."""

    def __init__(self, limit=10 * GiB, granule=GRANULE):
        self.clock = Clock()
        self.table = Table("cpu", granule, limit, clock=self.clock)
        self.numbers = itertools.count()

    def client(self, name="client"):
        made = Client(name, 1)
        self.table.join(made)
        return made

    def place(self, client, *weights, sound=lambda digest, pieces: False):
        regions = self.table.place(client, weights, sound)
        self.table.check_invariants()
        return regions

    def tokens(self, client, *weights):
        return [chunk.token for region in self.place(client, *weights) for chunk in region.chunks]

    def make(self, client, tokens, passes=True):
        """Acquire chunks, and make what is absent."""
        sorting = self.table.acquire(client, tokens)
        made = [ChunkMemory(chunk=c.token, memory=f"{next(self.numbers):016x}") for c in sorting.absent]
        for chunk, memory in zip(
            self.table.loaded(client, made, [object() for _ in made]), made, strict=True
        ):
            assert chunk.memory == memory.memory
            if passes:
                self.table.passed(chunk, chunk.descriptor)
        self.table.check_invariants()
        return sorting

    def load(self, client, *weights):
        tokens = self.tokens(client, *weights)
        self.make(client, tokens)
        return tokens
