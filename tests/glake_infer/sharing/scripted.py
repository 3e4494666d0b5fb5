"""A client of a broker that does what a test says: no pool, no device, memfds for memory."""

import fcntl
import itertools
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import numpy as np

from glake_infer.digest import digest_of
from glake_infer.sharing import protocol as p
from glake_infer.sharing.channel import Channel, ProtocolError, close_all
from glake_infer.sharing.connection import Times
from glake_infer.sharing.status import PoolStatus, ProcessStatus, TransferStatus

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
GRANULE = 64 * KiB
F_ADD_SEALS = 1033
SEALS = 0xF


class Files:
    """Objects of a store."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self._numbers = itertools.count(1)

    def add(self, size, group=0, seed=None, data=None, **more):
        """A weight of random bytes; the file is there."""
        if data is None:
            seed = next(self._numbers) if seed is None else seed
            data = np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()
        digest = digest_of(data)
        path = self.folder / digest
        path.write_bytes(data)
        more = {"length": len(data), "mapped": len(data), **more}
        return p.WeightSpec(digest=digest, path=str(path), group=group, **more)


def memfd(content, seals=SEALS, name="glake-test"):
    """Memory with these bytes, sealed."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def content_of(region, token):
    """The bytes that a chunk of a region is to have."""
    start = 0
    for chunk in region.chunks:
        if chunk.token == token:
            break
        start += chunk.size
    data = bytearray(chunk.size)
    for weight in region.weights:
        first, last = max(start, weight.offset), min(start + chunk.size, weight.offset + weight.mapped)
        if first < last:
            with Path(weight.path).open("rb") as file:
                file.seek(first - weight.offset)
                data[first - start : last - start] = file.read(last - first)
    return bytes(data)


def tokens_of(regions):
    return list(dict.fromkeys(chunk.token for region in regions for chunk in region.chunks))


def sizes_of(regions):
    return {chunk.token: chunk.size for region in regions for chunk in region.chunks}


class EndedError(Exception):
    """The broker ended the connection."""


class Peer:
    """One connection. A thread receives, and answers what the broker asks by what the test has set."""

    def __init__(
        self, path, name="client", device="cpu", memory=64 * GiB, granule=GRANULE, pid=None, silent=()
    ):
        self.device = device and p.Device(name=device, title=f"a {device}", memory=memory, granule=granule)
        self.name = name
        self.pid = os.getpid() if pid is None else pid
        self.channel = Channel.connect(path, 20)
        self.channel.socket.settimeout(None)
        self.regions = {}
        self.has = {}  # chunk -> (memory, descriptor)
        self.offers = {}  # chunk -> (awake, priority, idle seconds)
        self.keeps = set()  # chunks that it does not give although it offered them
        self.uses = set()  # chunks that count as busy while it has them
        self.idle = self.busy = 0
        self.running = 1  # uses that go on and do not wait for chunks
        self.quota = 0
        self.silent = set(silent)  # kinds of requests that it does not answer
        self.asked = []  # what the broker asked
        self.unexpected = []  # what came to nobody
        self.hooks = {}  # kind -> called with the request, before it is answered
        self.ended = threading.Event()
        self.lock = threading.RLock()  # held while it answers the broker
        self._ids = itertools.count(1)
        self._answers = {}
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    # The wire.

    def start(self, request, descriptors=()):
        """Send a request; returns its id."""
        number = next(self._ids)
        self.channel.send(request.model_copy(update={"id": number}), descriptors)
        return number

    def wait(self, number, timeout=20.0):
        """The answer and its descriptors."""
        until = time.monotonic() + timeout
        with self._condition:
            while number not in self._answers:
                if self.ended.is_set():
                    raise EndedError
                if not self._condition.wait(until - time.monotonic()) and time.monotonic() > until:
                    raise TimeoutError(f"no answer to request {number}")
            return self._answers.pop(number)

    def waits(self, number, seconds=0.2):
        """Whether the answer still is not there."""
        try:
            self.wait(number, seconds)
        except TimeoutError:
            return True
        return False

    def ask(self, request, descriptors=(), timeout=20.0):
        answer, came = self.wait(self.start(request, descriptors), timeout)
        if not isinstance(answer, p.Acquired):
            assert not came
            return answer
        for memory, descriptor in zip(answer.given, came, strict=True):
            self._take(memory, descriptor)
        return answer

    def expect(self, kind, request, descriptors=()):
        answer = self.ask(request, descriptors)
        assert isinstance(answer, kind), answer
        return answer

    def refused(self, request, reason, descriptors=()):
        """The refusal of a request."""
        answer = self.ask(request, descriptors)
        assert isinstance(answer, p.Refusal), answer
        assert answer.reason == reason, answer
        return answer

    def raw(self, data, descriptors=()):
        socket.send_fds(self.channel.socket, [data], list(descriptors))

    def _receive(self):
        try:
            while (found := self.channel.receive()) is not None:
                message, descriptors = found
                if isinstance(message, p.Request):
                    close_all(descriptors)
                    self._asked(message)
                    continue
                if isinstance(message, p.Granted):
                    self.quota = message.quota  # before anything that comes later is looked at
                with self._condition:
                    if message.to:
                        self._answers[message.to] = message, descriptors
                    else:
                        self.unexpected.append(message)
                        close_all(descriptors)
                    self._condition.notify_all()
        except (OSError, ProtocolError, ValueError):
            pass
        self.ended.set()
        with self._condition:
            self._condition.notify_all()

    def _asked(self, request):
        self.asked.append(request)
        if hook := self.hooks.get(request.kind):
            hook(request)
        if request.kind in self.silent:
            return
        with self.lock:
            answer = getattr(self, f"_on_{request.kind}")(request)
            self.channel.send(answer.model_copy(update={"to": request.id}))

    def _on_ping(self, ping):
        return p.Done()

    def _on_offer(self, offer):
        chunks = [
            p.Offered(chunk=token, awake=awake, priority=priority, idle_seconds=idle)
            for token, (awake, priority, idle) in self.offers.items()
            if token in self.has
        ]
        return p.Offers(
            chunks=chunks,
            idle=self.idle,
            busy=self.busy or GRANULE * len(self.uses & self.has.keys()),
            running=self.running,
        )

    def _on_give(self, give):
        gone = [token for token in give.chunks if token in self.has and token not in self.keeps]
        for token in gone:
            os.close(self.has.pop(token)[1])
        return p.Given(chunks=gone)

    def _on_trim(self, trim):
        less = min(self.idle, trim.bytes)
        self.idle -= less
        self.quota -= less
        return p.Granted(quota=self.quota)

    def _on_describe(self, describe):
        return p.Description(process=self.status())

    def status(self):
        pool = dict.fromkeys(PoolStatus.model_fields, 0)
        return ProcessStatus(
            pid=self.pid, name=self.name, device="cpu", release="1", connected=True, reconnections=0,
            pool=PoolStatus(**{**pool, "quota": self.quota}), models=[], chunks=list(self.has),
            transfers=TransferStatus(loads=0, bytes=0, seconds=0, hits=0, hit_bytes=0),
        )  # fmt: skip

    # What a good client does.

    def hello(self, resume=None, descriptors=(), kind=p.Welcome):
        message = p.Hello(release="1", pid=self.pid, name=self.name, device=self.device, resume=resume)
        answer = self.ask(message, descriptors)
        assert isinstance(answer, kind), answer
        if isinstance(answer, p.Welcome):
            self.quota = answer.quota
        return answer

    def place(self, *weights):
        regions = self.expect(p.Placed, p.Place(weights=list(weights))).regions
        self.regions.update((region.token, region) for region in regions)
        return regions

    def memory(self, token, change=lambda data: data, seals=SEALS):
        """Make a chunk's memory."""
        region = next(r for r in self.regions.values() if any(c.token == token for c in r.chunks))
        return memfd(change(content_of(region, token)), seals)

    def loaded(self, tokens, **options):
        """Make chunks, and say so; the answer."""
        memories = [p.ChunkMemory(chunk=token, memory=secrets.token_hex(8)) for token in tokens]
        descriptors = [self.memory(token, **options) for token in tokens]
        answer = self.ask(p.Loaded(chunks=memories, read=1, seconds=0.5), descriptors)
        if isinstance(answer, p.Done):
            self.has.update((m.chunk, (m.memory, d)) for m, d in zip(memories, descriptors, strict=True))
        else:
            close_all(descriptors)
        return answer

    def bring(self, tokens, full=False):
        """Bring chunks in, as far as that goes; returns how many were made and given. Checks every byte."""
        made, given, wait = 0, 0, False
        left = [token for token in tokens if token not in self.has]
        while left:
            answer = self.expect(p.Acquired, p.Acquire(chunks=left, wait=wait, full=full))
            if answer.make:
                done = self.loaded(answer.make)
                assert isinstance(done, p.Done), done
            made, given, wait = made + len(answer.make), given + len(answer.given), True
            left = answer.pending
        return made, given

    def load(self, *weights):
        """Place and bring weights in; returns their regions, how many chunks were made, and how many given."""
        regions = self.place(*weights)
        made, given = self.bring(tokens_of(regions))
        self.verify()
        return regions, made, given

    def verify(self):
        """Every byte that it has is right."""
        regions = {chunk.token: r for r in self.regions.values() for chunk in r.chunks}
        with self.lock:  # else it may be given away meanwhile
            for token, (_, descriptor) in self.has.items():
                size = os.fstat(descriptor).st_size
                assert os.pread(descriptor, size, 0) == content_of(regions[token], token)

    def grow(self, quota, full=False):
        return self.expect(p.Granted, p.Grow(quota=quota, full=full)).quota

    def release(self, *tokens, drop=False):
        with self.lock:  # what the broker has asked for meanwhile is given
            released = [token for token in tokens if token in self.has]
            for token in released:
                os.close(self.has.pop(token)[1])
            number = self.start(p.Released(chunks=released, drop=drop))
        assert isinstance(self.wait(number)[0], p.Done)

    def forget(self, *regions):
        for region in regions:
            del self.regions[region.token]
        self.expect(p.Done, p.Forget(regions=[region.token for region in regions]))

    def resume(self):
        """What it would bring to another broker, and the descriptors."""
        chunks = [p.ChunkMemory(chunk=token, memory=memory) for token, (memory, _) in self.has.items()]
        descriptors = [descriptor for _, descriptor in self.has.values()]
        return p.Resume(regions=list(self.regions.values()), chunks=chunks, quota=self.quota), descriptors

    def again(self, broker, **options):
        """The same process, connected to another broker: it has what this one had."""
        other = Peer(broker.path, self.name, pid=self.pid, **options)
        other.regions, other.has, self.has = dict(self.regions), self.has, {}
        other.offers, other.quota = self.offers, self.quota
        self.close()
        other.welcome = other.hello(*other.resume())
        return other

    def _take(self, memory, descriptor):
        if memory.chunk in self.has:
            os.close(self.has[memory.chunk][1])
        self.has[memory.chunk] = memory.memory, descriptor

    def status_of(self):
        return self.expect(p.Statement, p.Status()).status

    def bye(self):
        self.channel.send(p.Bye())
        self.close()

    def close(self):
        self.channel.close()
        self._thread.join(10)
        for _, descriptor in self.has.values():
            os.close(descriptor)
        for _, descriptors in self._answers.values():
            close_all(descriptors)
        self.has, self._answers = {}, {}


# Of brokers.

SHORT = Times(hello=0.3, message=0.3, reading=0.3, answer=0.3, describe=0.2)
GPU = "GPU-0123"


def device(broker, name="cpu"):
    """The table's figures."""

    async def look():
        table = broker.service.table(name)
        table.check_invariants()
        return table

    return broker.do(look)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def hears(broker, text):
    """Wait for an event."""
    until(lambda: any(text in event.text for event in broker.events))


def kinds(broker):
    return [event.kind for event in broker.events]


def flipped(at):
    def change(data):
        data = bytearray(data)
        data[at] ^= 1
        return bytes(data)

    return change
