"""store ls, verify and gc."""

import shutil


def test_ls(shop, fits):
    listing = shop.json("store", "ls")
    assert listing["root"] == str(shop.store.root)
    assert str(shop.folder / "a.glake") in listing["packages"]
    assert listing["bytes"] == sum(entry["bytes"] for entry in listing["objects"])
    assert all(entry.keys() == {"digest", "bytes", "packages"} for entry in listing["objects"])
    out, _ = shop.run("store", "ls", "--objects")
    assert "if every package had its own" in out
    assert listing["objects"][0]["digest"][:16] in out


def test_ls_of_an_empty_store(empty_shop, fits):
    out, _ = empty_shop.run("store", "ls")
    assert "0 of 0 B" in out
    assert empty_shop.json("store", "ls")["objects"] == []


def test_verify_names_the_packages_that_damage_hurts(own_shop, fits):
    assert own_shop.json("store", "verify")["ok"]
    assert "Every object that a package needs is right." in own_shop.run("store", "verify")[0]
    digest = own_shop.json("inspect", "a.glake")["models"][0]["weights"][0]["digest"]
    path = own_shop.store.objects.path(digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    report = own_shop.json("store", "verify", code=2)
    assert report["damaged"] == {digest: [str(own_shop.folder / name) for name in ("a.glake", "b.glake")]}
    assert not report["ok"]
    out, _ = own_shop.run("store", "verify", code=2)
    assert digest[:16] in out
    assert "--remove" in out
    assert "b.glake" in own_shop.error("run", "a.glake")
    assert own_shop.json("store", "verify", "--remove", code=2)["removed"]
    assert own_shop.json("store", "verify", code=2)["missing"].keys() == {digest}
    own_shop.run("convert", "a.onnx")
    assert own_shop.json("store", "verify")["ok"]


def test_gc(own_shop, fits):
    assert own_shop.json("store", "gc")["objects"] == 0
    shutil.rmtree(own_shop.folder / "b.glake")
    planned = own_shop.json("store", "gc", "--dry-run")
    assert planned["dry_run"]
    assert planned["objects"] > 0
    assert planned["vanished"] == [str(own_shop.folder / "b.glake")]
    out, _ = own_shop.run("store", "gc")
    assert f"{planned['objects']} objects" in out
    assert own_shop.json("store", "gc")["objects"] == 0
    assert own_shop.json("store", "verify")["ok"]


def test_gc_waits_unless_told_not_to(own_shop):
    with own_shop.store.using():
        assert "asked not to wait" in own_shop.error("store", "gc", "--no-wait")
