"""The source lines around an operation, which are kept with an incident.

The file may not exist where the incident is looked at. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import linecache

AROUND = 3
"""Lines that are kept before and after the line itself."""
_WIDEST = 160
"""Characters of a line that are kept."""


def lines_around(file: str, line: int) -> tuple[int, str]:
    """Returns the number of the first line that is kept, and the lines as one text.

    Args:
        file: as the interpreter names it; also the name of a notebook's cell.
        line: its number, from 1 on.

    Returns:
        ``(0, "")`` if the file cannot be read, or is shorter. Long lines are cut.

    >>> lines_around("missing.py", 3)
    (0, '')
    """
    everything = linecache.getlines(file) if file else []
    if not 1 <= line <= len(everything):
        return 0, ""
    first = max(1, line - AROUND)
    kept = everything[first - 1 : line + AROUND]
    return first, "\n".join(each.rstrip()[:_WIDEST] for each in kept)
