"""Residency: which weights have an address on a device, who needs them, and what is there now.

Per pool a table digest -> (address, state, references, bytes). Two models with an equal weight get the same address.
Models come and go as holdings (`Residency.hold`); a holding is used (`with holding:`) around whatever touches its
weights, and may be suspended: then memory that no other awake holding needs goes back to the system, while every address
stays, and the next use brings the same bytes back to it.

On the host a weight is a read-only mapping of the store's object, so the operating system holds its pages once for all
processes. On a device weights are copied into memory of their own (glake_infer/layout.py says how they lie there), which
is read-only once it is written. Some may be wanted on the host: then their memory is the machine's, which the device reads
over its link, and none of the pool's budget. What a pool may take back by itself, and in which order, is in
allocators/weights.hpp.

Where the pool has a broker (glake_infer/sharing/) that memory is the machine's: the broker says how weights lie, and whoever
needs a chunk first fills it for all processes.

A file's bytes are checked against its digest while they are copied, or before they are mapped, and again whenever the file
has changed since (glake_infer/checking.py). Nothing is resident before that.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

from glake_infer import layout
from glake_infer.allocators.errors import (
    BrokerError,
    DriverError,
    ForkedProcessError,
    StoreError,
)
from glake_infer.allocators.pool import Pool
from glake_infer.checking import AlteredObjectError, Checker, File
from glake_infer.digest import digest_of, is_digest
from glake_infer.holding import Holding, HostCopy, Weighed
from glake_infer.sharing.address import BrokerAddress, share_for
from glake_infer.sharing.protocol import RegionSpec, WeightSpec
from glake_infer.sharing.refusals import AlteredError, BrokerGoneError
from glake_infer.sharing.share import Share, placed_alone
from glake_infer.sharing.status import TransferStatus
from glake_infer.store import ObjectFolder
from glake_infer.transfers.device import (
    Bringing,
    Copied,
    CudaTransfers,
    Device,
    Part,
    Step,
    TransferOptions,
    device_for,
)
from glake_infer.transfers.host_cache import host_cache

if TYPE_CHECKING:
    from glake_infer.allocators import _native

PAGE = 4096

AT_ONCE = 1 << 30
"""Bytes of chunks that are mapped, and made read-only, at once. That is one call each, for which copies on their way are
waited for: of 10 GiB in chunks of 128 MiB one by one it took 16 ms of 213 (H200)."""

TELLING = 8 << 20
"""Bytes from which a load tells how fast the next one will be."""


@dataclass(frozen=True)
class Wanted:
    """A weight that a model asks for: an object of `folder`, of whose `length` bytes the first `mapped` are used.

    Without a folder it is a chunk of an engine's weights (glake_infer/engine_weights.py).

    `group`, `pieces` and `edges` are what glake_infer/layout.py lays it out by. `by_file`: it is used through its file,
    which somebody else maps too, and so never copied. `on_host`: its copy is to lie in memory of the host, unless a model
    has one already; not where a broker holds the weights.
    """

    digest: str
    length: int
    mapped: int
    folder: ObjectFolder | None
    group: Hashable = None
    pieces: tuple[str, ...] = ()
    edges: tuple[int, ...] = ()
    by_file: bool = False
    on_host: bool = False

    @functools.cached_property
    def file(self) -> File:
        """Its file, to be checked."""
        assert self.folder, "a part of an engine's weights has no file of its own"
        return File(self.folder.path(self.digest), self.digest, self.length, self.folder.store_root)


@dataclass(eq=False)
class _Copy:
    """Of a chunk, in page-locked memory. `wanted`: the holdings that want it kept, and loads that read it."""

    address: int
    size: int
    wanted: set[Hashable]
    used: float
    """When a holding was last brought back from it, or it was made."""


@dataclass
class _Fill:
    """What fills a chunk."""

    chunk: int
    size: int
    parts: list[Part]
    copies: list[Copied]
    made_here: bool
    """Whether it has yet to get its memory."""
    on_host: bool = False

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts) + sum(size for _, _, size in self.copies)


Filling: TypeAlias = Generator[None, None, int]


def _finish(filling: Filling) -> int:
    """The second step of a filling that has begun."""
    try:
        next(filling)
    except StopIteration as end:
        return int(end.value)
    raise AssertionError("a filling has two steps")


def _grouped(fills: list[_Fill]) -> Iterator[list[_Fill]]:
    """In groups of about AT_ONCE bytes of chunks, each on the device or on the host."""
    group: list[_Fill] = []
    total = 0
    for fill in fills:
        if group and (fill.on_host != group[0].on_host or total >= AT_ONCE):
            yield group
            group, total = [], 0
        group.append(fill)
        total += fill.size
    if group:
        yield group


@dataclass(eq=False)
class Region:
    """A reservation of addresses; `number` is the native pool's, 0 where there is nothing to reserve."""

    number: int
    address: int
    chunks: tuple[int, ...]
    sizes: tuple[int, ...]
    parted: layout.Item | None = None
    starts: tuple[int, ...] = ()
    """The address of each chunk."""
    parts: dict[int, list[Part]] = field(default_factory=dict)
    """What fills each chunk, at its address in this region."""
    spec: RegionSpec | None = None
    """As a broker knows it."""
    entries: set[str] = field(default_factory=set)
    references: int = 0
    on_host: bool = False
    files: dict[str, File] = field(default_factory=dict)
    """Of an engine's block, whose chunks hold parts of objects: the objects' files, by their digests."""
    of_engine: bool = False
    ended: bool = False
    """The engine is gone. The region goes once nobody compares with its chunks."""


@dataclass
class _Entry:
    wanted: Wanted
    address: int
    region: Region
    chunks: tuple[int, ...]
    users: dict[int, int] = field(default_factory=dict)
    """References by the number of the model."""


class Residency:
    """The table of one pool. Thread-safe; of several threads that bring weights in, one places at a time."""

    _tables: ClassVar[WeakKeyDictionary[Pool, Residency]] = WeakKeyDictionary()
    _by_device: ClassVar[WeakValueDictionary[str, Residency]] = (
        WeakValueDictionary()
    )  # of earlier handles too
    _tables_lock = threading.Lock()
    looking: ClassVar[threading.RLock] = threading.RLock()
    """Held by who looks at models that are others'. It may be the last to have one, and then ends it."""

    def __init__(self, pool: Pool, copies: bool, share: Share | None = None) -> None:
        """Make an empty table; use `Residency.of(pool)` to get a pool's one."""
        self._native: _native.Pool = pool._open()
        self._device: Device = device_for(pool.device)
        self._copies = copies
        self.share = share
        self._process = os.getpid()
        self._lock = threading.RLock()  # of the tables below; see _locked
        self._placing = threading.Lock()  # one model at a time is placed
        self._closing: deque[Holding] = deque()  # closed ones, whose references somebody has yet to give back
        self._entries: dict[str, _Entry] = {}
        self._regions: dict[int, Region] = {}
        self._owners: dict[int, list[Region]] = {}  # chunk -> the regions that have it
        self._pinning = threading.Lock()
        self._tails: dict[int, int] = {}  # last chunk of a region -> bytes of its granule that are used
        self._unfilled: dict[
            int, list[Region]
        ] = {}  # chunk -> regions whose weights in it may not be there yet
        self._filling = threading.Lock()
        self._pinned: dict[int, _Copy] = {}  # by chunk
        self._renewals = 0  # how many of them were dropped because others wrote to their chunks
        self._checker = Checker()
        self._rate = 0.0  # bytes per second of the last load
        self._loads = (0, 0, 0.0)  # chunks, bytes, seconds, of all loads
        numbers = self._numbers = set[int]()
        self._finalizer = weakref.finalize(self, _end, self._native, numbers, share)
        self._finalizer.atexit = False

    @classmethod
    def of(cls, pool: Pool, *, copies: bool | None = None, broker: BrokerAddress | None = None) -> Residency:
        """Return the table of `pool`, made at its first call.

        copies: whether weights are copied, not mapped; by default on devices, and where there is a broker. broker: who
        holds them. Raises what `Share` does, for the first call with a broker.
        """
        with cls._tables_lock:
            table = cls._tables.get(pool)
            if table is None:
                wanted = pool.device != "cpu" or broker is not None if copies is None else copies
                table = cls._by_device.get(pool.device)
                if table and table.share and table.share.closed:
                    table = None  # of a handle that was dropped
                socket = table.share.socket if table and table.share else None
                if table is None or table._copies != wanted or socket != (broker and broker.socket):
                    share = share_for(pool._open(), pool.device, broker) if broker else None
                    table = cls._by_device[pool.device] = cls(pool, wanted, share)
                cls._tables[pool] = table
            return table

    @classmethod
    def settle(cls, pool: Pool) -> None:
        """Wait until all is given back of holdings that were closed, and of models that somebody only looks at."""
        table = cls._tables.get(pool)
        if table and os.getpid() == table._process:
            with cls.looking:
                pass
            table._give_back_closed(wait=True)

    @classmethod
    def leave(cls, pool: Pool) -> None:
        """The handle is closed: its table ends now, unless models that sleep still need it."""
        with cls._tables_lock:
            table = cls._tables.pop(pool, None)
            if table is None or os.getpid() != table._process:
                return
            with table._locked():
                if any(entry.users for entry in table._entries.values()):
                    return
                if cls._by_device.get(pool.device) is table:
                    del cls._by_device[pool.device]
        table._finalizer()
        if table.share:
            table.share.close()

    def hold(
        self,
        wanted: Iterable[Wanted],
        user: int,
        *,
        evictable: bool = False,
        priority: int = 0,
        host_copy: HostCopy = "store",
    ) -> Holding:
        """Give weights addresses and count a reference of `user` (a number that names the model) on each.

        They are absent until the holding is used for the first time, unless another has them there. Their bytes are checked
        then; here, that the files are there and have their size. Raises AlteredObjectError, InputError (GLAKE_VERIFY),
        OutOfMemoryError or DriverError; then nothing is held.
        """
        self._refuse_child()
        items = {item.digest: item for item in wanted}
        self._checker.look(item.file for item in items.values() if not self._shares(item))
        with self._locked():  # mapped here from a file that may be another by now, for who maps it by itself
            there_by_file = [i.file for i in items.values() if i.by_file and i.digest in self._entries]
        self._checker.check(there_by_file)
        while True:
            with self._placing:
                specs = self._places_of(items)
                with self._locked():
                    self._sweep()
                    for item in items.values():
                        if unneeded := self._unneeded(item):
                            self._remove(unneeded)
                    missing = [item for item in items.values() if item.digest not in self._entries]
                    placed = {weight.digest for spec in specs for weight in spec.weights}
                    if any(self._shares(i) and i.mapped and i.digest not in placed for i in missing):
                        continue  # it went between the two looks at the tables
                    for item in items.values():
                        there = self._entries.get(item.digest)
                        if there and there.wanted.mapped < item.mapped:
                            raise self._shorter(item, there.wanted.mapped)
                    self._place(missing, specs)
                    entries = [self._entries[digest] for digest in items]
                    chunks = list(dict.fromkeys(chunk for entry in entries for chunk in entry.chunks))
                    number = self._native.add_user(chunks, evictable, priority)
                    for digest in items:
                        self.refer(digest, user)
                    addresses = {digest: entry.address for digest, entry in zip(items, entries, strict=True)}
                    holding = Holding(
                        self, self._native, number, user, addresses, tuple(chunks), host_copy, priority
                    )
                    holding.regions = frozenset(entry.region for entry in entries)
                    return holding

    def tokens(self, chunks: Iterable[int]) -> list[str]:
        """The broker's names of chunks; of those alone that are its."""
        return self.share.tokens(chunks) if self.share else []

    def flush(self) -> None:
        """Let the broker, where there is one, let go of what became absent here."""
        if self.share:
            self.share.flush()

    def users(self) -> dict[str, tuple[int, frozenset[int]]]:
        """{digest: (bytes, the models that use it)} of everything that models hold, awake or asleep."""
        with self._locked():
            return {d: (e.wanted.mapped, frozenset(e.users)) for d, e in self._entries.items() if e.users}

    def asleep(self) -> int:
        """Bytes of memory that models hold addresses for, and that are not there now."""
        with self._locked():
            used = [region for region in self._regions.values() if region.references]
            far = sum(sum(r.sizes) - int(self._native.resident_in(r.number)) for r in used if r.on_host)
            near = {chunk for region in used if not region.on_host for chunk in region.chunks}
            return far + int(self._native.absent(list(near)))  # each once, however many have it

    @property
    def offloads(self) -> bool:
        """Whether weights may lie on the host: where they are copied, by no broker, and the device maps host memory."""
        return self._copies and not self.share and self._native.granularity_on_host > 0

    def placed(self, digests: Iterable[str]) -> dict[str, bool]:
        """Of these weights those that stay where they are, because models have them: digest -> whether on the host."""
        with self._locked():
            entries = {digest: entry for digest in digests if (entry := self._entries.get(digest))}
            return {d: e.region.on_host for d, e in entries.items() if e.region.references}

    def room(self, wanted: Iterable[Wanted]) -> tuple[int, int]:
        """Bytes of the device that weights would take which are not there yet, held and used now; and how many they could.

        They could take what limit and device leave when all is given back that is idle or may be evicted, and is not
        wanted itself. What a broker says of that is not asked.
        """
        items = list({item.digest: item for item in wanted}.values())
        granule, size = self._native.granularity, 0
        with self._locked():
            self._sweep()
            leaving = [region for item in items if (region := self._unneeded(item))]
            missing: list[Wanted] = []
            chunks: list[int] = []
            for item in items:
                entry = self._entries.get(item.digest)
                if entry and entry.region not in leaving:
                    chunks += entry.chunks
                elif item.mapped and not item.on_host:
                    missing.append(item)
            own = [item for item in missing if not self._shares(item) and self._copies and not item.by_file]
            size += sum(item.mapped for item in missing) - sum(item.mapped for item in own)
            tail = 0

            def tail_for(size: int) -> int:
                nonlocal tail
                tail = self._tail_for(size, granule)
                return self._tails.get(tail, 0)

            for planned in layout.plan(_layout_items(own), granule, self._twin_of, tail_for):
                twin = self._twin_region(planned.parted) if planned.parted else None
                for index, (chunk, same) in enumerate(zip(planned.chunks, planned.shared, strict=True)):
                    if planned.in_tail and index == 0:
                        chunks.append(tail)
                    elif twin and same is not None:
                        chunks.append(twin.chunks[same])
                    else:
                        size += chunk
            absent, room = self._native.room_for(chunks)
            return size + absent, room

    @property
    def transfers(self) -> TransferStatus:
        """What was loaded from files so far; with a broker also what came without a load."""
        if self.share:
            return self.share.transfers
        loads, size, seconds = self._loads
        return TransferStatus(loads=loads, bytes=size, seconds=seconds, hits=0, hit_bytes=0)

    @property
    def rate(self) -> float:
        """Bytes per second of the last load that was large enough to tell; 0 before."""
        return self._rate

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the tables, and afterwards do what came up meanwhile.

        A session may be collected, and its finalizer close a holding, at any moment, in this very thread: such a one is
        put off until the tables are whole again.
        """
        self._refuse_child()
        try:
            with self._lock:
                yield
        finally:
            self._give_back_closed(wait=False)

    def _refuse_child(self) -> None:
        """A thread of the parent's may hold the lock for ever."""
        if os.getpid() != self._process:
            raise ForkedProcessError

    def _give_back_closed(self, *, wait: bool) -> None:
        """Without `wait`, whoever has the lock does it: a finalizer may run in a thread that that one waits for."""
        while self._closing and not self._lock._is_owned():  # type: ignore[attr-defined]
            if not self._lock.acquire(blocking=wait):
                return
            try:
                while self._closing:
                    self._release(self._closing.popleft())
            finally:
                self._lock.release()

    @staticmethod
    def _shorter(item: Wanted, mapped: int) -> StoreError:
        return StoreError(
            f"of the object {item.digest} {mapped} bytes are in use and {item.mapped} are wanted. Close the models that use "
            "it first."
        )

    # Placing.

    def _place(self, missing: list[Wanted], specs: list[RegionSpec]) -> None:
        placed: list[Region] = []
        try:
            self._place_files([item for item in missing if not self._copies or item.by_file], placed)
            missing = [item for item in missing if self._copies and not item.by_file]
            if self.share:
                self._place_shared(missing, specs, placed)
                return
            granule, tail = self._native.granularity, 0

            def tail_for(size: int) -> int:
                nonlocal tail
                tail = self._tail_for(size, granule)
                return self._tails.get(tail, 0)

            by_digest = {item.digest: item for item in missing}
            items = [item for item in missing if item.mapped]
            near = _layout_items(item for item in items if not item.on_host)
            for region in layout.plan(near, granule, self._twin_of, tail_for):
                placed.append(self._place_region(region, by_digest, tail))
            # On the host nothing is shared in part: no twins, and no tails.
            far = _layout_items(replace(item, pieces=()) for item in items if item.on_host)
            granule = max(granule, self._native.granularity_on_host)
            for region in layout.plan(far, granule, lambda item: None, aligned=True):
                placed.append(self._place_region(region, by_digest, 0, on_host=True))
            if len(items) < len(missing):  # weights without bytes
                placed.append(self._enter([i for i in missing if not i.mapped], Region(0, 0, (), ())))
        except BaseException:
            for made in placed:
                self._remove(made)
            raise

    def _place_files(self, missing: list[Wanted], placed: list[Region]) -> None:
        """A region each: files are mapped by themselves, and a weight goes when its last user does."""
        for item in missing:
            if not item.mapped:
                placed.append(self._enter([item], Region(0, 0, (), ())))
                continue
            size = -(-item.mapped // PAGE) * PAGE
            number, address, chunks = self._native.place_weights([(size, item.mapped, 0, False)], "file")
            self._numbers.add(number)
            part = Part(item.file.path, 0, item.mapped, address)
            region = Region(number, address, tuple(chunks), (size,), None, (address,), {chunks[0]: [part]})
            placed.append(self._enter([item], region))

    def _shares(self, item: Wanted) -> bool:
        return self.share is not None and not item.by_file

    def _places_of(self, items: dict[str, Wanted]) -> list[RegionSpec]:
        """Where the broker says that weights lie which are not here. It is asked without the lock."""
        if not self.share:
            return []
        with self._locked():
            self._sweep()
            missing = [
                i for i in items.values() if self._shares(i) and i.mapped and i.digest not in self._entries
            ]
            known = [region.spec for region in self._regions.values() if region.spec]
        if not missing:
            return []
        try:
            specs = self.share.place(specs_of(missing))
        except BrokerGoneError:
            return placed_alone(specs_of(missing), self._native.granularity, known)
        placed = {weight.digest for spec in specs for weight in spec.weights}
        if nowhere := [item.digest for item in missing if item.digest not in placed]:
            raise BrokerError(
                f"the broker at {self.share.socket} gave the weight {nowhere[0]} no place. It is none of ours, or has a "
                "defect: restart it."
            )
        return specs

    def _place_shared(self, missing: list[Wanted], specs: list[RegionSpec], placed: list[Region]) -> None:
        """Where the broker says that they lie."""
        assert self.share is not None
        with_bytes = [item for item in missing if item.mapped]
        if len(with_bytes) < len(missing):
            placed.append(self._enter([i for i in missing if not i.mapped], Region(0, 0, (), ())))
        if not with_bytes:
            return
        there = {region.spec.token: region for region in self._regions.values() if region.spec}
        regions = {}
        for spec in specs:
            region = there.get(spec.token)
            if region is None:
                placed.append(region := self._map_region(spec))
            elif region.spec != spec:  # files that are elsewhere now
                self._renew(region, spec)
            for weight in spec.weights:
                regions[weight.digest] = (region, weight)
        for item in with_bytes:
            region, weight = regions[item.digest]
            if weight.mapped < item.mapped:
                raise self._shorter(item, weight.mapped)
            self._enter([item], region, region.address + weight.offset)

    def _map_region(self, spec: RegionSpec) -> Region:
        """Reserve addresses for a region of the broker's."""
        assert self.share is not None
        numbers = [self.share.number_of(chunk.token) for chunk in spec.chunks]
        pieces = [  # one that was removed here may be known to the connection for a moment longer
            (chunk.size, chunk.used, number if number in self._owners else 0, False)
            for chunk, number in zip(spec.chunks, numbers, strict=True)
        ]
        number, address, chunks = self._native.place_weights(pieces, "shared")
        self._numbers.add(number)
        sizes = tuple(chunk.size for chunk in spec.chunks)
        starts = tuple(itertools.accumulate(sizes[:-1], initial=address))
        region = Region(number, address, tuple(chunks), sizes, None, starts)
        self._renew(region, spec)
        return self._enter([], region)

    def _renew(self, region: Region, spec: RegionSpec) -> None:
        assert self.share is not None
        region.spec = spec
        region.parts = self._parts_of(region, [(w.offset, w.mapped, Path(w.path)) for w in spec.weights])
        self.share.entered(spec, region.chunks)

    def _place_region(
        self, planned: layout.Region, by_digest: dict[str, Wanted], tail: int, *, on_host: bool = False
    ) -> Region:
        twin = self._twin_region(planned.parted) if planned.parted else None
        shared = [twin.chunks[i] if twin and i is not None else 0 for i in planned.shared]
        if planned.in_tail:
            shared[0] = tail
        beside = [planned.in_tail] + [False] * (len(shared) - 1)
        pieces = list(zip(planned.chunks, planned.used, shared, beside, strict=True))
        number, address, chunks = self._native.place_weights(pieces, "memory", on_host)
        self._numbers.add(number)
        starts = tuple(itertools.accumulate(planned.chunks[:-1], initial=address))
        region = Region(
            number, address, tuple(chunks), planned.chunks, planned.parted, starts, on_host=on_host
        )
        for digest, offset in planned.offsets.items():
            self._enter([by_digest[digest]], region, address + offset)
        spans = [
            (offset, by_digest[digest].mapped, by_digest[digest].file.path)
            for digest, offset in sorted(planned.offsets.items(), key=lambda each: each[1])
        ]
        region.parts = self._parts_of(region, spans)
        if planned.in_tail:
            del self._tails[tail]  # used up, or entered again below
            self._unfilled.setdefault(tail, []).append(region)
        if not planned.parted and not on_host:
            granule = self._native.granularity
            end = max(offset + length for offset, length, _ in spans)
            if planned.chunks[-1] == granule and -end % granule:
                self._tails[chunks[-1]] = granule - -end % granule
        return region

    @staticmethod
    def _parts_of(region: Region, spans: Sequence[tuple[int, int, Path]]) -> dict[int, list[Part]]:
        """What fills each chunk: of weights (offset in the region, bytes, file) in the order of their offsets."""
        found: dict[int, list[Part]] = {}
        first = start = 0
        for chunk, size in zip(region.chunks, region.sizes, strict=True):
            while first < len(spans) and spans[first][0] + spans[first][1] <= start:
                first += 1
            parts = []
            for offset, length, path in spans[first:]:
                if offset >= start + size:
                    break
                begin, end = max(start, offset), min(start + size, offset + length)
                if begin < end:
                    parts.append(Part(path, begin - offset, end - begin, region.address + begin))
            found[chunk] = parts
            start += size
        return found

    def _tail_for(self, size: int, granule: int) -> int:
        """The chunk in whose rest weights of `size` bytes lie best; 0 if there is none."""
        self._tails = {chunk: used for chunk, used in self._tails.items() if chunk in self._owners}
        rest = {chunk: granule - used for chunk, used in self._tails.items()}
        whole = [chunk for chunk in rest if rest[chunk] >= size + layout.ALIGNMENT]
        if whole:
            return min(whole, key=lambda chunk: rest[chunk])
        return max(rest, key=lambda chunk: rest[chunk], default=0)

    def _enter(self, items: Sequence[Wanted], region: Region, address: int | None = None) -> Region:
        for item in items:
            place = region.address if address is None else address
            first = max(0, bisect.bisect_right(region.starts, place) - 1)
            chunks = region.chunks[first : bisect.bisect_left(region.starts, place + item.mapped)]
            self._entries[item.digest] = _Entry(item, place, region, chunks)
            region.entries.add(item.digest)
        if region.number and region.number not in self._regions:
            self._regions[region.number] = region
            for chunk in region.chunks:
                self._owners.setdefault(chunk, []).append(region)
        return region

    def _unneeded(self, item: Wanted) -> Region | None:
        """Where a weight lies on the device that is wanted on the host, if no model needs it there."""
        there = self._entries.get(item.digest)
        if not (item.on_host and there and there.region.number):
            return None
        return None if there.region.on_host or there.region.references else there.region

    def _twin_of(self, item: layout.Item) -> layout.Twin | None:
        region = self._twin_region(item)
        return layout.Twin(region.parted, region.sizes) if region and region.parted else None

    def _twin_region(self, item: layout.Item) -> Region | None:
        """The placed weight with the most equal pieces, if there are any."""

        def equal(region: Region) -> int:
            theirs = region.parted.pieces if region.parted else ()
            return sum(a == b for a, b in zip(item.pieces, theirs, strict=False))

        best = max(self._regions.values(), key=equal, default=None)
        return best if best is not None and equal(best) else None

    # Letting go.

    def _release(self, holding: Holding) -> None:
        with contextlib.suppress(DriverError):
            self._native.remove_user(holding._number)
        for chunk in holding.chunks:
            if kept := self._pinned.get(chunk):
                self._let_go(chunk, kept, holding)
        for digest in holding.addresses:
            entry = self._entries[digest]
            entry.region.references -= 1
            entry.users[holding.user] -= 1
            if not entry.users[holding.user]:
                del entry.users[holding.user]
            of_file = (entry.wanted.by_file or not self._copies) and not entry.region.of_engine
            if not entry.region.references and (of_file or not entry.region.number):
                self._remove(entry.region)
        holding.released()
        self._sweep()

    def enter_chunk(self, digest: str, region: Region, chunk: int, address: int, size: int) -> str:
        """Enter a chunk of an engine's block, `size` bytes at `address`; returns its name. Under the lock."""
        self._regions.setdefault(region.number, region)
        self._numbers.add(region.number)
        region.of_engine = True
        self._owners.setdefault(chunk, []).append(region)
        there = self._entries.get(digest)
        if there and there.chunks != (chunk,):  # the same bytes twice
            digest = digest_of(f"{digest} {chunk}".encode())
            there = self._entries.get(digest)
        if there is None:
            self._entries[digest] = _Entry(Wanted(digest, size, size, None), address, region, (chunk,))
            region.entries.add(digest)
        return digest

    def refer(self, digest: str, user: int) -> None:
        """Count a reference of `user` on an entry. Under the lock."""
        entry = self._entries[digest]
        entry.users[user] = entry.users.get(user, 0) + 1
        entry.region.references += 1

    def keep_region(self, region: Region) -> None:
        """Keep an engine's region until `leave_region`: its chunks are about to be used. Under the lock."""
        region.references += 1

    def leave_region(self, region: Region) -> None:
        """The end of `keep_region`. Under the lock."""
        region.references -= 1
        if region.ended:
            self.end_region(region)

    def end_region(self, region: Region) -> None:
        """An engine's block is given back: what others have of it is theirs from now on. Under the lock."""
        region.ended = True
        for digest in list(region.entries):
            entry = self._entries[digest]
            heirs = [each for each in self._owners[entry.chunks[0]] if each is not region and not each.ended]
            if not entry.users or not heirs:
                continue
            count = sum(entry.users.values())
            region.references -= count
            entry.region = heirs[0]
            entry.region.references += count
            entry.address = heirs[0].starts[heirs[0].chunks.index(entry.chunks[0])]
            region.entries.discard(digest)
            heirs[0].entries.add(digest)
        if not region.references:
            self._remove(region)

    def _sweep(self) -> None:
        """Forget regions that nobody needs and that the pool has emptied."""
        for region in list(self._regions.values()):
            if region.of_engine and not region.ended:  # it may have no entry that another has not
                continue
            if not region.references and not self._native.resident_in(region.number):
                self._remove(region)

    def _remove(self, region: Region) -> None:
        if region.number:
            with contextlib.suppress(DriverError):  # of a GPU that is lost
                self._native.remove_region(region.number)
            self._numbers.discard(region.number)
            self._regions.pop(region.number, None)
            for chunk in region.chunks:
                self._owners[chunk].remove(region)
                if not self._owners[chunk]:
                    del self._owners[chunk]
                self._is_filled(chunk, region)
            if self.share and region.spec:
                self.share.removed(region.spec, [c for c in region.chunks if c not in self._owners])
        for digest in region.entries:
            self._entries.pop(digest, None)

    # Bringing in.

    def _bring(
        self, holding: Holding, chunks: list[int], *, later: bool = False, alone: bool = False
    ) -> None:
        """Fill chunks that a use waits for, and say so to the native pool. After an error they are absent.

        `later`: they have no memory yet.
        """
        try:
            self._bring_in(holding, chunks, later=later, alone=alone)
        except BaseException as error:
            self._failed(holding, chunks, error)

    def _bring_in(
        self, holding: Holding, chunks: list[int], *, later: bool = False, alone: bool = False
    ) -> None:
        """As `_bring`; after an error `_failed` has to be called by the thread that began the use."""
        if own := [chunk for chunk in chunks if not (self.share and self.share.has(chunk))]:
            filling = self._fill_in_steps(holding, own, later=later)
            next(filling)
            self._loaded(holding, own, filling)
        if self.share and (shared := [chunk for chunk in chunks if self.share.has(chunk)]):
            fill = functools.partial(self._fill, holding)
            self.share.bring(holding._number, shared, fill, self._verify_chunks, alone=alone)

    def _loaded(self, holding: Holding, chunks: list[int], filling: Filling) -> None:
        """Wait until chunks are filled, and say so to the native pool."""
        _finish(filling)
        self._native.loaded(holding._number, chunks)

    def _failed(self, holding: Holding, chunks: list[int], error: BaseException) -> NoReturn:
        """Chunks of a use, which ends, could not be filled."""
        self._native.load_failed(holding._number, chunks)
        if isinstance(error, AlteredError):
            why = str(error) if error.unreadable else None
            raise AlteredObjectError(error.digest, error.path, why) from error
        raise error

    def _verify_chunks(self, chunks: list[int], copy: Callable[[], object]) -> None:
        """Check the files of a broker's chunks, which it checks where it is there, while they are copied."""
        files = []
        with self._locked():
            for chunk in chunks:
                region = self._owners[chunk][0]
                wanted = {part.path.name for part in region.parts[chunk]}
                for weight in region.spec.weights if region.spec else ():
                    if weight.digest in wanted:
                        entry = self._entries.get(weight.digest)
                        file = File(Path(weight.path), weight.digest, weight.length)
                        ours = entry and entry.wanted.file
                        files.append(ours if ours and ours.path.absolute() == file.path else file)
        self._checker.beside(files, lambda failed: copy())

    def _fill(self, holding: Holding, chunks: list[int]) -> int:
        """Write the bytes of chunks; returns how many."""
        filling = self._fill_in_steps(holding, chunks, later=False)
        next(filling)
        return _finish(filling)

    def _fill_in_steps(self, holding: Holding, chunks: list[int], *, later: bool) -> Filling:
        """Write the bytes of chunks in two steps: the first begins that, the second waits for the end.

        It returns how many they were. `later`: the chunks have yet to get their memory.
        """
        native = self._native
        items: list[Wanted] = []
        borrowed: list[tuple[int, _Copy]] = []
        reader = object()
        start = time.perf_counter()
        try:
            with self._locked():
                fills: list[_Fill] = []
                filled: list[tuple[int, Region]] = []
                for chunk in chunks:
                    if kept := self._pinned.get(chunk):
                        kept.wanted.add(reader)  # so that nobody frees it meanwhile
                        kept.used = start
                        borrowed.append((chunk, kept))
                        copied = (self._address_of(chunk, holding), kept.address, kept.size)
                        fills.append(_Fill(chunk, kept.size, [], [copied], later))
                        continue
                    owners = self._owners[chunk]
                    mine = [owner for owner in owners if owner in holding.regions and chunk in owner.parts]
                    if not mine:
                        raise StoreError(
                            "weights of an engine that is gone were wanted for another's, and nothing is known that has "
                            "them. Load that engine again."
                        )
                    if (
                        mine[0].parted or mine[0].spec or mine[0].of_engine
                    ):  # versions have the same bytes there
                        mine = mine[:1]
                    elif others := [owner for owner in owners if owner not in holding.regions]:
                        self._unfilled[chunk] = others + mine  # each model reads its own files only
                    own = [part for owner in mine for part in owner.parts[chunk]]
                    filled += [(chunk, owner) for owner in mine]
                    on_host = mine[0].on_host
                    size = mine[0].sizes[mine[0].chunks.index(chunk)]
                    fills.append(_Fill(chunk, size, own, [], later or on_host, on_host))
                parts = [part for fill in fills for part in fill.parts]
                entries = [self._entries.get(d) for d in dict.fromkeys(part.path.name for part in parts)]
                items = [e.wanted for e in entries if e and not self._shares(e.wanted)]
            files = [item.file for item in items]
            of_engine = {owner for _, owner in filled if owner.of_engine}
            if of_engine:
                by_digest = {digest: file for owner in of_engine for digest, file in owner.files.items()}
                files = [by_digest[digest] for digest in dict.fromkeys(part.path.name for part in parts)]
            if not of_engine and (not self._copies or any(item.by_file for item in items)):
                yield
                self._checker.check(files)
                for chunk, part in zip(chunks, parts, strict=True):
                    with open(part.path, "rb") as file:  # noqa: PTH123
                        native.map_weights(chunk, file.fileno(), part.size)
                self._checker.check(files)  # not while they were mapped, either
            else:
                if parts:
                    holding._kept = -1  # of those that come and go, the ones that came last have copies
                yield from self._bring_fills(files, fills, holding)
            with self._locked():
                for chunk, owner in filled:
                    self._is_filled(chunk, owner)
        except OSError as error:
            self._raise_altered(error)
            raise
        finally:
            if borrowed:
                with self._locked():
                    for chunk, kept in borrowed:
                        self._let_go(chunk, kept, reader)
        seconds, size = time.perf_counter() - start, sum(part.bytes for part in parts)
        with self._locked():
            self._loads = (self._loads[0] + len(chunks), self._loads[1] + size, self._loads[2] + seconds)
        done = size + sum(size for fill in fills for _, _, size in fill.copies)
        if self._copies and done >= TELLING:
            self._rate = done / seconds
        return size

    def _bring_fills(self, files: list[File], fills: list[_Fill], holding: Holding) -> Iterator[None]:
        """Bring what fills chunks, and check the files beside that. Memory of some is made while others are filled.

        In two steps, as `_fill_in_steps`.
        """
        native, groups = self._native, list(_grouped(fills))
        # Only where the driver writes to memory, and so may do so once more where it is read-only, should a file change.
        freezes = len(groups) > 1 and isinstance(self._device, CudaTransfers)

        def steps() -> Iterator[Step]:
            for group in groups:
                if chunks := [fill.chunk for fill in group if fill.made_here]:
                    native.make(chunks)
                for fill in group:
                    fill.made_here = False  # not again where a file changed, and all is brought once more
                parts = [part for fill in group for part in fill.parts]
                yield Step(parts, [copy for fill in group for copy in fill.copies], group[0].on_host)

        def arrived(number: int) -> None:
            if freezes:
                native.freeze([fill.chunk for fill in groups[number]])

        yield from self._bring_steps(files, steps, sum(fill.bytes for fill in fills), holding, arrived)

    def _bring_steps(
        self,
        files: list[File],
        steps: Callable[[], Iterable[Step]],
        total: int,
        holding: Holding,
        arrived: Callable[[int], None] | None = None,
    ) -> Iterator[None]:
        given = holding.transfer
        stopped = given["cancelled"]
        checking = self._checker.begin(files)
        try:
            started: list[Bringing] = [self._device.start(steps(), total, priority=given["priority"])]
        except BaseException:
            checking.cancel()
            raise

        def bring(failed: Callable[[], bool]) -> None:
            options: TransferOptions = {
                **given,
                "cancelled": lambda: bool(stopped and stopped()) or failed(),
                "arrived": arrived,
            }
            if started:
                started.pop().finish(**options)
            else:  # a file has changed meanwhile
                self._device.bring(steps(), total, **options)

        try:
            yield
            self._checker.beside(files, bring, checking)
        finally:
            for each in started:
                each.stop()

    def _let_go(self, chunk: int, kept: _Copy, who: Hashable) -> None:
        """Whoever wanted a copy wants it no more; the last one frees it."""
        kept.wanted.discard(who)
        if not kept.wanted:
            if self._pinned.get(chunk) is kept:
                del self._pinned[chunk]
            host_cache.give_back(kept.size)
            with contextlib.suppress(DriverError):
                self._device.forget(kept.address)

    def _is_filled(self, chunk: int, region: Region) -> None:
        if region in (regions := self._unfilled.get(chunk, [])):
            regions.remove(region)
            if not regions:
                del self._unfilled[chunk]

    def _fill_tails(self, holding: Holding) -> None:
        """Write a holding's weights into chunks that were there before them; it is in use."""
        with self._filling:
            with self._locked():
                todo = [
                    (chunk, [region for region in self._unfilled[chunk] if region in holding.regions])
                    for chunk in holding.chunks
                    if chunk in self._unfilled
                ]
            for chunk, regions in todo:
                if not regions:
                    continue
                with self._locked():
                    files = [
                        self._entries[part.path.name].wanted.file for r in regions for part in r.parts[chunk]
                    ]
                with self._pinning:  # a copy has all of it, or is made anew
                    address = self._native.begin_writing(chunk)
                    try:
                        moved: list[Part] = []
                        for region in regions:
                            shift = address - region.starts[region.chunks.index(chunk)]
                            moved += [replace(p, address=p.address + shift) for p in region.parts[chunk]]
                        size = sum(part.bytes for part in moved)
                        for _ in self._bring_steps(files, lambda moved=moved: [Step(moved)], size, holding):  # type: ignore[misc]
                            pass
                    except OSError as error:
                        self._raise_altered(error)
                        raise
                    finally:
                        self._native.end_writing(chunk, address)
                    with self._locked():
                        if kept := self._pinned.pop(chunk, None):
                            self._renewals += 1
                            for who in [who for who in kept.wanted if isinstance(who, Holding)]:
                                self._let_go(chunk, kept, who)
                        for region in regions:
                            self._is_filled(chunk, region)

    @staticmethod
    def _raise_altered(error: OSError) -> None:
        """Turn the failure to read an object's file into our error."""
        if error.filename is not None and is_digest(digest := Path(os.fsdecode(error.filename)).name):
            short = error.errno == 0  # it ends early: transfers.py
            raise AlteredObjectError(digest, error.filename, None if short else error.strerror) from error

    def _keep_copies(self, holding: Holding) -> None:
        """Make page-locked copies of what a holding that is in use has, where there are none and the budget allows it.

        Copies that are older, and of other holdings, make room.
        """
        with self._pinning:
            missing: list[tuple[int, int]] = []
            with self._locked():
                now = time.perf_counter()
                total = 0  # of its copies, which must fit by themselves, or others' would go for nothing
                for chunk in holding.chunks:
                    if kept := self._pinned.get(chunk):
                        kept.wanted.add(holding)
                        kept.used = now
                        total += kept.size
                        continue
                    region = self._owners[chunk][0]
                    if region.on_host:  # the store has them, and this is host memory as it is
                        continue
                    size = region.sizes[region.chunks.index(chunk)]
                    if host_cache.fits(total + size):
                        total += size
                        missing.append((chunk, size))
                self._drop_copies(host_cache.excess(sum(size for _, size in missing)), holding)
            missing = [(chunk, size) for chunk, size in missing if host_cache.reserve(size)]
            if not missing:
                return
            try:
                with self._locked():
                    spans = [(self._address_of(chunk, holding), size) for chunk, size in missing]
                made = self._device.keep(spans)
            except BaseException:
                host_cache.give_back(sum(size for _, size in missing))
                raise
            with self._locked():
                for (chunk, size), address in zip(missing, made, strict=True):
                    self._pinned[chunk] = _Copy(address, size, {holding}, now)

    def _address_of(self, chunk: int, holding: Holding) -> int:
        """Where a chunk lies that a holding uses: in a region of its own, as others' may go meanwhile. Under the lock."""
        owner = next(owner for owner in self._owners[chunk] if owner in holding.regions)
        return owner.starts[owner.chunks.index(chunk)]

    def _drop_copies(self, size: int, wanting: Holding) -> None:
        """Free copies of other holdings, the longest unused first, until `size` bytes are free. Under the lock."""
        oldest = sorted(self._pinned.items(), key=lambda item: item[1].used)
        for chunk, kept in oldest:
            if size <= 0:
                return
            if wanting not in kept.wanted and all(isinstance(who, Holding) for who in kept.wanted):
                size -= kept.size
                for who in list(kept.wanted):
                    self._let_go(chunk, kept, who)

    def _weigh(self, holding: Holding, patience: float) -> Weighed:
        if self._lock.acquire(timeout=patience):
            try:
                holding.weighed = self._weigh_now(holding)
            finally:
                self._lock.release()
                self._give_back_closed(wait=False)
        return holding.weighed

    def _weigh_now(self, holding: Holding) -> Weighed:
        """Under the lock."""
        if holding.closed:
            return Weighed(0, 0, 0, 0, {})
        shared = own = offloaded = 0
        others: dict[int, int] = {}
        for digest in holding.addresses:
            entry = self._entries[digest]
            size = entry.wanted.mapped
            offloaded += size if entry.region.on_host else 0
            if len(entry.users) > 1:
                shared += size
                for user in entry.users:
                    if user != holding.user:
                        others[user] = others.get(user, 0) + size
            else:
                own += size
        pinned = sum(self._pinned[c].size for c in holding.chunks if c in self._pinned)
        missing = int(self._native.user(holding._number)["missing"])
        return Weighed(shared, own, missing, pinned, others, offloaded)


def _end(native: _native.Pool, numbers: set[int], share: Share | None) -> None:
    """Take back the addresses of a table that is gone."""
    for number in numbers:
        with contextlib.suppress(Exception):
            native.remove_region(number)
    if share:
        share.close(wait=False)


def _layout_items(items: Iterable[Wanted]) -> list[layout.Item]:
    return [layout.Item(i.digest, i.mapped, i.group, i.pieces, i.edges) for i in items]


def specs_of(items: Iterable[Wanted]) -> list[WeightSpec]:
    """Weights as a broker is asked to place them."""
    groups: dict[Hashable, int] = {}
    return [
        WeightSpec(
            digest=item.digest,
            length=item.length,
            mapped=item.mapped,
            path=str(item.file.path.absolute()),
            group=groups.setdefault(item.group, len(groups)),
            pieces=list(item.pieces),
            edges=list(item.edges),
        )
        for item in items
    ]


def _look_anew() -> None:
    """In a child of fork(): a thread of the parent's may have been looking."""
    Residency.looking = threading.RLock()


os.register_at_fork(after_in_child=_look_anew)
