"""Room: what goes first, what never goes, who waits, and what is said where there is none."""

import random
import threading
import time

import pytest
from scripted import GPU, GRANULE, SHORT, MiB, device, hears, kinds, tokens_of, until

from glake_infer.sharing import protocol as p


def owns(join, broker, files, name, chunks=1, awake=True, priority=0, idle=1.0, group=1):
    """A client with so many chunks, which it offers."""
    client = join(broker, name)
    for number in range(chunks):
        regions, *_ = client.load(files.add(10))
        for token in tokens_of(regions):
            client.offers[token] = (awake, priority, idle + number)
    return client


def needs(join, broker, files, name="needs", chunks=1):
    """A client that is about to acquire so many chunks; and their tokens."""
    client = join(broker, name)
    return client, [t for _ in range(chunks) for t in tokens_of(client.place(files.add(10)))]


def took(client):
    """What the broker asked of a client."""
    return [request.kind for request in client.asked if request.kind != "offer"]


def test_what_nobody_has_goes_first_the_longest_unused_before_all_others(start, join, files):
    broker = start(limit=4 * GRANULE)
    a = join(broker, "a")
    tokens = [token for _ in range(3) for token in tokens_of(a.load(files.add(10))[0])]
    a.offers = {tokens[0]: (False, 0, 0.0)}
    a.release(tokens[2])
    a.release(tokens[1])
    b, wanted = needs(join, broker, files, chunks=2)
    assert b.bring(wanted) == (2, 0)
    assert a.asked == []  # nobody was asked for anything
    found = {chunk.token: chunk.state for chunk in broker.status().devices[0].chunks}
    assert (found[tokens[1]], found[tokens[2]]) == ("ready", "absent")
    table = device(broker)
    assert (table.counters.evictions, table.counters.evicted_bytes) == (1, GRANULE)
    assert "evicted" in kinds(broker)


def test_then_idle_private_memory_of_who_has_most_of_it(start, join, files):
    broker = start(limit=10 * GRANULE)
    a, b, c = join(broker, "a"), join(broker, "b"), join(broker, "c")
    a.grow(3 * GRANULE)
    b.grow(4 * GRANULE)
    c.grow(3 * GRANULE)
    a.idle, b.idle = GRANULE, 2 * GRANULE
    d, wanted = needs(join, broker, files)
    assert d.bring(wanted) == (1, 0)
    assert (took(a), took(b), took(c)) == ([], ["trim"], [])
    assert b.asked[-1].bytes == GRANULE
    assert (b.quota, b.idle) == (3 * GRANULE, GRANULE)
    d, wanted = needs(join, broker, files, "e", 2)
    assert d.bring(wanted) == (2, 0)
    assert sorted((a.quota, b.quota)) == [2 * GRANULE, 2 * GRANULE]
    assert device(broker).used == 10 * GRANULE


def test_private_memory_goes_before_chunks_in_use(start, join, files):
    broker = start(limit=4 * GRANULE)
    a = owns(join, broker, files, "a")
    a.grow(3 * GRANULE)
    a.idle = GRANULE
    b, wanted = needs(join, broker, files)
    b.bring(wanted)
    assert took(a) == ["trim"]
    assert len(a.has) == 1


def test_the_asker_gives_its_own_too(start, join, files):
    """For weights, what its pool keeps idle; never for its pool itself, which would gain nothing."""
    broker = start(limit=4 * GRANULE)
    a, wanted = needs(join, broker, files)
    a.grow(4 * GRANULE)
    a.idle = 2 * GRANULE
    refusal = a.refused(p.Grow(quota=5 * GRANULE), "memory")
    assert refusal.requested == GRANULE
    refusal = a.refused(p.Grow(quota=4 * GRANULE + 1), "memory")
    assert refusal.requested == 1
    assert a.bring(wanted) == (1, 0)
    assert a.quota == 3 * GRANULE


def test_chunks_go_in_the_order_of_who_needs_them_least(start, join, files):
    broker = start(limit=5 * GRANULE)
    ranks = {
        "asleep, important": (False, 9, 1.0),
        "low": (True, 0, 1.0),
        "idle for long": (True, 5, 100.0),
        "idle": (True, 5, 2.0),
        "high": (True, 6, 1000.0),
    }
    clients = [owns(join, broker, files, name, 1, *rank) for name, rank in reversed(ranks.items())][::-1]
    assert device(broker).used == 5 * GRANULE
    for count in range(1, 6):
        other, wanted = needs(join, broker, files, f"other {count}")
        assert other.bring(wanted) == (1, 0)
        assert [not client.has for client in clients] == [True] * count + [False] * (5 - count)
        for each in clients[count:]:
            each.verify()


def test_a_chunk_counts_as_its_most_important_users(start, join, files):
    broker = start(limit=2 * GRANULE)
    shared, own = files.add(10, group=1), files.add(10, group=2)
    a, b = join(broker, "a"), join(broker, "b")
    one = tokens_of(a.load(shared)[0])[0]
    two = tokens_of(a.load(own)[0])[0]
    b.load(shared)
    a.offers = {one: (False, 0, 900.0), two: (True, 1, 1.0)}
    b.offers = {one: (True, 2, 1.0)}
    c, wanted = needs(join, broker, files)
    c.bring(wanted)
    assert (set(a.has), set(b.has)) == ({one}, {one})
    d, wanted = needs(join, broker, files)
    d.bring(wanted)
    assert (a.has, b.has) == ({}, {})
    assert device(broker).used == 2 * GRANULE


def test_a_chunk_that_one_of_its_users_does_not_offer_stays(start, join, files):
    broker = start(limit=GRANULE)
    shared = files.add(10)
    a, b = join(broker, "a"), join(broker, "b")
    (token,) = tokens_of(a.load(shared)[0])
    b.load(shared)
    a.offers = {token: (False, 0, 1.0)}
    c, wanted = needs(join, broker, files)
    refusal = c.refused(p.Acquire(chunks=wanted), "memory")
    assert (refusal.requested, refusal.used, refusal.limit, refusal.needed) == (
        GRANULE,
        GRANULE,
        GRANULE,
        2 * GRANULE,
    )
    assert refusal.holders == [("2 processes", "weights", GRANULE)]
    assert took(a) == took(b) == []
    b.offers = {token: (False, 0, 1.0)}
    b.keeps = {token}  # it offered it, and then it needed it: a gives it for nothing
    c.refused(p.Acquire(chunks=wanted), "memory")
    assert (len(a.has), len(b.has)) == (0, 1)
    b.keeps.clear()
    assert c.bring(wanted) == (1, 0)
    assert not b.has


def test_chunks_are_not_lost_that_somebody_else_takes_meanwhile(start, join, files):
    """Between the question and the answer another client gets the chunk: it has it."""
    broker = start(limit=2 * GRANULE)
    weight = files.add(10)
    a, b = join(broker, "a"), join(broker, "b")
    (token,) = tokens_of(a.load(weight)[0])
    a.offers = {token: (False, 0, 1.0)}
    b.place(weight)
    a.hooks["give"] = lambda request: b.bring([token])
    c, wanted = needs(join, broker, files, chunks=2)
    c.refused(p.Acquire(chunks=wanted), "memory")
    assert not a.has
    b.verify()
    assert len(b.has) == 1
    assert device(broker).used == GRANULE


def test_nothing_goes_where_it_would_not_be_enough(start, join, files):
    broker = start(limit=6 * GRANULE)
    a = owns(join, broker, files, "a", 2)
    a.grow(2 * GRANULE)
    a.idle = GRANULE
    a.load(files.add(10))
    unused = a.load(files.add(10))[0]
    a.release(*tokens_of(unused))
    b, wanted = needs(join, broker, files, chunks=5)
    refusal = b.refused(p.Acquire(chunks=wanted), "memory")
    assert refusal.needed == 11 * GRANULE
    assert took(a) == []
    assert (len(a.has), a.quota) == (3, 2 * GRANULE)
    assert device(broker).unused == GRANULE
    assert "raise" in refusal.message or "larger --limit" in refusal.message
    assert str(11 * GRANULE) in refusal.message
    assert refusal.holders[0] == (f"a ({a.pid})", "weights", 3 * GRANULE)
    assert device(broker).counters.refusals == 1
    assert b.bring(wanted[:4]) == (4, 0)


@pytest.mark.parametrize("what", ["weights", "pool"])
def test_more_than_the_limit_is_refused_at_once(start, join, files, what):
    broker = start(limit=2 * GRANULE)
    a = owns(join, broker, files, "a", 1)
    b, wanted = needs(join, broker, files, chunks=3)
    request = p.Acquire(chunks=wanted) if what == "weights" else p.Grow(quota=2 * GRANULE + 1)
    b.refused(request, "memory")
    assert a.asked == []


def test_what_the_asker_asks_for_does_not_go_for_it(start, join, files):
    broker = start(limit=2 * GRANULE)
    a, b = join(broker, "a"), join(broker, "b")
    one, two = files.add(10, group=1), files.add(10, group=2)
    tokens = tokens_of(a.load(one, two)[0])
    b.place(one, two)
    a.release(tokens[0], drop=True)
    a.release(tokens[1])
    c = owns(join, broker, files, "c")
    answer = b.expect(p.Acquired, p.Acquire(chunks=tokens))
    assert ([m.chunk for m in answer.given], answer.make) == ([tokens[1]], [tokens[0]])
    assert not c.has


class TestPools:
    def test_growing_makes_room(self, start, join, files):
        broker = start(limit=3 * GRANULE)
        a = owns(join, broker, files, "a", 2)
        b = join(broker, "b")
        assert b.grow(2 * GRANULE) == 2 * GRANULE
        assert len(a.has) == 1
        assert b.grow(GRANULE) == 2 * GRANULE  # never less
        b.refused(p.Grow(quota=4 * GRANULE), "memory")
        assert device(broker).used == 3 * GRANULE

    def test_a_quota_ends_with_its_client(self, start, join):
        broker = start(limit=3 * GRANULE)
        a, b = join(broker), join(broker)
        a.grow(3 * GRANULE)
        b.refused(p.Grow(quota=1), "memory")
        a.close()
        until(lambda: device(broker).used == 0)
        assert b.grow(3 * GRANULE) == 3 * GRANULE

    def test_growing_while_it_is_asked_to_trim(self, start, join, files):
        """The answer to the question comes first, so that both sides know the same quota."""
        broker = start(limit=4 * GRANULE)
        a = join(broker, "a")
        a.grow(3 * GRANULE)
        a.idle = 2 * GRANULE
        numbers = []
        a.hooks["trim"] = lambda request: (
            numbers.append(a.start(p.Grow(quota=3 * GRANULE))),
            time.sleep(0.2),
        )
        b, wanted = needs(join, broker, files, chunks=2)
        assert b.bring(wanted) == (2, 0)
        answer, _ = a.wait(numbers[0])
        assert (answer.kind, answer.reason) == ("refusal", "memory")
        assert answer.used == 4 * GRANULE
        (client,) = [each for each in device(broker).clients if each.name == "a"]
        assert client.quota == a.quota == 2 * GRANULE

    def test_a_client_that_trims_nothing(self, start, join, files):
        broker = start(limit=GRANULE)
        a = join(broker, "a")
        a.grow(GRANULE)
        a.idle = GRANULE
        a._on_trim = lambda request: p.Granted(quota=5 * GRANULE)
        b, wanted = needs(join, broker, files)
        b.refused(p.Acquire(chunks=wanted), "memory")
        assert device(broker).quotas == GRANULE


class TestWaiting:
    def test_busy_models_are_waited_for(self, start, join, files):
        broker = start(limit=2 * GRANULE)
        a = owns(join, broker, files, "a", 2)
        offers, a.offers, a.busy = a.offers, {}, 2 * GRANULE
        b, wanted = needs(join, broker, files)
        number = b.start(p.Acquire(chunks=wanted))
        assert b.waits(number, 0.3)
        assert len(a.asked) > 5
        a.offers, a.busy = offers, 0
        answer, _ = b.wait(number)
        assert answer.make == wanted
        assert len(a.has) == 1

    def test_what_can_go_goes_while_the_rest_is_waited_for(self, start, join, files):
        broker = start(limit=2 * GRANULE)
        a, b = owns(join, broker, files, "a"), owns(join, broker, files, "b")
        offers, b.offers, b.busy = b.offers, {}, GRANULE
        c, wanted = needs(join, broker, files, chunks=2)
        number = c.start(p.Acquire(chunks=wanted))
        until(lambda: not a.has)
        assert c.waits(number)
        b.offers, b.busy = offers, 0
        assert c.wait(number)[0].make == wanted

    def test_not_for_ever(self, start, join, files):
        broker = start(limit=GRANULE, patience=0.4)
        a = owns(join, broker, files, "a")
        a.offers, a.busy = {}, GRANULE
        b, wanted = needs(join, broker, files)
        began = time.monotonic()
        b.refused(p.Acquire(chunks=wanted), "memory")
        assert 0.3 < time.monotonic() - began < 3

    @pytest.mark.parametrize("kind", ["acquire", "grow"])
    def test_nobody_waits_for_himself(self, start, join, files, kind):
        """What an asker uses, because it asks, does not go meanwhile; what else runs in it may."""
        broker = start(limit=2 * GRANULE, patience=30)
        a = owns(join, broker, files, "a", 2)
        if kind == "acquire":
            (region,) = a.place(files.add(10))
            message = p.Acquire(chunks=tokens_of([region]))
        else:
            message = p.Grow(quota=GRANULE)
        offers, a.offers, a.busy, a.running = a.offers, {}, 2 * GRANULE, int(kind == "grow")
        began = time.monotonic()
        a.refused(message, "memory")
        assert time.monotonic() - began < 5
        a.running += 1
        number = a.start(message)
        assert a.waits(number, 0.3)
        a.offers, a.busy = offers, 0
        assert not isinstance(a.wait(number)[0], p.Refusal)

    def test_in_the_order_of_asking(self, start, join, files):
        broker = start(limit=2 * GRANULE, patience=2.0)
        a = owns(join, broker, files, "a", 2)
        offers, a.offers, a.busy = a.offers, {}, GRANULE
        b, both = needs(join, broker, files, "b", 2)
        c, one = needs(join, broker, files, "c")
        first = b.start(p.Acquire(chunks=both))
        assert b.waits(first, 0.1)
        second = c.start(p.Acquire(chunks=one))
        assert c.waits(second, 0.1)
        a.offers, a.busy = offers, 0
        assert b.wait(first)[0].make == both
        answer, _ = c.wait(second)
        assert answer.reason == "memory"  # b makes its chunks, and nothing else is left

    def test_what_would_fit_does_not_overtake(self, start, join, files):
        """Else who needs much would wait for ever."""
        broker = start(limit=3 * GRANULE)
        a = owns(join, broker, files, "a", 2)
        offers, a.offers, a.busy = a.offers, {}, GRANULE
        b, two = needs(join, broker, files, "b", 2)
        c, one = needs(join, broker, files, "c")
        first = b.start(p.Acquire(chunks=two))
        assert b.waits(first, 0.1)
        second = c.start(p.Acquire(chunks=one))
        assert c.waits(second, 0.2)
        a.offers, a.busy = offers, 0
        assert b.wait(first)[0].make == two
        assert c.wait(second)[0].make == one

    def test_runs_that_go_on_get_their_memory_while_others_wait(self, start, join, files):
        broker = start(limit=3 * GRANULE)
        a = owns(join, broker, files, "a", 2)
        offers, a.offers, a.busy = a.offers, {}, 2 * GRANULE
        b, wanted = needs(join, broker, files, "b", 2)
        number = b.start(p.Acquire(chunks=wanted))
        assert b.waits(number)
        assert a.grow(GRANULE) == GRANULE
        a.offers, a.busy = offers, 0
        assert b.wait(number)[0].make == wanted

    def test_what_needs_no_memory_does_not_wait(self, start, join, files):
        broker = start(limit=2 * GRANULE)
        weight = files.add(10)
        a = join(broker, "a")
        tokens = tokens_of(a.load(weight)[0])
        a.busy = GRANULE
        b, wanted = needs(join, broker, files, "b", 2)
        number = b.start(p.Acquire(chunks=wanted))
        assert b.waits(number)
        c = join(broker, "c")
        assert c.load(weight)[1:] == (0, 1)
        a.release(*tokens)
        c.release(*tokens)
        assert b.wait(number)[0].make == wanted

    def test_an_asker_that_dies_leaves_the_turn_to_the_next(self, start, join, files):
        broker = start(limit=GRANULE)
        a = owns(join, broker, files, "a")
        offers, a.offers, a.busy = a.offers, {}, GRANULE
        b, mine = needs(join, broker, files, "b")
        c, yours = needs(join, broker, files, "c")
        first = b.start(p.Acquire(chunks=mine))
        assert b.waits(first, 0.1)
        second = c.start(p.Acquire(chunks=yours))
        assert c.waits(second, 0.1)
        b.close()
        a.offers, a.busy = offers, 0
        assert c.wait(second)[0].make == yours

    def test_an_asker_that_dies_while_others_give(self, start, join, files):
        """What they gave is given, though nobody waits for it any more."""
        broker = start(limit=2 * GRANULE)
        a = owns(join, broker, files, "a")
        a.grow(GRANULE)
        a.idle = GRANULE
        b, wanted = needs(join, broker, files, "b", 2)
        a.hooks["trim"] = lambda request: (b.close(), hears(broker, "b ("), time.sleep(0.1))
        b.start(p.Acquire(chunks=wanted))
        until(lambda: a.quota == 0)
        until(lambda: device(broker).quotas == 0)
        c, wanted = needs(join, broker, files, "c")
        assert c.bring(wanted) == (1, 0)
        assert not a.unexpected

    def test_all_wait_for_each_other(self, start, join, files):
        """Of two that each have half of what they need, the later one begins again, and gives what it has."""
        broker = start(limit=2 * GRANULE)
        a, b = owns(join, broker, files, "a"), owns(join, broker, files, "b")
        more = [tokens_of(client.place(files.add(10))) for client in (a, b)]
        for client in (a, b):
            client.uses = client.keeps = set(client.has)
            client.offers = {}
        first = a.start(p.Acquire(chunks=more[0]))
        assert a.waits(first, 0.1)
        second = b.start(p.Acquire(chunks=more[1]))
        began = time.monotonic()
        answer, _ = b.wait(second)
        assert (answer.kind, answer.reason) == ("refusal", "lost")
        assert time.monotonic() - began < 3
        assert a.waits(first, 0.05)
        b.uses, b.keeps, b.offers = set(), set(), dict.fromkeys(b.has, (True, 0, 0.0))
        assert a.wait(first)[0].make == more[0]
        assert not b.has

    def test_all_wait_for_each_other_in_the_middle_of_runs(self, start, join, files):
        """Nobody can begin again: the first is refused, without the long wait."""
        broker = start(limit=2 * GRANULE)
        a, b = owns(join, broker, files, "a"), owns(join, broker, files, "b")
        for client in (a, b):
            client.uses = set(client.has)
            client.offers = {}
        numbers = [a.start(p.Grow(quota=GRANULE))]
        assert a.waits(numbers[0], 0.1)
        numbers.append(b.start(p.Grow(quota=GRANULE)))
        began = time.monotonic()
        answer, _ = a.wait(numbers[0])
        assert answer.reason == "memory"
        assert time.monotonic() - began < 3
        a.uses, a.offers = set(), dict.fromkeys(a.has, (True, 0, 0.0))
        assert b.wait(numbers[1])[0].quota == GRANULE

    def test_a_run_that_needs_memory_goes_before_others_that_begin(self, start, join, files):
        broker = start(limit=2 * GRANULE)
        a, b = owns(join, broker, files, "a"), owns(join, broker, files, "b")
        c, wanted = needs(join, broker, files, "c", 2)
        for client in (a, b):
            client.uses, client.offers = set(client.has), {}
        first = c.start(p.Acquire(chunks=wanted))
        assert c.waits(first, 0.1)
        grown = a.start(p.Grow(quota=GRANULE))
        assert c.waits(first, 0.1)
        b.uses, b.offers = set(), dict.fromkeys(b.has, (True, 0, 0.0))
        assert a.wait(grown)[0].quota == GRANULE
        a.uses, a.offers, a.idle = set(), dict.fromkeys(a.has, (True, 0, 0.0)), GRANULE
        assert c.wait(first)[0].make == wanted

    def test_a_run_goes_before_one_that_begins_and_holds_what_it_needs(self, start, join, files):
        """The one at the head of the line lets the run go first; then it is in the way itself, and begins again."""
        broker = start(limit=2 * GRANULE)
        a, b = owns(join, broker, files, "a"), owns(join, broker, files, "b")
        more = tokens_of(b.place(files.add(10)))
        for client in (a, b):
            client.uses, client.offers = set(client.has), {}
        first = b.start(p.Acquire(chunks=more))
        assert b.waits(first, 0.1)
        grown = a.start(p.Grow(quota=GRANULE))
        answer, _ = b.wait(first)
        assert answer.reason == "lost"
        b.uses, b.offers = set(), dict.fromkeys(b.has, (True, 0, 0.0))
        assert a.wait(grown)[0].quota == GRANULE

    def test_one_whose_chunks_are_on_their_way_is_busy(self, start, join, files):
        broker = start(limit=2 * GRANULE)
        a, b = join(broker, "a"), join(broker, "b")
        mine, yours = (tokens_of(client.place(files.add(10), files.add(10, group=1))) for client in (a, b))
        assert a.expect(p.Acquired, p.Acquire(chunks=mine)).make == mine
        number = b.start(p.Acquire(chunks=yours))
        assert b.waits(number, 0.5)
        a.loaded(mine)
        a.offers = dict.fromkeys(mine, (True, 0, 0.0))
        assert b.wait(number)[0].make == yours

    @pytest.mark.parametrize("kind", ["offer", "trim", "give"])
    def test_who_does_not_answer_is_lost_and_its_memory_free(self, start, join, files, kind):
        broker = start(limit=2 * GRANULE, times=SHORT)
        a = owns(join, broker, files, "a")
        a.grow(GRANULE)
        a.idle = GRANULE if kind == "trim" else 0
        a.silent = {kind}
        b, wanted = needs(join, broker, files, "b", 2 if kind == "offer" else 1)
        assert b.bring(wanted)[0] == len(wanted)
        hears(broker, "does not answer")
        assert a.ended.wait(5)

    @pytest.mark.parametrize("kind", ["offer", "trim", "give"])
    def test_who_dies_of_the_question(self, start, join, files, kind):
        broker = start(limit=2 * GRANULE)
        a = owns(join, broker, files, "a")
        a.grow(GRANULE)
        a.idle = GRANULE if kind == "trim" else 0
        a.hooks[kind] = lambda request: a.channel.socket.shutdown(2)
        a.silent = {kind}
        b, wanted = needs(join, broker, files, "b", 1 if kind == "give" else 2)
        assert b.bring(wanted)[0] == len(wanted)

    @pytest.mark.parametrize(
        "answer",
        [p.Done(), p.Refusal(reason="message", message="no"), p.Granted(quota=0), p.Given(chunks=["0" * 16])],
        ids=lambda answer: answer.kind,
    )
    def test_who_answers_something_else(self, start, join, files, answer):
        broker = start(limit=GRANULE)
        a = owns(join, broker, files, "a")
        a._on_offer = lambda request: answer
        b, wanted = needs(join, broker, files)
        b.refused(p.Acquire(chunks=wanted), "memory")
        a._on_offer = type(a)._on_offer.__get__(a)
        a._on_give = lambda request: answer
        b.refused(p.Acquire(chunks=wanted), "memory")
        assert len(a.has) == 1
        a._on_give = type(a)._on_give.__get__(a)
        assert b.bring(wanted) == (1, 0)


class TestFullDevice:
    """The limit has room, and the device has none: other programs have it."""

    def test_room_is_made_whatever_the_limit_says(self, start, join, files):
        broker = start(any_descriptor=True)
        a = join(broker, "a", device=GPU)
        tokens = [token for _ in range(3) for token in tokens_of(a.load(files.add(10))[0])]
        a.offers = dict.fromkeys(tokens, (True, 0, 1.0))
        b = join(broker, "b", device=GPU)
        wanted = tokens_of(b.place(files.add(10)))
        assert b.expect(p.Acquired, p.Acquire(chunks=wanted)).make == wanted
        b.expect(p.Done, p.Failed(chunks=wanted))  # the device had no room
        assert b.expect(p.Acquired, p.Acquire(chunks=wanted, full=True)).make == wanted
        assert len(a.has) == 2
        b.expect(p.Done, p.Failed(chunks=wanted))
        assert b.bring(wanted, full=True) == (1, 0)
        assert len(a.has) == 1

    def test_nothing_is_left_to_go(self, start, join, files):
        broker = start()
        a, wanted = needs(join, broker, files)
        refusal = a.refused(p.Acquire(chunks=wanted, full=True), "memory")
        assert "device has none" in refusal.message
        assert refusal.needed == 0
        assert a.bring(wanted) == (1, 0)

    def test_what_is_there_needs_no_room(self, start, join, files):
        broker = start()
        weight = files.add(10)
        a, b = join(broker, "a"), join(broker, "b")
        tokens = tokens_of(a.load(weight)[0])
        b.place(weight)
        assert b.bring(tokens, full=True) == (0, 1)

    def test_a_pool_that_finds_no_room(self, start, join, files):
        broker = start()
        a = owns(join, broker, files, "a", 3)
        b = join(broker, "b")
        assert b.grow(2 * GRANULE) == 2 * GRANULE
        assert b.grow(2 * GRANULE, full=True) == 2 * GRANULE  # the last growth found no room
        assert len(a.has) == 1
        assert b.grow(2 * GRANULE + 5, full=True) == 2 * GRANULE + 5
        assert len(a.has) == 0
        b.refused(p.Grow(quota=2 * GRANULE + 10, full=True), "memory")
        assert device(broker).quotas == 2 * GRANULE + 5


class Worker:
    """A process whose models need chunks and private memory, one run after the other."""

    def __init__(self, client, tokens, seed):
        self.client, self.tokens = client, tokens
        self.random = random.Random(seed)
        self.runs = self.again = self.refused = 0

    def uses(self, wanted):
        """What a model needs is in use; everything else it could do without."""
        client = self.client
        with client.lock:
            client.keeps = client.uses = set(wanted)
            client.offers = {
                token: (True, 0, self.random.random()) for token in self.tokens if token not in client.keeps
            }
            client.idle = 0 if wanted else client.quota
            return [token for token in wanted if token not in client.has]

    def brings(self, wanted):
        """Bring them in, as a client does; whether they are there."""
        client, wait = self.client, False
        left = self.uses(wanted)
        while left:
            answer = client.ask(p.Acquire(chunks=left, wait=wait), timeout=60)
            if answer.kind == "refusal":
                assert answer.reason == "lost", answer
                self.again += 1
                return False
            if answer.make:
                assert isinstance(client.loaded(answer.make), p.Done)
            left, wait = answer.pending, True
        return True

    def run(self):
        wanted = self.random.sample(self.tokens, min(3, len(self.tokens)))
        while not self.brings(wanted):
            self.uses([])
            time.sleep(0.1)  # so that who asked before gets what it had in use
        self.client.verify()
        with self.client.lock:
            quota = self.client.quota + GRANULE // 4
        answer = self.client.ask(p.Grow(quota=quota), timeout=60)
        self.refused += answer.kind == "refusal"
        self.runs += 1
        self.uses([])
        time.sleep(self.random.random() / 100)


def test_many_clients_under_a_limit_that_holds_a_few(start, join, files):
    """Everybody gets what it asks for in the end, with the right bytes, and never more than the limit is there."""
    broker = start(limit=8 * GRANULE)
    weights = [files.add(1000 + n) for n in range(16)]
    workers, failed = [], []
    for number in range(6):
        client = join(broker, f"client {number}")
        mine = random.Random(number).sample(weights, 8)
        tokens = [token for weight in mine for token in tokens_of(client.place(weight))]
        workers.append(Worker(client, tokens, number))
    end = time.monotonic() + 4

    def work(worker):
        try:
            while time.monotonic() < end or worker.runs < 4:
                worker.run()
            worker.client.release(*worker.client.has)
        except BaseException as error:
            failed.append((worker.client.name, error))

    threads = [threading.Thread(target=work, args=[worker]) for worker in workers]
    for thread in threads:
        thread.start()
    used = []
    while any(thread.is_alive() for thread in threads):
        used.append(device(broker).used)
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert max(used) <= 8 * GRANULE
    table = device(broker)
    assert table.counters.evictions > 10
    assert MiB > table.used == table.unused + table.quotas
