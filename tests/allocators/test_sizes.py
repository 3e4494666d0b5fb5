"""Amounts of memory as text (sizes.py)."""

from __future__ import annotations

import pytest

from glake_infer.allocators import InputError, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (12345, 12345),
        ("12345", 12345),
        ("7B", 7),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        (" 512MB ", 512 * 10**6),
        ("1.5KiB", 1536),
        ("0.1GB", 10**8),
        ("2TiB", 2 << 40),
        ("0.0000000001TB", 100),
        ("3kb", 3000),
    ],
)
def test_amounts(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "4G",
        "4 Gi B",
        "-1",
        "-4GiB",
        "1e9",
        "4GiB!",
        "\u0661GiB",
        "0x10",
        ".5GiB",
        None,
        1.0,
        True,
        [1],
    ],
)
def test_what_is_no_amount(text):
    with pytest.raises(InputError, match="expected bytes as an integer, or text such as '4GiB'"):
        parse_bytes(text)


def test_a_negative_amount():
    with pytest.raises(InputError, match="cannot be negative: received -5"):
        parse_bytes(-5)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 20, "1.0 MiB"),
        (4 << 30, "4.0 GiB"),
        (3 << 40, "3.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_text(size, text):
    assert format_bytes(size) == text
