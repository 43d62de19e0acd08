"""What became of each attempt at an optimizer step: rows of floats, and those around an incident.

An attempt is counted whether its step is taken or vetoed, and the count never goes back, while
``global_step`` does at a rollback. Imports neither torch nor Lightning.
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
"""What the columns of a row are, in order; NaN where there is none.

``attempt`` counts from 1; ``step`` is Lightning's ``global_step`` before the step; ``update_ratio``
is that of the *previous* update; ``precision`` an index into `PRECISIONS`; ``optimizer`` one into
``trainer.optimizers``; ``taken`` 1, or 0 for an attempt that was vetoed.
"""

PRECISIONS = (
    *("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16"),
)
"""Lightning's names; a row holds the index of one, or NaN for any other."""

BEFORE, AFTER, MOST = 50, 20, 400
"""Rows kept from before an incident, from after it, and in all."""

Row = tuple[float, ...]


def row_of(
    attempt: int, stats: StepStats, *, clip_threshold: float | None, precision: str, taken: bool
) -> Row:
    """An attempt in the order of `FIELDS`.

    Args:
        attempt: its number.
        stats: as measured.
        clip_threshold: the norm that it was clipped to, or would have been; None for no clipping.
        precision: Lightning's name.
        taken: whether it was not vetoed.

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
        # After a veto the weights have not moved: there was no update to measure.
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
    """An incident among the attempts around it."""

    attempt: int
    """At which it was opened."""
    rows: list[Row]
    """From before the opening on; of a very long incident the first and the last."""
    closed_attempt: int | None = None
    spans: list[list[int]] = field(default_factory=list)
    """First and last attempt of each stretch that was taken back."""
    _after: int = 0

    @property
    def complete(self) -> bool:
        """Whether enough has followed its closing."""
        return self._after >= AFTER

    def add(self, row: Row) -> None:
        """Take up an attempt since the opening."""
        if self.closed_attempt is None or row[0] <= self.closed_attempt:
            if len(self.rows) < MOST - AFTER:
                self.rows.append(row)
        elif not self.complete:
            self.rows.append(row)
            self._after += 1

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "attempt": self.attempt,
            "closed_attempt": self.closed_attempt,
            "spans": [list(span) for span in self.spans],
            "window": {"fields": list(FIELDS), "rows": [list(row) for row in self.rows]},
        }


class StepHistory:
    """The count of attempts, the last rows, and the incidents that are not over yet.

    The count is monotone state: no rollback rewinds it, and a checkpoint carries it. The rows are
    bounded and belong to one fit.

    >>> attempts = StepHistory()
    >>> for step in (0, 1, 2, 1):
    ...     stats = StepStats(step=step, loss=1.0, grad_norm=1.0)
    ...     span = attempts.went_back(step)
    ...     n = attempts.begin()
    ...     attempts.add(row_of(n, stats, clip_threshold=None, precision="32-true", taken=True))
    >>> n, span
    (4, [2, 3])
    """

    def __init__(self) -> None:
        self.count = 0
        """Attempts so far, in this fit and those before it."""
        self.windows: dict[int, IncidentWindow] = {}
        """By the id of the incident: those open, and those closed a few attempts ago."""
        self._rows: deque[Row] = deque(maxlen=MOST)
        self._in_force: deque[tuple[int, int]] = deque(maxlen=MOST)
        """Attempt and step of the last updates that have not been taken back."""

    def start(self) -> None:
        """Another fit begins; the count goes on."""
        self.windows = {}
        self._rows.clear()
        self._in_force.clear()

    def begin(self) -> int:
        """Number an attempt."""
        self.count += 1
        return self.count

    def add(self, row: Row) -> None:
        """Keep the row of an attempt."""
        self._rows.append(row)
        if row[-1]:
            self._in_force.append((int(row[0]), int(row[1])))
        for window in self.windows.values():
            window.add(row)

    def open(self, incident: int, attempt: int) -> IncidentWindow:
        """Keep what surrounds an incident from here on.

        Args:
            incident: its id.
            attempt: at which it was opened.
        """
        rows = [row for row in self._rows if row[0] > attempt - 1 - BEFORE]
        self.windows[incident] = IncidentWindow(attempt, rows)
        return self.windows[incident]

    def went_back(self, step: int) -> list[int] | None:
        """Note that ``global_step`` is this now, and which attempts have been taken back by it.

        Args:
            step: optimizer steps that are in force.

        Returns:
            First and last attempt of the stretch; None where nothing that was taken is undone.
            Further back than is known, the first is counted as if none had been vetoed.
        """
        far = len(self._in_force) == MOST
        first = None
        while self._in_force and self._in_force[-1][1] >= step:
            first = self._in_force.pop()
        if first is None:
            return None
        beyond = first[1] - step if far and not self._in_force else 0
        span = [first[0] - beyond, self.count]
        for window in self.windows.values():
            if window.closed_attempt is None:
                window.spans.append(span)
        return span


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
