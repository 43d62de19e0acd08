"""Counts consecutive rejected steps; replayed steps do not reset the count."""


class RejectionStreak:
    """Counts rejections without a newly accepted step in between.

    Steps that a rollback replays were accepted before and do not reset the count. After them it
    goes on if the next rejection is at the step of the last one. At another step the weights have
    led to different trouble, and the count restarts.

    >>> streak = RejectionStreak()
    >>> [streak.rejected(step) for step in (7, 7, 8)]
    [1, 2, 3]
    >>> streak.accepted(6); streak.accepted(7); streak.rejected(8)
    4
    >>> streak.accepted(6); streak.rejected(7)
    1
    >>> streak.accepted(7); streak.rejected(8)
    1
    >>> streak.accepted(7); streak.rejected(8, changed=False)
    1
    """

    def __init__(self) -> None:
        self._count = 0
        self._step = -1
        """Step of the last rejection."""
        self._replayed = False
        """Whether steps were replayed since then."""

    def rejected(self, step: int, *, changed: bool = True) -> int:
        """Counts a rejection and returns the length of the streak.

        Args:
            step: the rejected step.
            changed: whether anything was changed since the last rejection. If the same steps were
                replayed without a change, the same result was certain and is not counted.
        """
        goes_on = step == self._step or not self._replayed
        counts = changed or not self._replayed
        self._count = self._count + counts if goes_on else 1
        self._step, self._replayed = step, False
        return self._count

    def accepted(self, step: int) -> None:
        """Ends the streak with an accepted step, unless the step is a replayed one."""
        if step >= self._step:
            self._count, self._step = 0, -1
        self._replayed = step < self._step
