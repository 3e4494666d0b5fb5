"""The layout of weights in regions: what holds for every one, over random weights and both granules in use."""

import itertools
import random
import time

import pytest

from glake_infer import layout
from glake_infer.layout import ALIGNMENT, LARGE, LARGEST_CHUNK, MOST_LARGEST, PARTED_CHUNK, PIECE, Item, Twin

KiB, MiB = 1 << 10, 1 << 20
GRANULES = [64 * KiB, 2 * MiB]
SEEDS = range(60)

granules = pytest.mark.parametrize("granule", GRANULES, ids=["64KiB", "2MiB"])


def no_twin(item):
    return None


def up(size, step):
    return -(-size // step) * step


def large(digest, size, prefix="", changed=(), **more):
    """A large weight whose pieces are those of every other of its `prefix`, except the `changed` ones."""
    count = -(-size // PIECE)
    pieces = [f"{digest if i in changed else prefix}.{i}" for i in range(count)]
    if size % PIECE:
        pieces[-1] += f".{size % PIECE}"  # a shorter piece is another one
    return Item(digest, size, pieces=tuple(pieces), **more)


def random_item(rng, number, most_groups):
    size = int(2 ** rng.uniform(0, 27.5))
    if rng.random() < 0.3:
        size = max(1, size // ALIGNMENT * ALIGNMENT)
    group = rng.randrange(most_groups)
    if size < LARGE or rng.random() < 0.3:
        return Item(f"w{number}", size, group)
    edges = tuple(i * PIECE for i in range(1, -(-size // PIECE)) if rng.random() < 0.1)
    return large(f"w{number}", size, "any", {rng.randrange(30)}, group=group, edges=edges)


def random_items(seed):
    rng = random.Random(seed)
    count = int(2 ** rng.uniform(0, 8))
    return [random_item(rng, number, rng.choice([1, 4, 20])) for number in range(count)]


def ends(chunks):
    return list(itertools.accumulate(chunks, initial=0))


def check(items, granule, regions, tail=0):
    """What is true of every layout."""
    sizes = {item.digest: item.size for item in items}
    groups = {item.digest: item.group for item in items}
    assert sorted(d for region in regions for d in region.offsets) == sorted(sizes)  # once, all of them
    for region in regions:
        assert len(region.chunks) == len(region.used) == len(region.shared)
        end = ends(region.chunks)[-1]
        spans = sorted((offset, offset + sizes[d], d) for d, offset in region.offsets.items())
        assert all(start % ALIGNMENT == 0 for start, _, _ in spans)
        assert spans[0][0] == up(tail if region.in_tail else 0, ALIGNMENT)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert up(spans[-1][1], granule) == end
        most = PARTED_CHUNK if region.parted else LARGEST_CHUNK
        assert all(0 < size <= most and size % granule == 0 for size in region.chunks)
        assert sum(region.used) == sum(sizes[d] for d in region.offsets)
        for size, used, start in zip(region.chunks, region.used, ends(region.chunks), strict=False):
            inside = [(max(a, start), min(b, start + size), d) for a, b, d in spans]
            inside = [(a, b, d) for a, b, d in inside if a < b]
            assert used == sum(b - a for a, b, _ in inside)
            if len({groups[d] for *_, d in inside}) > 1:
                assert size == granule
        if region.in_tail:
            assert region.chunks[0] == granule
        if region.parted:
            assert list(region.offsets) == [region.parted.digest]
            assert not region.in_tail
        else:
            assert set(region.shared) == {None}
            if spans[-1][1] % granule:
                assert region.chunks[-1] == granule
    assert sum(region.in_tail for region in regions) == bool(tail)
    assert sum(region.parted is None for region in regions) <= 1
    total = sum(sizes.values())
    aligned = sum(up(size, ALIGNMENT) for size in sizes.values())
    taken = sum(sum(region.chunks) for region in regions) - tail
    assert taken < aligned + total / 100 + granule * len(regions)


@granules
@pytest.mark.parametrize("seed", SEEDS)
def test_any_weights(seed, granule):
    items = random_items(seed)
    regions = layout.plan(items, granule, no_twin)
    check(items, granule, regions)
    assert layout.plan(list(items), granule, no_twin) == regions
    for region in regions:
        if region.parted:
            assert set(ends(region.chunks)) >= set(region.parted.edges)
            assert set(region.shared) == {None}


@granules
@pytest.mark.parametrize("seed", SEEDS)
def test_any_weights_behind_a_tail(seed, granule):
    items = random_items(seed)
    rng = random.Random(seed)
    tail, asked = rng.choice([rng.randrange(1, granule), granule - rng.randrange(1, granule // 8)]), []

    def tail_for(size):
        asked.append(size)
        return tail

    regions = layout.plan(items, granule, no_twin, tail_for)
    packed = [d for region in regions if not region.parted for d in region.offsets]
    sizes = {item.digest: item.size for item in items}
    wanted = bool(packed) and granule > sum(sizes.values()) // 100
    assert asked == ([sum(up(sizes[d], ALIGNMENT) for d in packed)] if wanted else [])
    check(items, granule, regions, tail if wanted else 0)
    without = layout.plan(items, granule, no_twin)
    if not wanted:
        assert regions == without
    elif (
        asked[0] <= (granule - tail) // ALIGNMENT * ALIGNMENT
    ):  # all in what the tail has left: no memory at all
        assert regions[0].chunks == (granule,)


@granules
@pytest.mark.parametrize("seed", SEEDS)
def test_any_weights_with_groups_in_chunks_of_their_own(seed, granule):
    """Aligned: a chunk has weights of one group, nothing goes into a tail, and a group takes no granule too many."""
    items = random_items(seed)
    regions = layout.plan(items, granule, no_twin, lambda size: pytest.fail("no tails"), aligned=True)
    sizes = {item.digest: item.size for item in items}
    groups = {item.digest: item.group for item in items}
    assert sorted(d for region in regions for d in region.offsets) == sorted(sizes)
    for region in regions:
        assert not region.in_tail
        assert sum(region.used) == sum(sizes[d] for d in region.offsets)
        bounds = ends(region.chunks)
        of_chunk = [set() for _ in region.chunks]
        needed = {}
        for digest, offset in region.offsets.items():
            assert offset % ALIGNMENT == 0
            needed[groups[digest]] = needed.get(groups[digest], 0) + up(sizes[digest], ALIGNMENT)
            for index, (start, end) in enumerate(itertools.pairwise(bounds)):
                if offset < end and offset + sizes[digest] > start:
                    of_chunk[index].add(groups[digest])
        assert all(len(found) == 1 for found in of_chunk)
        assert bounds[-1] == sum(up(size, granule) for size in needed.values())
        assert all(size % granule == 0 for size in region.chunks)
        if not region.parted:
            assert len(region.chunks) == sum(-(-up(n, granule) // LARGEST_CHUNK) for n in needed.values())


@granules
def test_no_weights(granule):
    assert layout.plan([], granule, no_twin, lambda size: pytest.fail("nothing to pack")) == []


@granules
def test_a_group_is_whole_chunks_where_padding_is_small(granule):
    """Members lie one behind the other in the order of the first of each group, however they come."""
    sizes = [150 * MiB + 1, 40 * MiB, 300 * MiB]
    items = [Item(f"{group}{part}", sizes[group] // 10, group) for part in range(10) for group in range(3)]
    (region,) = layout.plan(items, granule, no_twin)
    check(items, granule, [region])
    assert list(region.offsets) == [f"{group}{part}" for group in range(3) for part in range(10)]
    starts = [region.offsets[f"{group}0"] for group in range(3)]
    assert starts[0] == 0
    # 490 MiB may have 4.9 of padding: two granules of 2 MiB at the most
    assert all(start % granule == 0 and start in ends(region.chunks) for start in starts)


def test_many_small_groups_share_granules_and_chunks():
    """300 groups of 7 KiB: neither a granule nor a chunk each."""
    items = [Item(f"w{number}", 7 * KiB, number) for number in range(300)]
    (region,) = layout.plan(items, 2 * MiB, no_twin)
    check(items, 2 * MiB, [region])
    assert region.chunks == (2 * MiB,) * 2


def test_the_edge_of_two_large_groups_falls_into_one_granule():
    granule = 2 * MiB
    items = [Item("a", 31 * MiB, "a"), Item("b", 31 * MiB, "b")]
    (region,) = layout.plan(items, granule, no_twin)
    assert region.offsets == {"a": 0, "b": 31 * MiB}
    assert region.chunks == (30 * MiB, granule, 30 * MiB)
    assert region.used == (30 * MiB, granule, 30 * MiB)


def test_eight_heads_of_2_3_mib_do_not_take_4_mib_each():
    """Each goes on in the last granule of the one before, as the table of residency lets it."""
    granule, size, taken, tail = 2 * MiB, 23 * MiB // 10, 0, 0
    for number in range(8):
        item = Item(f"head{number}", size)
        (region,) = layout.plan([item], granule, no_twin, lambda size, tail=tail: tail)
        check([item], granule, [region], tail)
        taken += sum(region.chunks) - granule * region.in_tail
        tail = (region.offsets[item.digest] + size) % granule
    assert taken == up(8 * up(size, ALIGNMENT), granule)


class TestParted:
    """Regions of one large weight, whose chunks may be shared with versions of it."""

    def plan(self, item, granule, twin=None):
        others = [Item("rest", item.size // 2)]
        if twin is None:
            regions = layout.plan([*others, item], granule, no_twin)
        else:
            regions = layout.plan([*others, item], granule, lambda asked: twin if asked is item else None)
        check([*others, item], granule, regions)
        return regions[1]

    @granules
    @pytest.mark.parametrize("seed", SEEDS)
    def test_any_version_of_any_twin(self, seed, granule):
        """Versions that are longer, shorter or of the same size, with edges: shared only where all bytes are equal."""
        rng = random.Random(seed)
        sizes = [LARGE + rng.randrange(0, 80 * MiB) for _ in range(2)]
        if seed % 3 == 0:
            sizes[1] = sizes[0]
        if seed % 4 == 0:
            sizes = [up(size, PIECE) for size in sizes]
        pieces = LARGE // PIECE
        kept = sorted(rng.sample(range(1, pieces), 3))
        first = large("first", sizes[0], "p", edges=tuple(i * PIECE for i in kept))
        region = self.plan(first, granule)
        assert set(ends(region.chunks)) >= set(first.edges)
        assert set(region.shared) == {None}
        changed = {rng.randrange(pieces) for _ in range(rng.randrange(5))}
        far = tuple(i * PIECE for i in range(1, -(-sizes[1] // PIECE)) if rng.random() < 0.2)
        version = large("version", sizes[1], "p", changed, edges=far)
        twin = Twin(first, region.chunks)
        other = self.plan(version, granule, twin)
        assert self.plan(version, granule, twin) == other
        bounds = ends(other.chunks)
        followed = list(itertools.takewhile(lambda e: e <= bounds[-1], ends(region.chunks)))
        assert bounds[: len(followed)] == followed  # cut as the twin
        assert set(bounds) >= {edge for edge in far if edge > followed[-1]}
        for index, (start, size) in enumerate(zip(bounds, other.chunks, strict=False)):
            covered = range(start // PIECE, -(-(start + size) // PIECE))
            equal = index < len(followed) - 1 and all(
                piece < min(len(version.pieces), len(first.pieces))
                and version.pieces[piece] == first.pieces[piece]
                for piece in covered
            )
            assert other.shared[index] == (index if equal else None)

    def test_a_version_that_differs_in_one_row_shares_all_other_chunks(self):
        first = large("a", 96 * MiB, "p", edges=(10 * MiB, 12 * MiB))
        region = self.plan(first, 2 * MiB)
        assert ends(region.chunks)[1:3] == [10 * MiB, 12 * MiB]
        second = large("b", 96 * MiB, "p", {5})
        other = self.plan(second, 2 * MiB, Twin(first, region.chunks))
        assert other.chunks == region.chunks
        assert other.shared == tuple(None if i == 1 else i for i in range(len(other.chunks)))

    def test_a_version_with_rows_added_shares_what_was_there(self):
        """The twin's last chunk is padded where its size is no whole piece: those bytes are others."""
        for size, last in ((96 * MiB, True), (96 * MiB - 4 * KiB, False)):
            first = large("a", size, "p")
            region = self.plan(first, 2 * MiB)
            other = self.plan(large("b", 110 * MiB, "p"), 2 * MiB, Twin(first, region.chunks))
            count = len(region.chunks)
            assert other.shared[: count - 1] == tuple(range(count - 1))
            assert other.shared[count - 1] == (count - 1 if last else None)
            assert set(other.shared[count:]) == {None}
            back = self.plan(first, 2 * MiB, Twin(large("b", 110 * MiB, "p"), other.chunks))
            assert back.chunks == region.chunks
            assert back.shared == other.shared[:count]

    def test_one_that_shares_nothing(self):
        first, second = large("a", 70 * MiB, "p"), large("b", 70 * MiB, "q")
        region = self.plan(first, 2 * MiB)
        assert set(self.plan(second, 2 * MiB, Twin(first, region.chunks)).shared) == {None}

    @granules
    @pytest.mark.parametrize("count", range(1, MOST_LARGEST + 3))
    def test_the_largest_of_a_model_are_parted_unless_many_are_as_large(self, granule, count):
        """Later versions of an embedding and a head are likely, of each of a hundred equal layers they are not."""
        items = [large(f"w{number}", 80 * MiB, f"w{number}") for number in range(count)]
        items += [large("less", 79 * MiB, "less"), Item("small", 5)]
        regions = layout.plan(items, granule, no_twin)
        check(items, granule, regions)
        parted = [region.parted.digest for region in regions if region.parted]
        assert parted == ([f"w{number}" for number in range(count)] if count <= MOST_LARGEST else [])
        assert "less" in regions[0].offsets

    def test_what_is_never_parted(self):
        """Weights that are small, that have no pieces, or whose pieces are no whole granules."""
        twin = Twin(large("t", 70 * MiB, "p"), (70 * MiB,))
        for item, granule in (
            (large("a", LARGE - 1, "p", edges=(PIECE,)), 2 * MiB),
            (Item("a", 70 * MiB, edges=(PIECE,)), 2 * MiB),
            (large("a", 70 * MiB, "p", edges=(PIECE,)), 4 * MiB),
        ):
            (region,) = layout.plan([item], granule, lambda item: twin)
            check([item], granule, [region])
            assert region.parted is None

    def test_the_largest_is_packed_where_its_own_region_would_waste_more_than_1_percent(self):
        item = large("a", LARGE + 1, "p")
        (region,) = layout.plan([item], 2 * MiB, no_twin)
        assert region.parted is None
        (region,) = layout.plan([large("a", LARGE + 1, "p", edges=(PIECE,))], 2 * MiB, no_twin)
        assert region.parted is not None

    @granules
    def test_edges_that_no_chunk_can_have_are_left_out(self, granule):
        item = large("a", 70 * MiB, "p", edges=(0, 4 * MiB, 5 * MiB + 1, 70 * MiB, 99 * MiB))
        bounds = ends(self.plan(item, granule).chunks)
        assert 4 * MiB in bounds
        assert bounds[-1] == 70 * MiB


@pytest.mark.clock
@granules
@pytest.mark.parametrize("groups", [1, 50, 20_000])
def test_20_000_weights_take_below_a_second(granule, groups):
    rng = random.Random(groups)
    items = [
        Item(f"{number:064}", rng.choice([3072, 40_000, 2_359_296]), number % groups)
        for number in range(20_000)
    ]
    start = time.perf_counter()
    regions = layout.plan(items, granule, no_twin)
    assert time.perf_counter() - start < 1
    check_quickly(items, granule, regions)


def check_quickly(items, granule, regions):
    (region,) = regions
    assert len(region.offsets) == len(items)
    assert sum(region.used) == sum(item.size for item in items)
    aligned = sum(up(item.size, ALIGNMENT) for item in items)
    assert sum(region.chunks) < 1.01 * aligned + granule
