"""The record of files that were found right: what it believes, and what becomes of it."""

import contextlib
import os
import shutil
import time

import pytest
from folders import temporaries

from glake_infer import maintenance, verified
from glake_infer.digest import digest_of
from glake_infer.verified import SIZE, Seal, Verified, seal_of

DATA = b"weight" * 500


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What was written this moment may be recorded."""
    monkeypatch.setattr(verified, "RACY", 0)


@pytest.fixture
def add(store):
    """Add an object, and its record; returns its digest and seal."""

    def added(data=DATA, folder=store.objects):
        digest, _ = folder.add_buffer(data)
        seal = seal_of(folder.path(digest).stat())
        Verified(store.root).add([(digest, seal)])
        return digest, seal

    return added


def known(root, digest, seal):
    """Whether a process that starts now knows it."""
    record = Verified(root)
    record.refresh()
    return record.holds(digest, seal)


def test_what_one_process_found_the_next_one_knows(store, add):
    digest, seal = add()
    assert known(store.root, digest, seal)
    assert (store.root / "verified").stat().st_size == SIZE
    record = Verified(store.root)
    assert not record.holds(digest, seal)  # nothing was read yet
    record.refresh()
    other, other_seal = add(DATA[1:])
    assert not record.holds(other, other_seal)
    record.refresh()
    assert record.holds(other, other_seal)
    record.add([(other, other_seal), (digest, seal)])
    assert (store.root / "verified").stat().st_size == 2 * SIZE
    assert not known(store.root, digest_of(b"another"), seal)


@pytest.mark.parametrize("field", Seal._fields)
def test_any_other_seal_is_not_known(store, add, field):
    digest, seal = add()
    for change in (-1, 1):
        assert not known(store.root, digest, seal._replace(**{field: getattr(seal, field) + change}))


def test_a_file_that_was_replaced_has_another_seal(store, add):
    """By one of the same size, with the same modification time."""
    digest, seal = add()
    path = store.objects.path(digest)
    other = path.with_name("other")
    other.write_bytes(DATA[::-1])
    os.utime(other, ns=(seal.modified, seal.modified))
    other.replace(path)
    now = seal_of(path.stat())
    assert (now.size, now.modified) == (seal.size, seal.modified)
    assert not known(store.root, digest, now)


def test_a_file_that_is_written_in_place_has_another_seal(store, add):
    digest, seal = add()
    path = store.objects.path(digest)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"!")
    os.utime(path, ns=(seal.modified, seal.modified))
    now = seal_of(path.stat())
    assert now._replace(changed=0) == seal._replace(changed=0)
    assert not known(store.root, digest, now)


@pytest.mark.parametrize("copy", [shutil.copy2, os.link])
def test_a_copied_store_knows_nothing_of_its_files(store, add, tmp_path, copy):
    digest, _ = add()
    shutil.copytree(store.root, tmp_path / "copy", copy_function=copy)
    path = tmp_path / "copy" / store.objects.location(digest)
    assert (tmp_path / "copy" / "verified").exists()
    assert not known(tmp_path / "copy", digest, seal_of(path.stat()))


def test_which_seals_tell():
    second = 1_000_000_000
    seal = Seal(1, 2, 3, modified=second, changed=100 * second)
    racy = 2 * second
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verified, "RACY", racy)
        assert not seal.tells(seal.changed)
        assert not seal.tells(seal.changed + racy - 1)
        assert seal.tells(seal.changed + racy)
        assert not seal.tells(seal.changed - 1000 * second)  # the clock was set back
        assert not seal._replace(modified=seal.changed).tells(
            seal.changed + racy
        )  # no time of change is kept


@pytest.mark.parametrize("at", [0, 31, 32, 50, 71, 72, 79])
def test_a_damaged_record_is_none(store, add, at):
    entries = [add(DATA + bytes([n])) for n in range(3)]
    path = store.root / "verified"
    data = bytearray(path.read_bytes())
    data[SIZE + at] ^= 1
    path.write_bytes(data)
    assert [known(store.root, *entry) for entry in entries] == [True, False, True]
    Verified(store.root).compact()
    assert path.stat().st_size == 2 * SIZE
    assert [known(store.root, *entry) for entry in entries] == [True, False, True]


@pytest.mark.parametrize("torn", [1, SIZE - 1, SIZE // 2])
def test_a_torn_record_takes_no_other_with_it(store, add, torn):
    first = add()
    path = store.root / "verified"
    with path.open("ab") as file:
        file.write(path.read_bytes()[:torn])
    assert known(store.root, *first)
    second = add(DATA[1:])
    assert known(store.root, *first)
    assert known(store.root, *second)
    assert path.stat().st_size == 2 * SIZE


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 1000, b"\xff" * 10 * SIZE, os.urandom(5000)])
def test_a_file_of_anything_is_no_record(store, add, content):
    digest, _ = store.objects.add_buffer(DATA)
    (store.root / "verified").write_bytes(content)
    assert not known(store.root, digest, seal_of(store.objects.path(digest).stat()))
    digest, seal = add()
    assert known(store.root, digest, seal)


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_what_only_has_the_name_is_left_alone(store, tmp_path, kind):
    digest, _ = store.objects.add_buffer(DATA)
    path, other = store.root / "verified", tmp_path / "other"
    other.write_bytes(b"something else")
    {"folder": path.mkdir, "link": lambda: path.symlink_to(other), "fifo": lambda: os.mkfifo(path)}[kind]()
    seal = seal_of(store.objects.path(digest).stat())
    record = Verified(store.root)
    record.refresh()
    record.add([(digest, seal)])
    record.drop(digest)
    record.compact()
    assert not known(store.root, digest, seal)
    assert other.read_bytes() == b"something else"


def test_without_a_store_nothing_is_made(tmp_path):
    record = Verified(tmp_path / "none")
    record.refresh()
    record.add([("a" * 64, Seal(1, 2, 3, 4, 5))])
    record.compact()
    assert not (tmp_path / "none").exists()


def test_a_store_that_may_only_be_read(store, add, read_only):
    digest, seal = add()
    other, _ = store.objects.add_buffer(DATA[1:])
    read_only(store.root)
    record = Verified(store.root)
    record.refresh()
    assert record.holds(digest, seal)
    record.add([(other, seal_of(store.objects.path(other).stat()))])
    record.compact()
    record.drop(digest)
    assert known(store.root, digest, seal)


def test_a_full_disk(small_disk):
    store = verified.Verified(small_disk)
    entries = [(digest_of(bytes([n])), Seal(1, n, 3, 4, 5)) for n in range(60)]
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    store.add(entries)
    store.compact()
    assert not any(known(small_disk, *entry) for entry in entries)
    assert not temporaries(small_disk)
    (small_disk / "filler").unlink()
    store.add(entries)
    assert all(known(small_disk, *entry) for entry in entries)


def test_nobody_waits_long_for_another_writer(store, add, monkeypatch):
    add()
    monkeypatch.setattr(verified, "PATIENCE", 0.02)
    digest, _ = store.objects.add_buffer(DATA[1:])
    seal = seal_of(store.objects.path(digest).stat())
    record = Verified(store.root)
    with verified._locked(store.root / "verified"):
        start = time.monotonic()
        record.add([(digest, seal)])
        record.compact()
        assert time.monotonic() - start < 5
    assert not known(store.root, digest, seal)
    record.add([(digest, seal)])
    assert known(store.root, digest, seal)


WORK = """
import sys
from pathlib import Path
from glake_infer.digest import digest_of
from glake_infer.verified import Seal, Verified
record, number = Verified(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for n in range(200):
    record.add([(digest_of(b"%d %d" % (number, n)), Seal(number, n, 3, 4, 5))])
    if sys.argv[3] == "compact" and n % 10 == number:
        record.compact()
"""


@pytest.mark.parametrize("more", ["append", "compact"])
def test_processes_write_at_once(store, add, python, more):
    lasting = [add(DATA + bytes([n])) for n in range(5)]
    workers = [python(WORK, store.root, n, more, stdin=-1) for n in range(4)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        assert worker.wait() == 0, worker.stderr.read()
    assert all(known(store.root, *entry) for entry in lasting)
    data = (store.root / "verified").read_bytes()
    records = [data[at : at + SIZE] for at in range(0, len(data), SIZE)]
    assert all(map(verified._is_whole, records))
    if more == "append":
        assert len(set(records)) == len(records) == 805
    assert not temporaries(store.root)


def test_it_is_rewritten_when_it_has_doubled_and_stays_within_bounds(store, add, monkeypatch):
    monkeypatch.setattr(verified, "FEWEST", 16)
    lasting = [add(DATA + bytes([n])) for n in range(3)]
    record, path = Verified(store.root), store.root / "verified"
    for n in range(12):
        record.add([(digest_of(bytes([n])), Seal(1, n, 3, 4, 5))])
    assert path.stat().st_size == 15 * SIZE
    record.add([(digest_of(b"one more"), Seal(1, 2, 3, 4, 5))])
    assert path.stat().st_size == 3 * SIZE
    assert all(known(store.root, *entry) for entry in lasting)
    monkeypatch.setattr(verified, "MOST", 4)
    lasting += [add(DATA[n:]) for n in range(1, 7)]
    assert [known(store.root, *entry) for entry in lasting] == [False] * 5 + [
        True
    ] * 4  # the last that are read
    Verified(store.root).compact()
    assert path.stat().st_size == 2 * SIZE
    assert known(store.root, *lasting[-1])


def test_verify_reads_everything_and_forgets_what_is_altered(store, add):
    """Bytes that rot change no seal."""
    entries = [add(DATA + bytes([n])) for n in range(3)]
    derived = add(b"derived" * 500, store.prepared_objects)
    (bad, _), path = entries[1], store.objects.path(entries[1][0])
    path.chmod(0o644)
    path.write_bytes(DATA + b"!")
    rotten = seal_of(path.stat())
    Verified(store.root).add([(bad, rotten)])  # as if the seal had stayed
    assert known(store.root, bad, rotten)
    report = maintenance.verify(store)
    assert report.checked == 4
    assert list(report.damaged) == [bad]
    assert not known(store.root, bad, rotten)
    assert all(known(store.root, *entry) for entry in [entries[0], entries[2], derived])
    assert (store.root / "verified").stat().st_size == 3 * SIZE


def test_verify_records_what_it_finds_right(store, monkeypatch):
    digest, _ = store.objects.add_buffer(DATA)
    seal = seal_of(store.objects.path(digest).stat())
    monkeypatch.setenv("GLAKE_VERIFY", "always")
    assert maintenance.verify(store).ok
    assert not known(store.root, digest, seal)
    monkeypatch.setenv("GLAKE_VERIFY", "once")
    for _ in range(2):
        assert maintenance.verify(store).ok
        assert (store.root / "verified").stat().st_size == SIZE
    assert known(store.root, digest, seal)


def test_gc_leaves_no_records_of_what_it_takes(store, add):
    add()
    (store.root / ".verified.1234.tmp").touch()
    report = maintenance.gc(store, dry_run=True)
    assert report.temporary == 1
    assert (store.root / "verified").stat().st_size == SIZE
    assert maintenance.gc(store).objects == 1
    assert (store.root / "verified").stat().st_size == 0
    assert not temporaries(store.root)
