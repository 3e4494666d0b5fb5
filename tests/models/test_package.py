import json
import os
import shutil

import building
import onnx
import pytest
from folders import flip_bit, temporaries, tree

import glake_infer as gi
from glake_infer.digest import digest_of
from glake_infer.maintenance import gc
from glake_infer.models.convert import convert
from glake_infer.models.graph import initializers
from glake_infer.models.manifest import _identity
from glake_infer.models.package import Package, check_target, default_target


@pytest.fixture
def package(store, tmp_path):
    """A package of three weights of 4 KiB; `other.glake` needs the first one too."""
    building.save(building.inline(), tmp_path / "model.onnx")
    convert(tmp_path / "model.onnx")
    building.save(building.chain(building.matrix(1)), tmp_path / "other.onnx")
    convert(tmp_path / "other.onnx")
    return tmp_path / "model.glake"


def rewrite(package, change_graph=None, change_manifest=None):
    """Alter a package and seal it again, as an attacker or a buggy tool would."""
    manifest = json.loads((package / "manifest.json").read_bytes())
    if change_graph:
        graph = onnx.load_model_from_string((package / "graph.onnx").read_bytes())
        change_graph(graph)
        data = graph.SerializeToString()
        (package / "graph.onnx").write_bytes(data)
        manifest["variants"]["onnx"]["digest"] = digest_of(data)
    if change_manifest:
        change_manifest(manifest)
    manifest["identity"] = _identity(manifest)
    (package / "manifest.json").write_text(json.dumps(manifest))


def object_of(package, store, index=0):
    path = store.objects.path(Package(package).manifest.weights[index].digest)
    path.chmod(0o644)
    return path


def test_a_sound_package(package, store):
    opened = Package(package)
    opened.check_present()
    assert [name for name, _ in opened.verify()] == list(opened.manifest.distinct)
    assert [item.tensor.name for item in initializers(opened.graph())] == ["w0", "w1", "w2"]
    assert sorted(p.name for p in package.iterdir()) == ["graph.onnx", "manifest.json"]


def test_a_missing_weight(package, store):
    object_of(package, store, 1).unlink()
    with pytest.raises(
        gi.PackageError,
        match=r"the weight 'w1' of .*model.glake is missing.*Convert model.onnx again.*GLAKE_STORE",
    ):
        Package(package).check_present()
    convert(package.with_suffix(".onnx"))
    Package(package).check_present()


def test_a_short_weight(package, store):
    os.truncate(object_of(package, store, 1), 4095)
    with pytest.raises(
        gi.PackageError, match=r"the weight 'w1' .* is short in the store.*should hold 4096 bytes"
    ):
        Package(package).check_present()
    convert(package.with_suffix(".onnx"))
    Package(package).check_present()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_weight_changed_on_disk_names_all_packages_it_hurts(package, store, tmp_path, hidden):
    path = object_of(package, store)
    status = path.stat()
    flip_bit(path)
    if hidden:  # somebody restored the file's times: only reading the bytes tells
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        Package(package).check_present()
    message = (
        r"the weight 'w0' was changed on disk: .*Hurt: .*/model.glake, .*/other.glake.*store verify --remove"
    )
    with pytest.raises(gi.DigestMismatchError, match=message):
        list(Package(package).verify())
    with pytest.raises(gi.DigestMismatchError, match=message):
        gi.export(package, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(gi.DigestMismatchError, match=message):
        gi.export_archive(package, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()
    with pytest.raises(gi.DigestMismatchError, match=message):
        gi.load(package)
    assert not temporaries(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: d[:-1],
        lambda d: d + b"x",
        lambda d: d.replace(b"MatMul", b"MatMuI", 1),
        lambda d: d[:50] + b"\0" + d[51:],
    ],
)
def test_an_altered_graph(package, damage):
    (package / "graph.onnx").write_bytes(damage((package / "graph.onnx").read_bytes()))
    with pytest.raises(gi.PackageError, match=r"graph.onnx was altered.*Convert model.onnx again"):
        Package(package).graph()


def test_a_missing_graph(package):
    (package / "graph.onnx").unlink()
    with pytest.raises(gi.PackageError, match=r"graph.onnx cannot be read: No such file"):
        Package(package).graph()


def test_a_graph_that_is_no_onnx(package):
    (package / "graph.onnx").write_bytes(b"\xff\xff")
    rewrite(package, change_manifest=lambda m: m["variants"]["onnx"].update(digest=digest_of(b"\xff\xff")))
    with pytest.raises(gi.PackageError, match="is not an ONNX graph"):
        Package(package).graph()


def an_extra_weight(graph):
    copy = graph.graph.initializer.add()
    copy.CopyFrom(graph.graph.initializer[0])
    copy.name = "extra"


def another_file(graph):
    graph.graph.initializer[0].external_data[0].value = "../../../etc/passwd"


def an_offset(graph):
    graph.graph.initializer[0].external_data[1].value = "8"


def another_shape(graph):
    graph.graph.initializer[0].dims[:] = [64, 16]


def fewer_weights(graph):
    graph.graph.initializer.pop()


def swapped(graph):
    a, b = graph.graph.initializer[0], graph.graph.initializer[1]
    a.name, b.name = b.name, a.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (an_extra_weight, "has the weight 'extra', which the manifest does not list"),
        (another_file, "the weight 'w0' of .* does not fit the manifest"),
        (an_offset, "does not fit"),
        (another_shape, "does not fit"),
        (swapped, "does not fit"),
        (fewer_weights, "lists the weight 'w2', which .* does not use"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest(package, change, message):
    rewrite(package, change)
    with pytest.raises(gi.PackageError, match=message):
        Package(package).graph()
    with pytest.raises(gi.PackageError, match=message):
        gi.load(package)


def test_a_package_from_another_store(package, tmp_path):
    with pytest.raises(
        gi.PackageError, match=r"'w0' .* is missing .*set GLAKE_STORE to it \(now .*elsewhere\)"
    ):
        Package(package, gi.Store(tmp_path / "elsewhere")).check_present()


def test_opening_registers_a_package_where_it_is(package, store, tmp_path):
    (tmp_path / "far").mkdir()
    moved = tmp_path / "far" / "m.glake"
    shutil.move(package, moved)
    Package(moved)
    assert str(moved) in store.users_of(Package(moved).manifest.weights[0].digest)
    gc(store)
    Package(moved).check_present()


def test_a_read_only_store_serves_its_packages(package, store, read_only, tmp_path):
    read_only(store.root)
    shutil.move(package, tmp_path / "moved.glake")
    opened = Package(tmp_path / "moved.glake")
    opened.check_present()
    gi.export(tmp_path / "moved.glake", tmp_path / "out", store=gi.Store())
    with pytest.raises(gi.StoreError, match="may not write to"):
        convert(building.save(building.half(), tmp_path / "half.onnx"))
    assert not temporaries(tmp_path)


# Targets


def test_targets(tmp_path):
    assert default_target(tmp_path / "a.b.onnx") == tmp_path / "a.b.glake"
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    check_target(tmp_path / "new.glake")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "exists and is not a package: it was left alone.*-o"),
        ("folder", "exists and is not a package"),
        ("link", "exists and is not a package"),
        ("absent/x.glake", "folder .*absent does not exist"),
        ("file/x.glake", "does not exist"),
        ("n" * 300, "cannot be written"),
        ("zero\0byte", "cannot be written"),
        ("loop", "cannot be written"),
        ("/", "exists and is not a package"),
    ],
)
def test_what_a_package_must_not_replace(store, tmp_path, name, message):
    building.save(building.inline(), tmp_path / "model.onnx")
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    before = tree(tmp_path)
    with pytest.raises(gi.InputError, match=message):
        convert(tmp_path / "model.onnx", tmp_path / name)
    assert tree(tmp_path) == before


def test_long_names_and_links_as_targets(store, tmp_path):
    building.save(building.inline(), tmp_path / "model.onnx")
    convert(tmp_path / "model.onnx", tmp_path / ("n" * 255))
    Package(tmp_path / ("n" * 255)).check_present()
    (tmp_path / "link.glake").symlink_to(tmp_path / ("n" * 255))
    convert(tmp_path / "model.onnx", tmp_path / "link.glake")
    assert (tmp_path / "link.glake").is_symlink()
    Package(tmp_path / "link.glake").check_present()
    assert not temporaries(tmp_path)


def test_a_package_is_replaced_by_a_new_one(package, store, tmp_path):
    convert(tmp_path / "other.onnx", package)
    assert [weight.name for weight in Package(package).manifest.weights] == ["w0"]
    assert not temporaries(tmp_path)
    assert gc(store).objects == 2
    Package(package).check_present()


def test_a_package_is_replaced_where_folders_cannot_be_exchanged(package, monkeypatch, tmp_path):
    class NoExchange:
        def __init__(self, *_, **__):
            pass

    monkeypatch.setattr("ctypes.CDLL", NoExchange)
    convert(tmp_path / "other.onnx", package)
    assert [weight.name for weight in Package(package).manifest.weights] == ["w0"]
    assert not temporaries(tmp_path)
