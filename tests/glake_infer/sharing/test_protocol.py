"""What goes over the wire, and what should not: versions, garbage, truncated and oversized messages; a fuzz test.

GLAKE_FUZZ_SECONDS says how long the fuzz test lasts.
"""

import gc
import json
import os
import random
import secrets
import socket
import threading
import time
from pathlib import Path

import pytest
from scripted import GRANULE, MiB, Peer, device, memfd, tokens_of, until

from glake_infer.process_memory import release_unused_heap
from glake_infer.sharing import protocol as p
from glake_infer.sharing.channel import Channel, Frames, OtherVersionError, ProtocolError, close_all, segments
from glake_infer.sharing.connection import Times

SECONDS = float(os.environ.get("GLAKE_FUZZ_SECONDS", "5"))
DIGEST, TOKEN = "a" * 64, "0123456789abcdef"


def frame(body, version=p.PROTOCOL, descriptors=0, length=None, magic=p.MAGIC):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return p.HEADER.pack(magic, version, descriptors, len(body) if length is None else length) + body


def hello(**more):
    device = {"name": "cpu", "memory": 1 << 30, "granule": GRANULE}
    return {"kind": "hello", "id": 1, "release": "1", "pid": 1, "name": "x", "device": device, **more}


class Raw:
    """A socket, and what comes back."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))

    def send(self, data, descriptors=()):
        socket.send_fds(self.socket, [data], list(descriptors))

    def answers(self, count=1):
        """So many messages, or all until the end."""
        frames, found = Frames(), []
        while len(found) < count:
            if (message := frames.next()) is not None:
                close_all(message[1])
                found.append(message[0])
                continue
            try:
                if not frames.receive(self.socket):
                    break
            except ConnectionResetError:
                break
        frames.close()
        return found

    def close(self):
        self.socket.close()


@pytest.fixture
def raw(broker):
    made = []

    def connect():
        made.append(Raw(broker.path))
        return made[-1]

    yield connect
    for each in made:
        each.close()


EXAMPLES = {
    "hello": hello(resume={"regions": [], "chunks": [], "quota": 5}),
    "refusal": {"kind": "refusal", "reason": "memory", "message": "", "holders": [["a", "pool", 5]]},
    "place": {"kind": "place", "weights": [{"digest": DIGEST, "length": 1, "mapped": 1, "path": "/x"}]},
    "acquire": {"kind": "acquire", "chunks": [TOKEN], "wait": True},
    "loaded": {"kind": "loaded", "chunks": [{"chunk": TOKEN, "memory": TOKEN}], "seconds": 0.5},
    "released": {"kind": "released", "chunks": [TOKEN], "drop": True},
    "offers": {"kind": "offers", "chunks": [], "idle": 0, "busy": 0, "running": 0},
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_there_and_back(kind):
    message = p.decode(json.dumps(EXAMPLES[kind]).encode())
    assert message.kind == kind
    assert p.decode(p.encode(message)) == message


@pytest.mark.parametrize("count", [0, 1, 249, 250, 251, 500, 501, 4096])
def test_segments(count):
    parts = list(segments(p.Ping(id=3), list(range(count))))
    assert [n for _, some in parts for n in some] == list(range(count))
    assert all(data and len(some) <= 250 for data, some in parts)
    assert b"".join(data for data, _ in parts).endswith(p.encode(p.Ping(id=3)))


class TestVersions:
    @pytest.mark.parametrize("version", [0, p.PROTOCOL + 1, 65535])
    @pytest.mark.parametrize("body", [{"kind": "hello", "new": {}}, b"\xff\0 not even text", b""])
    def test_another_one_is_refused_in_words_that_it_can_read(self, raw, version, body):
        client = raw()
        client.send(frame(body, version))
        (refusal,) = client.answers(2)
        assert refusal.reason == "version"
        assert f"version {version}" in refusal.message
        assert f"version {p.PROTOCOL}" in refusal.message

    def test_a_message_that_is_not_whole_yet(self, raw):
        client = raw()
        client.send(frame(b"", p.PROTOCOL + 1, length=1000))
        assert client.answers(2)[0].reason == "version"

    def test_what_the_other_side_makes_of_it(self, raw):
        """A future client has the header in common with us, and reads our version and our words."""
        client = raw()
        client.send(frame(hello(), p.PROTOCOL + 1))
        data = b""
        while more := client.socket.recv(10_000):
            data += more
        magic, version, count, length = p.HEADER.unpack_from(data)
        assert (magic, version, count, length) == (p.MAGIC, p.PROTOCOL, 0, len(data) - p.HEADER.size)
        assert json.loads(data[p.HEADER.size :])["reason"] == "version"

    def test_a_client_that_meets_a_newer_broker(self, place):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place / "x"))
            server.listen()
            channel = Channel.connect(place / "x", 5)
            other, _ = server.accept()
            other.sendall(frame({"what": "words"}, p.PROTOCOL + 1))
            with pytest.raises(OtherVersionError) as caught:
                channel.receive()
            assert json.loads(caught.value.text) == {"what": "words"}
            channel.close()
            other.close()


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\0" * 100,
    b"GLKX" + b"\0" * 30,
    frame(b"", length=p.MOST_BYTES + 1),
    frame(b"", length=2**32 - 1),
    frame(b"{}", descriptors=p.MOST_DESCRIPTORS + 1),
    frame(b"{}", descriptors=1),
    frame(b""),
    frame(b"{}"),
    frame(b"null"),
    frame(b"[" * 100_000),
    frame(b"\xff\xfe\xfd"),
    frame({"kind": "nothing"}),
    frame({"kind": "ping", "more": 1}),
    frame({"kind": "ping", "id": "x"}),
    frame({"kind": "ping", "id": 1e300}),
    frame(hello(device={"name": "cpu", "memory": -1, "granule": GRANULE})),
    frame(hello(device={"name": "cpu", "memory": 1 << 61, "granule": GRANULE})),
    frame(hello(name="x" * 5000)),
    frame({"kind": "acquire", "chunks": ["../../etc/passwd"]}),
    frame({"kind": "acquire", "chunks": []}),
    frame({"kind": "place", "weights": [{"digest": "A" * 64, "length": 1, "mapped": 1, "path": ""}]}),
    frame({"kind": "loaded", "chunks": [{"chunk": TOKEN, "memory": TOKEN}], "seconds": -1}),
    b'GLKB\0\1\0\0\0\0\0\x20{"kind": "ping", "id": NaN}     ',
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("greets", [False, True])
def test_garbage_is_refused_and_the_connection_ends(broker, raw, join, data, greets, nothing_leaks):
    good = join(broker)
    with nothing_leaks():
        client = raw()
        if greets:
            client.send(frame(hello()))
            assert client.answers()[0].kind == "welcome"
        client.send(data)
        refusals = client.answers(2)
        assert [(each.kind, each.reason) for each in refusals] == [("refusal", "message")]
        client.close()
    good.expect(p.Done, p.Ping())
    assert len(device(broker).clients) == 1


def test_a_message_in_many_parts(raw):
    client = raw()
    data = frame(hello()) + frame({"kind": "ping", "id": 2}) * 3
    for start in range(0, len(data), 7):
        client.send(data[start : start + 7])
    assert [answer.kind for answer in client.answers(4)] == ["welcome", "done", "done", "done"]


def test_the_largest_message(raw):
    client = raw()
    client.send(frame(hello()))
    client.answers()
    weights = [
        {"digest": f"{n:064x}", "length": 1, "mapped": 1, "path": "/" + "x" * 4000} for n in range(15_000)
    ]
    body = json.dumps({"kind": "place", "id": 5, "weights": weights}).encode()
    assert p.MOST_BYTES * 0.9 < len(body) < p.MOST_BYTES
    thread = threading.Thread(target=client.socket.sendall, args=[frame(body)])
    thread.start()
    (answer,) = client.answers()
    thread.join()
    assert answer.kind == "placed"


@pytest.mark.parametrize("cut", [1, 6, 12, 20])
def test_the_end_in_the_middle(broker, raw, cut):
    client = raw()
    client.send(frame(hello())[:cut])
    client.close()
    until(lambda: any("middle" in event.text for event in broker.events))


class TestDescriptors:
    def test_that_nobody_announced(self, broker, raw, nothing_leaks):
        with nothing_leaks():
            client = raw()
            client.send(frame(hello()), [0, 1])
            assert [each.reason for each in client.answers(3)] == ["message"]
            client.close()

    def test_that_belong_to_no_message_of_that_kind(self, broker, raw, nothing_leaks):
        with nothing_leaks():
            client = raw()
            client.send(frame(hello()))
            client.send(frame({"kind": "ping", "id": 2}, descriptors=2), [0, 1])
            client.send(frame({"kind": "ping", "id": 3}))
            _, refusal, done = client.answers(3)
            assert (refusal.to, refusal.reason) == (2, "message")
            assert done == p.Done(to=3)
            client.close()

    def test_without_end(self, broker, raw, nothing_leaks):
        """More than any message has, before there is a message."""

        def flood(client):
            for byte in frame({"kind": "ping"}, descriptors=4096, length=60_000_000) + b" " * 100:
                client.send(bytes([byte]), [0] * 250)

        with nothing_leaks():
            client = raw()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                flood(client)
            client.close()

    def test_of_a_client_that_dies_in_the_middle(self, broker, raw, nothing_leaks):
        with nothing_leaks():
            client = raw()
            client.send(frame(hello(), descriptors=3, length=5000), [0, 1, 2])
            client.close()

    def test_the_hello_of_who_brings_nothing(self, broker, raw, nothing_leaks):
        with nothing_leaks():
            client = raw()
            client.send(frame(hello(), descriptors=1), [0])
            assert [each.reason for each in client.answers(2)] == ["message"]
            client.close()


class Fuzzer:
    """One connection after the other that does what it likes."""

    def __init__(self, path, folder, seed):
        self.path, self.folder = path, folder
        self.random = random.Random(seed)
        self.count = 0
        self.tokens, self.regions, self.digests = [TOKEN], [TOKEN], [DIGEST]

    def connection(self):
        """Some messages, one at least of them wrong as a rule."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(0.01)
        descriptors = []
        frames = Frames()
        try:
            sock.connect(str(self.path))
            if self.random.random() < 0.9:
                self.send(sock, frame(self.hello()), [])
            for _ in range(self.random.randint(1, 40)):
                self.count += 1
                data, descriptors = self.some()
                self.send(sock, data, descriptors)
                close_all(descriptors)
                descriptors = []
                if self.random.random() < 0.7:
                    self.read(sock, frames)
        except OSError:
            pass
        finally:
            close_all(descriptors)
            frames.close()
            sock.close()

    def send(self, sock, data, descriptors):
        sock.settimeout(1)
        socket.send_fds(sock, [data[:1]], descriptors)
        sock.sendall(data[1:])
        sock.settimeout(0.01)

    def read(self, sock, frames):
        """Take in what comes: learn tokens, answer questions, rightly or not."""
        try:
            if not frames.receive(sock):
                raise OSError("the end")
            while (found := frames.next()) is not None:
                message, descriptors = found
                close_all(descriptors)
                if isinstance(message, p.Placed):
                    self.regions += [region.token for region in message.regions]
                    self.tokens += tokens_of(message.regions)
                    del self.tokens[:-50], self.regions[:-20]
                if isinstance(message, p.Request) and self.random.random() < 0.8:
                    self.send(sock, frame(self.answer(message)), [])
        except (TimeoutError, ProtocolError):
            pass

    def some(self):
        """A message, as it should be or not, and descriptors."""
        message = self.message()
        descriptors = []
        if message["kind"] == "loaded" and self.random.random() < 0.8:
            descriptors = [self.descriptor() for _ in message["chunks"]]
        elif self.random.random() < 0.05:
            descriptors = [self.descriptor() for _ in range(self.random.randint(1, 3))]
        announced = len(descriptors) if self.random.random() < 0.95 else self.random.randrange(5)
        data = frame(self.bent(message) if self.random.random() < 0.1 else message, descriptors=announced)
        what = self.random.random()
        if what < 0.03:
            data = self.random.randbytes(self.random.randint(1, 200))
        elif what < 0.06:
            data = data[: self.random.randint(1, len(data))]
        elif what < 0.12:
            changed = bytearray(data)
            for _ in range(self.random.randint(1, 4)):
                changed[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            data = bytes(changed)
        return data, descriptors

    def descriptor(self):
        content = bytes(self.random.choice([GRANULE, GRANULE, 100]))
        return memfd(content, self.random.choice([15, 15, 15, 3]))

    def hello(self):
        message = hello(name=f"fuzz {self.random.randrange(9)}", pid=self.random.randrange(1 << 20))
        what = self.random.random()
        if what < 0.1:
            message["device"] = None
        elif what < 0.2:
            message["device"]["name"] = f"GPU-{self.random.randrange(200)}"
        elif what < 0.3:
            message["resume"] = {"regions": [], "chunks": [], "quota": self.random.choice([0, 5, 1 << 58])}
        elif what < 0.35:
            chunk = {"token": self.pick(self.tokens), "size": GRANULE, "used": 5}
            weight = {"digest": self.pick(self.digests), "length": 5, "mapped": 5, "path": "/x", "offset": 0}
            region = {"token": self.pick(self.regions), "chunks": [chunk], "weights": [weight]}
            message["resume"] = {"regions": [region], "chunks": [], "quota": 5}
        return message

    def pick(self, things):
        return self.random.choice(things) if self.random.random() < 0.95 else secrets.token_hex(8)

    def picks(self, things):
        return [self.pick(things) for _ in range(self.random.randint(1, 4))]

    def weight(self):
        number = self.random.randrange(40)
        path = self.folder / f"{number}"
        length = self.random.choice([10, 10, 10, 70_000, 1 << 40])
        digest = f"{number:064x}"
        self.digests = [*self.digests[-20:], digest]
        more = {"pieces": self.picks(self.digests)} if self.random.random() < 0.1 else {}
        return {"digest": digest, "length": length, "mapped": self.random.choice([length, 5]), "path": str(path),
                "group": number % 3, **more}  # fmt: skip

    def message(self):
        rng, kinds = self.random, (
            "place", "place", "forget", "acquire", "acquire", "acquire", "loaded", "loaded", "failed", "released", "grow",
            "status", "ping", "bye", "offer", "give", "done", "refusal", "hello", "offers", "granted", "given",
        )  # fmt: skip
        kind = rng.choice(kinds)
        body = {
            "place": lambda: {"weights": [self.weight() for _ in range(rng.randint(1, 5))]},
            "forget": lambda: {"regions": self.picks(self.regions)},
            "acquire": lambda: {
                "chunks": self.picks(self.tokens),
                "wait": rng.random() < 0.5,
                "full": rng.random() < 0.2,
            },
            "loaded": lambda: {
                "chunks": [{"chunk": t, "memory": secrets.token_hex(8)} for t in self.picks(self.tokens)]
            },
            "failed": lambda: {"chunks": self.picks(self.tokens)},
            "released": lambda: {"chunks": self.picks(self.tokens), "drop": rng.random() < 0.5},
            "grow": lambda: {"quota": rng.choice([5, MiB, 1 << 50]), "full": rng.random() < 0.2},
            "give": lambda: {"chunks": self.picks(self.tokens)},
            "refusal": lambda: {"reason": "message", "message": "", "to": rng.randrange(4)},
            "hello": self.hello,
            "done": lambda: {"to": rng.randrange(5)},
            "offers": lambda: {
                "chunks": [],
                "idle": 1 << 40,
                "busy": 1,
                "running": 1,
                "to": rng.randrange(5),
            },
            "granted": lambda: {"quota": rng.choice([0, 1 << 55]), "to": rng.randrange(5)},
            "given": lambda: {"chunks": self.picks(self.tokens), "to": rng.randrange(5)},
        }.get(kind, dict)()
        if kind not in ("done", "refusal", "offers", "granted", "given"):
            body["id"] = rng.randrange(1, 1000)
        return {**body, "kind": kind}

    def answer(self, request):
        if self.random.random() < 0.2:
            return {**self.message(), "to": request.id}
        right = {
            "offer": lambda: {"kind": "offers", "idle": self.random.randrange(MiB), "busy": self.random.randrange(2),
                              "running": self.random.randrange(2),
                              "chunks": [{"chunk": t, "awake": True, "priority": 0, "idle_seconds": 1.0}
                                         for t in self.tokens[:9]]},
            "give": lambda: {"kind": "given", "chunks": request.chunks},
            "trim": lambda: {"kind": "granted", "quota": self.random.randrange(MiB)},
        }.get(request.kind, lambda: {"kind": "done"})()  # fmt: skip
        return {**right, "to": request.id}

    def bent(self, message):
        """Another value, or one more or fewer."""
        message = dict(message)
        key = self.random.choice(list(message))
        odd = [None, -1, 1 << 70, 1.5, "", "x" * 5000, [], {}, [[]], True, "\0", "\ud800"]
        if self.random.random() < 0.2:
            del message[key]
        else:
            message[self.random.choice([key, "else"])] = self.random.choice(odd)
        return message


def resident():
    """Python's objects, and the bytes of this process."""
    gc.collect()
    release_unused_heap()
    return len(gc.get_objects()), int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_fuzz(start, join, files, tmp_path, nothing_leaks):
    """Whatever anybody sends: a good client is served all the time, and nothing is left of the others."""
    for number in range(40):
        (tmp_path / f"{number}").write_bytes(bytes(number))
    times = Times(hello=1, message=1, reading=1, answer=0.3, describe=0.1)
    broker = start(limit=40 * GRANULE, times=times, patience=0.2, make_seconds=0.5)
    good = join(broker, "good")
    weight, other = files.add(100_000), files.add(10)
    good.load(weight)

    def served():
        (token,) = tokens_of(good.place(other))
        good.bring([token])
        good.verify()
        good.release(token, drop=True)

    def fuzz(seed, seconds):
        fuzzers = [Fuzzer(broker.path, tmp_path, seed * 100 + n) for n in range(4)]
        end = time.monotonic() + seconds

        def work(fuzzer):
            while time.monotonic() < end:
                fuzzer.connection()

        threads = [threading.Thread(target=work, args=[each]) for each in fuzzers]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            served()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        return sum(each.count for each in fuzzers)

    def alone():
        return len(device(broker).clients) == 1 and broker.count == 1

    fuzz(0, min(1.0, SECONDS))  # so that all threads and caches are there
    until(alone)
    before = resident()
    with nothing_leaks():
        count = fuzz(1, SECONDS)
        until(alone)
        assert not [event for event in broker.events if event.kind == "error"], broker.events
        assert not [event for event in broker.events if "defect" in event.text]
        broker.events.clear()
    assert count > 100 * SECONDS / 5
    table = device(broker)
    assert table.used == table.weights
    for _ in range(40):  # what is left is memory that nobody has; it goes when it is needed
        if not table.unused:
            break
        good.grow(good.quota + table.limit - table.used + GRANULE)
    assert {chunk.token for client in table.clients for chunk in client.has} == set(good.has)
    good.verify()
    served_by = Peer(broker.path)
    served_by.hello()
    assert served_by.load(weight)[1:] == (0, len(tokens_of(good.place(weight))))
    served_by.close()
    objects, memory = (now - then for now, then in zip(resident(), before, strict=True))
    assert objects < 5000
    assert memory < 100 * MiB  # what the heap keeps; it does not grow with time
