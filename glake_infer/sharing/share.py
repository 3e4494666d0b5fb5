"""How the chunks of a residency come from a broker, and what is known of them here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glake_infer.allocators.errors import OutOfMemoryError
from glake_infer.sharing import protocol
from glake_infer.sharing.channel import close_all
from glake_infer.sharing.client import Client, Held, new_memory
from glake_infer.sharing.entries import Client as TableClient
from glake_infer.sharing.protocol import ChunkMemory, RegionSpec, Resume, WeightSpec
from glake_infer.sharing.refusals import BrokerGoneError, SupersededError, UnknownTokenError
from glake_infer.sharing.status import ProcessStatus, TransferStatus
from glake_infer.sharing.table import Table

if TYPE_CHECKING:
    from glake_infer.allocators import _native

AT_ONCE = 1024
"""Chunks that are made, and handed in, together."""

Fill = Callable[[list[int]], int]
"""Writes the bytes of chunks (their numbers), which are mapped writable; returns how many were read."""

Verify = Callable[[list[int], Callable[[], object]], None]
"""Checks files of chunks, as the broker does where there is one, while the function reads them (again, if they change)."""


class GaveWayError(SupersededError):
    """Others who asked before wait for what this process has in use: begin again, behind them, as often as it takes."""


def placed_alone(
    weights: Sequence[WeightSpec], granule: int, known: Sequence[RegionSpec]
) -> list[RegionSpec]:
    """Place weights as a broker would that knows of these regions."""
    table = Table("", granule, 1 << 60)
    client = TableClient("", os.getpid())
    table.join(client)
    table.resume(client, Resume(regions=list(known), chunks=[], quota=0), ())
    return table.place(client, weights)


class Share:
    """A residency's part in a broker's memory. Thread-safe; the tables are read without a lock."""

    def __init__(
        self, native: _native.Pool, device: protocol.Device, shown: str, socket: Path, *, starts: bool
    ) -> None:
        """Connect; raises what `Client` does."""
        self._native = native
        self._tokens: dict[int, str] = {}  # by the native pool's number of a chunk
        self._numbers: dict[str, int] = {}
        self._memories: dict[int, ChunkMemory] = {}  # what is in the chunks that are there
        self._regions: dict[str, RegionSpec] = {}
        self._client = Client(
            native,
            device,
            shown,
            socket,
            starts=starts,
            held=self._held,
            gone=self._gone,
            token_of=self._tokens.get,
            number_of=self._numbers.get,
            forgot=self._forgot,
        )

    # What is known.

    def _held(self) -> Held:
        return Held(list(self._regions.values()), list(self._memories.items()))

    def _gone(self, chunk: int) -> str | None:
        self._memories.pop(chunk, None)
        return self._tokens.get(chunk)

    @property
    def socket(self) -> Path:
        """The broker's."""
        return self._client.socket

    @property
    def closed(self) -> bool:
        """Whether it has ended for good."""
        return self._client.closed

    @property
    def connected(self) -> bool:
        """Whether there is a broker just now."""
        return self._client.connected

    @property
    def reconnections(self) -> int:
        """How often another broker was found."""
        return self._client.reconnections

    @property
    def quota(self) -> int:
        """Bytes of private memory that the broker allows."""
        return self._client.quota

    @property
    def transfers(self) -> TransferStatus:
        """What was loaded, and what came without a load."""
        return self._client.transfers

    def describe(self) -> ProcessStatus:
        """This process, without its models."""
        return self._client.describe_bare()

    def has(self, chunk: int) -> bool:
        """Whether a chunk is a broker's."""
        return chunk in self._tokens

    def number_of(self, token: str) -> int:
        """The native pool's number of a chunk, 0 where it has none here."""
        return self._numbers.get(token, 0)

    def tokens(self, chunks: Iterable[int]) -> list[str]:
        """The broker's names of those chunks that are its."""
        return [token for chunk in chunks if (token := self._tokens.get(chunk))]

    # Placing.

    def place(self, weights: Sequence[protocol.WeightSpec]) -> list[RegionSpec]:
        """The regions in which weights lie. Raises BrokerGoneError."""
        return self._client.place(weights)

    def entered(self, spec: RegionSpec, chunks: Sequence[int]) -> None:
        """A region has addresses here, and its chunks these numbers."""
        for chunk, number in zip(spec.chunks, chunks, strict=True):
            self._tokens[number] = chunk.token
            self._numbers[chunk.token] = number
        self._regions[spec.token] = spec

    def removed(self, spec: RegionSpec, chunks: Iterable[int]) -> None:
        """The region's addresses were given back; `chunks`: those of its chunks that lie nowhere else."""
        self._regions.pop(spec.token, None)
        self._client.forget(spec.token, chunks)

    def _forgot(self, chunks: Iterable[int]) -> None:
        for number in chunks:
            self._memories.pop(number, None)
            token = self._tokens.pop(number, None)
            if token and self._numbers.get(token) == number:
                del self._numbers[token]

    # Bringing in.

    def bring(
        self, user: int, chunks: Iterable[int], fill: Fill, verify: Verify, *, alone: bool = False
    ) -> None:
        """Give chunks that are loading their memory, and say `loaded` of each to the native pool.

        alone: without the broker, in memory that nobody else gets until this process is introduced to another.
        Raises OutOfMemoryError, SupersededError and GaveWayError (begin the use again), AlteredError, DriverError, and what
        `fill` does; what is not loaded is still loading then, and the caller says that it failed.
        """
        left = {self._tokens[number]: number for number in chunks}
        for number in left.values():
            self._memories.pop(number, None)
        wait = full = False
        while left:
            try:
                if alone:
                    raise BrokerGoneError("it was not asked.")
                answer, descriptors, generation = self._client.acquire(list(left), wait=wait, full=full)
            except BrokerGoneError:
                self._make_alone(user, list(left.values()), fill, verify)
                return
            except SupersededError as error:
                raise GaveWayError(str(error)) from error
            except UnknownTokenError as error:  # it came between two messages of ours
                self._client.renew()
                raise SupersededError(str(error)) from error
            self._adopt(user, answer, descriptors, left, generation)
            try:
                for first in range(0, len(answer.make), AT_ONCE):
                    some = answer.make[first : first + AT_ONCE]
                    self._make(user, [left[token] for token in some], fill, verify)
            except OutOfMemoryError as error:
                if full or not error.device_full:
                    raise
                full = True
                continue
            for token in answer.make:
                del left[token]
            wait = True

    def _adopt(
        self,
        user: int,
        answer: protocol.Acquired,
        descriptors: list[int],
        left: dict[str, int],
        generation: int,
    ) -> None:
        """Map what was given."""
        done: list[int] = []
        size = 0
        try:
            for memory, descriptor in zip(answer.given, descriptors, strict=True):
                number = left[memory.chunk]
                self._native.adopt(number, descriptor)
                self._memories[number] = memory
                done.append(number)
            if done:
                self._native.loaded(user, done)
                size = sum(self._native.size_of(number) for number in done)
        except BaseException:
            self._client.failed(answer.make)
            self._client.let_go(memory.chunk for memory in answer.given[len(done) :])
            raise
        finally:
            close_all(descriptors)
        for memory in answer.given:
            del left[memory.chunk]
        self._client.took(len(done), size)
        if done and generation != self._client.generation:
            self._client.renew()  # another broker came, and may not have been told of these

    def _make(self, user: int, numbers: list[int], fill: Fill, verify: Verify) -> None:
        """Make chunks for everybody."""
        if not numbers:
            return
        descriptors: list[int] = []
        memories = self._new_memories(numbers)
        start = time.perf_counter()
        try:
            for number in numbers:
                self._native.make([number])
            read = fill(numbers)
            for number in numbers:
                self._native.freeze([number])
                descriptors.append(self._native.descriptor(number))
            try:
                generation = self._client.loaded(memories, descriptors, read, time.perf_counter() - start)
            except BrokerGoneError:  # nobody has checked the files
                verify(numbers, lambda: None)
                self._alone(user, numbers, memories)
                return
            self._memories.update(zip(numbers, memories, strict=True))
            self._native.loaded(user, numbers)
            if generation != self._client.generation:
                self._client.renew()
        except SupersededError:
            raise
        except BaseException:
            for number in numbers:
                self._memories.pop(number, None)
                self._native.unmake(number)
            self._client.failed(memory.chunk for memory in memories)
            # If they were taken while this was interrupted:
            self._client.let_go(memory.chunk for memory in memories)
            raise
        finally:
            close_all(descriptors)

    def _new_memories(self, numbers: list[int]) -> list[ChunkMemory]:
        return [ChunkMemory(chunk=self._tokens[number], memory=new_memory()) for number in numbers]

    def _make_alone(self, user: int, numbers: list[int], fill: Fill, verify: Verify) -> None:
        """Make chunks while there is no broker."""
        self._client.collect()
        for number in numbers:
            self._native.make([number])
        verify(numbers, lambda: fill(numbers))
        for number in numbers:
            self._native.freeze([number])
        self._alone(user, numbers, self._new_memories(numbers))

    def _alone(self, user: int, numbers: list[int], memories: list[ChunkMemory]) -> None:
        self._memories.update(zip(numbers, memories, strict=True))
        self._native.loaded(user, numbers)
        self._client.renew()  # if there is one by now, it does not know of these

    # Ending.

    def flush(self) -> None:
        """Let the broker let go of what became absent here, before this returns."""
        self._client.flush()

    def close(self, *, wait: bool = True) -> None:
        """End the connection; without `wait`, wherever a finalizer may be."""
        self._client.close(wait=wait)
