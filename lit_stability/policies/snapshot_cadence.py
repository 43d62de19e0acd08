"""Decides how many steps lie between two snapshots, from what a snapshot costs.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

_LONGEST = 16
"""Largest distance, as a multiple of the shortest: a replay must not take for ever."""
_UNNOTICED = 0.2e-3
"""Seconds a step. Snapshots that cost less are as frequent as allowed, whatever their share: a
small model gains nothing from a distance that depends on how busy the machine was."""
_FIRST_DECISION = 6
"""Number of the capture after which the distance is decided first. Those before the last three
allocate their memory: each of two snapshots once, and again for the state of the optimizers."""
_MEASURED = 3
"""Captures before each decision that are measured."""


class SnapshotCadence:
    """The distance between two snapshots, in optimizer steps.

    The distance is ``every`` steps, or the first of its doublings at which snapshots cost no more
    than a share of the training time. It is never shorter: damage that is detected late is undone
    by way of the older snapshot, and a shorter distance would bring that nearer. Medians of the
    last steps and captures decide, after the capture 6, 12, 24 and so on, so that one slow capture
    changes nothing and a run has few distances.

    Args:
        every: shortest distance, in steps.
        cost: share of the training time, in (0, 1); None to keep the shortest distance.

    >>> cadence = SnapshotCadence(every=20, cost=0.01)
    >>> cadence.stepped(0.1)
    >>> for _ in range(6):
    ...     cadence.captured(0.05)  # 2.5 ms a step at 20 steps; 1 ms are allowed
    >>> cadence.decides, cadence.wanted()
    (True, 80)
    >>> cadence.agree([(80, 1000), (40, 70)]), cadence.distance
    (True, 40)
    """

    def __init__(self, every: int, cost: float | None) -> None:
        self.every, self.cost = every, cost
        self.distance = every
        """Steps between two snapshots now."""
        self._steps: deque[float] = deque(maxlen=64)
        self._captures: deque[float] = deque(maxlen=_MEASURED)
        self._taken, self._decision = 0, _FIRST_DECISION

    @property
    def longest(self) -> int:
        """The largest distance that there may be."""
        return self.every * (1 if self.cost is None else _LONGEST)

    @property
    def measures(self) -> bool:
        """Whether the next capture should be measured."""
        return self.cost is not None and self._taken >= self._decision - _MEASURED

    @property
    def decides(self) -> bool:
        """Whether the distance is decided now, after a capture."""
        return self.cost is not None and self._taken >= self._decision and bool(self._steps)

    def stepped(self, seconds: float) -> None:
        """Records how long a step took, without a capture."""
        self._steps.append(seconds)

    def captured(self, seconds: float | None) -> None:
        """Counts a capture, and records how long it took if it was measured."""
        self._taken += 1
        if seconds is not None:
            self._captures.append(seconds)

    def wanted(self) -> int:
        """Returns the distance at which snapshots cost no more than their share on this rank."""
        assert self.cost is not None
        allowed = max(self.cost * self.step_seconds, _UNNOTICED)
        distance = self.every
        while distance < self.longest and self.capture_seconds > allowed * distance:
            distance *= 2
        return distance

    def agree(self, ranks: Iterable[tuple[int, float]]) -> bool:
        """Sets the same distance on all ranks: the largest that one wants and all have room for.

        Args:
            ranks: the distance that each rank wants, and the largest that it has room for.

        Returns:
            Whether the distance has changed.
        """
        before, self._decision = self.distance, 2 * self._taken
        wanted, rooms = zip(*ranks, strict=True)
        self.distance = max(wanted)
        while self.distance > self.every and self.distance > min(rooms):
            self.distance //= 2
        return self.distance != before

    @property
    def step_seconds(self) -> float:
        """Duration of a step, the median of the last 64; 0 if none is known."""
        return statistics.median(self._steps or [0.0])

    @property
    def capture_seconds(self) -> float:
        """Duration of a capture, the median of the last three measured; 0 if none is known."""
        return statistics.median(self._captures or [0.0])

    def in_words(self) -> str:
        """Returns the shortest distance, and the largest that there may be.

        >>> SnapshotCadence(every=20, cost=0.01).in_words(), SnapshotCadence(5, None).in_words()
        ('20 to 320 steps', '5 steps')
        """
        to = "" if self.cost is None else f" to {self.longest}"
        return f"{self.every}{to} steps"

    def change(self) -> str:
        """Returns the log line for a distance that has changed."""
        assert self.cost is not None
        return (
            f"AutoRollback takes a snapshot every {self.distance} steps from now on: one takes "
            f"{1e3 * self.capture_seconds:.3g} ms, a step {1e3 * self.step_seconds:.3g} ms, and "
            f"snapshot_cost={self.cost:.3g}"
        )

    def as_dict(self) -> dict[str, float]:
        """Returns the distance in steps and both durations in seconds, as JSON types."""
        return {
            "snapshot_every": self.distance,
            "capture_seconds": self.capture_seconds,
            "step_seconds": self.step_seconds,
        }
