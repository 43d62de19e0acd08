"""Refusals in a row, which steps that are taken again after a rollback do not end."""

from __future__ import annotations


class Row:
    """Counts refusals that no newly accepted step lies between.

    After a rollback steps are accepted that were accepted before: they end no row. It goes on if
    the next refusal is at the step of the last one; at another, other weights have led to other
    trouble, and it begins anew.

    >>> row = Row()
    >>> [row.refused(step) for step in (7, 7, 8)]
    [1, 2, 3]
    >>> row.accepted(6); row.accepted(7); row.refused(8)
    4
    >>> row.accepted(6); row.refused(7)
    1
    >>> row.accepted(7); row.refused(8)
    1
    >>> row.accepted(7); row.refused(8, changed=False)
    1
    """

    def __init__(self) -> None:
        self._count = 0
        self._step = -1
        """Of the last refusal."""
        self._again = False
        """Whether steps were taken again since."""

    def refused(self, step: int, *, changed: bool = True) -> int:
        """Count a refusal; returns how many there are in the row.

        Args:
            step: at which it is.
            changed: whether anything was changed since the last one. What comes back where steps
                were taken again just as they were had to come back, and is not counted.
        """
        goes_on = step == self._step or not self._again
        counts = changed or not self._again
        self._count = self._count + counts if goes_on else 1
        self._step, self._again = step, False
        return self._count

    def accepted(self, step: int) -> None:
        """End the row with an accepted step, unless it was accepted before."""
        if step >= self._step:
            self._count, self._step = 0, -1
        self._again = step < self._step
