"""Kin: which weights come and go together, and where versions of a large one differ. Manifests alone, no bytes."""

import re
import shutil

import pytest

from glake_infer.digest import digest_of
from glake_infer.layout import LARGE, PIECE
from glake_infer.models import kin, manifest
from glake_infer.models.kin import MOST_KIN, hints
from glake_infer.models.manifest import Manifest, Run, Source, Variant, Weight, run_digest
from glake_infer.models.package import Package

COUNT = LARGE // PIECE


def digest(text):
    return digest_of(text.encode())


def small(name, version=""):
    return Weight(name=name, digest=digest(name + version), bytes=4096, dtype="float", shape=(1024,))


def large(name, pieces, size=None):
    """A weight whose pieces are told by letters: "aab" has two equal ones and another."""
    return Weight(
        name=name,
        digest=digest(name + pieces),
        bytes=size or len(pieces) * PIECE,
        dtype="float",
        shape=(1024,),
        pieces="".join(map(digest, pieces)),
    )


@pytest.fixture
def write(store, tmp_path):
    """Write a package of weights and register it, as convert does."""

    def make(name, *weights):
        folder = tmp_path / f"{name}.glake"
        run = Run(
            first=0, count=len(weights), bytes=sum(w.bytes for w in weights), digest=run_digest(weights)
        )
        made = Manifest(
            producer="test",
            source=Source(name="model.onnx", digest=digest("source")),
            inputs=(),
            outputs=(),
            variants={"onnx": Variant(graph="graph.onnx", digest=digest("graph"), purpose="p")},
            weights=weights,
            runs=(run,),
        ).sealed()
        folder.mkdir()
        (folder / "manifest.json").write_bytes(made.to_json())
        store.register(folder, made.identity, made.distinct)
        return Package(folder, store)

    return make


def hints_by_name(package):
    found = hints(package, package.manifest.distinct)
    assert found.keys() == package.manifest.distinct.keys()
    return {weight.name: found[weight.digest] for weight in package.manifest.weights}


def groups(package):
    """The names of weights that are together, as sets."""
    found = {}
    for name, hint in hints_by_name(package).items():
        found.setdefault(hint.group, set()).add(name)
    return sorted(map(sorted, found.values()))


def edges(package, name="large"):
    """Those inside the weight, in pieces; one at its end says no more than that there is a version."""
    found = hints_by_name(package)[name].edges
    size = next(weight.bytes for weight in package.manifest.weights if weight.name == name)
    assert all(edge % PIECE == 0 and 0 < edge <= size for edge in found)
    assert list(found) == sorted(set(found))
    return [edge // PIECE for edge in found if edge < size]


def same_then(pieces):
    """A weight's pieces: those given at its end, and equal ones before."""
    return "a" * (COUNT - len(pieces)) + pieces


def test_the_constants_are_those_of_the_format():
    assert PIECE == manifest.PIECE


class TestGroups:
    def test_alone_in_the_store_all_are_together(self, write):
        assert groups(write("one", small("a"), small("b"))) == [["a", "b"]]

    def test_weights_that_the_same_packages_have_are_together(self, write):
        shared, some, few = (small(name) for name in ("shared", "some", "few"))
        one = write("one", shared, small("shared2"), some, few, small("own"), small("own2"))
        write("two", shared, small("shared2"), some, small("x"))
        write("three", shared, small("shared2"), some, few, small("y"))
        write("four", shared, small("shared2"))
        write("stranger", small("z"))
        assert groups(one) == [["few"], ["own", "own2"], ["shared", "shared2"], ["some"]]
        found = hints_by_name(one)
        assert found["own"].group == frozenset()
        assert [len(found[name].group) for name in ("few", "some", "shared")] == [1, 2, 3]

    def test_equal_names_with_other_bytes_are_not_the_same(self, write):
        one = write("one", small("a"), small("b"))
        write("two", small("a"), small("b", "other"))
        assert groups(one) == [["a"], ["b"]]

    def test_the_most_related_packages_are_looked_at(self, write, monkeypatch):
        """Of more than MOST_KIN those with the most weights in common, whatever their order."""
        monkeypatch.setattr(kin, "MOST_KIN", 2)
        a, b, c, d = (small(name) for name in "abcd")
        one = write("one", a, b, c, d)
        write("k1", d)
        write("k2", a, b, c)
        write("k3", a, b)
        write("k4", c)
        assert groups(one) == [["a", "b"], ["c"], ["d"]]
        found = hints_by_name(one)
        assert [sorted(found[name].group) for name in "abcd"] == [[0, 1], [0, 1], [0], []]

    def test_a_crowd_of_packages(self, write):
        weights = [small(f"w{number}") for number in range(MOST_KIN + 8)]
        one = write("one", *weights)
        for number in range(len(weights)):  # number + 1 weights in common
            write(f"k{number}", *weights[: number + 1])
        found = hints_by_name(one)
        assert found["w0"].group == frozenset(range(MOST_KIN))
        assert sum(hint.group == found["w0"].group for hint in found.values()) == 9
        assert hints_by_name(one) == found

    def test_only_the_digests_that_are_asked_for(self, write):
        """Prepared weights, which the manifest does not have, are with the package's own."""
        one = write("one", small("a"), small("b"))
        write("two", small("b"))
        asked = [digest("a"), digest("prepared")]
        found = hints(one, iter(asked))
        assert found == dict.fromkeys(asked, kin.Hint(frozenset(), (), ()))
        assert hints(one, []) == {}

    def test_the_package_itself_is_no_kin_however_its_path_is_written(self, write, store, monkeypatch):
        one = write("one", small("a"), small("b"))
        monkeypatch.chdir(one.path.parent)
        again = Package("one.glake", store)
        assert {hint.group for hint in hints_by_name(again).values()} == {frozenset()}


class TestPieces:
    def test_only_weights_that_have_them(self, write):
        one = write("one", large("large", "a" * COUNT), small("a"))
        found = hints_by_name(one)
        assert found["large"].pieces == (digest("a"),) * COUNT
        assert found["a"].pieces == ()
        assert found["large"].edges == ()

    def test_edges_are_where_a_version_begins_or_stops_to_be_equal(self, write):
        one = write("one", large("large", same_then("abcdef")))
        write("kin", large("large", same_then("abXYef")), small("x"))
        assert edges(one) == []  # nothing that both have: no kin
        first = COUNT - 6
        two = write("two", large("large", same_then("abcdef")), small("x"))
        assert edges(two) == [first + 2, first + 4]

    def test_edges_of_all_versions_together(self, write):
        trunk = small("trunk")
        one = write("one", large("large", "s" + same_then("")), trunk)
        write("start", large("large", "X" + same_then("")), trunk)
        write("end", large("large", "s" + same_then("X")), trunk)
        write("same", large("large", "s" + same_then("")), trunk)
        assert edges(one) == [1, COUNT]

    def test_versions_that_are_longer_or_shorter(self, write):
        trunk = small("trunk")
        one = write("one", large("large", same_then("") + "bb"), trunk)
        write("shorter", large("large", same_then("")), trunk)
        assert edges(one) == [COUNT]
        write("longer", large("large", same_then("") + "bbb"), trunk)
        assert edges(one) == [COUNT]
        own = write("own", large("large", same_then("")), trunk)
        assert hints_by_name(own)["large"].edges == (COUNT * PIECE,)  # so that it gets a region of its own

    def test_versions_of_which_nothing_is_equal_have_no_edges(self, write):
        trunk = small("trunk")
        one = write("one", large("large", "a" * COUNT), trunk)
        write("kin", large("large", "b" * COUNT), trunk)
        assert edges(one) == []

    def test_versions_are_told_by_name(self, write):
        trunk = small("trunk")
        one = write("one", large("large", same_then("ab")), large("head", "h" * COUNT), trunk)
        write("kin", large("renamed", same_then("aX")), large("head", "h" * (COUNT - 1) + "i"), trunk)
        assert edges(one) == []
        assert edges(one, "head") == [COUNT - 1]

    def test_weights_below_the_size_have_none(self, write):
        trunk = small("trunk")
        one = write("one", large("large", "a" * COUNT, LARGE - 1), trunk)
        write("kin", large("large", "a" * (COUNT - 1) + "b"), trunk)
        assert edges(one) == []
        assert hints_by_name(one)["large"].pieces != ()

    def test_versions_beyond_the_most_kin_are_not_looked_at(self, write, monkeypatch):
        monkeypatch.setattr(kin, "MOST_KIN", 1)
        a, b = small("a"), small("b")
        one = write("one", large("large", same_then("ab")), a, b)
        write("k1", large("large", same_then("Xb")), a)
        write("k2", large("large", same_then("aX")), a, b)
        assert edges(one) == [COUNT - 1]


class TestDamage:
    """Hints are no more than hints: whatever is wrong with other packages, there are some."""

    @pytest.fixture
    def one(self, write):
        trunk = small("trunk")
        one = write("one", large("large", same_then("abc")), trunk, small("own"))
        write("good", large("large", same_then("abX")), trunk)
        write("bad", large("large", same_then("Xbc")), trunk)
        return one

    def test_before(self, one):
        assert edges(one) == [COUNT - 3, COUNT - 2, COUNT - 1]

    @pytest.mark.parametrize("damage", ["gone", "moved", "cut", "altered", "newer", "no JSON", "a file"])
    def test_packages_that_are_gone_or_damaged_are_ignored(self, one, damage):
        folder = one.path.with_name("bad.glake")
        file = folder / "manifest.json"
        data = file.read_bytes()
        if damage in ("gone", "a file"):
            shutil.rmtree(folder)
            if damage == "a file":
                folder.write_bytes(data)
        elif damage == "moved":
            folder.rename(folder.with_name("elsewhere.glake"))
        else:
            change = {
                "cut": data[:-100],
                "altered": data.replace(b'"test"', b'"tset"'),
                "newer": re.sub(rb'("version": ?)\d+', rb"\g<1>99", data),
                "no JSON": b"\xff\0",
            }[damage]
            assert change != data
            file.write_bytes(change)
        assert edges(one) == [COUNT - 1]
        assert groups(one) == [["large", "own"], ["trunk"]]

    @pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b'{"path": 1}'])
    def test_a_damaged_record_leaves_all_weights_in_one_group(self, one, store, damage):
        next(store.packages.glob("*.json")).write_bytes(damage)
        found = hints_by_name(one)
        assert {hint.group for hint in found.values()} == {frozenset()}
        assert len(found["large"].pieces) == COUNT
        assert edges(one) == []

    def test_a_record_that_cannot_be_read_leaves_all_weights_in_one_group(self, one, store):
        """Of another user of the machine's store, say."""
        (store.packages / "0123.json").mkdir()
        assert {hint.group for hint in hints_by_name(one).values()} == {frozenset()}

    def test_a_store_without_records(self, one, store):
        shutil.rmtree(store.packages)
        assert groups(one) == [["large", "own", "trunk"]]
