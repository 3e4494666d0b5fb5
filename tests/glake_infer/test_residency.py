"""The table of resident weights: one address per digest, references, nothing left after an error."""

import os

import pytest

import glake_infer as gi
from glake_infer.residency import AlteredObjectError, Residency, Wanted

PAGE = 4096


@pytest.fixture
def pool():
    with gi.Pool(device="cpu", limit="64MiB") as pool:
        yield pool


def wanted(folder, data, mapped=None):
    digest, _ = folder.add_buffer(data)
    return Wanted(digest, len(data), len(data) if mapped is None else mapped, folder)


def test_equal_digests_get_one_address_that_lives_as_long_as_its_last_user(tmp_path, pool):
    folder = gi.Store(tmp_path).objects
    item = wanted(folder, os.urandom(3 * PAGE))
    table = Residency.of(pool)
    assert Residency.of(pool) is table
    first, second = table.acquire(pool, [item, item], 1), table.acquire(pool, [item], 2)
    assert first == second
    assert pool.stats().mapped_files == 3 * PAGE
    assert table.users() == {item.digest: (3 * PAGE, frozenset({1, 2}))}
    table.release(pool, first, 1)
    assert pool.stats().mapped_files == 3 * PAGE
    table.release(pool, second, 2)
    assert pool.stats().mapped_files == 0
    assert table.users() == {}


def test_only_the_part_that_is_used_is_mapped(tmp_path, pool):
    folder = gi.Store(tmp_path).objects
    part, none = wanted(folder, os.urandom(3 * PAGE), PAGE), wanted(folder, os.urandom(PAGE), 0)
    table = Residency.of(pool)
    held = table.acquire(pool, [part, none], 1)
    assert pool.stats().mapped_files == PAGE
    assert held[none.digest] == 0
    table.release(pool, held, 1)


@pytest.mark.parametrize("damage", ["change", "shorten", "lengthen", "remove"])
def test_wrong_bytes_are_never_mapped_and_nothing_is_left(tmp_path, pool, damage):
    folder = gi.Store(tmp_path).objects
    good, bad = wanted(folder, os.urandom(PAGE)), wanted(folder, os.urandom(PAGE))
    path = folder.path(bad.digest)
    data = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(
            {"change": data[:-1] + bytes([data[-1] ^ 1]), "shorten": data[:-1], "lengthen": data + b"\0"}[
                damage
            ]
        )
    table = Residency.of(pool)
    with pytest.raises(AlteredObjectError) as caught:
        table.acquire(pool, [good, bad], 1)
    assert caught.value.digest == bad.digest
    assert table.users() == {}
    assert pool.stats().active == 0


def test_a_limit_in_the_middle_gives_everything_back(tmp_path, pool):
    folder = gi.Store(tmp_path).objects
    items = [wanted(folder, os.urandom(1 << 20)) for _ in range(4)]
    pool.limit = 2 << 20
    with pytest.raises(gi.OutOfMemoryError):
        Residency.of(pool).acquire(pool, items, 1)
    assert pool.stats().active == 0
