"""A broker and its clients: places, chunks, checks, deaths, resuming, what can be seen."""

import os
import secrets
import time

import pytest
from scripted import GPU, GRANULE, SHORT, KiB, MiB, device, flipped, hears, kinds, memfd, tokens_of, until

from glake_infer.sharing import broker as broker_module
from glake_infer.sharing import protocol as p


class TestLife:
    def test_hello(self, start, join):
        broker = start(limits={"cpu": 5 * MiB})
        a, b = join(broker, hello=False), join(broker, hello=False)
        first, second = a.hello(), b.hello()
        assert (first.limit, first.quota, first.disowned) == (5 * MiB, 0, [])
        assert first.broker == second.broker
        until(lambda: kinds(broker) == ["started", "came", "came"])

    def test_the_limit_is_what_the_device_has_or_what_was_said(self, start, join):
        broker = start(limit=3 * MiB, limits={GPU: 4 * MiB}, any_descriptor=True)
        assert join(broker, hello=False).hello().limit == 3 * MiB
        assert join(broker, hello=False, device=GPU).hello().limit == 4 * MiB
        other = start("other.sock")
        assert join(other, hello=False, memory=7 * MiB).hello().limit == 7 * MiB
        assert join(other, hello=False, memory=9 * MiB).hello().limit == 7 * MiB  # as the first said

    def test_a_second_hello(self, broker, join):
        client = join(broker)
        client.hello(kind=p.Refusal)
        assert client.ask(p.Ping()) == p.Done(to=3)

    @pytest.mark.parametrize("granule", [3 * 4096, 1 << 30])
    def test_granules_that_cannot_be(self, broker, join, granule):
        client = join(broker, hello=False, granule=granule)
        assert "granule" in client.hello(kind=p.Refusal).message
        assert client.ended.wait(5)

    def test_another_granule_than_the_others(self, broker, join):
        join(broker)
        other = join(broker, hello=False, granule=2 * GRANULE)
        assert str(2 * GRANULE) in other.hello(kind=p.Refusal).message

    def test_a_word_before_hello(self, broker, join):
        for request in (p.Ping(), p.Status(), p.Grow(quota=1)):
            client = join(broker, hello=False)
            assert client.refused(request, "message").message
            assert client.ended.wait(5)

    def test_an_observer_sees_and_does_nothing_else(self, broker, join):
        join(broker, "worker")
        observer = join(broker, device=None)
        assert [process.name for process in observer.status_of().devices[0].processes] == ["worker"]
        observer.expect(p.Done, p.Ping())
        for request in (p.Grow(quota=1), p.Acquire(chunks=["0" * 16]), p.Forget(regions=[])):
            assert "observer" in observer.refused(request, "message").message
        other = join(broker, device=None, hello=False)
        other.hello(p.Resume(regions=[], chunks=[], quota=0), kind=p.Refusal)

    def test_who_said_bye_is_not_lost(self, broker, join):
        a, b = join(broker, "a"), join(broker, "b")
        a.bye()
        b.close()
        until(lambda: kinds(broker).count("gone") == 1 and kinds(broker).count("lost") == 1)
        assert broker.status().broker.lost == 1

    def test_what_is_not_for_clients_to_say(self, broker, join):
        client = join(broker)
        for request in (p.Offer(), p.Give(chunks=[]), p.Trim(bytes=1), p.Describe()):
            client.refused(request, "message")
        client.expect(p.Done, p.Ping())

    def test_answers_to_nothing(self, broker, join):
        client = join(broker)
        for answer in (
            p.Done(to=7),
            p.Granted(to=0, quota=5),
            p.Welcome(release="", broker="0" * 16, limit=0, quota=0),
        ):
            client.channel.send(answer)
        client.channel.send(
            p.Refusal(to=9, reason="message", message="no")
        )  # never answered: two would go on for ever
        client.expect(p.Done, p.Ping())
        until(lambda: len(client.unexpected) == 3)
        assert {refusal.reason for refusal in client.unexpected} == {"message"}

    def test_a_hundred_devices_are_not_kept(self, broker, join):
        for number in range(100):
            join(broker, device=f"GPU-{number}").close()
        join(broker)
        assert len(broker.status().devices) <= 65


class TestChunks:
    def test_one_loads_and_others_are_given(self, broker, join, files):
        weights = [files.add(size, group=i % 2) for i, size in enumerate((10, 3 * MiB, 70_000, 200))]
        a, b = join(broker), join(broker)
        regions, made, given = a.load(*weights)
        assert (made, given) == (2, 0)
        assert b.load(*weights) == (regions, 0, 2)
        assert [os.fstat(a.has[t][1]).st_ino for t in a.has] == [os.fstat(b.has[t][1]).st_ino for t in a.has]
        table = device(broker)
        assert table.used == sum(chunk.size for chunk in regions[0].chunks)
        assert (table.counters.loads, table.counters.hits) == (2, 2)
        assert table.counters.loaded_bytes == 1
        assert table.counters.load_seconds == 0.5

    def test_the_memory_outlives_its_maker(self, broker, join, files):
        weight = files.add(MiB)
        a = join(broker)
        a.load(weight)
        a.close()
        assert join(broker).load(weight)[1:] == (0, 1)

    def test_many_chunks_at_once(self, broker, join, files):
        weights = [files.add(100 + i, group=i) for i in range(600)]
        join(broker).load(*weights)
        assert join(broker).load(*weights)[1:] == (0, 600)

    def test_waiting_for_another_maker(self, broker, join, files):
        weight = files.add(MiB)
        a, b, c = join(broker), join(broker), join(broker)
        (region,) = a.place(weight)
        for other in (b, c):
            other.place(weight)
        (token,) = tokens_of([region])
        assert a.expect(p.Acquired, p.Acquire(chunks=[token])).make == [token]
        assert b.expect(p.Acquired, p.Acquire(chunks=[token])).pending == [token]
        waiting = b.start(p.Acquire(chunks=[token], wait=True))
        also = c.start(p.Acquire(chunks=[token], wait=True))
        own = a.start(p.Acquire(chunks=[token], wait=True))  # another of its threads
        assert b.waits(waiting)
        assert isinstance(a.loaded([token]), p.Done)
        for client, number in ((b, waiting), (c, also), (a, own)):
            answer, descriptors = client.wait(number)
            assert [memory.chunk for memory in answer.given] == [token]
            os.close(descriptors[0])

    def test_waiting_ends_with_the_first_that_is_there(self, broker, join, files):
        weights = [files.add(10, group=i) for i in range(3)]
        a, b = join(broker), join(broker)
        one, two, three = tokens_of(a.place(*weights))
        b.place(*weights)
        a.bring([one])
        a.expect(p.Acquired, p.Acquire(chunks=[two]))
        answer = b.expect(p.Acquired, p.Acquire(chunks=[one, two, three], wait=True))
        assert ([m.chunk for m in answer.given], answer.make, answer.pending) == ([one], [three], [two])

    @pytest.mark.parametrize("end", ["dies", "fails", "forgets", "bye"])
    def test_when_the_maker_is_no_more_the_next_makes_it(self, broker, join, files, end):
        weight = files.add(MiB)
        a, b, c = join(broker), join(broker), join(broker)
        regions = a.place(weight)
        (token,) = tokens_of(regions)
        a.expect(p.Acquired, p.Acquire(chunks=[token]))
        waiting = []
        for other in (b, c):
            other.place(weight)
            waiting.append(other.start(p.Acquire(chunks=[token], wait=True)))
        assert b.waits(waiting[0])
        if end == "fails":
            a.expect(p.Done, p.Failed(chunks=[token]))
        elif end == "forgets":
            a.forget(*regions)
        else:
            a.close() if end == "dies" else a.bye()
        answer, _ = b.wait(waiting[0])
        assert answer.make == [token]
        assert c.waits(waiting[1])
        assert isinstance(b.loaded([token]), p.Done)
        answer, descriptors = c.wait(waiting[1])
        assert [memory.chunk for memory in answer.given] == [token]
        os.close(descriptors[0])

    def test_a_maker_that_takes_too_long(self, start, join, files):
        broker = start(make_seconds=0.3)
        weight = files.add(MiB)
        a, b = join(broker), join(broker)
        (token,) = tokens_of(a.place(weight))
        b.place(weight)
        a.expect(p.Acquired, p.Acquire(chunks=[token]))
        began = time.monotonic()
        answer = b.expect(p.Acquired, p.Acquire(chunks=[token], wait=True))
        assert answer.make == [token]
        assert 0.2 < time.monotonic() - began < 5
        late = a.loaded([token])
        assert (late.kind, late.reason) == ("refusal", "lost")
        assert isinstance(b.loaded([token]), p.Done)
        assert a.bring([token]) == (0, 1)
        assert "late" in kinds(broker)

    def test_released_stays_dropped_goes(self, broker, join, files):
        one, two = files.add(10, group=1), files.add(10, group=2)
        a = join(broker)
        regions, *_ = a.load(one, two)
        first, second = tokens_of(regions)
        a.release(first)
        a.release(second, drop=True)
        assert device(broker).used == device(broker).unused == GRANULE
        assert a.bring([first, second]) == (1, 1)

    def test_released_and_asked_for_again_in_one_breath(self, broker, join, files):
        """The order of messages is the order of things."""
        a = join(broker)
        regions, *_ = a.load(files.add(10))
        (token,) = tokens_of(regions)
        numbers = []
        for _ in range(20):
            numbers.append(a.start(p.Released(chunks=[token])))
            numbers.append(a.start(p.Acquire(chunks=[token])))
        for number in numbers:
            answer, descriptors = a.wait(number)
            assert isinstance(answer, p.Done) or len(answer.given) == len(descriptors) == 1
            for descriptor in descriptors:
                os.close(descriptor)
        assert [c.token for client in device(broker).clients for c in client.has] == [token]

    def test_unknown_tokens(self, broker, join, files):
        a, b = join(broker), join(broker)
        regions, *_ = a.load(files.add(10))
        (token,) = tokens_of(regions)
        for unknown in (token, "0" * 16):  # b was told of neither
            b.refused(p.Acquire(chunks=[unknown]), "unknown")
            b.refused(p.Released(chunks=[unknown]), "unknown")
            b.refused(p.Failed(chunks=[unknown]), "unknown")
            fd = memfd(bytes(GRANULE))
            b.refused(p.Loaded(chunks=[p.ChunkMemory(chunk=unknown, memory="1" * 16)]), "unknown", [fd])
            os.close(fd)
        b.refused(p.Forget(regions=[regions[0].token]), "unknown")
        a.verify()

    def test_a_region_that_is_forgotten_while_it_is_waited_for(self, broker, join, files):
        weight = files.add(10)
        a, b = join(broker), join(broker)
        regions = a.place(weight)
        b.place(weight)
        a.expect(p.Acquired, p.Acquire(chunks=tokens_of(regions)))
        waiting = b.start(p.Acquire(chunks=tokens_of(regions), wait=True))
        assert b.waits(waiting)
        b.forget(*regions)
        a.loaded(tokens_of(regions))
        answer, _ = b.wait(waiting)
        assert (answer.kind, answer.reason) == ("refusal", "unknown")

    def test_placing_contradictions(self, broker, join, files):
        client = join(broker)
        weight = files.add(10)
        client.refused(p.Place(weights=[weight.model_copy(update={"mapped": 11})]), "message")
        client.load(weight)

    def test_weights_without_bytes(self, broker, join, files):
        assert join(broker).place(files.add(0)) == []

    def test_too_many_that_wait(self, broker, join, files):
        a, b = join(broker), join(broker)
        weight = files.add(10)
        tokens = tokens_of(a.place(weight))
        b.place(weight)
        a.expect(p.Acquired, p.Acquire(chunks=tokens))
        for _ in range(1024):
            b.start(p.Acquire(chunks=tokens, wait=True))
        assert "too many" in b.refused(p.Acquire(chunks=tokens, wait=True), "message").message
        b.close()
        until(lambda: "lost" in kinds(broker))
        device(broker)


class TestResume:
    """A broker is gone, its clients come to the next one with what they have."""

    def clients(self, start, join, files, count=2, **options):
        """Clients of a broker that is gone, and the next one."""
        weights = [files.add(size, group=i) for i, size in enumerate((10, 300_000))]
        old = start("old.sock", **options)
        clients = [join(old, f"client {i}") for i in range(count)]
        for client in clients:
            client.load(*weights)
            client.grow(MiB)
        old.stop()
        for client in clients:
            assert client.ended.wait(5)
        return clients, start("new.sock", **options), weights

    def again(self, join, client, broker):
        return client.again(broker)

    def test_all_come_and_share_as_before(self, start, join, files):
        clients, broker, weights = self.clients(start, join, files)
        new = [client.again(broker) for client in clients]
        assert [client.welcome.disowned for client in new] == [[], []]
        assert [client.welcome.quota for client in new] == [MiB, MiB]
        other = join(broker)
        assert other.load(*weights)[1:] == (0, 2)
        assert device(broker).used == 2 * MiB + GRANULE + 5 * GRANULE
        assert broker.status().broker.resumed == 2
        assert kinds(broker).count("resumed") == 2
        for client in new:
            client.load(*weights)
            client.close()
        until(lambda: device(broker).quotas == 0)

    def test_other_memory_of_the_same_chunk_is_its_own(self, start, join, files):
        (a, b), broker, _ = self.clients(start, join, files)
        token = next(iter(b.has))
        os.close(b.has[token][1])
        b.has[token] = secrets.token_hex(8), b.memory(token)  # made while there was no broker
        a, b = a.again(broker), b.again(broker)
        assert [memory.chunk for memory in b.welcome.disowned] == [token]
        assert b.welcome.quota == MiB
        assert device(broker).quotas == 2 * MiB + os.fstat(b.has[token][1]).st_size
        a.close()
        b.close()

    def test_wrong_bytes_are_given_to_nobody(self, start, join, files):
        (a,), broker, weights = self.clients(start, join, files, 1)
        token = next(iter(a.has))
        memory, fd = a.has[token]
        os.close(fd)
        a.has[token] = memory, a.memory(token, change=flipped(3))
        a = a.again(broker)
        other = join(broker)
        assert other.load(*weights)[1:] == (1, 1)
        assert "altered" in kinds(broker)
        size = os.fstat(a.has[token][1]).st_size
        assert device(broker).quotas == MiB + size
        a.release(token)
        assert device(broker).quotas == MiB
        a.close()

    @pytest.mark.parametrize("what", ["unsealed", "another size", "a file"])
    def test_what_is_no_memory_is_refused(self, start, join, files, what, tmp_path):
        (a,), broker, _ = self.clients(start, join, files, 1)
        token = next(iter(a.has))
        memory, fd = a.has[token]
        os.close(fd)
        if what == "a file":
            (tmp_path / "x").write_bytes(b"x")
            wrong = os.open(tmp_path / "x", os.O_RDONLY)
        else:
            wrong = a.memory(
                token, seals=0 if what == "unsealed" else 15, change=lambda d: d + b"0" * (what != "unsealed")
            )
        a.has[token] = memory, wrong
        resume, descriptors = a.resume()
        other = join(broker, hello=False)
        assert token in other.hello(resume, descriptors, kind=p.Refusal).message
        assert other.ended.wait(5)
        assert device(broker).used == 0
        assert not device(broker).clients

    def test_a_file_that_is_gone(self, start, join, files):
        """Its owner goes on with it; nobody else can have it, as nobody can say whether it is right."""
        (a,), broker, weights = self.clients(start, join, files, 1)
        path = files.folder / weights[0].digest
        path.unlink()
        a = a.again(broker)
        until(lambda: "altered" in kinds(broker))
        table = device(broker)
        assert table.quotas == MiB + GRANULE
        assert table.weights == 5 * GRANULE
        a.close()

    def test_a_client_that_dies_at_once(self, start, join, files):
        (a,), broker, weights = self.clients(start, join, files, 1)
        a = a.again(broker)
        a.close()
        until(lambda: "lost" in kinds(broker))
        assert join(broker).load(*weights)[1:] == (0, 2)

    def test_more_than_the_limit(self, start, join, files):
        (a, b), _, _ = self.clients(start, join, files, limit=3 * MiB)
        small = start("small.sock", limit=MiB)
        a, b = a.again(small), b.again(small)
        assert device(small).used > MiB
        refusal = a.refused(p.Grow(quota=MiB + 1), "memory")
        assert refusal.needed == device(small).used + 1
        a.close()
        b.close()


class TestStatus:
    def test_who_has_what(self, broker, join, files):
        a, b = join(broker, "a", pid=11), join(broker, "b", pid=22)
        regions, *_ = a.load(files.add(10), files.add(20, group=1))
        b.place(files.add(10, seed=1))
        b.grow(5)
        status = broker.status()
        assert status.broker.pid == os.getpid()
        assert status.broker.socket == str(broker.path)
        assert abs(status.time - time.time()) < 60
        (cpu,) = status.devices
        assert cpu == cpu.model_copy(
            update={"used": 2 * GRANULE + 5, "weights": 2 * GRANULE, "quotas": 5, "unused": 0}
        )
        assert {(process.name, process.pid) for process in cpu.processes} == {("a", 11), ("b", 22)}
        assert [(c.token, c.processes, c.state) for c in cpu.chunks] == [
            (t, [11], "ready") for t in tokens_of(regions)
        ]
        assert b.status_of().devices[0].chunks == cpu.chunks

    def test_who_does_not_describe_itself_is_seen_all_the_same_and_not_lost(self, start, join, files):
        broker = start(times=SHORT)
        a = join(broker, "a", silent=["describe"])
        a.load(files.add(10))
        a.grow(7)
        for _ in range(3):
            began = time.monotonic()
            (process,) = broker.status().devices[0].processes
            assert time.monotonic() - began < 2
            assert (process.name, process.pool.quota, process.pool.reserved) == ("a", 7, GRANULE + 7)
            assert len(process.chunks) == 1
        assert [request.kind for request in a.asked] == ["describe"]  # asked once, till it answers
        a.channel.send(p.Description(to=a.asked[0].id, process=a.status()))
        a.silent.clear()
        a.expect(p.Done, p.Ping())
        assert broker.status().devices[0].processes == [a.status()]
        assert not a.unexpected

    def test_a_broker_that_is_gone(self, start):
        broker = start()
        broker.stop()
        until(lambda: "stopped" in kinds(broker))
        with pytest.raises(broker_module.GlakeError):
            broker.status()


class TestTimes:
    """Who keeps the others waiting is lost."""

    def test_who_says_nothing(self, start, join):
        broker = start(times=SHORT)
        client = join(broker, hello=False)
        assert client.ended.wait(5)
        hears(broker, "said nothing")

    def test_who_stops_in_the_middle_of_a_message(self, start, join):
        broker = start(times=SHORT)
        for data in (b"G", b"GLKB\0\1\0\0\0\0\0\x20", b"GLKB\0\1\0\0\0\0\0\x20{"):
            client = join(broker)
            client.raw(data)
            assert client.ended.wait(5)
        hears(broker, "middle")
        until(lambda: kinds(broker).count("lost") == 3)

    def test_a_byte_now_and_then_does_not_help(self, start, join):
        broker = start(times=SHORT)
        client = join(broker)
        began = time.monotonic()
        data = p.HEADER.pack(p.MAGIC, p.PROTOCOL, 0, 100) + b" " * 100

        def trickle():
            for byte in data:
                client.raw(bytes([byte]))
                time.sleep(0.1)

        with pytest.raises(BrokenPipeError):
            trickle()
        assert time.monotonic() - began < 3

    def test_who_is_quiet_between_messages_is_not_lost(self, start, join):
        client = join(start(times=SHORT))
        time.sleep(1)
        client.expect(p.Done, p.Ping())

    def test_who_does_not_read(self, start, join, files):
        broker = start(times=SHORT)
        client, other = join(broker), join(broker)
        weights = [files.add(10, group=i) for i in range(300)]
        client.place(*weights)
        client.hooks["describe"] = lambda request: time.sleep(2)  # its thread stands still
        observer = join(broker, device=None)
        observer.start(p.Status())
        place = p.Place(weights=weights)

        def flood():
            for _ in range(500):
                client.start(place)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood()
        other.expect(p.Done, p.Ping())
        assert client.ended.wait(15)
        hears(broker, "does not read")

    def test_who_does_not_answer(self, start, join, files):
        broker = start(times=SHORT, limit=2 * GRANULE)
        silent, other = join(broker, silent=["offer"]), join(broker)
        silent.load(files.add(10))
        assert other.load(files.add(100_000))[1:] == (1, 0)
        assert silent.ended.wait(5)
        hears(broker, "does not answer")


def test_a_thousand_clients_come_and_go(broker, join, files, nothing_leaks):
    weight = files.add(10 * KiB)
    keeper = join(broker)
    keeper.load(weight)
    with nothing_leaks():
        for number in range(1000):
            client = join(broker)
            client.load(weight)
            client.bye() if number % 2 else client.close()
    table = device(broker)
    assert table.used == GRANULE
    assert len(table.clients) == 1
    assert len(broker.service._tasks) == 0
