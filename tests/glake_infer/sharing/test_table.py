"""What a broker knows of a device: every rule, and the invariants over random histories."""

import itertools
import random
from collections import Counter

import pytest

from glake_infer import layout
from glake_infer.layout import LARGE, PIECE
from glake_infer.sharing import table as table_module
from glake_infer.sharing.entries import Client, NoRoomError, NotMakingError, UnknownError, WrongError
from glake_infer.sharing.protocol import ChunkMemory, Resume, WeightSpec
from glake_infer.sharing.table import MAKE_RATE, MAKE_SECONDS, Table

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
GRANULE = 64 * KiB


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def digest(name):
    return f"{name:0>64}" if isinstance(name, int) else name.encode().hex().rjust(64, "0")


def weight(name, size, group=0, path="/store", **more):
    d = digest(name)
    return WeightSpec(digest=d, length=size, group=group, path=f"{path}/{d}", **{"mapped": size, **more})


def large(name, size, prefix, changed=()):
    """A large weight whose pieces are those of all of its prefix but for the changed ones."""
    pieces = [digest(f"{name if i in changed else prefix}{i}") for i in range(-(-size // PIECE))]
    return weight(name, size, pieces=pieces)


def is_sound(digest, pieces):
    return True


class Case:
    """A table, and clients that do as they should."""

    def __init__(self, limit=10 * GiB, granule=GRANULE):
        self.clock = Clock()
        self.table = Table("cpu", granule, limit, clock=self.clock)
        self.numbers = itertools.count()

    def client(self, name="client"):
        made = Client(name, 1)
        self.table.join(made)
        return made

    def place(self, client, *weights, sound=lambda digest, pieces: False):
        regions = self.table.place(client, weights, sound)
        self.table.check_invariants()
        return regions

    def tokens(self, client, *weights):
        return [chunk.token for region in self.place(client, *weights) for chunk in region.chunks]

    def make(self, client, tokens, passes=True):
        """Acquire chunks, and make what is absent."""
        sorting = self.table.acquire(client, tokens)
        made = [ChunkMemory(chunk=c.token, memory=f"{next(self.numbers):016x}") for c in sorting.absent]
        for chunk, memory in zip(
            self.table.loaded(client, made, [object() for _ in made]), made, strict=True
        ):
            assert chunk.memory == memory.memory
            if passes:
                self.table.passed(chunk, chunk.descriptor)
        self.table.check_invariants()
        return sorting

    def load(self, client, *weights):
        tokens = self.tokens(client, *weights)
        self.make(client, tokens)
        return tokens


@pytest.fixture
def case():
    return Case()


class TestPlaces:
    def test_a_chunk_belongs_to_one_group_and_regions_are_cut_as_the_layout_does(self, case):
        weights = [weight(n, 70_000 + n, group=n % 3) for n in range(9)]
        (region,) = case.place(case.client(), *weights)
        (planned,) = layout.plan(
            [layout.Item(w.digest, w.mapped, w.group) for w in weights], GRANULE, lambda i: None, aligned=True
        )
        assert {w.digest: w.offset for w in region.weights} == planned.offsets
        assert [w.offset for w in region.weights] == sorted(planned.offsets.values())
        assert [(c.size, c.used) for c in region.chunks] == list(
            zip(planned.chunks, planned.used, strict=True)
        )
        assert len(region.chunks) == 3
        assert case.table.used == 0

    def test_a_weight_stays_where_it_is(self, case):
        a, b = case.client(), case.client()
        (one,) = case.place(a, weight(1, 1000), weight(2, 1000))
        assert case.place(b, weight(2, 1000)) == [one]
        old, new = case.place(b, weight(3, 10), weight(1, 1000), weight(3, 10))
        assert old == one
        assert [w.digest for w in new.weights] == [digest(3)]

    def test_more_of_a_weight_is_another_place(self, case):
        client = case.client()
        (some,) = case.place(client, weight(1, 1000, mapped=500))
        (more,) = case.place(client, weight(1, 1000, mapped=800))
        assert some.token != more.token
        assert case.place(client, weight(1, 1000, mapped=400)) == [more]
        assert case.place(client, weight(1, 999)) != [
            more
        ]  # another length: one of them is wrong, not both hurt
        case.table.forget(client, [more.token])
        assert case.place(client, weight(1, 1000, mapped=400)) == [some]

    def test_the_same_weight_twice_in_a_request(self, case):
        (region,) = case.place(case.client(), weight(1, 1000, mapped=10), weight(1, 1000, mapped=900))
        assert [w.mapped for w in region.weights] == [900]

    def test_weights_without_bytes_lie_nowhere(self, case):
        client = case.client()
        assert case.place(client, weight(1, 0)) == []
        assert case.place(client, weight(1, 50, mapped=0)) == []
        (region,) = case.place(client, weight(1, 0), weight(2, 5))
        assert [w.digest for w in region.weights] == [digest(2)]

    @pytest.mark.parametrize(
        "wrong",
        [
            [weight(1, 10, mapped=11)],
            [weight(1, 10), weight(1, 11)],
            [weight(1, 3 * PIECE, pieces=[digest(5)] * 2)],
            [weight(1, 3 * PIECE, mapped=PIECE, pieces=[digest(5)] * 3)],
            [weight(n, 1 << 43) for n in range(3)],
        ],
    )
    def test_contradictions_change_nothing(self, case, wrong):
        client = case.client()
        with pytest.raises(WrongError):
            case.place(client, weight(9, 9), *wrong)
        assert not client.regions
        case.table.check_invariants()

    def test_so_much_that_no_device_has_it(self, case):
        client = case.client()
        case.place(client, weight(1, 1 << 43))
        with pytest.raises(WrongError, match="17592186044416"):
            case.place(client, *[weight(n, 1 << 43) for n in (2, 3)])

    def test_a_region_is_forgotten_with_its_last_client_and_chunk(self, case):
        a, b = case.client(), case.client()
        (region,) = case.place(a, weight(1, 1000))
        case.place(b, weight(1, 1000))
        token = region.chunks[0].token
        case.make(a, [token])
        case.table.forget(a, [region.token])
        case.table.check_invariants()
        case.table.forget(b, [region.token])
        case.table.check_invariants()
        assert case.table.unused == GRANULE  # the chunk stays, so the region does
        assert case.place(b, weight(1, 1000)) == [region]
        case.table.forget(b, [region.token])
        assert case.table.evict(case.table.oldest_unused()[0])
        case.table.check_invariants()
        assert case.place(b, weight(1, 1000)) != [region]

    def test_forgetting_gives_back_what_was_not_released(self, case):
        a, b = case.client(), case.client()
        (region,) = case.place(a, weight(1, 1000, group=1), weight(2, 1000, group=2))
        first, second = (chunk.token for chunk in region.chunks)
        case.make(a, [first])
        case.table.acquire(a, [second])
        case.table.forget(a, [region.token])
        case.table.check_invariants()
        assert not a.has
        assert not a.makes
        assert case.table.used == GRANULE
        case.place(b, weight(2, 1000))
        assert [c.token for c in case.table.acquire(b, [second]).absent] == [second]

    def test_who_comes_later_with_other_files_is_told_of_those(self, case):
        a, b = case.client(), case.client()
        (old,) = case.place(a, weight(1, 1000, path="/old"), weight(2, 1000, path="/old"))
        (new,) = case.place(b, weight(2, 1000, path="/new"))
        assert [w.path[:4] for w in new.weights] == ["/old", "/new"]
        assert new.model_copy(update={"weights": old.weights}) == old
        tokens = [chunk.token for chunk in old.chunks]
        (chunk,) = case.table.find(a, tokens)
        assert [fill.weight.path[:4] for fill in case.table.fills(a, chunk)] == ["/old", "/old"]
        assert [fill.weight.path[:4] for fill in case.table.fills(b, chunk)] == ["/old", "/new"]

    def test_unknown_regions(self, case):
        a, b = case.client(), case.client()
        (region,) = case.place(a, weight(1, 1000))
        for client, tokens in ((b, [region.token]), (a, [region.token, "0" * 16])):
            with pytest.raises(UnknownError):
                case.table.forget(client, tokens)
        assert region.token in a.regions


class TestVersions:
    """Regions of large weights that share chunks."""

    def test_equal_pieces_share_chunks_if_they_are_sound(self, case):
        client = case.client()
        first, second = large("a", LARGE, "p"), large("b", LARGE, "p", {0})
        (one,) = case.place(client, first)
        assert one.pieces == first.pieces
        assert set(case.table.claims([second])) == {first.digest, second.digest}
        assert case.table.claims([first]) == {}  # placed already
        assert case.table.claims([large("c", LARGE, "q")]) == {}
        asked = []

        def sound(digest, pieces):
            asked.append(digest)
            return digest != first.digest

        (alone,) = case.place(client, second, sound=sound)
        assert not {c.token for c in alone.chunks} & {c.token for c in one.chunks}
        assert asked == [second.digest, first.digest]
        case.table.forget(client, [alone.token])
        (two,) = case.place(client, second, sound=is_sound)
        assert [a.token == b.token for a, b in zip(one.chunks, two.chunks, strict=True)] == [False, True]
        case.make(client, [c.token for c in one.chunks + two.chunks])
        assert case.table.used == LARGE + one.chunks[0].size

    def test_a_shared_chunk_keeps_both_regions(self, case):
        a, b = case.client(), case.client()
        (one,) = case.place(a, large("a", LARGE, "p"))
        case.place(b, large("b", LARGE, "p", {0}), sound=is_sound)
        shared = one.chunks[1].token
        case.make(a, [shared])
        assert [c.token for c in case.table.acquire(b, [shared]).ready] == [shared]
        case.table.forget(a, [one.token])
        case.table.check_invariants()
        assert [f.weight.digest for f in case.table.fills(b, case.table.find(b, [shared])[0])] == [
            digest("b")
        ]
        assert case.place(a, large("a", LARGE, "p")) == [one]
        case.table.leave(b)
        case.table.forget(a, [one.token])
        case.table.check_invariants()
        case.table.evict(case.table.oldest_unused()[0])
        case.table.check_invariants()
        assert case.place(a, large("a", LARGE, "p")) != [one]

    def test_a_client_that_forgets_one_version_keeps_what_the_other_has(self, case):
        client = case.client()
        (one,) = case.place(client, large("a", LARGE, "p"))
        (two,) = case.place(client, large("b", LARGE, "p", {0}), sound=is_sound)
        shared = one.chunks[1].token
        case.make(client, [shared])
        case.table.forget(client, [one.token])
        assert [chunk.token for chunk in client.has] == [shared]
        case.table.forget(client, [two.token])
        assert not client.has


class TestChunks:
    def test_one_makes_others_wait_then_all_have_it(self, case):
        a, b = case.client(), case.client()
        (token,) = case.tokens(a, weight(1, 1000))
        case.place(b, weight(1, 1000))
        assert [c.token for c in case.table.acquire(a, [token]).absent] == [token]
        assert case.table.used == GRANULE
        for client in (a, b):
            sorting = case.table.acquire(client, [token, token])
            assert (sorting.ready, [c.token for c in sorting.pending], sorting.absent) == ([], [token], [])
        memory = ChunkMemory(chunk=token, memory="1" * 16)
        (chunk,) = case.table.loaded(a, [memory], [1])
        case.table.check_invariants()
        assert case.table.acquire(b, [token]).pending == [chunk]
        case.table.passed(chunk, 1)
        assert case.table.acquire(b, [token]).ready == [chunk]
        assert case.table.used == GRANULE
        assert set(chunk.holders) == {a, b}
        counters = case.table.counters
        assert (counters.hits, counters.hit_bytes) == (1, GRANULE)
        case.table.acquire(b, [token])
        assert counters.hits == 1

    def test_who_waits_is_woken_at_every_change(self, case):
        class Waiter:
            woken = 0

            def wake(self):
                self.woken += 1

        a, waiter = case.client(), Waiter()
        (token,) = case.tokens(a, weight(1, 1000))
        (chunk,) = case.table.find(a, [token])
        chunk.waiting[waiter] = None
        case.table.acquire(a, [token])
        assert waiter.woken == 0
        case.table.failed(a, [token])
        assert waiter.woken == 1
        case.make(a, [token])
        assert waiter.woken == 2
        case.table.released(a, [token])
        assert waiter.woken == 2
        case.table.evict(chunk)
        assert waiter.woken == 3

    def test_what_makes_it_absent_again(self, case):
        for ends in (
            lambda a, token: case.table.failed(a, [token]),
            lambda a, token: case.table.leave(a),
            lambda a, token: case.table.forget(a, list(a.regions)),
        ):
            a, b = case.client(), case.client()
            (token,) = case.tokens(a, weight(1, 1000))
            case.place(b, weight(1, 1000))
            case.table.acquire(a, [token])
            ends(a, token)
            case.table.check_invariants()
            assert case.table.used == 0
            assert len(case.table.acquire(b, [token]).absent) == 1
            case.table.leave(b)

    def test_a_maker_that_is_too_late(self, case):
        a, b = case.client(), case.client()
        tokens = case.tokens(a, *[weight(n, 100 * MiB, group=n) for n in range(2)])
        case.place(b, weight(0, 100 * MiB), weight(1, 100 * MiB))
        start = case.clock.now
        case.table.acquire(a, tokens[:1])
        case.table.acquire(a, tokens[1:])  # the time is for all that it makes
        assert case.table.next_deadline == start + MAKE_SECONDS + 100 * MiB / MAKE_RATE
        case.clock.now = case.table.next_deadline - 0.1
        assert case.table.expire() == []
        case.clock.now += 0.2
        assert [(who, c.token) for who, c in case.table.expire()] == [(a, tokens[0])]
        case.table.check_invariants()
        assert case.table.next_deadline == start + MAKE_SECONDS + 200 * MiB / MAKE_RATE
        assert [c.token for c in case.table.acquire(b, tokens).absent] == [tokens[0]]
        late = [ChunkMemory(chunk=token, memory="1" * 16) for token in tokens]
        with pytest.raises(NotMakingError):
            case.table.loaded(a, late, [1, 2])
        case.table.check_invariants()
        assert not a.makes  # the other one neither
        assert {c.token for c in b.makes} == {tokens[0]}
        assert case.table.used == 100 * MiB

    def test_a_check_has_no_deadline(self, case):
        a = case.client()
        (token,) = case.tokens(a, weight(1, 1000))
        case.make(a, [token], passes=False)
        case.clock.now += 10_000
        assert case.table.next_deadline is None
        assert case.table.expire() == []

    def test_what_does_not_pass_the_check(self, case):
        a, b = case.client(), case.client()
        (token,) = case.tokens(a, weight(1, 1000))
        case.place(b, weight(1, 1000))
        case.make(a, [token], passes=False)
        (chunk,) = a.has
        case.table.unfit(chunk, object())  # of other memory: nothing
        assert a.has
        case.table.unfit(chunk, chunk.descriptor)
        case.table.check_invariants()
        assert not a.has
        assert case.table.used == 0
        assert case.table.acquire(b, [token]).absent == [chunk]
        case.table.unfit(chunk, None)
        case.table.passed(chunk, None)
        case.table.check_invariants()
        assert chunk.maker is b

    def test_a_maker_that_dies_during_the_check(self, case):
        a, b = case.client(), case.client()
        (token,) = case.tokens(a, weight(1, 1000))
        case.place(b, weight(1, 1000))
        case.make(a, [token], passes=False)
        (chunk,) = a.has
        case.table.leave(a)
        case.table.check_invariants()
        assert case.table.used == GRANULE
        case.table.passed(chunk, chunk.descriptor)
        case.table.check_invariants()
        assert case.table.oldest_unused() == [chunk]
        assert case.table.acquire(b, [token]).ready == [chunk]

    def test_what_is_not_there_to_be_loaded(self, case):
        a, b = case.client(), case.client()
        (token,) = case.tokens(a, weight(1, 1000))
        memory = ChunkMemory(chunk=token, memory="1" * 16)
        with pytest.raises(NotMakingError):
            case.table.loaded(a, [memory], [1])
        with pytest.raises(UnknownError):
            case.table.loaded(b, [memory], [1])
        case.table.acquire(a, [token])
        with pytest.raises(WrongError):
            case.table.loaded(a, [memory, memory], [1, 2])
        case.table.check_invariants()
        assert not a.makes

    def test_released_chunks_stay_until_they_are_in_the_way(self, case):
        a = case.client()
        tokens = case.load(a, *[weight(n, 1000, group=n) for n in range(3)])
        for token in (tokens[1], tokens[0], tokens[2]):
            case.clock.now += 1
            assert case.table.released(a, [token]) == []
        case.table.check_invariants()
        assert case.table.used == case.table.unused == 3 * GRANULE
        oldest = case.table.oldest_unused()
        assert [c.token for c in oldest] == [tokens[1], tokens[0], tokens[2]]
        assert case.table.oldest_unused(oldest[:2]) == oldest[2:]
        case.table.acquire(a, [tokens[1]])
        assert not case.table.evict(oldest[0])
        assert case.table.evict(oldest[1])
        assert not case.table.evict(oldest[1])
        case.table.check_invariants()
        assert case.table.used == 2 * GRANULE
        assert (case.table.counters.evictions, case.table.counters.evicted_bytes) == (1, GRANULE)

    def test_released_to_be_dropped_goes_with_its_last_holder(self, case):
        a, b = case.client(), case.client()
        (token,) = case.load(a, weight(1, 1000))
        case.load(b, weight(1, 1000))
        assert case.table.released(a, [token], drop=True) == []
        assert case.table.used == GRANULE
        assert case.table.released(a, [token], drop=True) == []  # it has it no more
        assert [c.token for c in case.table.released(b, [token], drop=True)] == [token]
        case.table.check_invariants()
        assert case.table.used == 0
        assert case.table.counters.evictions == 0

    def test_given_takes_only_what_was_had_when_it_was_asked_for(self, case):
        a = case.client()
        one, two = case.load(a, weight(1, 1000, group=1), weight(2, 1000, group=2))
        moment = case.table.moment()
        case.table.released(a, [one])
        case.table.acquire(a, [one])  # again, after it was asked to give it
        left = case.table.given(a, [one, two, "0" * 16], moment)
        assert [c.token for c in left] == [two]
        assert [c.token for c in a.has] == [one]
        case.table.check_invariants()

    def test_given_by_one_of_two(self, case):
        a, b = case.client(), case.client()
        (token,) = case.load(a, weight(1, 1000))
        case.load(b, weight(1, 1000))
        assert case.table.given(a, [token], case.table.moment()) == []
        assert [c.token for c in case.table.given(b, [token], case.table.moment())] == [token]

    def test_unknown_chunks(self, case):
        a, b = case.client(), case.client()
        (token,) = case.load(a, weight(1, 1000))
        for call in (
            case.table.acquire,
            case.table.sort,
            case.table.find,
            case.table.failed,
            case.table.released,
        ):
            for client, tokens in ((b, [token]), (a, [token, "0" * 16])):
                with pytest.raises(UnknownError):
                    call(client, tokens)
        assert len(a.has) == 1

    def test_fills(self, case):
        client = case.client()
        weights = [weight(1, 100), weight(2, 300 * MiB), weight(3, 5)]
        (region,) = case.place(client, *weights)
        found = []
        start = 0
        for chunk in case.table.find(client, [c.token for c in region.chunks]):
            for fill in case.table.fills(client, chunk):
                assert 0 <= fill.at <= fill.at + fill.size <= chunk.size
                found.append((fill.weight.digest, fill.offset, fill.size, start + fill.at))
            start += chunk.size
        placed = {w.digest: w.offset for w in region.weights}
        sizes = Counter()
        for name, offset, size, at in found:
            assert at == placed[name] + offset
            assert offset == sizes[name]
            sizes[name] += size
        assert sizes == {w.digest: w.mapped for w in weights}
        assert len(region.chunks) == 3
        other = case.client()
        assert case.table.fills(other, case.table.find(client, [region.chunks[0].token])[0]) == []


class TestBudget:
    def test_making_and_growing_stay_within_the_limit(self):
        case = Case(limit=4 * GRANULE)
        a, b = case.client(), case.client()
        tokens = case.tokens(a, *[weight(n, 1000, group=n) for n in range(5)])
        case.make(a, tokens[:2])
        assert case.table.grow(b, GRANULE) == GRANULE
        assert case.table.grow(b, 5) == GRANULE  # never less
        with pytest.raises(NoRoomError) as caught:
            case.table.acquire(a, tokens)
        assert caught.value.missing == 2 * GRANULE
        with pytest.raises(NoRoomError) as caught:
            case.table.grow(b, 2 * GRANULE + 1)
        assert caught.value.missing == 1
        case.table.check_invariants()
        assert case.table.used == 3 * GRANULE
        assert len(a.has) == 2
        assert not a.makes
        assert case.table.shrink(b, 100) == GRANULE - 100
        assert case.table.shrink(b, 200) == 0  # more than it has: no shrinking
        assert b.quota == 100
        case.table.leave(b)
        assert case.table.used == 2 * GRANULE
        case.table.leave(b)
        case.table.check_invariants()

    def test_all_holders(self):
        case = Case()
        a, b = case.client("a"), case.client("b")
        case.load(a, weight(1, 2 * GRANULE))
        case.load(a, weight(2, GRANULE))
        case.load(b, weight(1, 2 * GRANULE))
        case.table.grow(b, 5)
        case.load(b, weight(3, 5))
        assert case.table.holders() == [
            ("2 processes", "weights", 2 * GRANULE),
            ("a (1)", "weights", GRANULE),
            ("b (1)", "weights", GRANULE),
            ("b (1)", "pool", 5),
        ]
        case.table.leave(a)
        assert ("no process", "weights", GRANULE) in case.table.holders()


class TestResume:
    """What clients bring from an earlier broker."""

    def brought(self, clients=1, **options):
        """Clients of an earlier broker, each with all of three chunks; what they would bring."""
        case = Case(**options)
        found = []
        for n in range(clients):
            client = case.client(f"client {n}")
            tokens = case.load(client, *[weight(n, 1000, group=n) for n in range(3)])
            case.table.grow(client, 100)
            chunks = case.table.find(client, tokens)
            memories = [ChunkMemory(chunk=c.token, memory=c.memory) for c in chunks]
            found.append(Resume(regions=list(client.regions.values()), chunks=memories, quota=client.quota))
        return found

    def resume(self, case, brought, name="client"):
        client = case.client(name)
        descriptors = [object() for _ in brought.chunks]
        check, disowned = case.table.resume(client, brought, descriptors)
        case.table.check_invariants()
        return client, check, disowned

    def test_the_first_brings_all_and_the_next_shares_it(self, case):
        first, second = self.brought(2)
        a, check, disowned = self.resume(case, first)
        assert [c.token for c in check] == [m.chunk for m in first.chunks]
        assert disowned == []
        assert case.table.used == 3 * GRANULE + 100
        new = case.client()
        assert case.place(new, weight(1, 1000)) == first.regions
        token = first.chunks[1].chunk
        assert case.table.acquire(new, [token]).pending  # not before it was checked
        b, check_too, disowned = self.resume(case, second)
        assert (check_too, disowned) == ([], [])
        assert case.table.used == 3 * GRANULE + 200
        for chunk in check:
            case.table.passed(chunk, chunk.descriptor)
        assert case.table.acquire(new, [token]).ready
        for client in (a, b):
            case.table.leave(client)
        case.table.check_invariants()
        assert case.table.unused == 2 * GRANULE

    def test_other_memory_of_the_same_chunk_is_its_own(self, case):
        (first,) = self.brought()
        others = [m.model_copy(update={"memory": "f" * 16}) for m in first.chunks]
        self.resume(case, first)
        b, check, disowned = self.resume(case, first.model_copy(update={"chunks": others}))
        assert check == []
        assert disowned == others
        assert b.quota == 100 + 3 * GRANULE
        assert case.table.used == 2 * (3 * GRANULE + 100)
        assert not b.has

    def test_what_is_being_made_meanwhile_is_disowned(self, case):
        (first,) = self.brought()
        a, check, _ = self.resume(case, first.model_copy(update={"chunks": first.chunks[:2]}))
        case.table.acquire(a, [first.chunks[2].chunk])
        _, check, disowned = self.resume(case, first.model_copy(update={"chunks": first.chunks[2:]}))
        assert check == []
        assert disowned == first.chunks[2:]

    def test_what_does_not_pass_is_kept_by_who_brought_it(self, case):
        first, second = self.brought(2)
        a, check, _ = self.resume(case, first)
        b, _, _ = self.resume(case, second)
        chunk = check[0]
        case.table.unfit(chunk, chunk.descriptor)
        case.table.check_invariants()
        assert a.strays == b.strays == {chunk.token: GRANULE}
        assert case.table.used == 2 * GRANULE + 2 * GRANULE + 200
        assert case.table.quotas == 2 * GRANULE + 200
        assert (a.quota, b.quota) == (100, 100)  # as they were told
        case.table.released(a, [chunk.token])
        case.table.check_invariants()
        assert not a.strays
        case.table.given(b, [chunk.token], case.table.moment())
        assert not b.strays
        assert case.table.used == 2 * GRANULE + 200
        c = case.client()
        case.place(c, weight(0, 1000))
        assert case.table.acquire(c, [chunk.token]).absent == [chunk]

    @pytest.mark.parametrize("end", ["leave", "forget"])
    def test_a_stray_ends_with_its_client(self, case, end):
        (first,) = self.brought()
        a, check, _ = self.resume(case, first)
        case.table.unfit(check[0], check[0].descriptor)
        case.table.leave(a) if end == "leave" else case.table.forget(a, list(a.regions))
        case.table.check_invariants()
        assert not a.strays
        assert case.table.quotas == (0 if end == "leave" else 100)

    def test_who_brought_it_ends_before_it_was_checked(self, case):
        (first,) = self.brought()
        a, check, _ = self.resume(case, first)
        case.table.leave(a)
        case.table.unfit(check[0], check[0].descriptor)
        case.table.passed(check[1], check[1].descriptor)
        case.table.check_invariants()
        assert case.table.used == 2 * GRANULE
        assert case.table.oldest_unused() == [check[1]]

    def test_more_than_the_limit_is_taken_over_and_nothing_more_granted(self):
        (first,) = self.brought()
        case = Case(limit=2 * GRANULE)
        a, check, _ = self.resume(case, first)
        assert case.table.used == 3 * GRANULE + 100
        with pytest.raises(NoRoomError) as caught:
            case.table.grow(a, 101)
        assert caught.value.missing == GRANULE + 101
        for chunk in check:
            case.table.passed(chunk, chunk.descriptor)
        case.table.released(a, [c.token for c in check], drop=True)
        case.table.check_invariants()
        assert case.table.grow(a, 101) == 101

    def test_a_digest_that_was_placed_anew_meanwhile(self, case):
        (first,) = self.brought()
        new = case.client()
        (anew,) = case.place(new, weight(0, 1000))
        a, check, _ = self.resume(case, first)
        assert len(check) == 3
        assert first.regions[0].token in a.regions
        assert anew.token not in a.regions
        case.table.leave(a)
        for chunk in check:
            case.table.passed(chunk, chunk.descriptor)
            case.table.evict(chunk)
        case.table.check_invariants()
        assert case.place(new, weight(0, 1000)) == [anew]

    def test_versions_share_chunks_afterwards(self, case):
        before = Case()
        client = before.client()
        before.place(client, large("a", LARGE, "p"))
        before.place(client, large("b", LARGE, "p", {0}), sound=is_sound)
        both = Resume(regions=list(client.regions.values()), chunks=[], quota=0)
        one, two = both.regions
        for brought in (
            [both],
            [both.model_copy(update={"regions": [one]}), both.model_copy(update={"regions": [two]})],
        ):
            clients = [self.resume(case, each)[0] for each in brought]
            token = one.chunks[1].token
            assert token == two.chunks[1].token
            assert len(case.table.find(clients[-1], [token])[0].regions) == 2
            for each in clients:
                case.table.leave(each)
        wrong = two.model_copy(update={"pieces": [digest(f"x{i}") for i in range(len(two.pieces))]})
        for regions in ([one, wrong], [wrong, one]):
            with pytest.raises(WrongError):
                self.resume(case, both.model_copy(update={"regions": regions}))
        self.resume(case, both.model_copy(update={"regions": [one]}))
        with pytest.raises(WrongError):
            self.resume(case, both.model_copy(update={"regions": [wrong]}))

    def test_nonsense_changes_nothing(self, case):
        (good,) = self.brought()
        region = good.regions[0]
        weights, chunks = region.weights, region.chunks

        def changed(**more):
            return good.model_copy(update={"regions": [region.model_copy(update=more)]})

        def with_weight(**more):
            return changed(weights=[weights[0].model_copy(update=more), *weights[1:]])

        def with_chunk(**more):
            return changed(chunks=[chunks[0].model_copy(update=more), *chunks[1:]])

        wrong = [
            good.model_copy(update={"chunks": [*good.chunks, good.chunks[0]]}),
            good.model_copy(update={"regions": []}),
            good.model_copy(update={"regions": [region, region]}),
            good.model_copy(update={"quota": 1 << 59}),
            changed(weights=[*weights[:2], weights[2].model_copy(update={"offset": weights[1].offset})]),
            changed(weights=weights[::-1]),
            changed(weights=[*weights, weights[0].model_copy(update={"offset": 1 << 40})]),
            changed(pieces=[digest(1)]),
            changed(chunks=[*chunks, chunks[0]]),
            changed(chunks=chunks[:1]),
            with_weight(mapped=5000),
            with_weight(mapped=0),
            with_weight(digest=weights[1].digest),
            with_chunk(size=GRANULE + 1),
            with_chunk(size=1 << 40),
            with_chunk(used=GRANULE + 1),
        ]
        for each in wrong:
            client = case.client()
            with pytest.raises(WrongError):
                case.table.resume(client, each, [object() for _ in each.chunks])
            case.table.check_invariants()
            assert not client.regions
            case.table.leave(client)
        self.resume(case, good)
        for each in wrong:
            client = case.client()
            with pytest.raises(WrongError):
                case.table.resume(client, each, [object() for _ in each.chunks])
            case.table.check_invariants()
            case.table.leave(client)


def test_statuses(case):
    a, b = case.client("a"), case.client("b")
    a.pid, b.pid = 11, 22
    one, two, three = case.load(a, *[weight(n, 1000, group=n) for n in range(3)])
    case.place(b, weight(0, 1000))
    case.table.acquire(b, [one])
    case.table.released(a, [two], drop=True)
    case.table.released(a, [three])
    case.table.acquire(a, [two])
    case.clock.now += 5
    found = {status.token: status for status in case.table.statuses()}
    assert [(found[t].state, found[t].processes, found[t].idle_seconds) for t in (one, two, three)] == [
        ("ready", [11, 22], 0),
        ("loading", [11], 0),
        ("ready", [], 5),
    ]
    assert [(w.digest, w.offset, w.size) for w in found[two].weights] == [(digest(1), 0, 1000)]
    assert {status.size for status in found.values()} == {GRANULE}
    case.table.failed(a, [two])
    assert {s.token: s.state for s in case.table.statuses()}[two] == "absent"


class Story:
    """A random history of one table, as brokers have it, with invariants checked after every step."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        limit = self.random.choice([20, 60, 3000, 10_000]) * GRANULE
        self.case = Case(limit=limit)
        self.table = self.case.table
        self.weights = [weight(n, self.random.choice([10, 70_000, 500_000]), group=n % 5) for n in range(30)]
        self.weights += [large(f"v{n}", LARGE, "p", {n}) for n in range(3)]
        self.clients = []
        self.past = []  # what clients would bring

    def step(self):
        self.case.clock.now += self.random.expovariate(0.2)
        moves = [self.come] * (len(self.clients) < 6) + [
            self.place, self.place, self.forget, self.acquire, self.acquire, self.acquire, self.load, self.load, self.check,
            self.check, self.fail, self.release, self.give, self.grow, self.shrink, self.evict, self.leave, self.expire,
        ]  # fmt: skip
        move = self.random.choice(moves)
        if self.clients or move == self.come:
            move()
        self.table.check_invariants()

    def client(self):
        return self.random.choice(self.clients)

    def some(self, things, most=6):
        things = list(things)
        return self.random.sample(things, min(len(things), self.random.randint(1, most)))

    def tokens(self, client):
        return self.some(chunk.token for region in client.regions.values() for chunk in region.chunks)

    def come(self):
        client = self.case.client()
        self.clients.append(client)
        if self.past and self.random.random() < 0.5:
            regions, chunks, quota = self.random.choice(self.past)
            brought = Resume(regions=regions, chunks=chunks, quota=quota)
            self.table.resume(client, brought, [object() for _ in chunks])

    def leave(self):
        if self.random.random() < 0.3:
            client = self.client()
            has = [ChunkMemory(chunk=c.token, memory=c.memory) for c in client.has]
            if self.random.random() < 0.3:
                has = [m.model_copy(update={"memory": f"{self.random.getrandbits(64):016x}"}) for m in has]
            self.past.append((list(client.regions.values()), has, client.quota))
            self.clients.remove(client)
            self.table.leave(client)
            assert not any([client.has, client.makes, client.regions, client.strays, client.quota])

    def place(self):
        sound = (lambda d, p: True) if self.random.random() < 0.8 else (lambda d, p: False)
        client = self.client()
        wanted = self.some(self.weights)
        regions = self.table.place(client, wanted, sound)
        placed = {w.digest for region in regions for w in region.weights}
        assert {w.digest for w in wanted} <= placed
        assert all(client.regions[region.token] == region for region in regions)

    def forget(self):
        client = self.client()
        if client.regions and self.random.random() < 0.3:
            self.table.forget(client, self.some(client.regions, 2))

    def acquire(self):
        client = self.client()
        if tokens := self.tokens(client):
            used = self.table.used
            before = self.table.sort(client, tokens)
            let_go = sum(client.strays.get(chunk.token, 0) for chunk in before.ready)
            try:
                done = self.table.acquire(client, tokens)
            except NoRoomError as error:
                assert used + before.needed - error.missing == self.table.limit  # noqa: PT017
                assert self.table.used == used
            else:
                assert self.table.used == used + before.needed - let_go
                assert all(client in chunk.holders for chunk in done.ready)
                assert all(chunk.maker is client for chunk in done.absent)

    def load(self):
        client = self.client()
        if client.makes:
            chunks = self.some(client.makes)
            memories = [
                ChunkMemory(chunk=c.token, memory=f"{self.random.getrandbits(64):016x}") for c in chunks
            ]
            used = self.table.used - sum(
                client.strays.get(c.token, 0) for c in chunks
            )  # it has let go of these
            made = self.table.loaded(client, memories, [object() for _ in chunks])
            assert self.table.used == used
            for chunk in made:
                assert sum(fill.size for fill in self.table.fills(client, chunk)) == chunk.used

    def check(self):
        checking = [c for client in self.clients for c in client.has if c.checking]
        for chunk in self.some(set(checking)) if checking else ():
            (self.table.passed if self.random.random() < 0.8 else self.table.unfit)(chunk, chunk.descriptor)

    def fail(self):
        client = self.client()
        if client.makes:
            self.table.failed(client, [c.token for c in self.some(client.makes)])

    def release(self):
        client = self.client()
        if tokens := self.tokens(client):
            self.table.released(client, tokens, drop=self.random.random() < 0.5)
            assert not {chunk.token for chunk in client.has} & set(tokens)

    def give(self):
        client = self.client()
        if tokens := self.tokens(client):
            self.table.given(client, tokens, self.table.moment() if self.random.random() < 0.8 else 0)

    def grow(self):
        client = self.client()
        quota = self.random.randrange(20 * GRANULE)
        try:
            assert self.table.grow(client, quota) >= quota
        except NoRoomError:
            assert self.table.used + quota - client.quota > self.table.limit

    def shrink(self):
        self.table.shrink(self.client(), self.random.randrange(20 * GRANULE))

    def evict(self):
        for chunk in self.table.oldest_unused()[: self.random.randrange(4)]:
            assert self.table.evict(chunk)

    def expire(self):
        self.table.expire()
        assert all(chunk.deadline > self.case.clock.now for client in self.clients for chunk in client.makes)


@pytest.mark.parametrize("seed", range(25))
def test_any_history(seed):
    story = Story(seed)
    for _ in range(1500):
        story.step()
    for client in list(story.clients):
        story.table.leave(client)
        story.table.check_invariants()
    for chunk in list(story.table._chunks.values()):
        story.table.unfit(chunk, chunk.descriptor)
    while unused := story.table.oldest_unused():
        story.table.evict(unused[0])
    story.table.check_invariants()
    assert story.table.used == 0
    assert not story.table._regions
    assert not story.table._chunks


def test_20_000_weights_and_a_thousand_chunks_are_placed_and_seen_at_once():
    case = Case(limit=1 << 50)
    client = case.client()
    start = case.clock.now
    weights = [weight(n, 600_000, group=n // 10) for n in range(10_000)]
    tokens = case.tokens(client, *weights)
    assert len(tokens) == 1000
    import time

    before = time.perf_counter()
    case.table.place(client, weights)
    case.table.acquire(client, tokens)
    case.table.statuses()
    assert time.perf_counter() - before < 2
    assert case.clock.now == start


def test_the_constants_are_those_of_the_design():
    assert (table_module.MAKE_SECONDS, table_module.MAKE_RATE) == (20, 50 << 20)
