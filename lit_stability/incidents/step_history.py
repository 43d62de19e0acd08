"""The history of step attempts: one row of floats each, and the rows around each incident.

Every attempt at an optimizer step is counted, accepted or skipped. The count only increases, while
``global_step`` decreases at a rollback. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lit_stability.measurement.step_stats import StepStats

FIELDS = (
    *("attempt", "step", "loss", "grad_norm", "update_ratio", "learning_rate", "lr_factor"),
    *("clip_threshold", "loss_scale", "precision", "optimizer", "taken"),
)
"""Columns of a row, in order; NaN where a value is missing.

``attempt`` counts from 1; ``step`` is Lightning's ``global_step`` before the step; ``update_ratio``
is that of the *previous* update; ``precision`` is an index into `PRECISIONS`, ``optimizer`` one
into ``trainer.optimizers``; ``taken`` is 1, or 0 for a skipped step.
"""

PRECISIONS = (
    *("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16"),
)
"""Lightning's precision names; a row holds the index of one, or NaN for any other."""

BEFORE, AFTER, MOST = 50, 20, 400
"""Largest numbers of rows kept: before an incident, after it, and in total."""

Row = tuple[float, ...]


def row_of(
    attempt: int, stats: StepStats, *, clip_threshold: float | None, precision: str, taken: bool
) -> Row:
    """Returns the row of an attempt, in the order of `FIELDS`.

    Args:
        attempt: number of the attempt.
        stats: its measurement.
        clip_threshold: norm to which its gradients are clipped; None for no clipping.
        precision: Lightning's name of the precision.
        taken: whether the step was not skipped.

    >>> stats = StepStats(step=7, loss=2.0, grad_norm=1.5, learning_rates=(0.25,))
    >>> row_of(9, stats, clip_threshold=1.0, precision="bf16-mixed", taken=True)
    (9.0, 7.0, 2.0, 1.5, nan, 0.25, 1.0, 1.0, nan, 2.0, 0.0, 1.0)
    """
    rate = max(stats.learning_rates, default=math.nan)
    nominal = max(stats.nominal_learning_rates, default=math.nan)
    return (
        float(attempt),
        float(stats.step),
        stats.loss,
        stats.grad_norm,
        # After a skipped step the weights have not changed: there is no update to measure.
        _or_nan(stats.update_ratio or None),
        rate,
        rate / nominal if nominal > 0 else 1.0,
        _or_nan(clip_threshold),
        _or_nan(stats.loss_scale),
        float(PRECISIONS.index(precision)) if precision in PRECISIONS else math.nan,
        float(stats.optimizer),
        float(taken),
    )


@dataclass
class IncidentWindow:
    """The rows of the attempts around one incident."""

    attempt: int
    """Attempt at which the incident opened."""
    rows: list[Row]
    """Rows from before the opening on; of a long incident, the first and the last ones."""
    closed_attempt: int | None = None
    spans: list[list[int]] = field(default_factory=list)
    """First and last attempt of each range that was rolled back."""
    _after: int = 0

    @property
    def complete(self) -> bool:
        """Whether enough rows after the closing are kept."""
        return self._after >= AFTER

    def add(self, row: Row) -> None:
        """Adds a row after the opening, if it is within the limits."""
        if self.closed_attempt is None or row[0] <= self.closed_attempt:
            if len(self.rows) < MOST - AFTER:
                self.rows.append(row)
        elif not self.complete:
            self.rows.append(row)
            self._after += 1

    def as_dict(self) -> dict[str, Any]:
        """Returns the window as JSON types."""
        return {
            "attempt": self.attempt,
            "closed_attempt": self.closed_attempt,
            "spans": [list(span) for span in self.spans],
            "window": {"fields": list(FIELDS), "rows": [list(row) for row in self.rows]},
        }


class StepHistory:
    """Counts step attempts and keeps the recent rows and the windows of recent incidents.

    A rollback does not restore the count, and checkpoints contain it. The rows are bounded in
    number and belong to one fit.

    >>> attempts = StepHistory()
    >>> for step in (0, 1, 2, 1):
    ...     stats = StepStats(step=step, loss=1.0, grad_norm=1.0)
    ...     span = attempts.rolled_back_to(step)
    ...     n = attempts.begin()
    ...     attempts.add(row_of(n, stats, clip_threshold=None, precision="32-true", taken=True))
    >>> n, span
    (4, [2, 3])
    """

    def __init__(self) -> None:
        self.count = 0
        """Attempts so far, in this fit and earlier ones."""
        self.windows: dict[int, IncidentWindow] = {}
        """Incident id -> window, for open incidents and for those closed a few attempts ago."""
        self._rows: deque[Row] = deque(maxlen=MOST)
        self._in_force: deque[tuple[int, int]] = deque(maxlen=MOST)
        """Attempt and step of the recent updates that were not rolled back."""

    def start(self) -> None:
        """Clears rows and windows for a new fit; the count continues."""
        self.windows = {}
        self._rows.clear()
        self._in_force.clear()

    def begin(self) -> int:
        """Counts a new attempt and returns its number."""
        self.count += 1
        return self.count

    def add(self, row: Row) -> None:
        """Adds the row of an attempt to the history and to all windows."""
        self._rows.append(row)
        if row[-1]:
            self._in_force.append((int(row[0]), int(row[1])))
        for window in self.windows.values():
            window.add(row)

    def open(self, incident: int, attempt: int) -> IncidentWindow:
        """Starts the window of an incident, with the rows before it.

        Args:
            incident: id of the incident.
            attempt: attempt at which it opened.
        """
        rows = [row for row in self._rows if row[0] > attempt - 1 - BEFORE]
        self.windows[incident] = IncidentWindow(attempt, rows)
        return self.windows[incident]

    def rolled_back_to(self, step: int) -> list[int] | None:
        """Compares the history with ``global_step`` and marks the attempts that were rolled back.

        Args:
            step: current ``global_step``.

        Returns:
            First and last attempt of the range; None if no update was undone. For a range that
            begins before the kept history, the first is computed as if no step had been skipped.
        """
        full = len(self._in_force) == MOST
        first = None
        while self._in_force and self._in_force[-1][1] >= step:
            first = self._in_force.pop()
        if first is None:
            return None
        earlier = first[1] - step if full and not self._in_force else 0
        span = [first[0] - earlier, self.count]
        for window in self.windows.values():
            if window.closed_attempt is None:
                window.spans.append(span)
        return span


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
