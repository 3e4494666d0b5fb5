"""What the texts of a command line mean to the models of a run."""

import numpy as np
import pytest

from glake_infer.allocators.errors import InputError
from glake_infer.models.feeds import feeds_of, parse_overrides, parse_shapes
from glake_infer.models.manifest import Value

IDS = Value(name="ids", dtype="int64", shape=("batch", "length"))
MASK = Value(name="mask", dtype="int64", shape=("batch", "past + length"))
CACHE = Value(name="cache:0", dtype="float", shape=(2, "batch", "past", None))
INPUTS = [IDS, MASK, CACHE]


def feed(*, model="a", inputs=INPUTS, overrides=(), shapes=(), used=None):
    rng = np.random.default_rng(0)
    return feeds_of(model, inputs, inputs, overrides, shapes, rng, set() if used is None else used)


def shapes_of(feeds):
    return {name: array.shape for name, array in feeds.items()}


def test_undeclared_axes_are_one_and_sums_are_sums():
    feeds, generated = feed()
    assert shapes_of(feeds) == {"ids": (1, 1), "mask": (1, 2), "cache:0": (2, 1, 1, 1)}
    assert generated == ("ids", "mask", "cache:0")


def test_a_shape_fixes_the_symbols_of_its_axes():
    feeds, _ = feed(shapes=parse_shapes(["ids=3,8", "cache:0=2,3,5,7"], ["a"]))
    assert shapes_of(feeds) == {"ids": (3, 8), "mask": (3, 13), "cache:0": (2, 3, 5, 7)}


def test_a_fed_array_fixes_them_too(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 6), np.int64))
    feeds, generated = feed(overrides=parse_overrides([f"ids={tmp_path}/x.npy"], ["a"]))
    assert shapes_of(feeds) == {"ids": (4, 6), "mask": (4, 7), "cache:0": (2, 4, 1, 1)}
    assert generated == ("mask", "cache:0")


def test_a_text_that_names_the_model_beats_one_that_does_not():
    shapes = parse_shapes(["b:ids=2,2", "ids=1,5", "2:mask=1,9"], ["a", "b"])
    assert [(item.model, item.name) for item in shapes] == [("b", "ids"), (None, "ids"), ("b", "mask")]
    used = set()
    assert shapes_of(feed(model="a", shapes=shapes, used=used)[0])["ids"] == (1, 5)
    assert used == {id(shapes[1])}
    assert shapes_of(feed(model="b", shapes=shapes, used=used)[0])["ids"] == (2, 2)
    assert len(used) == 3


def test_names_may_hold_colons_and_equals_signs(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(1, np.float32))
    found = parse_overrides([f"{name}={tmp_path}/x.npy" for name in ("in:0", "a:in:0", "9:x", "p=q")], ["a"])
    assert [(item.model, item.name) for item in found] == [
        (None, "in:0"),
        ("a", "in:0"),
        (None, "9:x"),
        (None, "p=q"),
    ]


def test_npz_files_hold_one_or_many(tmp_path):
    np.savez(tmp_path / "many.npz", ids=np.zeros(1), mask=np.ones(2))
    np.savez(tmp_path / "one.npz", whatever=np.zeros(3))
    found = parse_overrides(
        [f"a:{tmp_path}/many.npz", f"mask={tmp_path}/many.npz", f"x={tmp_path}/one.npz"], ["a"]
    )
    assert [(item.model, item.name, item.value.shape) for item in found] == [
        ("a", "ids", (1,)), ("a", "mask", (2,)), (None, "mask", (2,)), (None, "x", (3,)),
    ]  # fmt: skip


def test_a_scalar_shape():
    assert parse_shapes(["ids="], ["a"])[0].value == ()


@pytest.mark.parametrize("text", ["ids", "ids=1,-2", "ids=1,x", "=1,2", "1,2"])
def test_bad_shapes(text):
    with pytest.raises(InputError, match="expected \\[MODEL:\\]NAME=N,N"):
        parse_shapes([text], ["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}/none.npy", "NAME=FILE.npy"),
        ("ids={}/none.npy", "there is no file"),
        ("ids={}/text.npy", "numpy.save"),
        ("ids={}/objects.npy", "plain arrays"),
        ("ids={}/many.npz", "it has a, b"),
        ("ids={}/short.npz", "numpy.save"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(InputError, match=message):
        parse_overrides([text.format(tmp_path)], ["a"])
