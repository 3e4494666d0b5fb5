"""Profiles and cards as users write them."""

import numpy as np
import pytest

from glake_infer.allocators.errors import InputError
from glake_infer.models.manifest import Shapes, Value
from glake_infer.models.tensorrt.options import EngineOptions, complete_profiles, parse_cards, parse_profiles

IDS = Value(name="ids", dtype="int64", shape=("batch", "length"))
MASK = Value(name="mask", dtype="int64", shape=("batch", "length"))
IMAGE = Value(name="image", dtype="float", shape=("batch", 3, None, None))
FIXED = Value(name="fixed", dtype="float", shape=(1, 8))


def test_profiles_of_the_command_line():
    one = parse_profiles(["ids=1x8:1x128:8x512", "a=b:0=1:2:3"])
    assert one == ({"ids": ((1, 8), (1, 128), (8, 512)), "a=b:0": ((1,), (2,), (3,))},)
    two = parse_profiles(["ids=1:2:3", "mask=1:2:3", "ids=4:5:6", "mask=4:5:6"])
    assert two == ({"ids": ((1,), (2,), (3,)), "mask": ((1,), (2,), (3,))},
                   {"ids": ((4,), (5,), (6,)), "mask": ((4,), (5,), (6,))})  # fmt: skip
    assert parse_profiles([]) == ()


@pytest.mark.parametrize(
    "text", ["ids", "ids=", "=1:2:3", "ids=1x8", "ids=1:2", "ids=1:2:3:4", "ids=1:2:x", "ids=1:-2:3", "ids=1:1e3:9",
             "ids=1:2:99999999999", "ids=1X8:1x8:1x8", "ids=1x1x1x1x1x1x1x1x1:1:1"]
)  # fmt: skip
def test_profiles_that_cannot_be_read(text):
    with pytest.raises(InputError, match=r"--profile .* cannot be read.*NAME=MIN:OPT:MAX"):
        parse_profiles([text])


def test_cards():
    assert parse_cards(["a10", "L4", "3090", "RTX4090", "8.6", "12.0"]) == ("8.6", "8.9", "12.0")
    for text in ("h100", "", "8", "8.x", ".", "1.20"):
        with pytest.raises(
            InputError, match=r"is not known: expected one of a10, 3090, l4, 4090, or a compute"
        ):
            parse_cards([text])


def test_options_are_checked():
    with pytest.raises(InputError, match="'openvino' is no engine"):
        EngineOptions(kind="openvino")
    with pytest.raises(InputError, match="workspace=-1 is no number of bytes"):
        EngineOptions(kind="tensorrt", workspace=-1)
    for workspace in ("1GiB", 1.5, 1 << 66):
        with pytest.raises(InputError, match="is no number of bytes"):
            EngineOptions(kind="tensorrt", workspace=workspace)
    for capabilities in ("8.6", ("86",), ("1.20",), (8.6,), ("8.6", "")):
        with pytest.raises(
            InputError, match=r"are no compute capabilities: expected a tuple of texts such as '8\.9'"
        ):
            EngineOptions(kind="tensorrt", capabilities=capabilities)
    for profiles in (
        {"x": ((1,), (2,), (3,))}, ("x",), ({"x": (1, 2, 3)},), ({"x": ((1,), (2,))},), ({1: ((1,), (2,), (3,))},),
        ({"x": ((1.5,),) * 3},), ({"x": (("1",),) * 3},), ({"x": ((1 << 40,),) * 3},),
    ):  # fmt: skip
        with pytest.raises(InputError, match="cannot be read: expected a tuple of dictionaries"):
            EngineOptions(kind="tensorrt", profiles=profiles)
    EngineOptions(kind="tensorrt", profiles=[{"x": (np.array([1]), [np.int64(2)], (3,))}])


def shapes(minimum, usual, maximum):
    return Shapes(min=minimum, opt=usual, max=maximum)


def test_equal_symbols_fill_in():
    found = complete_profiles([{"ids": ((1, 8), (2, 16), (4, 64))}], [IDS, FIXED, MASK])
    assert found == ({name: shapes((1, 8), (2, 16), (4, 64)) for name in ("ids", "mask")},)
    assert list(found[0]) == ["ids", "mask"]
    assert complete_profiles([], [FIXED]) == ()
    assert complete_profiles([{"fixed": ((1, 8),) * 3}], [FIXED]) == ({},)


def test_a_symbol_that_names_nothing_says_nothing():
    value = Value(name="x", dtype="float", shape=("?", "?"))
    assert complete_profiles([{"x": ((1, 2), (1, 3), (1, 4))}], [value]) == (
        {"x": shapes((1, 2), (1, 3), (1, 4))},
    )


def test_shape_tensors_have_values():
    value = Value(name="size", dtype="int64", shape=(2,))
    found = complete_profiles([{"size": ((1, 1), (64, 64), (512, 512))}], [value], ["size"])
    assert found == ({"size": shapes((1, 1), (64, 64), (512, 512))},)
    with pytest.raises(InputError, match=r"--profile size=1x1:8x8:64x64 .*Of 'size', .* it needs the values"):
        complete_profiles([], [value], ["size"])
    with pytest.raises(
        InputError, match="expects the smallest, the usual and the largest of its 2 values, not its"
    ):
        complete_profiles([{"size": ((2,), (2,), (2,))}], [value], ["size"])
    assert complete_profiles([{"size": ((-1, 1), (-1, 1), (-1, 1))}], [value], ["size"])  # as Reshape has it


def test_inputs_without_a_profile_are_named_with_the_option_to_give():
    with pytest.raises(InputError) as caught:
        complete_profiles([], [IDS, FIXED, MASK, IMAGE])
    text = str(caught.value)
    assert "no optimization profile was given: ids: int64[batch, length], mask: int64[batch, length]" in text
    assert (
        "--profile ids=1x1:8x8:64x64 --profile mask=1x1:8x8:64x64 --profile image=1x3x1x1:8x3x8x8:64x3x64x64"
        in text
    )
    assert "fixed" not in text.replace("that are not fixed", "")
    with pytest.raises(InputError, match=r"profile 2 does not say their shapes: mask"):
        complete_profiles([{"ids": ((1, 8),) * 3}, {"fixed": ((1, 8),) * 3}], [MASK, FIXED, IDS])


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"idz": ((1, 8),) * 3}, r"names the input 'idz', which the model does not have: it has ids"),
        ({"ids": ((1, 8), (1, 8, 1), (1, 8))}, "different ranks"),
        ({"ids": ((2, 8), (1, 8), (4, 8))}, r"2x8:1x8:4x8, is not in order"),
        ({"ids": ((1, 8), (1, 9), (4, 8))}, "is not in order"),
        ({"ids": ((-1, 8), (1, 8), (4, 8))}, "has a negative size"),
        ({"ids": ((1,), (1,), (1,))}, "does not fit the input ids.*expected 2 axes"),
        ({"image": ((1, 1, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))}, "does not fit the input image"),
        (
            {"ids": ((1, 8),) * 3, "mask": ((1, 9),) * 3},
            "gives the axis 'length' of the input 'mask' the sizes 9:9:9",
        ),
    ],
)
def test_profiles_that_do_not_fit(profile, said):
    with pytest.raises(InputError, match=said):
        complete_profiles([profile], [IDS, MASK, IMAGE])
