"""Reads a number of bytes that a user has written. Imports neither torch nor Lightning."""

from __future__ import annotations

import re

_PREFIXES = "kmgt"
_UNITS = {
    **{"": 1, "b": 1},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(name: str, value: int | str) -> int:
    """Returns the bytes of a size such as ``"4 GiB"``, ``"500 MB"`` or ``2**30``.

    Args:
        name: of the argument, for the message of an error.
        value: a whole number of bytes, or a number with one of the units B, kB, MB, GB, TB (powers
            of 1000) and KiB, MiB, GiB, TiB (powers of 1024).

    Raises:
        ValueError: if it is neither, or less than one byte.

    >>> parse_bytes("memory_budget", "1.5 KiB"), parse_bytes("memory_budget", 7)
    (1536, 7)
    >>> parse_bytes("limit", "4 gigs")
    Traceback (most recent call last):
    ...
    ValueError: limit must be bytes as a whole number, or a size such as '4 GiB', got '4 gigs'
    """
    found = _bytes_of(value)
    if found is None or found < 1:
        raise ValueError(
            f"{name} must be bytes as a whole number, or a size such as '4 GiB', got {value!r}"
        )
    return found


def _bytes_of(value: object) -> int | None:
    if type(value) is int:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = None if match is None else _UNITS.get(match[2].lower())
    return None if match is None or unit is None else int(float(match[1]) * unit)


def as_text(nbytes: int) -> str:
    """Returns a number of bytes for people: in KiB, from 1 MiB on in MiB, from 10 GiB on in GiB.

    >>> as_text(1536), as_text(3 * 2**19), as_text(24 * 2**30)
    ('1.5 KiB', '1.5 MiB', '24.0 GiB')
    """
    power, unit = (1, "KiB") if nbytes < 2**20 else (2, "MiB")
    power, unit = (3, "GiB") if nbytes >= 10 * 2**30 else (power, unit)
    return f"{nbytes / 1024**power:.1f} {unit}"
