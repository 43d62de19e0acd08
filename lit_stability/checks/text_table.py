"""Text that the reports of all checks print: aligned tables, numbers, shortened lists of names.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import isfinite

from lit_stability.printing import printable

WIDTH = 100
"""Characters of a printed line; tables and lists of names may be longer."""


def align(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Returns one line per row, with columns padded to the same width; cells are made printable.

    Args:
        rows: Cells, the header first; all rows have the same number of cells.
        left: Number of leading columns that are left-aligned; the others are right-aligned.

    >>> align([("layer", "rms"), ("head", "0.1"), ("encoder", "12")], left=1)
    ['layer    rms', 'head     0.1', 'encoder   12']
    """
    rows = [[printable(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def format_number(value: float) -> str:
    """Returns a number with three significant digits in a compact form.

    >>> [format_number(x) for x in (0.0, 0.0123456, 12345.6, 1e-12)]
    ['0', '0.0123', '12346', '1.0e-12']
    """
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.1e}"


def format_share(value: float) -> str:
    """Returns a share in percent; a dot for zero, so that other values stand out.

    >>> [format_share(x) for x in (0.0, 1.0, 0.1234, 1e-6)]
    ['.', '100%', '12%', '<0.1%']
    """
    if value == 0:
        return "."
    if value < 1e-3:
        return "<0.1%"
    return f"{value:.1%}" if value < 0.095 else f"{value:.0%}"


def join_names(names: Sequence[str], most: int | None) -> str:
    """Returns the first names, made printable, and how many more there are.

    Args:
        names: All names.
        most: Largest number of names to write; None for all.

    >>> join_names(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = len(names) - len(names[:most])
    return ", ".join(map(printable, names[:most])) + (f" and {more} more" if more else "")


def more_rows(count: int, what: str) -> list[str]:
    """Returns the line below a table that hides `count` rows, or nothing if it hides none.

    >>> more_rows(3, "tensors"), more_rows(0, "tensors")
    (['3 more tensors; --all shows them'], [])
    """
    return [f"{count} more {what}; --all shows them"] if count > 0 else []


def wrap(sentence: str, *, first: str, following: str) -> list[str]:
    """Returns the lines of a sentence, broken at `WIDTH` characters but not within names.

    Args:
        sentence: Text; it is made printable.
        first: Start of the first line.
        following: Start of the other lines.
    """
    return textwrap.wrap(
        printable(sentence),
        WIDTH,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )
