"""What a broker does not believe: memory, files, pieces; what it cannot read."""

import os
import threading
import time

import pytest
from scripted import GPU, GRANULE, MiB, device, flipped, kinds, memfd, tokens_of, until

from glake_infer import verified
from glake_infer.digest import digests_of_pieces
from glake_infer.layout import LARGE, PIECE
from glake_infer.sharing import checks
from glake_infer.sharing import protocol as p


class TestChecks:
    """What a broker does not believe."""

    def acquired(self, broker, join, files, *sizes):
        client = join(broker)
        weights = [files.add(size) for size in sizes or (1000, 5000)]
        tokens = tokens_of(client.place(*weights))
        assert client.expect(p.Acquired, p.Acquire(chunks=tokens)).make == tokens
        return client, weights, tokens

    def then_it_is_right(self, broker, client, tokens):
        """Nothing of the wrong ones is there, and it can be made after all."""
        assert device(broker).used == 0
        assert client.bring(tokens) == (len(tokens), 0)
        client.verify()

    @pytest.mark.parametrize("at", [0, 999, 1000, 1023, 1024, 6023, 6024, GRANULE - 1])
    def test_memory_that_differs_in_one_bit(self, broker, join, files, at):
        client, weights, tokens = self.acquired(broker, join, files)
        refusal = client.loaded(tokens, change=flipped(at))
        assert (refusal.kind, refusal.reason) == ("refusal", "altered")
        assert refusal.digest in {weight.digest for weight in weights}
        assert refusal.path.endswith(refusal.digest)
        self.then_it_is_right(broker, client, tokens)

    def test_a_bit_far_inside_a_large_chunk(self, broker, join, files):
        client, _, tokens = self.acquired(broker, join, files, 9 * MiB + 5)
        assert client.loaded(tokens, change=flipped(7 * MiB + 3)).reason == "altered"
        self.then_it_is_right(broker, client, tokens)

    @pytest.mark.parametrize("seals", range(15))
    def test_memory_that_can_be_changed(self, broker, join, files, seals):
        client, _, tokens = self.acquired(broker, join, files)
        refusal = client.loaded(tokens, seals=seals)
        assert refusal.reason == "message"
        assert "sealed" in refusal.message
        self.then_it_is_right(broker, client, tokens)

    @pytest.mark.parametrize("change", [lambda data: data + b"0", lambda data: data[:-1]])
    def test_memory_of_another_size(self, broker, join, files, change):
        client, _, tokens = self.acquired(broker, join, files)
        assert str(GRANULE) in client.loaded(tokens, change=change).message
        self.then_it_is_right(broker, client, tokens)

    def test_a_file_instead_of_memory(self, broker, join, files, tmp_path):
        client, _, tokens = self.acquired(broker, join, files)
        with (tmp_path / "f").open("w+b") as file:
            file.truncate(GRANULE)
            memories = [p.ChunkMemory(chunk=tokens[0], memory="1" * 16)]
            client.refused(p.Loaded(chunks=memories), "message", [file.fileno()])
        self.then_it_is_right(broker, client, tokens)

    def test_descriptors_that_are_too_few_or_too_many(self, broker, join, files):
        client, _, tokens = self.acquired(broker, join, files)
        memories = [p.ChunkMemory(chunk=tokens[0], memory="1" * 16)]
        fd = client.memory(tokens[0])
        client.refused(p.Loaded(chunks=memories), "message")
        client.refused(p.Loaded(chunks=memories), "message", [fd, fd])
        client.refused(p.Ping(), "message", [fd])
        os.close(fd)
        assert isinstance(client.loaded(tokens), p.Done)  # it still makes it

    def test_a_file_that_was_altered(self, broker, join, files):
        client, weights, tokens = self.acquired(broker, join, files)
        path = files.folder / weights[1].digest
        content = path.read_bytes()
        path.write_bytes(flipped(17)(content))
        refusal = client.loaded(tokens)  # the memory holds the altered bytes
        assert (refusal.reason, refusal.digest, refusal.path) == ("altered", weights[1].digest, str(path))
        path.write_bytes(content)
        self.then_it_is_right(broker, client, tokens)

    def test_a_file_that_was_altered_after_its_check(self, broker, join, files):
        """Its seal is another one then."""
        a, b = join(broker), join(broker)
        weight = files.add(1000)
        regions, *_ = a.load(weight)
        a.release(*tokens_of(regions), drop=True)
        path = files.folder / weight.digest
        path.write_bytes(flipped(17)(path.read_bytes()))
        b.place(weight)
        b.expect(p.Acquired, p.Acquire(chunks=tokens_of(regions)))
        assert b.loaded(tokens_of(regions)).reason == "altered"

    @pytest.mark.parametrize("which", ["_check_file", "_compare"])
    def test_a_file_that_is_touched_while_it_is_read(self, broker, join, files, monkeypatch, which):
        """Nobody knows which bytes were read."""
        module, name = (verified, "digest_of_range") if which == "_check_file" else (checks, "_opened")
        original = getattr(module, name)

        def touching(first, *rest, **more):
            os.utime(first.path if which == "_compare" else f"/proc/self/fd/{first}")
            return original(first, *rest, **more)

        client, weights, tokens = self.acquired(broker, join, files)
        client.loaded(tokens, change=flipped(0))  # so that the files are known
        if which == "_check_file":
            for weight in weights:
                os.utime(weight.path)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, touching)
            client.expect(p.Acquired, p.Acquire(chunks=tokens))
            refusal = client.loaded(tokens)
        assert refusal.reason == "altered"
        assert "was changed while it was read" in refusal.message
        self.then_it_is_right(broker, client, tokens)

    @pytest.mark.parametrize(
        "make", [lambda path: None, lambda path: path.mkdir(), os.mkfifo], ids=["none", "dir", "fifo"]
    )
    def test_a_file_that_cannot_be_read(self, broker, join, files, make):
        client, weights, tokens = self.acquired(broker, join, files)
        client.loaded(tokens, change=flipped(0))  # so that no check reads the file that goes
        client.expect(p.Acquired, p.Acquire(chunks=tokens))
        path = files.folder / weights[0].digest
        memory = client.memory(tokens[0])
        content = path.read_bytes()
        path.unlink()
        make(path)
        memories = [p.ChunkMemory(chunk=tokens[0], memory="1" * 16)]
        refusal = client.refused(p.Loaded(chunks=memories), "unreadable", [memory])
        assert (refusal.digest, refusal.path) == (weights[0].digest, str(path))
        os.close(memory)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        self.then_it_is_right(broker, client, tokens)

    @pytest.mark.parametrize("path", ["relative", "/nowhere/x", "/dev/zero", "", "/a\0b"])
    def test_paths_that_are_none(self, broker, join, files, path):
        client = join(broker)
        weight = files.add(10)
        (region,) = client.place(weight.model_copy(update={"path": path}))
        client.expect(p.Acquired, p.Acquire(chunks=tokens_of([region])))
        fd = memfd((files.folder / weight.digest).read_bytes() + bytes(GRANULE - 10))
        memories = [p.ChunkMemory(chunk=region.chunks[0].token, memory="1" * 16)]
        client.refused(p.Loaded(chunks=memories), "unreadable", [fd])
        os.close(fd)

    def test_another_length(self, broker, join, files):
        client = join(broker)
        weight = files.add(1000)
        client.place(weight.model_copy(update={"length": 999, "mapped": 999}))
        tokens = tokens_of(client.regions.values())
        client.expect(p.Acquired, p.Acquire(chunks=tokens))
        assert client.loaded(tokens).reason == "altered"
        assert join(broker).load(weight)[1:] == (1, 0)  # who is right is not hurt

    def test_a_part_of_a_weight(self, broker, join, files):
        weight = files.add(200_000)
        client = join(broker)
        client.load(weight.model_copy(update={"mapped": 100_000}))
        client.load(weight)

    def test_files_are_read_once(self, broker, join, files, monkeypatch):
        read = []
        original = checks.Checks._check_file
        monkeypatch.setattr(
            checks.Checks,
            "_check_file",
            lambda self, weight: read.append(weight.digest) or original(self, weight),
        )
        weight = files.add(3 * MiB)
        a, b = join(broker), join(broker)
        regions, *_ = a.load(weight)
        a.release(*tokens_of(regions), drop=True)
        assert b.load(weight)[1:] == (1, 0)
        assert read == [weight.digest]
        os.utime(weight.path)
        b.release(*tokens_of(regions), drop=True)
        a.bring(tokens_of(regions))
        assert read == [weight.digest] * 2

    def test_a_check_begins_with_the_load(self, broker, join, files, monkeypatch):
        begun = threading.Event()
        original = checks.Checks._check_file
        monkeypatch.setattr(
            checks.Checks, "_check_file", lambda self, weight: begun.set() or original(self, weight)
        )
        self.acquired(broker, join, files)
        assert begun.wait(5)

    def test_a_client_that_dies_during_the_check_leaves_the_chunk(self, broker, join, files, monkeypatch):
        going, go_on = threading.Event(), threading.Event()
        original = checks.Checks._compare

        def compare(self, *arguments):
            going.set()
            assert go_on.wait(10)
            return original(self, *arguments)

        monkeypatch.setattr(checks.Checks, "_compare", compare)
        client, weights, tokens = self.acquired(broker, join, files)
        other = join(broker)
        other.place(*weights)
        memories = [p.ChunkMemory(chunk=tokens[0], memory="1" * 16)]
        fd = client.memory(tokens[0])
        client.start(p.Loaded(chunks=memories), [fd])
        os.close(fd)
        waiting = other.start(p.Acquire(chunks=tokens, wait=True))
        assert going.wait(5)
        client.close()
        until(lambda: "lost" in kinds(broker))
        assert other.waits(waiting)
        go_on.set()
        answer, descriptors = other.wait(waiting)
        assert [memory.chunk for memory in answer.given] == tokens
        os.close(descriptors[0])

    def test_a_broker_that_ends_during_a_check(self, start, join, files, monkeypatch):
        going = threading.Event()

        def check(self, weight):
            going.set()
            while True:
                self._go_on(0)
                time.sleep(0.01)

        monkeypatch.setattr(checks.Checks, "_check_file", check)
        broker = start()
        client, _, tokens = self.acquired(broker, join, files)
        client.start(
            p.Loaded(chunks=[p.ChunkMemory(chunk=tokens[0], memory="1" * 16)]),
            [fd := client.memory(tokens[0])],
        )
        os.close(fd)
        assert going.wait(5)
        broker.stop()
        assert client.ended.wait(5)


class TestGpus:
    """Memory that the broker cannot read."""

    def test_files_are_checked(self, start, join, files):
        broker = start(any_descriptor=True)
        a, b = (join(broker, device=GPU, granule=2 * MiB) for _ in range(2))
        weight, other = files.add(5 * MiB), files.add(100)
        assert a.load(weight)[1:] == (1, 0)
        assert b.load(weight)[1:] == (0, 1)
        path = files.folder / other.digest
        path.write_bytes(b"x" * 100)
        tokens = tokens_of(a.place(other))
        a.expect(p.Acquired, p.Acquire(chunks=tokens))
        assert a.loaded(tokens).reason == "altered"

    def test_any_other_file_is_no_memory(self, start, join, files):
        broker = start()
        client = join(broker, device=GPU)
        tokens = tokens_of(client.place(files.add(10)))
        client.expect(p.Acquired, p.Acquire(chunks=tokens))
        refusal = client.loaded(tokens)
        assert refusal.reason == "message"
        assert "NVIDIA" in refusal.message

    def test_devices_have_nothing_to_do_with_each_other(self, start, join, files):
        broker = start(any_descriptor=True, limits={"cpu": GRANULE})
        weight = files.add(10)
        a, b = join(broker), join(broker, device=GPU)
        assert a.load(weight)[1:] == b.load(weight)[1:] == (1, 0)
        assert not set(a.has) & set(b.has)


class TestVersions:
    def versions(self, files, wrong=False):
        first = bytes(LARGE)
        second = b"x" + first[1:]
        found = []
        for data in (first, second):
            _, pieces, _ = digests_of_pieces([data], PIECE)
            pieces = [pieces[i : i + 64] for i in range(0, len(pieces), 64)]
            if wrong and data is second:
                pieces[0] = found[0].pieces[0]  # it says that all of it is the first one's
            found.append(files.add(0, data=data, pieces=pieces))
        return found

    def test_equal_pieces_are_held_once(self, broker, join, files):
        first, second = self.versions(files)
        a, b = join(broker), join(broker)
        (one,), *_ = a.load(first)
        assert b.load(second)[1:] == (1, 1)
        assert device(broker).used == LARGE + one.chunks[0].size

    def test_pieces_that_are_not_those_of_the_file(self, broker, join, files):
        first, second = self.versions(files, wrong=True)
        a, b = join(broker), join(broker)
        a.load(first)
        assert b.load(second)[1:] == (2, 0)  # right, and shared with nobody
        assert "altered" in kinds(broker)
        c = join(broker)
        assert c.load(second)[1:] == (0, 2)
