import io
import random
import tarfile

import building
import numpy as np
import onnx
import pytest
from folders import temporaries, tree

import glake_infer as gi
from glake_infer.models.archive import export_archive, import_archive
from glake_infer.models.convert import convert
from glake_infer.models.export import checked_object, export
from glake_infer.models.package import Package
from glake_infer.store import Store


@pytest.fixture
def package(store, tmp_path):
    building.save(building.odd_sizes(), tmp_path / "model.onnx")
    convert(tmp_path / "model.onnx")
    return tmp_path / "model.glake"


@pytest.fixture
def archive(package, tmp_path):
    export_archive(package, tmp_path / "model.tar")
    return tmp_path / "model.tar"


def same(a, b):
    feeds = building.feeds_for(building.odd_sizes())
    np.testing.assert_array_equal(building.run_plain(a, feeds)["y"], building.run_plain(b, feeds)["y"])


# An ordinary ONNX model


def test_an_export_is_an_ordinary_model(package, tmp_path):
    seen = []
    report = export(package, tmp_path / "out" / "deep", progress=lambda *step: seen.append(step))
    model = tmp_path / "out" / "deep" / "model.onnx"
    assert (report.target, report.weights, report.bytes) == (str(model), 3, 4096), (
        "equal weights are written once"
    )
    assert sorted(p.name for p in model.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert seen == [("weights", 4096, 4096)]
    onnx.checker.check_model(str(model), full_check=True)
    same(model, tmp_path / "model.onnx")
    proto = onnx.load_model(model)  # onnx's own loader takes it too
    assert {t.name for t in proto.graph.initializer} >= {"schicht/größe:0", "层/重み 😀", "flat"}


def test_an_export_converts_to_the_same_weights(package, tmp_path):
    target = export(package, tmp_path / "out").target
    assert convert(target).new_bytes == 0
    assert Package(tmp_path / "out" / "model.glake").manifest.weights == Package(package).manifest.weights


def test_large_weights_begin_at_pages(store, tmp_path):
    building.save(
        building.chain(building.matrix(1), building.matrix(2, (32, 48)), building.matrix(3, (48, 32))),
        tmp_path / "m.onnx",
    )
    convert(tmp_path / "m.onnx")
    export(tmp_path / "m.glake", tmp_path / "out")
    proto = onnx.load_model(tmp_path / "out" / "m.onnx", load_external_data=False)
    assert [int(t.external_data[1].value) for t in proto.graph.initializer] == [0, 4096, 12288]


def test_a_model_without_weights(store, tmp_path):
    building.save(
        building.model([building.node("Neg", ["x"], ["y"])], [building.floats("x")], [building.floats("y")]),
        tmp_path / "m.onnx",
    )
    convert(tmp_path / "m.onnx")
    assert export(tmp_path / "m.glake", tmp_path / "out").bytes == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.onnx"]
    export_archive(tmp_path / "m.glake", tmp_path / "m.tar")
    import_archive(tmp_path / "m.tar", tmp_path / "n.glake")


def test_other_files_stay_and_an_earlier_export_is_replaced(package, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_bytes(b"x")
    export(package, tmp_path / "out")
    first = tree(tmp_path / "out")
    export(package, tmp_path / "out")
    assert tree(tmp_path / "out") == first


def test_a_model_from_elsewhere_is_never_overwritten(package, tmp_path):
    report = export(package, tmp_path / "out")
    ours = onnx.load(report.target, load_external_data=False)
    del ours.metadata_props[:]
    onnx.save(ours, report.target)
    before = tree(tmp_path / "out")
    with pytest.raises(gi.InputError, match="was not exported by glake-infer"):
        export(package, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_the_folder_names_the_export_however_it_is_written(package, tmp_path, monkeypatch):
    monkeypatch.chdir(package)
    export(".", tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_a_file_where_the_folder_should_be(package, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(gi.InputError, match="is a file; export needs a folder"):
        export(package, tmp_path / "file")
    with pytest.raises(gi.InputError, match="is a folder; --archive needs"):
        export_archive(package, tmp_path)


def test_a_full_disk_keeps_the_earlier_export(store, tmp_path, small_disk):
    convert(
        building.save(
            building.chain(building.matrix(1, (32, 3000)), building.matrix(2, (3000, 32))),
            tmp_path / "small.onnx",
        ),
        tmp_path / "m.glake",
    )
    export(tmp_path / "m.glake", small_disk / "out")
    export_archive(tmp_path / "m.glake", tmp_path / "m.tar")
    before = tree(small_disk)
    convert(
        building.save(
            building.chain(building.matrix(1, (32, 9000)), building.matrix(2, (9000, 32))),
            tmp_path / "large.onnx",
        ),
        tmp_path / "m.glake",
    )
    for act in (
        lambda: export(tmp_path / "m.glake", small_disk / "out"),
        lambda: export(tmp_path / "m.glake", small_disk / "new"),
        lambda: export_archive(tmp_path / "m.glake", small_disk / "m.tar"),
    ):
        with pytest.raises(gi.StorageFullError, match="no space left on the disk"):
            act()
        assert tree(small_disk) == before
        assert sorted(p.name for p in small_disk.iterdir()) == ["out"]


def test_a_wrong_byte_is_noticed_before_the_last_piece(package, store, monkeypatch):
    monkeypatch.setattr("glake_infer.digest.PIECE", 1000)
    opened = Package(package)
    digest = opened.manifest.weights[0].digest
    assert sum(len(p) for p in checked_object(opened, digest, 4096)) == 4096
    path = store.objects.path(digest)
    path.chmod(0o644)
    path.write_bytes(bytes(4096))
    pieces = checked_object(opened, digest, 4096)
    assert sum(len(next(pieces)) for _ in range(4)) < 4096
    with pytest.raises(gi.DigestMismatchError):
        next(pieces)


# One archive


def test_an_archive_goes_to_another_machine(package, archive, tmp_path):
    other = Store(tmp_path / "other store")
    seen = []
    report = import_archive(
        archive, tmp_path / "there.glake", store=other, progress=lambda *step: seen.append(step)
    )
    assert seen == [("weights", 4096, 4096)]
    assert (report.package, report.new_bytes) == (str(tmp_path / "there.glake"), 4096)
    assert Package(tmp_path / "there.glake", other).manifest == Package(package).manifest
    assert tree(tmp_path / "there.glake") == tree(package)
    list(Package(tmp_path / "there.glake", other).verify())
    export(tmp_path / "there.glake", tmp_path / "out", store=other)
    same(tmp_path / "out" / "there.onnx", tmp_path / "model.onnx")
    import_archive(archive, tmp_path / "there.glake", store=other)


@pytest.mark.parametrize(
    ("name", "target"),
    [("m.tar", "m.glake"), ("m.glake.tar", "m.glake"), ("m.glake.archive", "m.glake"), ("m", "m.glake")],
)
def test_where_an_archive_goes_by_default(archive, tmp_path, monkeypatch, name, target):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    archive.rename(tmp_path / name)
    import_archive(tmp_path / name)
    assert (tmp_path / "cwd" / target / "manifest.json").is_file()


def members(archive):
    with tarfile.open(archive) as opened:
        return [(entry.name, opened.extractfile(entry).read()) for entry in opened]


def repack(archive, entries):
    with tarfile.open(archive, "w") as opened:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if isinstance(name, str) and name.startswith("link:"):
                entry.name, entry.type, entry.linkname, entry.size = (
                    name[5:],
                    tarfile.SYMTYPE,
                    "/etc/passwd",
                    0,
                )
            opened.addfile(entry, io.BytesIO(data))


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def last(change):
    return lambda entries: [*entries[:-1], change(entries[-1])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[1:], "does not begin with manifest.json"),
        (lambda e: [("x", b"y"), *e], "does not begin with manifest.json"),
        (lambda e: [e[0], *e[2:]], "lacks graph.onnx: it is truncated"),
        (lambda e: e[:-1], "lacks [0-9a-f]{64}: it is truncated"),
        (lambda e: [], "not a glake-infer archive"),
        (last(lambda m: (m[0], flip(m[1]))), "the weight [0-9a-f]{16} .* was altered"),
        (last(lambda m: (m[0], m[1][:-1])), "which its manifest does not list"),
        (last(lambda m: (m[0].upper(), m[1])), "which its manifest does not list"),
        (last(lambda m: ("../" + m[0], m[1])), "does not list"),
        (last(lambda m: ("link:" + m[0], m[1])), "does not list"),
        (lambda e: [*e, e[-1]], "does not list"),
        (lambda e: [*e, ("objects/" + "0" * 64, b"")], "does not list"),
        (lambda e: [*e, ("../escape", b"x")], "'../escape'"),
        (lambda e: [*e, ("/tmp/escape", b"x")], "does not list"),
        (lambda e: [e[0], (e[1][0], flip(e[1][1])), *e[2:]], "graph.onnx in .* was altered"),
        (lambda e: [e[0], ("link:graph.onnx", b""), *e[2:]], "does not list"),
        (lambda e: [(e[0][0], flip(e[0][1])), *e[1:]], "damaged|not valid|altered"),
        (lambda e: [("link:manifest.json", b""), *e[1:]], "does not begin with manifest.json"),
    ],
)
def test_a_bad_archive_enters_nothing(archive, tmp_path, change, message):
    repack(archive, change(members(archive)))
    other = Store(tmp_path / "other store")
    with pytest.raises(gi.PackageError, match=message):
        import_archive(archive, tmp_path / "there.glake", store=other)
    assert not (tmp_path / "there.glake").exists()
    assert not temporaries(tmp_path)
    for digest, _ in other.objects:
        assert other.objects.state(digest, 4096) == "intact"


def test_what_is_no_archive(store, tmp_path):
    for data in (b"", b"text", b"PK\x03\x04" + bytes(1000), bytes(10240)):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(gi.PackageError, match="not a glake-infer archive"):
            import_archive(tmp_path / "a.tar", tmp_path / "there.glake")
    with pytest.raises(gi.PackageError, match="is not a file"):
        import_archive(tmp_path, tmp_path / "there.glake")
    with pytest.raises(gi.PackageError, match="is not a file"):
        import_archive(tmp_path / "absent", tmp_path / "there.glake")


def test_damaged_bytes_give_our_errors_only(archive, tmp_path):
    """60 seeded cuts and 240 changes of single bytes, most of them in headers."""
    rng = random.Random(11)
    data = archive.read_bytes()
    headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    assert len(headers) >= 3
    good = tree(tmp_path / "model.glake")
    for number in range(300):
        changed = bytearray(data)
        if number < 60:
            del changed[rng.randrange(len(data)) :]
        else:
            start = rng.choice(headers) if number % 4 else rng.randrange(len(data) - 512)
            changed[start + rng.randrange(512)] = rng.randrange(256)
            if number % 4:  # a checksum that fits, so that the change is believed
                header = changed[start : start + 512]
                total = sum(header[:148]) + 8 * 32 + sum(header[156:])
                changed[start + 148 : start + 156] = b"%06o\0 " % total
        archive.write_bytes(changed)
        try:
            import_archive(archive, tmp_path / "there.glake", store=Store(tmp_path / "other store"))
        except gi.GlakeError:
            continue
        assert tree(tmp_path / "there.glake") == good
