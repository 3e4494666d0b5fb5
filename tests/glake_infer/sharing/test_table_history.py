"""What a table has been through: resumed clients, and random histories with all invariants."""

import random

import pytest
from tables import GRANULE, Case, digest, is_sound, large, weight

from glake_infer.layout import LARGE
from glake_infer.sharing.entries import NoRoomError, WrongError
from glake_infer.sharing.protocol import ChunkMemory, Resume


@pytest.fixture
def case():
    return Case()


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
        assert b.quota == 100
        assert sum(b.strays.values()) == 3 * GRANULE
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
        case.table.given(b, [chunk.token])
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
            self.table.given(client, tokens)

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
