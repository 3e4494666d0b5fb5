import json
import shutil

import building
import pytest
from folders import temporaries, tree

from glake_infer.allocators.errors import StoreError
from glake_infer.maintenance import gc, ls, verify
from glake_infer.models.convert import convert
from glake_infer.models.package import Package


@pytest.fixture
def two(store, tmp_path):
    """Two packages that share one of two weights each (4 KiB)."""
    for name, seeds in (("a", (1, 2)), ("b", (2, 3))):
        building.save(building.chain(*map(building.matrix, seeds)), tmp_path / f"{name}.onnx")
        convert(tmp_path / f"{name}.onnx")
    return tmp_path / "a.glake", tmp_path / "b.glake"


def digests(package):
    return [weight["digest"] for weight in json.loads((package / "manifest.json").read_bytes())["weights"]]


def damage(store, digest):
    path = store.objects.path(digest)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def test_ls(store, two):
    a, b = two
    listing = ls(store)
    assert listing.bytes == 3 * 4096
    assert listing.unreferenced_bytes == 0
    assert listing.packages == {str(a): 8192, str(b): 8192}
    users = {entry.digest: entry.packages for entry in listing.objects}
    assert users[digests(a)[1]] == (str(a), str(b))
    shutil.rmtree(b)
    listing = ls(store)
    assert listing.missing_packages == (str(b),)
    assert listing.unreferenced_bytes == 4096


def test_verify_names_the_packages_that_are_hurt(store, two):
    a, b = two
    seen = []
    assert verify(store, progress=seen.append).ok
    assert seen == [4096] * 3
    shared, own = digests(a)[1], digests(b)[1]
    damage(store, shared)
    store.objects.path(own).unlink()
    report = verify(store)
    assert not report.ok
    assert report.damaged == {shared: [str(a), str(b)]}
    assert report.missing == {own: [str(b)]}
    assert store.objects.path(shared).exists()
    assert verify(store, remove=True).damaged == {shared: [str(a), str(b)]}
    assert not store.objects.path(shared).exists()
    for package in two:
        convert(package.with_suffix(".onnx"))
    assert verify(store).ok


def test_gc_takes_what_no_package_needs(store, two):
    a, b = two
    before = tree(store.root)
    assert gc(store).objects == 0
    assert tree(store.root) == before
    shutil.rmtree(a)
    report = gc(store, dry_run=True)
    assert (report.objects, report.bytes, report.kept_objects, report.vanished) == (1, 4096, 2, [str(a)])
    assert tree(store.root) == before
    gc(store)
    assert {digest for digest, _ in store.objects} == set(digests(b))
    assert gc(store).vanished == []


def test_gc_follows_a_package_that_was_renamed_beside_itself(store, two, tmp_path):
    a, b = two
    a.rename(tmp_path / "c.glake")
    report = gc(store)
    assert report.moved == {str(a): str(tmp_path / "c.glake")}
    assert report.objects == 0
    b.rename(tmp_path / "store" / "d.glake")  # moved elsewhere: opened once there, it is known again
    Package(tmp_path / "store" / "d.glake", store)
    assert gc(store).objects == 0


def test_gc_believes_the_manifest_more_than_the_record(store, two, tmp_path):
    """A convert killed after registering its new version leaves the old one, which must stay whole."""
    a, _ = two
    store.register(a, "f" * 64, ["e" * 64])
    assert gc(store).objects == 0
    shutil.rmtree(a)
    shutil.copytree(tmp_path / "b.glake", a)
    assert gc(store).objects == 1  # what only the old `a` needed


def test_gc_keeps_weights_of_a_package_it_cannot_read(store, two):
    a, _ = two
    (a / "manifest.json").write_bytes(b"\xff{")
    assert gc(store).objects == 0


def test_gc_stops_at_a_damaged_record(store, two):
    next(iter(store.records())).file.write_bytes(b"{")
    with pytest.raises(StoreError, match="damaged"):
        gc(store)
    assert len(list(store.objects)) == 3


def test_gc_removes_what_killed_processes_left(store, two, tmp_path):
    digest = digests(two[0])[0]
    left = [
        store.objects.path(digest).with_name(f".{digest}.1.tmp"),
        store.packages / ".x.json.1.tmp",
        store.pending / ".x.json.1.tmp",
        tmp_path / ".archive.1.tmp",
    ]
    store.pending.mkdir(exist_ok=True)
    for path in left:
        path.write_bytes(b"half")
    folder = tmp_path / ".a.glake.1.tmp"
    folder.mkdir()
    (folder / "graph.onnx").write_bytes(b"half")
    for number, path in enumerate((folder, tmp_path / ".archive.1.tmp", two[0], tmp_path / "a.onnx")):
        (store.pending / f"{number}{number}.json").write_text(json.dumps({"path": str(path)}))
    (store.pending / "ff.json").write_bytes(b"{")
    assert gc(store, dry_run=True).temporary == 10
    assert temporaries(tmp_path)
    gc(store)
    assert not temporaries(tmp_path)
    assert list(store.pending.iterdir()) == []
    assert two[0].is_dir(), "a note can only ever name something temporary"
    assert (tmp_path / "a.onnx").is_file()


def test_gc_waits_for_whoever_uses_the_store(store, two):
    with store.using(), pytest.raises(StoreError, match="is using the store"):
        gc(store, wait=False)
    gc(store, wait=False)


def test_gc_of_derived_objects(store, two):
    identity = json.loads((two[0] / "manifest.json").read_bytes())["identity"]
    kept, _ = store.prepared_objects.add_buffer(b"k" * 2000)
    lost, _ = store.prepared_objects.add_buffer(b"l" * 2000)
    for key, owner, digest in (("kept", identity, kept), ("lost", "0" * 64, lost)):
        (store.prepared / key).mkdir()
        (store.prepared / key / "info.json").write_text(
            json.dumps({"identities": [owner], "derived": [digest]})
        )
    (store.prepared / "broken").mkdir()
    (store.prepared / "broken" / "info.json").write_bytes(b"[")
    report = gc(store)
    assert (report.prepared, report.objects) == (2, 1)
    assert [digest for digest, _ in store.prepared_objects] == [kept]
    assert (store.prepared / "kept").is_dir()
    path = store.prepared_objects.path(kept)
    path.chmod(0o644)
    path.write_bytes(b"x" * 2000)
    assert verify(store).ok, "what is derived is made again, so damage to it is no damage"
    assert not path.exists()
