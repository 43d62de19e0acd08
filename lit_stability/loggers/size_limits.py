"""How much the incidents of one fit may add to an event file.

An event file only grows, and TensorBoard reads all of it. A run with thousands of incidents would
otherwise write tens of megabytes within minutes: each incident comes with the steps around it.
``incidents.jsonl`` has every incident in any case. Imports nothing heavy.

=============================  ========  ==========================================================
what                           at most   afterwards
=============================  ========  ==========================================================
records with their steps       8 MiB     records without the steps around them
records without them           4 MiB     only those that were begun, and the one that stops the fit
steps that are not logged      8 MiB     only those of ``log_every_n_steps``
incidents as text              4 MiB     none
=============================  ========  ==========================================================

Together at most 24 MiB per fit, and the one record, or the few, that end what was begun.
"""

from __future__ import annotations

MIB = 2**20
WITH_STEPS, WITHOUT_STEPS, EXTRA_STEPS, TEXTS = 8 * MIB, 4 * MIB, 8 * MIB, 4 * MIB
"""Limits in bytes, per fit and logger."""


class SizeLimit:
    """Counts bytes up to a limit.

    Args:
        most: the limit in bytes.

    >>> limit = SizeLimit(100)
    >>> limit.take(60), limit.take(60), limit.take(40), limit.reached
    (True, False, True, True)
    """

    def __init__(self, most: int) -> None:
        self._left = most

    @property
    def reached(self) -> bool:
        """Whether no byte is left."""
        return self._left <= 0

    def take(self, size: int) -> bool:
        """Counts a number of bytes if they fit; returns whether they do."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def spend(self, size: int) -> None:
        """Counts bytes that are written in any case."""
        self._left -= size


_AROUND = 200
"""Bytes of an event around its text: tag, metadata, time, checksums."""


def bytes_of(text: str) -> int:
    """Returns the size of an event that holds a text.

    >>> bytes_of("层a") - bytes_of("")
    4
    """
    return len(text.encode("utf8", "backslashreplace")) + _AROUND
