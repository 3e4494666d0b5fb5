"""What a broker does for its clients: the answer to every request, and what goes on until there is one.

A request is answered at once where that is possible, so what clients say takes effect in the order in which they say it.
Where something has to be waited for (room, another client, a check) a task goes on, and looks at everything anew after each
wait: the client may have ended, forgotten the region, or been given the chunk meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from glake_infer.allocators.sizes import format_bytes
from glake_infer.layout import LARGEST_CHUNK
from glake_infer.sharing import protocol
from glake_infer.sharing.checks import CheckError, Checks
from glake_infer.sharing.connection import Connection
from glake_infer.sharing.describe import device_status, silent
from glake_infer.sharing.descriptors import Descriptor, is_device_memory, is_sealed_memory
from glake_infer.sharing.entries import (
    Chunk,
    Client,
    Fill,
    NoRoomError,
    NotMakingError,
    Sorting,
    UnknownError,
    WrongError,
)
from glake_infer.sharing.room import Room, Went
from glake_infer.sharing.status import DeviceStatus, MachineStatus
from glake_infer.sharing.table import Table
from glake_infer.sharing.turns import GiveWayError, Turn
from glake_infer.version import __version__

MOST_DEVICES = 64
"""Of which tables are kept."""

Check = tuple[Chunk, Descriptor, list[Fill]]
"""A chunk, its memory, and what fills it."""


class Log(Protocol):
    """Takes an event."""

    def __call__(self, kind: str, text: str, **facts: Any) -> None:
        """Note it."""


class Device:
    """One device: its table, and who makes room there."""

    def __init__(self, table: Table, patience: float) -> None:
        """Begin."""
        self.table = table
        self.room = Room(table, patience)
        self.deadline: asyncio.TimerHandle | None = None

    @property
    def memory_is_readable(self) -> bool:
        """Whether its chunks are memfds."""
        return self.table.name == "cpu"


class Service:
    """All requests of all clients. Everything happens in the loop's thread."""

    def __init__(
        self,
        status: Callable[[], Awaitable[MachineStatus]],
        log: Log,
        *,
        limits: dict[str, int],
        limit: int | None,
        patience: float,
        make_seconds: float,
        any_descriptor: bool,
    ) -> None:
        """As `Broker`; `status` gives what Statement says."""
        self.token = secrets.token_hex(8)
        self.resumed = 0
        self._machine = status
        self._log = log
        self._limits, self._limit = limits, limit
        self._patience = patience
        self._make_seconds = make_seconds
        self._any_descriptor = any_descriptor
        self._devices: dict[str, Device] = {}
        self._checks = Checks()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[type[protocol.Message], Callable[[Connection, Any, list[Descriptor]], None]] = {
            protocol.Place: self._place,
            protocol.Forget: self._forget,
            protocol.Acquire: self._acquire,
            protocol.Loaded: self._loaded,
            protocol.Failed: self._failed,
            protocol.Released: self._released,
            protocol.Grow: self._grow,
            protocol.Status: self._status,
            protocol.Ping: self._ping,
            protocol.Bye: self._bye,
        }

    @property
    def clients(self) -> int:
        """How many there are."""
        return sum(len(device.table.clients) for device in self._devices.values())

    def table(self, name: str) -> Table:
        """A device's. Raises KeyError."""
        return self._devices[name].table

    async def close(self) -> None:
        """End what goes on."""
        for device in self._devices.values():
            if device.deadline:
                device.deadline.cancel()
        for task in list(self._tasks):
            task.cancel()
        self._checks.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for device in self._devices.values():
            device.table.close()

    def received(
        self, connection: Connection, message: protocol.AnyMessage, descriptors: list[Descriptor]
    ) -> None:
        """Answer a request, or begin to."""
        assert isinstance(message, protocol.Request)
        kind = _kind(message)
        if (expected := _descriptors_of(message)) != len(descriptors):
            text = f"{kind} came with {len(descriptors)} descriptors; expected {expected}."
            self._refuse(connection, message, "message", text)
            if not connection.greeted:
                connection.finish(text)
            return
        if isinstance(message, protocol.Hello):
            self._hello(connection, message, descriptors)
            return
        handler = self._handlers.get(type(message))
        if not connection.greeted:
            text = f"{kind} came before hello."
            self._refuse(connection, message, "message", text)
            connection.finish(text)
        elif handler is None:
            self._refuse(connection, message, "message", f"{kind} is for the broker to ask.")
        elif connection.client is None and type(message) not in OBSERVERS:
            text = f"{kind} came from an observer, which may ask for status alone: say hello with a device."
            self._refuse(connection, message, "message", text)
        else:
            try:
                handler(connection, message, descriptors)
            except UnknownError as error:
                self._refuse(connection, message, "unknown", f"{error}.")
            except WrongError as error:
                self._refuse(connection, message, "message", f"{_kind(message)} contradicts itself: {error}.")

    def left(self, connection: Connection) -> None:
        """A connection of a client is over."""
        assert connection.client is not None
        device = self._device(connection)
        device.room.connections.pop(connection.client, None)
        device.table.leave(connection.client)
        self._watch_makers(device)

    def _device(self, connection: Connection) -> Device:
        return self._devices[connection.device]

    @staticmethod
    def _client(connection: Connection) -> Client:
        assert connection.client is not None
        return connection.client

    def _refuse(
        self, connection: Connection, message: protocol.Request, reason: str, text: str, **more: Any
    ) -> None:
        who = connection.client.label if connection.client else "a process"
        if reason == "memory" or connection.may_complain():
            self._log("refusal", f"{who}, {_kind(message)}: {text}", reason=reason, request=_kind(message))
        connection.refuse(message.id, reason, text, **more)

    def _go_on(
        self, connection: Connection, message: protocol.Request, work: Callable[[], Awaitable[None]]
    ) -> None:
        """Answer later, as long as the client is there."""
        if not connection.spawn(self._guarded(connection, message, work)):
            text = "too many requests of one client wait: expected fewer at once."
            self._refuse(connection, message, "message", text)

    async def _guarded(
        self, connection: Connection, message: protocol.Request, work: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await work()
        except UnknownError as error:
            self._refuse(connection, message, "unknown", f"{error}.")
        except WrongError as error:
            self._refuse(connection, message, "message", f"{_kind(message)} contradicts itself: {error}.")
        except GiveWayError:
            text = "others asked for memory before, and wait for what this process has in use: begin again."
            self._refuse(connection, message, "lost", text)
        except Exception:
            self._log("error", f"a defect of the broker, at {_kind(message)}:\n{traceback.format_exc()}")
            self._refuse(connection, message, "message", "the broker failed; its log says why.")

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that goes on when a client ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Coming.

    def _hello(self, connection: Connection, hello: protocol.Hello, descriptors: list[Descriptor]) -> None:
        def refuse(text: str) -> None:
            self._refuse(connection, hello, "message", text)
            if not connection.greeted:
                connection.finish(text)

        if connection.greeted:
            return refuse("hello came twice on one connection.")
        wanted = hello.device
        if wanted is None:
            if hello.resume:
                return refuse("an observer has nothing to resume: say hello with a device.")
            connection.welcome()
            connection.send(
                protocol.Welcome(to=hello.id, release=__version__, broker=self.token, limit=0, quota=0)
            )
            return None
        device = self._devices.get(wanted.name)
        if wanted.granule & (wanted.granule - 1) or wanted.granule > LARGEST_CHUNK:
            return refuse(
                f"the granule of {wanted.name} cannot be {wanted.granule}: expected a power of two."
            )
        if device and device.table.granule != wanted.granule:
            return refuse(
                f"the granule of {wanted.name} is {device.table.granule} here, and this process says {wanted.granule}: "
                "use the same release of glake-infer on the same device."
            )
        if device is None:
            self._forget_devices()
            if len(self._devices) >= MOST_DEVICES:
                return refuse(
                    f"there are {len(self._devices)} devices already, and {wanted.name} is one more."
                )
            device = self._new_device(wanted)
        client = Client(hello.name, hello.pid)
        device.table.join(client)
        device.room.connections[client] = connection
        connection.client, connection.device = client, wanted.name
        brought: list[Check] = []
        disowned: list[protocol.ChunkMemory] = []
        if hello.resume:
            try:
                brought, disowned = self._resume(device, client, hello.resume, descriptors)
            except WrongError as error:
                self.left(connection)
                connection.client = None
                return refuse(f"what was brought from an earlier broker cannot be: {error}.")
        connection.welcome()
        connection.send(
            protocol.Welcome(
                to=hello.id,
                release=__version__,
                broker=self.token,
                limit=device.table.limit,
                quota=client.quota,
                disowned=disowned,
            )
        )
        if hello.resume:
            self.resumed += 1
            text = (
                f"{client.label} came over from an earlier broker, with {len(hello.resume.chunks)} chunks and "
                f"{format_bytes(client.quota)} of its own"
            )
        else:
            text = f"{client.label} has come, for {wanted.title or wanted.name}"
        facts = {"pid": client.pid, "name": client.name, "device": wanted.name, "release": hello.release}
        self._log("resumed" if hello.resume else "came", text, **facts)
        for each in brought:
            self._begin(self._check_brought(device, client, each))
        return None

    def _new_device(self, wanted: protocol.Device) -> Device:
        limit = self._limits.get(wanted.name, self._limit)
        table = Table(
            wanted.name,
            wanted.granule,
            wanted.memory if limit is None else limit,
            memory=wanted.memory,
            title=wanted.title,
            make_seconds=self._make_seconds,
        )
        device = self._devices[wanted.name] = Device(table, self._patience)
        return device

    def _forget_devices(self) -> None:
        """Drop tables in which nothing ever happened."""
        for name, device in list(self._devices.items()):
            if not device.table.clients and not device.table.counters.loads and not device.table.weights:
                del self._devices[name]

    def _resume(
        self,
        device: Device,
        client: Client,
        resume: protocol.Resume,
        descriptors: Sequence[Descriptor],
    ) -> tuple[list[Check], list[protocol.ChunkMemory]]:
        """Take over what a client has. Raises WrongError."""
        sizes = {chunk.token: chunk.size for region in resume.regions for chunk in region.chunks}
        for each, descriptor in zip(resume.chunks, descriptors, strict=True):
            if not self._is_memory(device, descriptor, sizes.get(each.chunk, 0)):
                raise WrongError(f"the descriptor of chunk {each.chunk} is not its memory")
        check, disowned = device.table.resume(client, resume, descriptors)
        own = {each.chunk: d for each, d in zip(resume.chunks, descriptors, strict=True)}
        return [(c, own[c.token], device.table.fills(client, c)) for c in check], disowned

    def _is_memory(self, device: Device, descriptor: Descriptor, size: int) -> bool:
        if device.memory_is_readable:
            return is_sealed_memory(descriptor.number, size)
        return self._any_descriptor or is_device_memory(descriptor.number)

    async def _check_brought(self, device: Device, client: Client, brought: Check) -> None:
        chunk, descriptor, fills = brought
        async with self._checks.background:
            try:
                await self._checks.chunk(descriptor, chunk.size, fills, memory=device.memory_is_readable)
            except CheckError as error:
                device.table.unfit(chunk, descriptor)
                self._log("altered", f"{client.label} keeps a chunk for itself: {error}", path=error.path)
            except Exception:
                device.table.unfit(chunk, descriptor)
                self._log("error", f"a defect of the broker, at a check:\n{traceback.format_exc()}")
            else:
                device.table.passed(chunk, descriptor)

    # Places.

    def _place(self, connection: Connection, place: protocol.Place, _: list[Descriptor]) -> None:
        claims = self._device(connection).table.claims(place.weights)
        if all(self._checks.sound(digest, pieces) for digest, (_, pieces) in claims.items()):
            self._place_now(connection, place)
        else:
            self._go_on(connection, place, lambda: self._place_later(connection, place))

    async def _place_later(self, connection: Connection, place: protocol.Place) -> None:
        """Versions of large weights share chunks once the digests of their pieces were compared with their files."""
        table = self._device(connection).table
        for weight, pieces in table.claims(place.weights).values():
            if not await self._checks.pieces(weight, pieces):
                text = f"the pieces of {weight.digest} are not those of {weight.path}: it shares no memory with its versions"
                self._log("altered", text, path=weight.path)
        self._place_now(connection, place)

    def _place_now(self, connection: Connection, place: protocol.Place) -> None:
        table = self._device(connection).table
        regions = table.place(self._client(connection), place.weights, self._checks.sound)
        connection.send(protocol.Placed(to=place.id, regions=regions))

    def _forget(self, connection: Connection, forget: protocol.Forget, _: list[Descriptor]) -> None:
        device = self._device(connection)
        device.table.forget(self._client(connection), forget.regions)
        self._watch_makers(device)
        connection.send(protocol.Done(to=forget.id))

    # Chunks.

    def _acquire(self, connection: Connection, acquire: protocol.Acquire, _: list[Descriptor]) -> None:
        room = self._device(connection).room
        if acquire.full or not self._give(connection, acquire, alone=not room.turns.crowded):
            self._go_on(connection, acquire, lambda: self._acquire_later(connection, acquire))

    def _give(self, connection: Connection, acquire: protocol.Acquire, alone: bool) -> bool:
        """Answer, if that can be done now. What takes memory has to wait for its turn, unless it is `alone`.

        Raises UnknownError.
        """
        device, client = self._device(connection), self._client(connection)
        now = device.table.sort(client, acquire.chunks)
        wanted = [*now.absent, *now.ready[: protocol.MOST_DESCRIPTORS]]
        if (now.absent and not alone) or (acquire.wait and not now.ready and not now.absent):
            return False
        try:
            done = device.table.acquire(client, [chunk.token for chunk in wanted])
        except NoRoomError:
            return False
        given = [protocol.ChunkMemory(chunk=chunk.token, memory=chunk.memory) for chunk in done.ready]
        connection.send(
            protocol.Acquired(
                to=acquire.id,
                given=given,
                make=[chunk.token for chunk in done.absent],
                pending=[chunk.token for chunk in [*now.pending, *now.ready[protocol.MOST_DESCRIPTORS :]]],
            ),
            [chunk.descriptor for chunk in done.ready if isinstance(chunk.descriptor, Descriptor)],
        )
        if done.absent:
            self._watch_makers(device)
            for chunk in done.absent:
                self._checks.begin(fill.weight for fill in device.table.fills(client, chunk))
        return True

    async def _acquire_later(self, connection: Connection, acquire: protocol.Acquire) -> None:
        device, client = self._device(connection), self._client(connection)
        full = acquire.full

        def now() -> Sorting:
            return device.table.sort(client, acquire.chunks)

        def kept() -> list[Chunk]:
            return device.table.find(client, acquire.chunks)

        while True:
            chunks = now()
            if acquire.wait and not chunks.ready and not chunks.absent:
                await _change(chunks.pending)
                continue
            if not chunks.absent:
                self._give(connection, acquire, alone=False)
                return
            async with device.room.turns.turn(client) as turn:
                if full:
                    full = False
                    if not await self._make_room_on_device(device, turn, now().needed, kept):
                        self._no_room(connection, acquire, now().needed, "weights", device_full=True)
                        return
                if sum(chunk.size for chunk in kept()) <= device.table.limit:
                    await self._make_room(device, turn, lambda went: device.table.missing(now().needed), kept)
                if self._give(connection, acquire, alone=True):
                    return
                if now().absent:
                    self._no_room(connection, acquire, now().needed, "weights")
                    return

    async def _make_room(
        self,
        device: Device,
        turn: Turn,
        missing: Callable[[Went], int],
        keep: Callable[[], list[Chunk]] = list,
        spare: Client | None = None,
    ) -> Went:
        """`Room.make`, and a word in the log of what went."""
        went = Went()
        before = device.table.counters.evictions
        try:
            went = await device.room.make(turn, missing, keep, spare)
        finally:
            if went.bytes or device.table.counters.evictions != before:
                text = (
                    f"{went.chunks} chunks of {format_bytes(went.chunk_bytes)} and "
                    f"{format_bytes(went.private_bytes)} of private memory made room on {device.table.name}"
                )
                facts = {"chunks": went.chunks, "chunk_bytes": went.chunk_bytes}
                self._log("evicted", text, private_bytes=went.private_bytes, **facts)
        return went

    async def _make_room_on_device(
        self,
        device: Device,
        turn: Turn,
        needed: int,
        keep: Callable[[], list[Chunk]] = list,
        spare: Client | None = None,
    ) -> bool:
        """Whatever the limit says, let go of that much; whether anything went, so that trying again makes sense."""
        if not needed:
            return True
        went = await self._make_room(device, turn, lambda went: needed - went.bytes, keep, spare)
        return went.bytes > 0

    def _no_room(
        self,
        connection: Connection,
        message: protocol.Request,
        requested: int,
        kind: str,
        device_full: bool = False,
    ) -> None:
        table = self._device(connection).table
        table.counters.refusals += 1
        holders = table.holders()[:64]
        largest = ", ".join(f"{who}: {what} {format_bytes(size)}" for who, what, size in holders[:5])
        needed = 0 if device_full else table.used + requested
        remedy = (
            "The limit has room, but the device has none: other programs hold the rest (`nvidia-smi` lists them). End "
            "them, or close models."
            if device_full
            else f"This request would have passed with a limit of {needed} bytes ({format_bytes(needed)}): start the "
            "broker with a larger --limit, or close or suspend models."
        )
        text = (
            f"out of memory: {format_bytes(requested)} ({requested} bytes) more were requested for {kind} by "
            f"{self._client(connection).label}. All processes on {table.name} may have {format_bytes(table.limit)} "
            f"together, and {format_bytes(table.used)} are in use and cannot go now ({largest or 'nothing'}). {remedy}"
        )
        figures = {"requested": requested, "used": table.used, "limit": table.limit, "needed": needed}
        most = (1 << 60) - 1
        figures = {name: min(figure, most) for name, figure in figures.items()}
        self._refuse(connection, message, "memory", text, holders=holders, **figures)

    def _loaded(self, connection: Connection, loaded: protocol.Loaded, descriptors: list[Descriptor]) -> None:
        device, client = self._device(connection), self._client(connection)
        try:
            chunks = device.table.loaded(client, loaded.chunks, descriptors)
        except NotMakingError as error:
            self._refuse(connection, loaded, "lost", str(error))
            return
        finally:
            self._watch_makers(device)
        made = [(c, d, device.table.fills(client, c)) for c, d in zip(chunks, descriptors, strict=True)]
        for chunk, descriptor, _ in made:
            if not self._is_memory(device, descriptor, chunk.size):
                for each, memory, _ in made:
                    device.table.unfit(each, memory)
                expected = (
                    f"a memfd of {chunk.size} bytes that is sealed (write, grow, shrink, seal)"
                    if device.memory_is_readable
                    else "a handle of the NVIDIA driver"
                )
                text = f"the descriptor of chunk {chunk.token} is not its memory: expected {expected}."
                self._refuse(connection, loaded, "message", text)
                return
        self._begin(self._guarded(connection, loaded, lambda: self._check_loaded(connection, loaded, made)))

    async def _check_loaded(self, connection: Connection, loaded: protocol.Loaded, made: list[Check]) -> None:
        device = self._device(connection)
        try:
            for chunk, descriptor, fills in made:
                await self._checks.chunk(descriptor, chunk.size, fills, memory=device.memory_is_readable)
        except CheckError as error:
            for chunk, descriptor, _ in made:
                device.table.unfit(chunk, descriptor)
            self._refuse(
                connection, loaded, error.reason, str(error), digest=error.digest, path=error.path[:4096]
            )
        except BaseException:
            for chunk, descriptor, _ in made:
                device.table.unfit(chunk, descriptor)
            raise
        else:
            for chunk, descriptor, _ in made:
                device.table.passed(chunk, descriptor)
            counters = device.table.counters
            counters.loads += len(made)
            counters.loaded_bytes += loaded.read
            counters.load_seconds += loaded.seconds
            connection.send(protocol.Done(to=loaded.id))

    def _failed(self, connection: Connection, failed: protocol.Failed, _: list[Descriptor]) -> None:
        device = self._device(connection)
        device.table.failed(self._client(connection), failed.chunks)
        self._watch_makers(device)
        connection.send(protocol.Done(to=failed.id))

    def _released(self, connection: Connection, released: protocol.Released, _: list[Descriptor]) -> None:
        table = self._device(connection).table
        table.released(self._client(connection), released.chunks, drop=released.drop)
        connection.send(protocol.Done(to=released.id))

    def _watch_makers(self, device: Device) -> None:
        """Set the timer to the first deadline of those who make chunks."""
        when = device.table.next_deadline
        if device.deadline:
            device.deadline.cancel()
            device.deadline = None
        if when is not None:
            loop = asyncio.get_running_loop()
            wait = max(0.0, when - device.table.now())
            device.deadline = loop.call_later(wait + 0.001, self._expire, device)

    def _expire(self, device: Device) -> None:
        device.deadline = None
        late: dict[Client, int] = {}
        for client, _ in device.table.expire():
            late[client] = late.get(client, 0) + 1
        for client, count in late.items():
            text = f"{client.label} took too long to make {count} chunks: others may make them now"
            self._log("late", text, pid=client.pid, chunks=count)
        self._watch_makers(device)

    # Private memory.

    def _grow(self, connection: Connection, grow: protocol.Grow, _: list[Descriptor]) -> None:
        """What fits is granted at once, even while others wait for room: they may wait for this very run to end."""
        if grow.full or not self._grant(connection, grow):
            self._go_on(connection, grow, lambda: self._grow_later(connection, grow))

    def _grant(self, connection: Connection, grow: protocol.Grow) -> bool:
        device, client = self._device(connection), self._client(connection)
        if connection.trimming and not connection.trimming.done():
            return False  # its answer comes first, and says what the quota is
        before = client.quota
        try:
            quota = device.table.grow(client, grow.quota)
        except NoRoomError:
            return False
        connection.grown = max(0, quota - before)
        connection.send(protocol.Granted(to=grow.id, quota=quota))
        return True

    async def _grow_later(self, connection: Connection, grow: protocol.Grow) -> None:
        device, client = self._device(connection), self._client(connection)

        def more() -> int:
            return max(0, grow.quota - client.quota)

        async with device.room.turns.turn(client, urgent=True) as turn:
            if connection.trimming and not connection.trimming.done():
                await asyncio.wait([connection.trimming])
            if grow.full:
                needed = more() or connection.grown or device.table.granule
                if not await self._make_room_on_device(device, turn, needed, spare=client):
                    self._no_room(connection, grow, needed, "its pool", device_full=True)
                    return
            if grow.quota <= device.table.limit:
                await self._make_room(device, turn, lambda went: device.table.missing(more()), spare=client)
            if not self._grant(connection, grow):
                self._no_room(connection, grow, more(), "its pool")

    # The rest.

    def _ping(self, connection: Connection, ping: protocol.Ping, _: list[Descriptor]) -> None:
        connection.send(protocol.Done(to=ping.id))

    def _bye(self, connection: Connection, bye: protocol.Bye, _: list[Descriptor]) -> None:
        connection.said_bye = True
        connection.end()

    def _status(self, connection: Connection, status: protocol.Status, _: list[Descriptor]) -> None:
        async def answer() -> None:
            connection.send(protocol.Statement(to=status.id, status=await self._machine()))

        self._go_on(connection, status, answer)

    async def devices(self) -> list[DeviceStatus]:
        """All devices, with what each client says of itself."""
        return await asyncio.gather(*(self._describe(device) for device in list(self._devices.values())))

    async def _describe(self, device: Device) -> DeviceStatus:
        asked = {
            client: connection.ask(protocol.Describe(), protocol.Description, patient=True)
            for client, connection in list(device.room.connections.items())  # asking may end one
            if connection.describes
        }
        if asked:
            await asyncio.wait(asked.values())
        processes = []
        for client in device.room.connections:
            answer = asked[client].result() if client in asked else None
            processes.append(answer.process if answer else silent(client, device.table.name))
        return device_status(device.table, processes)


OBSERVERS = (protocol.Status, protocol.Ping, protocol.Bye)


def _kind(message: protocol.Request) -> str:
    return type(message).__name__.lower()


def _descriptors_of(message: protocol.Request) -> int:
    """How many come with a request."""
    if isinstance(message, protocol.Loaded):
        return len(message.chunks)
    if isinstance(message, protocol.Hello) and message.resume:
        return len(message.resume.chunks)
    return 0


async def _change(chunks: Sequence[Chunk]) -> None:
    """Wait until one of them is given, absent, or ready."""
    change = _Change()
    for chunk in chunks:
        chunk.waiting[change] = None
    try:
        await change.future
    finally:
        for chunk in chunks:
            chunk.waiting.pop(change, None)


class _Change:
    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)
