"""Amounts of memory as text: "4GiB", "512MB"."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(amount: int | str) -> int:
    """Return an amount of memory in bytes.

    `amount` is an integer (bytes) or a number with a unit: B, KB, MB, GB, TB (powers of 1000) or KiB,
    MiB, GiB, TiB (powers of 1024), in either case; fractions are rounded down to a byte.

    Raises `InputError` for anything else, and for negative amounts.
    """
    from .errors import InputError

    if isinstance(amount, int) and not isinstance(amount, bool):
        if amount < 0:
            raise InputError(f"an amount of memory cannot be negative: received {amount}")
        return amount
    if isinstance(amount, str):
        match = _AMOUNT.fullmatch(amount)
        if match and (unit := _UNITS.get(match[2].lower())):
            whole, _, fraction = match[1].partition(".")
            size: int = int(whole) * unit + int(fraction or 0) * unit // 10 ** len(fraction)
            return size
    raise InputError(
        f"{amount!r} is not an amount of memory: expected bytes as an integer, or text such as '4GiB' or "
        "'512MB' (units: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB)"
    )


def format_bytes(count: int) -> str:
    """Return an amount of memory as text with a unit of 1024's, such as "4.0 GiB"."""
    if abs(count) < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if abs(value) < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"
