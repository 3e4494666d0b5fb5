"""Weights of TensorRT engines: blocks that the library fills by itself, and whose equal parts become one.

At deserialization TensorRT asks for one block of memory and copies the weights there, as they lie in the plan. Here such a
block is a region of chunks (allocators/weights.hpp). Once it is filled every chunk is read back and gets a digest; a chunk
that equals one which is there already is mapped onto that, read-only, and its own memory goes back. So a second load of
an engine adds nothing, and a fine-tune adds what is its own. Memory for the whole block is needed for the moment of the
load.

Chunks can be equal only where the same bytes lie at the same place of a chunk. A head of another size moves the rest by
a part of one; so the address within the first chunk (the shift) is chosen, in multiples of the alignment that is asked
for, such that as many bytes as possible coincide with those of a block that is there: both plans are known as stretches
of stored objects, and equal objects tell by how much they are apart. Where nothing is known, or nothing coincides, blocks
end at the end of a chunk: TensorRT puts last layers first, so fine-tunes with other heads have equal ends.

What the plan's stretches are known to hold can also be brought back: such a block sleeps and wakes as other weights do
(glake_infer/residency.py), at its address, without TensorRT. Equality with the plan is checked, chunk by chunk, at the load.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakValueDictionary

from glake_infer import cuda
from glake_infer.allocators.errors import GlakeError, OutOfMemoryError
from glake_infer.allocators.pool import Pool
from glake_infer.digest import digest_of, digest_of_piece
from glake_infer.holding import Holding, HostCopy
from glake_infer.plan_bytes import TRAILER, PlanBytes, Stretch, parts_of
from glake_infer.residency import Region, Residency

if TYPE_CHECKING:
    from glake_infer.allocators import _native
    from glake_infer.allocators.tensorrt_face import TensorRTAllocator

CHUNKS = 512
"""Of a block, at most about so many: mapping costs per chunk, and sharing loses up to one where bytes begin to differ."""

MOST_CUT = 8
"""How many times as many chunks a block has, at most, where it is like one with smaller ones."""

READ_BACK = 8 << 20
THREADS = 8
"""Bytes that a thread reads back at once, and how many do."""

TELLING = 4 << 10
"""Bytes of an object from which it says where its block should lie."""

SAMPLE = 64 << 10
"""Bytes of a block's beginning by which it is found in the plan."""

_nameless = itertools.count(-1, -1)
"""Numbers of engines that are no models of ours."""

_log = logging.getLogger("glake_infer.tensorrt")


@dataclass(frozen=True)
class SharingReport:
    """What came of an engine's weight blocks, in bytes."""

    block_bytes: int
    """Weights, as TensorRT asked for them."""
    shared_bytes: int
    """Of them, what is in memory that other engines had."""
    own_bytes: int
    """Of them, the rest."""
    reserved_bytes: int
    """Physical memory that this engine added: of its own chunks, rounded to granules."""
    lost_bytes: int
    """What other engines have too, as their plans say, and that is in memory of its own all the same: at borders of chunks,
    or because it lies elsewhere within them."""
    source_known: bool
    """Whether all of it can be brought back from the store. Else it stays when the engine is suspended."""


@dataclass(eq=False)
class Block:
    """A region of chunks of `grid` bytes, the first less `lead`; TensorRT's block begins `shift` behind its begin."""

    region: Region
    user: int
    size: int
    shift: int
    grid: int
    lead: int
    objects: dict[str, int] = field(default_factory=dict)
    """Of the plan's objects: where the first byte of each lies, from the region's begin."""
    begin: int | None = None
    """Where it begins in the plan; None: it was not found there."""
    holding: BlockHolding | None = None

    @property
    def address(self) -> int:
        """TensorRT's."""
        return self.region.address + self.shift

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Of each chunk (address of the block's first byte in it, bytes of the block, where they begin in the chunk)."""
        for start, size in zip(self.region.starts, self.region.sizes, strict=True):
            begin = max(start, self.address)
            yield begin, min(start + size, self.address + self.size) - begin, begin - start


class BlockHolding(Holding):
    """An engine's weights. `with holding:` goes around what queues work that reads them; see Holding."""

    blocks: tuple[Block, ...] = ()
    anchor: int = 0
    """A user of the chunks that cannot be brought back, so that they stay. 0: none."""

    def settle(self) -> None:
        """Let the memory go only once the device has done what is queued now."""
        if not self.closed:
            self._native.touch(
                self._number
            )  # no use: that could need room, or wait for what this very thread loads

    def released(self) -> None:
        """The table has given the references back; it is locked."""
        table = self._table
        if self.anchor:
            self._native.remove_user(self.anchor)
        for block in self.blocks:
            table.end_region(block.region)


class EngineWeights:
    """The weight blocks of a pool's engines. Thread-safe; one load of several at a time is compared with the others."""

    _of: ClassVar[WeakValueDictionary[Residency, EngineWeights]] = WeakValueDictionary()
    """Their blocks keep them."""
    _of_lock = threading.Lock()

    def __init__(self, table: Residency, device: str) -> None:
        """Use `EngineWeights.of`."""
        self._table = table
        self._native: _native.Pool = table._native
        self._device = device
        self._lock = threading.RLock()  # a collection in a thread that has it may end an engine
        self._settling = threading.Lock()
        self._blocks: dict[int, Block] = {}  # by TensorRT's address
        self._known: dict[str, int] = {}  # what a chunk holds -> the chunk

    @classmethod
    def of(cls, pool: Pool) -> EngineWeights:
        """Return the engine weights of `pool`. Raises PoolClosedError."""
        table = Residency.of(pool)
        with cls._of_lock:
            found = cls._of.get(table)
            if found is None:
                found = cls._of[table] = cls(table, pool.device)
            return found

    @contextlib.contextmanager
    def loading(
        self,
        allocator: TensorRTAllocator,
        *,
        user: int | None = None,
        plan_bytes: int = 0,
        stretches: Sequence[Stretch] = (),
        evictable: bool = False,
        priority: int = 0,
        host_copy: HostCopy = "store",
    ) -> Iterator[Loading]:
        """Serve the weights of an engine that this thread deserializes inside the block, then share what is equal.

            with EngineWeights.of(pool).loading(allocator) as loading:
                engine = runtime.deserialize_cuda_engine(plan)
            print(loading.report)

        `allocator` is the runtime's. `user`: a number that names the model, None for one of no model. `stretches`: where
        the plan's bytes lie in the store, all `plan_bytes` of them; without them, or where they turn out to be others, the
        block stays when it is suspended, and is shared all the same. It lives until TensorRT gives it back, with the
        engine.

        At the end waits for the device, and reads the block back. Raises DriverError; the engine is usable then too, with
        memory of its own.
        """
        if user is None:
            user = next(_nameless)
        loading = Loading(self, user, plan_bytes, stretches, evictable, priority, host_copy)
        with allocator.blocks_from(loading):
            yield loading
        loading._settle()

    def chunk_of(self, key: str) -> int:
        """A chunk that holds what `key` names (`key_of`); 0 if there is none. Under the table's lock."""
        chunk = self._known.get(key, 0)
        return chunk if chunk in self._table._owners else 0

    def remember(self, key: str, chunk: int) -> None:
        """What a chunk holds. Under the table's lock."""
        if not self.chunk_of(key):
            self._known[key] = chunk

    def enter(
        self,
        region: Region,
        keys: Sequence[str],
        spans: Sequence[tuple[int, int]],
        user: int,
        addresses: dict[str, int],
    ) -> None:
        """Let the table know of a region's chunks, each with its key and (address, bytes), and count one use of each.

        `addresses` gets the address of each by its name in the table. Under the table's lock.
        """
        for chunk, key, (address, size) in zip(region.chunks, keys, spans, strict=True):
            self.remember(key, chunk)
            digest = self._table.enter_chunk(key, region, chunk, address, size)
            if digest not in addresses:
                self._table.refer(digest, user)
            addresses[digest] = address

    def forget_gone(self) -> None:
        """Forget what no chunk holds any more. Under the table's lock."""
        self._known = {key: chunk for key, chunk in self._known.items() if self.chunk_of(key)}

    def _block_at(self, address: int) -> Block | None:
        with self._lock:
            return self._blocks.pop(address, None)

    def grid_for(self, size: int) -> int:
        """Bytes of the chunks of a block where none is there that it is like."""
        grid = self._native.granularity
        while grid * CHUNKS < size:
            grid *= 2
        return grid

    def _best_place(self, size: int, alignment: int, plan: PlanBytes) -> tuple[int, int]:
        """(bytes of a chunk, shift within the first) for a block of a plan."""
        begin = plan.bytes - TRAILER - size
        grid = self.grid_for(size)
        votes: Counter[tuple[int, int]] = Counter()
        inside = [s for s in plan.within(begin, size) if s.file.length >= TELLING and s.start == 0]
        with self._lock:
            for block in list(self._blocks.values()):
                for stretch in inside:
                    there = block.objects.get(stretch.file.digest)
                    if there is not None:
                        place = there + block.lead - (stretch.offset - begin)
                        votes[block.grid, place % block.grid] += stretch.file.length
        for (theirs, shift), coinciding in votes.most_common():
            # Not for less than a chunk, nor with many more chunks than its own size asks for.
            if shift % alignment == 0 and coinciding >= theirs and theirs * MOST_CUT >= grid:
                return theirs, shift
        return grid, -size % grid // alignment * alignment


class Loading:
    """An engine's weights while they are loaded; what `EngineWeights.loading` gives."""

    def __init__(
        self,
        weights: EngineWeights,
        user: int,
        plan_bytes: int,
        stretches: Sequence[Stretch],
        evictable: bool,
        priority: int,
        host_copy: HostCopy,
    ) -> None:
        """Use `EngineWeights.loading`."""
        self._weights = weights
        self._native = weights._native
        self._plan = PlanBytes(plan_bytes, stretches)
        self._user, self._evictable, self._priority, self._host_copy = user, evictable, priority, host_copy
        self._blocks: list[Block] = []
        self._compared: list[Holding] = []  # of the chunks that are shared, until they are entered
        self.holding: BlockHolding | None = None
        """The engine's weights, once it is loaded; None if it asked for no block."""
        self.report: SharingReport | None = None

    # What the allocator asks (BlockSource).

    def allocate(self, size: int, alignment: int) -> int:
        """Return the address of a block that TensorRT can write to. Raises OutOfMemoryError, DriverError."""
        native = self._native
        grid, shift = self._weights._best_place(size, alignment, self._plan)
        lead = shift // native.granularity * native.granularity
        shift -= lead
        sizes = sizes_of(shift + size, grid, lead, native.granularity)
        used = [
            min(start + each, shift + size) - max(start, shift)
            for start, each in zip(itertools.accumulate(sizes[:-1], initial=0), sizes, strict=True)
        ]
        pieces = [(each, part, 0, False) for each, part in zip(sizes, used, strict=True)]
        number, address, chunks = native.place_weights(pieces, "memory")
        user = 0
        try:
            user = native.add_user(chunks, False, self._priority)
            self._make(user)
        except BaseException:
            if user:
                native.remove_user(user)
            native.remove_region(number)
            raise
        starts = tuple(itertools.accumulate(sizes[:-1], initial=address))
        block = Block(
            Region(number, address, tuple(chunks), tuple(sizes), None, starts), user, size, shift, grid, lead
        )
        with self._weights._lock:
            self._weights._blocks[block.address] = block
        self._blocks.append(block)
        return block.address

    def _make(self, user: int) -> None:
        """Give a user's chunks memory that can be written to."""
        native = self._native
        later = True
        while True:
            chunks = native.begin_use(user, later)
            try:
                if later:
                    native.make(chunks)
                native.loaded(user, chunks, writable=True)
                break
            except OutOfMemoryError:
                native.load_failed(user, chunks)
                if not later:
                    raise
                later = False  # the device is fuller than the pool's limit says: wait for room, if others may make some
            except BaseException:
                native.load_failed(user, chunks)
                raise
        native.end_use(user)

    def deallocate(self, address: int, stream: int) -> None:
        """TensorRT has destroyed the engine, or not made it."""
        del stream  # what was queued on any stream is waited for
        weights = self._weights
        block = weights._block_at(address)
        if block is None:
            return
        native, holding = self._native, block.holding
        if holding is None:
            native.remove_user(block.user)
            native.remove_region(block.region.number)
            self._blocks.remove(block)
        elif not any(other in weights._blocks.values() for other in holding.blocks):
            holding.settle()
            holding.close(wait=False)

    # Once TensorRT has filled it.

    def _settle(self) -> None:
        """Give each chunk its digest, share those that are there, and make the rest read-only."""
        if not self._blocks:
            return
        weights, table = self._weights, self._weights._table
        cuda_index = None if weights._device == "cpu" else int(weights._device.partition(":")[2])
        if cuda_index is not None:
            cuda.synchronize_all(cuda_index)
        with weights._settling:
            looked = [self._read_back(block) for block in self._blocks]
            try:
                shared = sum(
                    self._share(block, keys) for block, (keys, _) in zip(self._blocks, looked, strict=True)
                )
                with table._locked():
                    self._enter(looked)
            finally:
                for using in self._compared:
                    using.close()
                    with table._locked():
                        for region in using.regions:
                            table.leave_region(region)
        assert self.holding
        size = sum(block.size for block in self._blocks)
        self.report = SharingReport(
            block_bytes=size,
            shared_bytes=shared,
            own_bytes=size - shared,
            reserved_bytes=self._reserved,
            lost_bytes=max(0, self._sharable - shared),
            source_known=not self.holding.anchor,
        )
        if self._host_copy == "pinned":
            with self.holding:
                pass  # makes the copy

    def _read_back(self, block: Block) -> tuple[list[str], list[bool]]:
        """What each chunk holds, and whether the plan is known to hold the same; the region learns how to fill it."""
        region, spans = block.region, list(block.spans())
        with self._copied(block.address, min(SAMPLE, block.size)) as sample:
            begin = block.begin = self._plan.find(sample, block.size)

        def look(group: tuple[int, int]) -> list[tuple[str, bool]]:
            first, last = group
            sizes = [size for _, size, _ in spans[first:last]]
            starts = itertools.accumulate(sizes[:-1], initial=0)
            found = []
            with self._copied(spans[first][0], sum(sizes)) as data:
                for index, start in zip(range(first, last), starts, strict=True):
                    address, size, within = spans[index]
                    piece = data[start : start + size]
                    key = key_of(region.sizes[index], within, piece)
                    sure = begin is not None and self._plan.holds(begin + address - block.address, piece)
                    found.append((key, sure))
                    piece.release()
            return found

        with ThreadPoolExecutor(THREADS, "glake-infer engine weights") as threads:
            groups = _groups([size for _, size, _ in spans], READ_BACK)
            looked = list(itertools.chain.from_iterable(threads.map(look, groups)))
        if begin is not None:
            for (address, size, _), chunk, (_, sure) in zip(spans, region.chunks, looked, strict=True):
                if sure:
                    region.parts[chunk] = self._plan.parts(begin + address - block.address, size, address)
            for stretch in self._plan.within(begin, block.size):
                region.files[stretch.file.path.name] = stretch.file
                if stretch.start == 0:
                    block.objects.setdefault(stretch.file.digest, stretch.offset - begin + block.shift)
        return [key for key, _ in looked], [sure for _, sure in looked]

    @contextlib.contextmanager
    def _copied(self, address: int, size: int) -> Iterator[memoryview]:
        """The bytes at an address of the device."""
        device = self._weights._table._device
        copy = device.keep([(address, size)])[0]
        try:
            with memoryview((ctypes.c_char * size).from_address(copy)).cast("B") as data:
                yield data
        finally:
            device.forget(copy)

    def _share(self, block: Block, keys: list[str]) -> int:
        """Map chunks that are there in the place of equal ones; returns the bytes of weights in them."""
        weights, table, native = self._weights, self._weights._table, self._native
        with table._locked():
            there = {index: chunk for index, key in enumerate(keys) if (chunk := weights.chunk_of(key))}
            if not there:
                return 0
            chunks = tuple(dict.fromkeys(there.values()))
            number = native.add_user(chunks, False, self._priority)
            using = Holding(table, native, number, self._user, {}, chunks, "store", self._priority)
            using.regions = frozenset(region for chunk in chunks for region in table._owners[chunk])
            for owner in using.regions:
                table.keep_region(owner)
            self._compared.append(using)
        region = block.region
        sizes = [size for _, size, _ in block.spans()]
        mine = list(region.chunks)
        shared = 0
        try:
            with using:  # brings back those of engines that sleep
                for index, chunk in there.items():
                    native.replace(region.number, index, chunk)
                    if mine[index] in region.parts:
                        region.parts[chunk] = region.parts.pop(mine[index])
                    mine[index] = chunk
                    shared += sizes[index]
        except GlakeError as error:  # no room, or files of an engine that sleeps are others now
            _log.warning(
                "an engine keeps %d bytes to itself that others have: %s", block.size - shared, error
            )
        finally:
            region.chunks = tuple(mine)
        return shared

    def _enter(self, looked: list[tuple[list[str], list[bool]]]) -> None:
        """Make the holding, and let the table know of the chunks. It is locked."""
        weights, table, native = self._weights, self._weights._table, self._native
        addresses: dict[str, int] = {}
        chunks: list[int] = []
        unknown: list[int] = []
        self._reserved = self._sharable = 0
        own = {c for block in self._blocks for c in block.region.chunks if c not in table._owners}
        native.freeze(sorted(own))  # first: it may fail, and the table would know of what is none of its
        for block, (keys, known) in zip(self._blocks, looked, strict=True):
            region = block.region
            self._reserved += sum(s for c, s in zip(region.chunks, region.sizes, strict=True) if c in own)
            self._sharable += self._elsewhere(block)
            weights.enter(region, keys, [span[:2] for span in block.spans()], self._user, addresses)
            chunks += region.chunks
            unknown += [chunk for chunk, sure in zip(region.chunks, known, strict=True) if not sure]
        chunks = list(dict.fromkeys(chunks))
        number = native.add_user(chunks, False, self._priority)
        holding = BlockHolding(
            table, native, number, self._user, addresses, tuple(chunks), self._host_copy, self._priority
        )
        holding.blocks = tuple(self._blocks)
        holding.regions = frozenset(block.region for block in self._blocks)
        holding.wake()
        if unknown:
            holding.anchor = native.add_user(unknown, False, self._priority)
            Holding(table, native, holding.anchor, self._user, {}, tuple(unknown), "store").wake()
        for block in self._blocks:
            native.remove_user(block.user)
            block.holding = holding
        holding.set_policy(evictable=self._evictable, priority=self._priority)
        self.holding = holding
        weights.forget_gone()

    def _elsewhere(self, block: Block) -> int:
        """Bytes of a block's objects that other blocks have too."""
        with self._weights._lock:
            others = {
                digest
                for other in list(self._weights._blocks.values())
                if other not in self._blocks
                for digest in other.objects
            }
        begin = block.begin or 0
        return sum(
            part.bytes
            for stretch in self._plan.within(begin, block.size)
            if stretch.file.digest in others and stretch.file.digest in block.objects
            for part in parts_of(stretch, begin, begin + block.size, 0)
        )


def key_of(chunk_bytes: int, within: int, data: memoryview) -> str:
    """What names a chunk of so many bytes that holds `data` from `within` on."""
    return digest_of(f"{chunk_bytes} {within} {digest_of_piece(data)}".encode())


def sizes_of(size: int, grid: int, lead: int, granule: int) -> list[int]:
    """Bytes of chunks for `size` bytes: of `grid`, the first less `lead`, the last no more than it takes."""
    sizes: list[int] = []
    left = size
    while left > 0:
        most = grid - (0 if sizes else lead)
        sizes.append(min(most, -(-left // granule) * granule))
        left -= sizes[-1]
    return sizes


def _groups(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of indices whose sizes together are at most `most`, or one each."""
    first = total = 0
    for index, size in enumerate(sizes):
        if index > first and total + size > most:
            yield first, index
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield first, len(sizes)
