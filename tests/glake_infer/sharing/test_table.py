"""What a broker knows of a device: every rule, and the invariants over random histories."""

from collections import Counter

import pytest
from tables import GRANULE, Case, MiB, digest, is_sound, large, weight

from glake_infer import layout
from glake_infer.layout import LARGE, PIECE
from glake_infer.sharing import table as table_module
from glake_infer.sharing.entries import NoRoomError, NotMakingError, UnknownError, WrongError
from glake_infer.sharing.protocol import ChunkMemory
from glake_infer.sharing.table import MAKE_RATE, MAKE_SECONDS


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
        for client, tokens in ((b, [region.token]), (a, ["0" * 16])):
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

    def test_given_holds_in_the_order_of_messages(self, case):
        a = case.client()
        one, two = case.load(a, weight(1, 1000, group=1), weight(2, 1000, group=2))
        case.table.released(a, [one])
        case.table.acquire(a, [one])  # again, after it was asked to give it, and before it did
        left = case.table.given(a, [one, two, "0" * 16])
        assert [c.token for c in left] == [one, two]
        assert not a.has
        case.table.check_invariants()

    def test_what_is_known_is_released_beside_what_is_not(self, case):
        a = case.client()
        (one,) = case.load(a, weight(1, 1000))
        with pytest.raises(UnknownError):
            case.table.released(a, ["0" * 16, one])
        assert not a.has
        assert case.table.unused == GRANULE
        with pytest.raises(UnknownError):
            case.table.forget(a, ["0" * 16, *a.regions])
        assert not a.regions
        case.table.check_invariants()

    def test_given_by_one_of_two(self, case):
        a, b = case.client(), case.client()
        (token,) = case.load(a, weight(1, 1000))
        case.load(b, weight(1, 1000))
        assert case.table.given(a, [token]) == []
        assert [c.token for c in case.table.given(b, [token])] == [token]

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
            for client, tokens in ((b, [token]), (a, ["0" * 16])):
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
