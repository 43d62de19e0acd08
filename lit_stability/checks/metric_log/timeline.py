"""The points of a log as step statistics, so that detectors and causes of live runs can judge them.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from lit_stability.checks.metric_log.roles import Roles
from lit_stability.checks.metric_log.series import Series
from lit_stability.measurement.step_stats import StepStats

HISTORY = 100
"""Points before an event that its causes are judged by."""


@dataclass(frozen=True)
class Timeline:
    """Joins the metrics of a log at the points of the training loss.

    Args:
        roles: The metrics.
    """

    roles: Roles

    def stats(self, index: int, *, number: int | None = None) -> StepStats:
        """Returns the statistics at a point of the loss, with the last values logged by then.

        Args:
            index: Of the point.
            number: Step to write into the statistics, by default that of the point.
        """
        roles, step = self.roles, self.roles.loss.steps[index]
        earlier = roles.loss.steps[index - 1] if index else -1
        norm = last_value(roles.gradient_norm, step, after=earlier)
        rates = tuple(last_value(s, step) for s in roles.learning_rates if len(s))
        known = tuple(rate for rate in rates if rate is not None)
        return StepStats(
            step=step if number is None else number,
            loss=roles.loss.values[index],
            grad_norm=0.0 if norm is None else norm,
            learning_rates=known,
            nominal_learning_rates=known,
            loss_scale=last_value(roles.loss_scale, step),
        )

    def all_stats(self) -> Iterator[StepStats]:
        """Returns the statistics of every point, with its index as their step."""
        return (self.stats(i, number=i) for i in range(len(self.roles.loss)))

    def losses(self) -> Iterator[StepStats]:
        """Returns the losses alone, with the index of each as its step: faster than `all_stats`."""
        for i, value in enumerate(self.roles.loss.values):
            yield StepStats(step=i, loss=value, grad_norm=0.0)

    def history(self, index: int) -> tuple[StepStats, ...]:
        """Returns the statistics of up to a hundred points before one, the oldest first."""
        return tuple(self.stats(i) for i in range(max(0, index - HISTORY), index))

    def index_of(self, step: int) -> int:
        """Returns the index of the first point of the loss at a step or after it."""
        steps = self.roles.loss.steps
        return min(bisect_right(steps, step - 1), len(steps) - 1)


def last_value(series: Series | None, step: int, after: int = -1) -> float | None:
    """Returns the last value of a series up to a step; None if none is known.

    Args:
        series: Whose steps do not go back.
        step: Last step that counts.
        after: Steps up to this one do not count.

    >>> rate = Series("lr")
    >>> rate.add(0, 0.1)
    >>> rate.add(10, 0.2)
    >>> last_value(rate, 9), last_value(rate, 12), last_value(rate, 9, after=0)
    (0.1, 0.2, None)
    """
    if series is None:
        return None
    at = bisect_right(series.steps, step) - 1
    return series.values[at] if at >= 0 and series.steps[at] > after else None
