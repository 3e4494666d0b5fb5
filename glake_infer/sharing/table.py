"""What a broker knows of one device: regions, chunks, who has them, and the budget. Pure logic: no sockets, no waiting.

A chunk is absent; being made by a client (`maker`); there, and its bytes are being checked (`checking`); or ready. From
being made on it counts, once, whoever has it. `used` is the bytes of all these chunks, the quotas of all clients, and what
clients keep of chunks that did not pass the check (`strays`); it stays within `limit`, but for what clients bring from an
earlier broker. Whatever is asked for here is done at once or not at all. The descriptor of a chunk's memory is opaque here:
it is let go of when the memory is to go.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence

from glake_infer import layout
from glake_infer.sharing.entries import (
    Chunk,
    Client,
    Counters,
    Fill,
    NoRoomError,
    NotMakingError,
    Region,
    Sorting,
    UnknownError,
    WrongError,
    are_equal,
    check_region,
    check_weight,
    item_of,
    shape_of,
)
from glake_infer.sharing.protocol import (
    ChunkMemory,
    ChunkSpec,
    PlacedWeight,
    RegionSpec,
    Resume,
    WeightSpec,
)
from glake_infer.sharing.status import ChunkStatus, WeightStatus

MAKE_SECONDS = 20.0
"""That a client may take to make chunks, and a second more for each MAKE_RATE bytes."""

MAKE_RATE = 50 << 20

MOST_QUOTA = 1 << 50
"""Bytes of private memory that a client may bring."""

MOST_PLACED = 1 << 44
"""Bytes of all regions of a device together: far more than devices have, and few enough chunks to keep in mind."""


class Table:
    """One device's. Not thread-safe."""

    def __init__(
        self,
        name: str,
        granule: int,
        limit: int,
        *,
        memory: int = 0,
        title: str = "",
        make_seconds: float = MAKE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """An empty one."""
        self._make_seconds = make_seconds
        self.name, self.title, self.memory = name, title, memory
        self.granule, self.limit = granule, limit
        self.clients: set[Client] = set()
        self.counters = Counters()
        self._clock = clock
        self._regions: dict[str, Region] = {}
        self._places: dict[str, list[Region]] = {}  # by the digest of a weight, the latest last
        self._chunks: dict[str, Chunk] = {}
        self._making: dict[Chunk, None] = {}
        self._unused: dict[Chunk, None] = {}  # ready, and nobody has them: in the order of their last use
        self._weights = self._quotas = self._strays = self._placed_bytes = 0
        self._brought = False  # more than the limit, by clients that resumed

    def now(self) -> float:
        """Seconds, as deadlines are."""
        return self._clock()

    # The budget.

    @property
    def used(self) -> int:
        """Bytes that count."""
        return self._weights + self._quotas + self._strays

    @property
    def weights(self) -> int:
        """Bytes of chunks that count."""
        return self._weights

    @property
    def quotas(self) -> int:
        """Of all clients, with what they keep of chunks that nobody else gets."""
        return self._quotas + self._strays

    @property
    def unused(self) -> int:
        """Bytes of ready chunks that nobody has."""
        return sum(chunk.size for chunk in self._unused)

    def missing(self, needed: int) -> int:
        """Bytes that must go before so many more fit; 0 if they do."""
        return max(0, self.used + needed - self.limit)

    def grow(self, client: Client, quota: int) -> int:
        """Let the client's private memory reach `quota` bytes; returns its quota. Raises NoRoomError."""
        if (more := quota - client.quota) > 0:
            if missing := self.missing(more):
                raise NoRoomError(missing)
            self._set_quota(client, quota)
        return client.quota

    def shrink(self, client: Client, quota: int) -> int:
        """The client has given private memory back; returns how much."""
        less = max(0, client.quota - quota)
        self._set_quota(client, client.quota - less)
        return less

    def _set_quota(self, client: Client, quota: int) -> None:
        self._quotas += quota - client.quota
        client.quota = quota
        self._settle()

    def _settle(self) -> None:
        if self.used <= self.limit:
            self._brought = False

    # Clients.

    def join(self, client: Client) -> None:
        """A new client."""
        self.clients.add(client)

    def leave(self, client: Client) -> None:
        """The client has ended: what it had is nobody's now, what it made is absent again. Twice is fine."""
        if client not in self.clients:
            return
        for chunk in list(client.makes):
            self._unmake(client, chunk)
        for chunk in list(client.has):
            self._let_go(client, chunk)
        self._set_quota(client, 0)
        self._strays -= sum(client.strays.values())
        client.strays.clear()
        self.forget(client, list(client.regions))
        self.clients.remove(client)
        self._settle()

    # Places.

    def claims(self, weights: Iterable[WeightSpec]) -> dict[str, tuple[PlacedWeight, tuple[str, ...]]]:
        """By digest: large weights, and what is claimed of their pieces, that placing would share chunks by.

        Two weights share a chunk where the digests of their pieces are equal. Whether they are those of their bytes is to be
        found out first: `place` is told of which it is true.
        """
        found: dict[str, tuple[PlacedWeight, tuple[str, ...]]] = {}
        for weight in weights:
            if not weight.pieces or weight.mapped < layout.LARGE or self._placed(weight):
                continue
            item = item_of(weight)
            for region in self._likely_twins(item):
                twin = region.spec.weights[0]
                found[twin.digest] = twin, tuple(region.spec.pieces)
                placed = PlacedWeight(**weight.model_dump(exclude={"group", "pieces", "edges"}), offset=0)
                found[weight.digest] = placed, tuple(weight.pieces)
        return found

    def place(
        self,
        client: Client,
        weights: Iterable[WeightSpec],
        sound: Callable[[str, tuple[str, ...]], bool] = lambda digest, pieces: False,
    ) -> list[RegionSpec]:
        """Say where weights lie, and refer the client to these regions. What has no bytes lies nowhere.

        `sound` tells of a digest whether these are its pieces. Raises WrongError.
        """
        wanted: dict[str, WeightSpec] = {}
        for weight in weights:
            check_weight(weight)
            other = wanted.get(weight.digest)
            if other and other.length != weight.length:
                raise WrongError(f"the object {weight.digest} has {other.length} bytes, and {weight.length}")
            if weight.mapped and (other is None or other.mapped < weight.mapped):
                wanted[weight.digest] = weight
        regions: dict[Region, None] = {}
        missing: list[WeightSpec] = []
        for weight in wanted.values():
            if region := self._placed(weight):
                regions[region] = None
            else:
                missing.append(weight)
        if self._placed_bytes + sum(weight.mapped for weight in missing) > MOST_PLACED:
            raise WrongError(f"all weights together would have more than {MOST_PLACED} bytes")
        regions |= dict.fromkeys(self._place_new(missing, sound))
        told = []
        for region in regions:
            self._renew_paths(region, wanted)
            region.clients.add(client)
            client.regions[region.token] = region.spec
            told.append(region.spec)
        return told

    def forget(self, client: Client, tokens: Sequence[str]) -> None:
        """The client refers to these regions no more, and has none of their chunks. Raises UnknownError in the end."""
        unknown = [token for token in tokens if token not in client.regions]
        for token in dict.fromkeys(token for token in tokens if token in client.regions):
            region = self._regions[token]
            del client.regions[token]
            region.clients.discard(client)
            for chunk in region.chunks:
                if not any(other.token in client.regions for other in chunk.regions):
                    self._unmake(client, chunk)
                    self._let_go(client, chunk)
            self._sweep(region)
        if unknown:
            raise UnknownError("region", unknown[0])

    def _placed(self, weight: WeightSpec) -> Region | None:
        """The region in which it lies with as many bytes at least."""
        for region in reversed(self._places.get(weight.digest, ())):
            placed = region.spec.weights[region.index[weight.digest]]
            if placed.length == weight.length and placed.mapped >= weight.mapped:
                return region
        return None

    def _place_new(
        self, missing: Sequence[WeightSpec], sound: Callable[[str, tuple[str, ...]], bool]
    ) -> list[Region]:
        by_digest = {weight.digest: weight for weight in missing}
        twins: dict[str, Region] = {}

        def twin_of(item: layout.Item) -> layout.Twin | None:
            likely = self._likely_twins(item) if sound(item.digest, item.pieces) else []
            for region in likely:
                if region.item and sound(region.item.digest, region.item.pieces):
                    twins[item.digest] = region
                    return layout.Twin(region.item, tuple(chunk.size for chunk in region.chunks))
            return None

        made = []
        for planned in layout.plan([item_of(w) for w in missing], self.granule, twin_of, aligned=True):
            twin = twins.get(planned.parted.digest) if planned.parted else None
            chunks = [
                twin.chunks[same]
                if twin and same is not None
                else Chunk(secrets.token_hex(8), size, used, self._clock())
                for size, used, same in zip(planned.chunks, planned.used, planned.shared, strict=True)
            ]
            weights = [
                PlacedWeight(digest=d, length=w.length, mapped=w.mapped, path=w.path, offset=offset)
                for offset, d, w in sorted((offset, d, by_digest[d]) for d, offset in planned.offsets.items())
            ]
            specs = [ChunkSpec(token=c.token, size=c.size, used=c.used) for c in chunks]
            pieces = list(planned.parted.pieces) if planned.parted else []
            token = secrets.token_hex(8)
            made.append(
                self._add(RegionSpec(token=token, chunks=specs, weights=weights, pieces=pieces), chunks)
            )
        return made

    def _likely_twins(self, item: layout.Item) -> list[Region]:
        """Regions of versions of a large weight, by what is claimed: those with the most equal pieces first."""
        found = []
        for region in self._regions.values():
            theirs = region.item.pieces if region.item else ()
            if equal := sum(a == b for a, b in zip(item.pieces, theirs, strict=False)):
                found.append((equal, region))
        return [region for _, region in sorted(found, key=lambda each: -each[0])[:3]]

    def _add(self, spec: RegionSpec, chunks: list[Chunk]) -> Region:
        region = Region(spec, chunks)
        self._regions[region.token] = region
        self._placed_bytes += region.starts[-1]
        for chunk in chunks:
            chunk.regions.append(region)
            self._chunks[chunk.token] = chunk
        for digest in region.index:
            self._places.setdefault(digest, []).append(region)
        return region

    def _renew_paths(self, region: Region, wanted: dict[str, WeightSpec]) -> None:
        """Whoever names a file last is told of that one: an older one may be gone with its store."""
        changed = {
            i: wanted[w.digest].path
            for i, w in enumerate(region.spec.weights)
            if w.digest in wanted and wanted[w.digest].path != w.path
        }
        if changed:
            weights = [
                w.model_copy(update={"path": changed[i]}) if i in changed else w
                for i, w in enumerate(region.spec.weights)
            ]
            region.spec = region.spec.model_copy(update={"weights": weights})

    def _sweep(self, region: Region) -> None:
        """Forget the region if nobody refers to it and nothing of it is there."""
        if region.clients or region.token not in self._regions or any(c.there for c in region.chunks):
            return
        del self._regions[region.token]
        self._placed_bytes -= region.starts[-1]
        for digest in region.index:
            self._places[digest].remove(region)
            if not self._places[digest]:
                del self._places[digest]
        for chunk in region.chunks:
            chunk.regions.remove(region)
            if not chunk.regions:
                del self._chunks[chunk.token]

    # Chunks.

    def find(self, client: Client, tokens: Iterable[str]) -> list[Chunk]:
        """The chunks of these tokens, each once, of regions that the client refers to. Raises UnknownError."""
        found: dict[Chunk, None] = {}
        for token in tokens:
            chunk = self._chunks.get(token)
            if chunk is None or not any(region.token in client.regions for region in chunk.regions):
                raise UnknownError("chunk", token)
            found[chunk] = None
        return list(found)

    def _known(self, tokens: Iterable[str]) -> list[Chunk]:
        return [self._chunks[token] for token in dict.fromkeys(tokens) if token in self._chunks]

    def sort(self, client: Client, tokens: Iterable[str]) -> Sorting:
        """How these chunks are now. Raises UnknownError."""
        sorting = Sorting()
        for chunk in self.find(client, tokens):
            (sorting.ready if chunk.ready else sorting.pending if chunk.there else sorting.absent).append(
                chunk
            )
        return sorting

    def acquire(self, client: Client, tokens: Iterable[str]) -> Sorting:
        """Give the client what is ready, and let it make what is absent. Raises UnknownError, NoRoomError."""
        sorting = self.sort(client, tokens)
        if sorting.absent and (missing := self.missing(sorting.needed)):
            raise NoRoomError(missing)
        for chunk in sorting.ready:
            if client not in chunk.holders:
                self.counters.hits += 1
                self.counters.hit_bytes += chunk.size
            self._hold(client, chunk)
        for chunk in sorting.absent:
            chunk.maker = client
            client.makes.add(chunk)
            self._making[chunk] = None
            self._weights += chunk.size
        if sorting.absent:
            making = sum(chunk.size for chunk in client.makes)
            deadline = self._clock() + self._make_seconds + making / MAKE_RATE
            for chunk in sorting.absent:
                chunk.deadline = deadline
        return sorting

    def loaded(
        self, client: Client, memories: Sequence[ChunkMemory], descriptors: Sequence[object]
    ) -> list[Chunk]:
        """The client has made these; they are there, and to be checked. It has them.

        Raises UnknownError, WrongError or NotMakingError; then it makes none of them any more.
        """
        made: list[Chunk] = []
        try:
            made = self.find(client, [each.chunk for each in memories])
            if len(made) != len(memories):
                raise WrongError("a chunk is named twice")
            if lost := [chunk for chunk in made if chunk.maker is not client]:
                raise NotMakingError(
                    f"the chunk {lost[0].token} is not this client's to make (any more): it took too long, or somebody "
                    "else made it. Ask for it again."
                )
        except (UnknownError, WrongError, NotMakingError):
            self.failed(client, [each.chunk for each in memories], known=False)
            raise
        for chunk, each, descriptor in zip(made, memories, descriptors, strict=True):
            self._take_from_maker(chunk)
            self._bring(client, chunk, each.memory, descriptor)
        return made

    def passed(self, chunk: Chunk, descriptor: object) -> None:
        """The bytes of a chunk in that memory are right: everybody may have it."""
        if chunk.checking and chunk.descriptor is descriptor:
            chunk.checking = chunk.brought = False
            chunk.last_use = self._clock()
            if not chunk.holders:
                self._unused[chunk] = None
            self._wake(chunk)

    def unfit(self, chunk: Chunk, descriptor: object) -> None:
        """They are not, or cannot be checked. Who made it frees it; who brought it keeps it for itself."""
        if not chunk.checking or chunk.descriptor is not descriptor:
            return
        brought = chunk.brought
        for holder in list(chunk.holders):
            self._let_go(holder, chunk)
            if brought:
                holder.strays[chunk.token] = chunk.size
                self._strays += chunk.size
        self._drop(chunk)

    def failed(self, client: Client, tokens: Iterable[str], *, known: bool = True) -> None:
        """The client makes these no longer. Raises UnknownError in the end, unless not `known`."""
        for chunk in self._known(tokens):
            self._unmake(client, chunk)
        if known:
            self.find(client, tokens)

    def expire(self) -> list[tuple[Client, Chunk]]:
        """Take chunks from makers that are too late; returns whom and which."""
        now = self._clock()
        late = [(c.maker, c) for c in self._making if c.maker is not None and c.deadline <= now]
        for client, chunk in late:
            self._unmake(client, chunk)
        return late

    @property
    def next_deadline(self) -> float | None:
        """When the next maker is too late."""
        return min((chunk.deadline for chunk in self._making), default=None)

    def released(self, client: Client, tokens: Iterable[str], *, drop: bool = False) -> list[Chunk]:
        """The client has them no more. With `drop` their memory goes, if nobody has them; returns which went.

        Raises UnknownError, when all that is known has been released.
        """
        gone = []
        for chunk in self._known(tokens):
            had = self._let_go(client, chunk)
            if had and drop and not chunk.holders:
                self._drop(chunk)
                gone.append(chunk)
        self.find(client, tokens)
        return gone

    def given(self, client: Client, tokens: Iterable[str]) -> list[Chunk]:
        """The client has given these back, asked to do so.

        Returns those that nobody has now. What it does not have is passed over: it may have given that back otherwise.
        """
        left = []
        for chunk in self._known(tokens):
            self._let_go(client, chunk)
            if chunk in self._unused:
                left.append(chunk)
        return left

    def oldest_unused(self, keep: Iterable[Chunk] = ()) -> list[Chunk]:
        """Ready chunks that nobody has, the longest unused first."""
        kept = set(keep)
        return [chunk for chunk in self._unused if chunk not in kept]

    def evict(self, chunk: Chunk) -> bool:
        """Let the memory of a chunk go, if nobody has it; whether it went."""
        if chunk not in self._unused:
            return False
        self.counters.evictions += 1
        self.counters.evicted_bytes += chunk.size
        self._drop(chunk)
        return True

    def fills(self, client: Client, chunk: Chunk) -> list[Fill]:
        """What fills a chunk, by the region that the client was told of; nothing if it refers to none."""
        for region in chunk.regions:
            if spec := client.regions.get(region.token):
                return region.fills(chunk, spec)
        return []

    def _bring(self, client: Client, chunk: Chunk, memory: str, descriptor: object) -> None:
        chunk.memory, chunk.descriptor, chunk.checking = memory, descriptor, True
        self._weights += chunk.size
        self._hold(client, chunk)

    def _hold(self, client: Client, chunk: Chunk) -> None:
        self._strays -= client.strays.pop(chunk.token, 0)
        chunk.holders[client] = None
        client.has.add(chunk)
        self._unused.pop(chunk, None)

    def _take_from_maker(self, chunk: Chunk) -> None:
        if chunk.maker:
            chunk.maker.makes.discard(chunk)
            chunk.maker = None
            del self._making[chunk]
            self._weights -= chunk.size

    def _unmake(self, client: Client, chunk: Chunk) -> None:
        if chunk.maker is client:
            self._take_from_maker(chunk)
            self._gone(chunk)

    def _let_go(self, client: Client, chunk: Chunk) -> bool:
        """The client has it no more; whether it had it."""
        if (stray := client.strays.pop(chunk.token, 0)) != 0:
            self._strays -= stray
            self._settle()
        if client not in chunk.holders:
            return False
        del chunk.holders[client]
        client.has.discard(chunk)
        chunk.last_use = self._clock()
        if chunk.ready and not chunk.holders:
            self._unused[chunk] = None
        return True

    def _drop(self, chunk: Chunk) -> None:
        """Let go of its memory; nobody has it."""
        self._unused.pop(chunk, None)
        chunk.descriptor, chunk.memory = None, ""
        chunk.checking = chunk.brought = False
        self._weights -= chunk.size
        self._gone(chunk)

    def _gone(self, chunk: Chunk) -> None:
        """It is absent now: whoever waits for it may make it."""
        self._settle()
        self._wake(chunk)
        for region in list(chunk.regions):
            self._sweep(region)

    @staticmethod
    def _wake(chunk: Chunk) -> None:
        for waiter in list(chunk.waiting):
            waiter.wake()

    # What clients bring from an earlier broker.

    def resume(
        self, client: Client, brought: Resume, descriptors: Sequence[object]
    ) -> tuple[list[Chunk], list[ChunkMemory]]:
        """Take over what a client has. Returns the chunks that are to be checked, and those that are disowned.

        Of two that bring a chunk in different memory the first one's is kept. Raises WrongError, with nothing taken over.
        """
        known: dict[str, Chunk] = {}
        seen: dict[str, tuple[RegionSpec, int]] = {}
        for spec in brought.regions:
            self._check_region(spec, known, seen)
        if len({spec.token for spec in brought.regions}) != len(brought.regions):
            raise WrongError("a region is brought twice")
        memories = {each.chunk: each for each in brought.chunks}
        if len(memories) != len(brought.chunks) or not memories.keys() <= known.keys():
            raise WrongError("a chunk is brought twice, or without its region")
        if brought.quota > MOST_QUOTA:
            raise WrongError(f"{brought.quota} bytes of private memory")
        for spec in brought.regions:
            region = self._regions.get(spec.token)
            if region is None:
                region = self._add(spec, [known[each.token] for each in spec.chunks])
            region.clients.add(client)
            client.regions[region.token] = spec
        check, disowned = [], []
        for each, descriptor in zip(brought.chunks, descriptors, strict=True):
            chunk = known[each.chunk]
            if chunk.descriptor is not None and chunk.memory == each.memory:
                self._hold(client, chunk)
            elif chunk.there:
                disowned.append(each)
                self._strays += chunk.size - client.strays.get(chunk.token, 0)
                client.strays[chunk.token] = chunk.size
            else:
                self._bring(client, chunk, each.memory, descriptor)
                chunk.brought = True
                check.append(chunk)
        self._set_quota(client, brought.quota)
        self._brought = self.used > self.limit
        return check, disowned

    def _check_region(
        self, spec: RegionSpec, known: dict[str, Chunk], seen: dict[str, tuple[RegionSpec, int]]
    ) -> None:
        """Compare what a client says of a region with what is known. Raises WrongError.

        Adds its chunks to `known`, and where they were seen first to `seen`.
        """
        wrong = WrongError(f"the region {spec.token} is not as this broker, or any, would have told of it")
        if there := self._regions.get(spec.token):
            if shape_of(spec) != shape_of(there.spec):
                raise wrong
            for number, chunk in enumerate(there.chunks):
                known[chunk.token] = chunk
                seen.setdefault(chunk.token, (spec, number))
            return
        if not check_region(spec, self.granule):
            raise wrong
        for number, each in enumerate(spec.chunks):
            there_too = known.get(each.token) or self._chunks.get(each.token)
            if there_too:
                region = there_too.regions[0] if there_too.regions else None
                other = (region.spec, region.numbers[there_too]) if region else seen[each.token]
                if not are_equal((spec, number), other):
                    raise wrong
            known[each.token] = there_too or Chunk(each.token, each.size, each.used, self._clock())
            seen.setdefault(each.token, (spec, number))

    def close(self) -> None:
        """Let go of all memory; the table is of no more use."""
        for chunk in self._chunks.values():
            chunk.descriptor = None

    # To be seen.

    def statuses(self) -> list[ChunkStatus]:
        """All chunks."""
        now = self._clock()
        return [self._status(chunk, now) for chunk in self._chunks.values()]

    def _status(self, chunk: Chunk, now: float) -> ChunkStatus:
        region = chunk.regions[0]
        weights = [
            WeightStatus(digest=fill.weight.digest, offset=fill.at, size=fill.size)
            for fill in region.fills(chunk, region.spec)
        ]
        who = [*chunk.holders] + ([chunk.maker] if chunk.maker else [])
        return ChunkStatus(
            token=chunk.token,
            region=region.token,
            size=chunk.size,
            used=chunk.used,
            state="ready" if chunk.ready else "loading" if chunk.there else "absent",
            processes=[client.pid for client in who],
            idle_seconds=0.0 if who else max(0.0, now - chunk.last_use),
            weights=weights,
        )

    def holders(self) -> list[tuple[str, str, int]]:
        """Who has what: process, kind of memory, bytes; each byte once, the largest first."""
        found: dict[tuple[str, str], int] = {}
        for chunk in self._chunks.values():
            if not chunk.there:
                continue
            who = [*chunk.holders] + ([chunk.maker] if chunk.maker else [])
            label = f"{len(who)} processes" if len(who) > 1 else who[0].label if who else "no process"
            found[label, "weights"] = found.get((label, "weights"), 0) + chunk.size
        for client in self.clients:
            if private := client.quota + sum(client.strays.values()):
                key = client.label, "pool"
                found[key] = found.get(key, 0) + private
        return sorted(((*key, size) for key, size in found.items()), key=lambda each: -each[2])

    def check_invariants(self) -> None:
        """Raise AssertionError where the table contradicts itself. For tests."""
        chunks = self._chunks.values()
        there = [chunk for chunk in chunks if chunk.there]
        assert self._weights == sum(chunk.size for chunk in there)
        assert self._quotas == sum(client.quota for client in self.clients)
        assert self._strays == sum(sum(client.strays.values()) for client in self.clients)
        assert self.used <= self.limit or self._brought
        assert all(client.quota >= 0 for client in self.clients)
        assert list(self._unused) == [c for c in self._unused if c.ready and not c.holders]
        assert set(self._unused) == {c for c in chunks if c.ready and not c.holders}
        assert set(self._making) == {c for c in chunks if c.maker}
        for chunk in chunks:
            assert self._chunks[chunk.token] is chunk
            assert chunk.regions
            assert len(set(chunk.regions)) == len(chunk.regions)
            assert all(chunk in region.numbers for region in chunk.regions)
            assert all(self._regions[region.token] is region for region in chunk.regions)
            assert not (chunk.maker and chunk.descriptor is not None)
            assert bool(chunk.memory) == (chunk.descriptor is not None)
            assert not chunk.checking or chunk.descriptor is not None
            assert not chunk.brought or chunk.checking
            assert not chunk.holders or chunk.descriptor is not None
            assert chunk.maker is None or chunk.maker in self.clients
            assert all(holder in self.clients and chunk in holder.has for holder in chunk.holders)
        for client in self.clients:
            assert all(client in chunk.holders for chunk in client.has)
            assert all(chunk.maker is client for chunk in client.makes)
            assert all(client in self._regions[token].clients for token in client.regions)
            for chunk in client.has | client.makes:
                assert any(region.token in client.regions for region in chunk.regions)
            assert all(self._chunks[token] not in client.has for token in client.strays)
        for region in self._regions.values():
            assert region.clients or any(chunk.there for chunk in region.chunks)
            assert all(region in chunk.regions for chunk in region.chunks)
            assert all(client in self.clients and region.token in client.regions for client in region.clients)
        for digest, regions in self._places.items():
            assert regions
            assert all(self._regions[region.token] is region and digest in region.index for region in regions)
        assert {digest for region in self._regions.values() for digest in region.index} == self._places.keys()
        assert self._placed_bytes == sum(region.starts[-1] for region in self._regions.values())
