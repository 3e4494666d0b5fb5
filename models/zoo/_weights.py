"""Seeded random weights, generated block by block from a seed and a name.

Every block of a weight has a generator of its own, keyed by a hash of seed, name and block number, so a
weight's bytes depend on nothing else: not on the model around it, the order of generation, or the head. Only
the raw bits of SFC64 are used, which NumPy keeps equal over its versions (its distributions may change).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 20
"""Elements generated at a time; the first block of a long weight equals that of any other length."""

ATTEMPTS = 16


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of a zoo model: uniformly distributed with this mean and standard deviation."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    trunk: bool  # False: it belongs to the head

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Weights(Mapping[str, Weight]):
    """The weights of one model, by name and in graph order; their values are made on request.

    Equal (seed, name) give equal bytes, cut or continued to the weight's size, in every model; an fp16 weight
    is the fp32 one rounded. The head's weights depend on `head` as well. `changed` is the share of the
    trunk's bytes, 0 to 1, that `variant` draws anew, in whole weights: the best of `ATTEMPTS` random
    choices.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        *,
        dtype: npt.DTypeLike,
        seed: int = 0,
        head: str | None = None,
        variant: int = 0,
        changed: float = 0.0,
    ) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._weights = dict(weights)
        self._seed = seed
        self._head = head
        self._variant = variant
        self.changed = self._choose(changed)
        """Names of the trunk's weights that differ from the model with `changed=0`."""

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def trunk(self) -> tuple[str, ...]:
        """Names of the trunk's weights, in graph order."""
        return tuple(name for name, weight in self._weights.items() if weight.trunk)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(map(self.nbytes, self._weights))

    def nbytes(self, name: str) -> int:
        """Bytes of one weight. Raises KeyError for a name that the model does not have."""
        return self._weights[name].size * self.dtype.itemsize

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Generate a weight as a new array of its shape. Raises KeyError for an unknown name."""
        array = np.empty(self._weights[name].size, self.dtype)
        start = 0
        for block in self.blocks(name):
            array[start : start + block.size] = block
            start += block.size
        return array.reshape(self._weights[name].shape)

    def blocks(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Generate a weight in row-major order, as new flat arrays of at most `BLOCK` elements.

        Raises KeyError for an unknown name.
        """
        weight, key = self._weights[name], self._key(name)
        for number, start in enumerate(range(0, weight.size, BLOCK)):
            steps = _steps(f"{key}#{number}", min(BLOCK, weight.size - start))
            if self.dtype == np.float16:
                yield _halves(weight.mean, weight.std).take(steps.view(np.uint16), mode="wrap")
            else:
                yield _values(steps, weight.mean, weight.std)

    def _key(self, name: str) -> str:
        if not self._weights[name].trunk:
            return f"{self._seed}/heads/{self._head}/{name}"
        return (
            f"{self._seed}/variant {self._variant}/{name}" if name in self.changed else f"{self._seed}/{name}"
        )

    def _choose(self, share: float) -> frozenset[str]:
        if share == 0:
            return frozenset()
        sizes = {name: self._weights[name].size for name in self.trunk}
        target = share * sum(sizes.values())

        def miss(chosen: frozenset[str]) -> float:
            return target - sum(sizes[name] for name in chosen)

        return min((self._choice(sizes, target, attempt) for attempt in range(ATTEMPTS)), key=miss)

    def _choice(self, sizes: Mapping[str, int], target: float, attempt: int) -> frozenset[str]:
        """Fill `target` elements with weights in a random order, passing over those that are too large."""
        key = f"{self._seed}/choice {self._variant}.{attempt}"
        chosen = set()
        for name in sorted(sizes, key=lambda name: _digest(f"{key}/{name}")):
            if sizes[name] <= target:
                chosen.add(name)
                target -= sizes[name]
        return frozenset(chosen)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _steps(key: str, size: int) -> npt.NDArray[np.int16]:
    """Uniform 16-bit integers: four from each draw, which is what makes this faster than a disk."""
    generator = np.random.SFC64(int.from_bytes(_digest(key), "little"))
    raw: npt.NDArray[np.uint64] = generator.random_raw(-(-size // 4))
    return raw.view(np.int16)[:size]


def _values(steps: npt.NDArray[np.int16], mean: float, std: float) -> npt.NDArray[np.float32]:
    values = np.multiply(steps, np.float32(std * math.sqrt(3) / 2**15), dtype=np.float32)
    if mean:
        values += np.float32(mean)
    return values


@lru_cache(maxsize=64)
def _halves(mean: float, std: float) -> npt.NDArray[np.float16]:
    """All 65,536 values of a weight, indexed by the step's bits: a lookup is faster than rounding."""
    return _values(np.arange(2**16, dtype=np.uint16).view(np.int16), mean, std).astype(np.float16)
