"""How often incidents are announced: a pure function of times. Imports nothing else."""

from __future__ import annotations


class RateLimit:
    """Lets one message through in each interval, and counts the others.

    Args:
        seconds: length of the interval.

    >>> limit = RateLimit(60.0)
    >>> [limit.take(time) for time in (0.0, 10.0, 20.0, 70.0, 140.0)]
    [0, None, None, 2, 0]
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = -float("inf")
        self._held_back = 0

    def take(self, now: float) -> int | None:
        """Asks for a message.

        Args:
            now: the time, in seconds.

        Returns:
            How many were held back since the last message, or None if this one is too.
        """
        if now - self._last < self._seconds:
            self._held_back += 1
            return None
        held_back, self._last, self._held_back = self._held_back, now, 0
        return held_back
