import errno
import json
import os
import stat
import threading

import pytest
from folders import temporaries

from glake_infer.allocators.errors import DigestMismatchError, StorageFullError, StoreError
from glake_infer.digest import digest_of
from glake_infer.store import SEALED, Store, default_root, storage_errors, write_file

DATA = b"weight" * 500


def test_the_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("GLAKE_STORE", str(tmp_path / "a"))
    assert default_root() == tmp_path / "a"
    monkeypatch.delenv("GLAKE_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_root() == tmp_path / "b" / "glake-infer" / "store"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert default_root() == tmp_path / "c" / ".cache" / "glake-infer" / "store"


def test_nothing_is_created_before_something_is_written(store):
    assert list(store.objects) == list(store.records()) == []
    assert store.objects.state("a" * 64, 1) == "missing"
    assert not store.root.exists()


def test_an_object_is_added_once_sealed_and_read_only(store):
    digest, new = store.objects.add_buffer(DATA)
    path = store.objects.path(digest)
    status = path.stat()
    assert (digest, new) == (digest_of(DATA), True)
    assert path == store.root / "objects" / digest[:2] / digest
    assert store.objects.location(digest) == f"objects/{digest[:2]}/{digest}"
    assert path.read_bytes() == DATA
    assert stat.S_IMODE(status.st_mode) == 0o444
    assert status.st_mtime == SEALED
    assert status.st_nlink == 1
    assert store.objects.add_buffer(DATA) == (digest, False)
    assert path.stat().st_ino == status.st_ino
    assert [(d, s.st_size) for d, s in store.objects] == [(digest, len(DATA))]


@pytest.mark.parametrize("bad", ["../../etc/passwd", "a" * 63, "A" * 64, ""])
def test_a_path_is_only_made_from_a_digest(store, bad):
    with pytest.raises(StoreError, match="is not a digest"):
        store.objects.path(bad)


@pytest.mark.parametrize(
    ("pieces", "length"),
    [([DATA, b"x"], len(DATA)), ([DATA[:-1]], len(DATA)), ([b"y" * len(DATA)], len(DATA))],
)
def test_wrong_bytes_never_get_a_name(store, pieces, length):
    with pytest.raises(DigestMismatchError, match="the source changed while it was read"):
        store.objects.add(digest_of(DATA), length, pieces)
    assert list(store.objects) == []
    assert not temporaries(store.root)


def test_a_source_that_fails_leaves_nothing(store):
    def broken():
        yield DATA
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        store.objects.add(digest_of(DATA), len(DATA), broken())
    assert list(store.objects) == []
    assert not temporaries(store.root)


def test_states(store):
    digest, _ = store.objects.add_buffer(DATA)
    path = store.objects.path(digest)
    assert store.objects.state(digest, len(DATA)) == "intact"
    assert store.objects.state(digest, len(DATA) + 1) == "short"
    assert store.objects.state(digest, len(DATA) - 1) == "altered"
    os.utime(path)
    assert store.objects.state(digest, len(DATA)) == "intact"  # touched, not changed
    path.chmod(0o644)
    path.write_bytes(DATA[:-1] + b"!")
    assert store.objects.state(digest, len(DATA)) == "altered"


@pytest.mark.parametrize("damage", [lambda d: d[:-1] + b"!", lambda d: d[:-1], lambda d: b""])
def test_a_damaged_object_is_replaced_when_it_is_added_again(store, damage):
    digest, _ = store.objects.add_buffer(DATA)
    path = store.objects.path(digest)
    path.chmod(0o644)
    path.write_bytes(damage(DATA))
    assert not store.objects.holds(digest, len(DATA))
    assert store.objects.add_buffer(DATA) == (digest, True)
    assert path.read_bytes() == DATA


def test_threads_add_the_same_object(store):
    digest = digest_of(DATA)
    barrier = threading.Barrier(8)
    errors = []

    def add():
        try:
            barrier.wait()
            store.objects.add(digest, len(DATA), [DATA])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert store.objects.path(digest).read_bytes() == DATA
    assert not temporaries(store.root)


def test_a_full_disk(small_disk):
    store = Store(small_disk / "store")
    data = os.urandom(2 << 20)
    with pytest.raises(StorageFullError, match=r"no space left on the disk of .*store.*gc"):
        store.objects.add_buffer(data)
    assert list(store.objects) == []
    assert not temporaries(small_disk)
    store.objects.add_buffer(DATA)


def test_refusals_of_the_system_get_words(tmp_path):
    for number, kind in [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EFBIG, StoreError),
        (errno.EACCES, StoreError),
        (errno.EROFS, StoreError),
        (errno.EPERM, StoreError),
    ]:
        with pytest.raises(kind, match=str(tmp_path)), storage_errors("testing", tmp_path):
            raise OSError(number, "refused")
    with pytest.raises(IsADirectoryError), storage_errors("testing", tmp_path):
        raise IsADirectoryError(errno.EISDIR, "refused")


def test_a_read_only_store_can_be_read(store, read_only):
    digest, _ = store.objects.add_buffer(DATA)
    with store.using():
        pass
    read_only(store.root)
    with store.using():
        assert store.objects.holds(digest, len(DATA))
    with pytest.raises(StoreError, match="may not write to"):
        store.objects.add_buffer(b"other")
    with pytest.raises(StoreError, match="may not write to"), store.locked("lock", exclusive=True):
        pass
    with pytest.raises(StoreError, match="may not write to"):
        store.register(store.root, "i", [digest])


def test_a_store_that_cannot_be_made(tmp_path, read_only):
    (tmp_path / "ro").mkdir()
    read_only(tmp_path / "ro")
    with pytest.raises(StoreError, match="GLAKE_STORE"), Store(tmp_path / "ro" / "store").using():
        pass


def test_locks(store):
    with store.using(), store.using():
        with pytest.raises(BlockingIOError), store.locked("lock", exclusive=True, wait=False):
            pass
        with store.locked("other", exclusive=True, wait=False):
            pass
    with store.locked("lock", exclusive=True, wait=False):
        pass


def test_write_file_is_all_or_nothing(tmp_path, small_disk):
    write_file(small_disk / "f", b"old")
    with pytest.raises(OSError, match="No space"):
        write_file(small_disk / "f", bytes(2 << 20))
    assert (small_disk / "f").read_bytes() == b"old"
    assert [p.name for p in small_disk.iterdir()] == ["f"]
    write_file(tmp_path / ("n" * 255), b"long name")


def test_records(store, tmp_path):
    digests = sorted(store.objects.add_buffer(bytes([i]) * 2000)[0] for i in range(3))
    store.register(tmp_path / "a.glake", "one", digests[:2])
    store.register(tmp_path / "b.glake", "two", digests[1:])
    first = {record.path.name: record.file.stat().st_ino for record in store.records()}
    store.register(tmp_path / "a.glake", "one", digests[:2])
    assert {record.path.name: record.file.stat().st_ino for record in store.records()} == first
    assert store.users_of(digests[1]) == [str(tmp_path / "a.glake"), str(tmp_path / "b.glake")]
    assert store.users_of(digests[0]) == [str(tmp_path / "a.glake")]
    store.register(tmp_path / "a.glake", "three", digests[2:])
    records = {record.path.name: record for record in store.records()}
    assert records["a.glake"].identity == "three"
    assert records["a.glake"].digests == {digests[2]}
    assert not records["a.glake"].exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"path": 1, "identity": "", "digests": []}', b"\xff"]
)
def test_a_damaged_record_is_an_error_not_a_hole(store, tmp_path, content):
    store.register(tmp_path / "a.glake", "one", [])
    (record,) = store.records()
    record.file.write_bytes(content)
    with pytest.raises(StoreError, match=f"{record.file.name} is damaged"):
        list(store.records())


def test_what_is_being_written_is_announced(store, tmp_path):
    with store.writing(tmp_path / "half"):
        (note,) = store.pending.iterdir()
        assert json.loads(note.read_bytes()) == {"path": str(tmp_path / "half")}
    assert list(store.pending.iterdir()) == []
