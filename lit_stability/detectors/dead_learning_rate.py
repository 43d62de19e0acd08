"""Notices a learning rate that has become almost 0 while the loss was still falling.

Imports neither torch nor Lightning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

DEAD_SHARE = 1e-5
"""Share of its largest value at which a learning rate changes nothing: a weight that moved by 1 %
would now move by less than float32 can represent."""
_WORKING = 0.1
"""Share from which on the rate still trains as intended."""
_PATIENCE = 20
"""Smallest number of steps for which the rate must have been dead."""
_LONG = 0.1
"""Smallest share of all steps for which it must have been: a decay ends with a few such steps."""
_SHORT = 100
"""A phase of fewer steps is too short to show that the loss has reached its floor."""
_FALLING = 0.02
"""Relative fall of the loss from the third to the last quarter that shows it has no floor yet."""
_SOLVED = 1e-3
"""Share of the first loss at which nothing is left to learn."""


@dataclass(frozen=True)
class DeadRate:
    """A learning rate that no longer trains anything."""

    rate: float
    """The largest learning rate of any group now."""
    peak: float
    """The largest that it was."""
    since: int
    """Step from which on it has been dead."""


class DeadLearningRate:
    """Compares the learning rates of all groups with the largest that each has had.

    A group that never had a positive rate is frozen on purpose, and a warm-up that starts at 0 has
    not had its largest rate yet: both are silent. So is the end of a decay, because there the rate
    is almost 0 for a small part of the run only; a rate that is held at some share of its largest;
    and any rate once the loss has reached its floor. It is reported once. In doubt it is reported:
    apart from the end of a decay there is hardly a reason for a rate of 0.

    >>> watch = DeadLearningRate()
    >>> rates = [1e-3] * 10 + [0.0] * 30
    >>> [i for i, r in enumerate(rates) if watch.update(i, 0, 2.0 - i / 100, [r]) is not None]
    [29]
    """

    def __init__(self) -> None:
        self._peaks: dict[int, list[float]] = {}
        self._rates: dict[int, list[float]] = {}
        self._losses = LossCourse()
        self._steps = self._working = 0
        self._since: int | None = None
        self._dead_steps = 0
        self._reported = False

    def update(
        self,
        step: int,
        optimizer: int,
        loss: float,
        rates: Sequence[float],
        *,
        metric: float | None = None,
    ) -> DeadRate | None:
        """Adds an accepted step; returns what to report, once.

        Args:
            step: optimizer steps before it.
            optimizer: index of the optimizer; the loss is that of the first.
            loss: of the step.
            rates: learning rate of each group as the scheduler wrote it.
            metric: the metric that a scheduler follows. If it was ever NaN, the scheduler had no
                reason to lower the rate; if not, it saw that the metric had stopped improving, and
                only a loss that clearly fell contradicts it. None without such a scheduler.
        """
        peaks = self._peaks.get(optimizer, [])
        if len(peaks) != len(rates):
            peaks = [0.0] * len(rates)
        self._peaks[optimizer] = [max(p, r) for p, r in zip(peaks, rates, strict=True)]
        self._rates[optimizer] = list(rates)
        if optimizer:
            return None
        share, rate, peak = self._strongest()
        self._count(step, share, loss)
        long = self._dead_steps >= max(_PATIENCE, _LONG * self._steps)
        if self._reported or not long or self._since is None:
            return None
        if metric is not None and math.isnan(metric):
            self._reported = True
        else:
            self._reported = not self._losses.at_floor(self._working, doubt=metric is None)
        return DeadRate(rate, peak, self._since) if self._reported else None

    def _strongest(self) -> tuple[float, float, float]:
        """The group with the largest share of its peak: the share, its rate, its peak."""
        pairs = [
            (rate / peak, rate, peak)
            for index, peaks in self._peaks.items()
            for rate, peak in zip(self._rates[index], peaks, strict=True)
            if peak > 0
        ]
        return max(pairs, default=(1.0, 0.0, 0.0))

    def _count(self, step: int, share: float, loss: float) -> None:
        self._steps += 1
        if share > DEAD_SHARE * (1 + 1e-6):
            self._since, self._dead_steps = None, 0
        else:
            self._since = step if self._since is None else self._since
            self._dead_steps += 1
        if self._since is None:
            self._losses.add(loss)
            self._working = self._steps if share >= _WORKING else self._working


@dataclass
class LossCourse:
    """Means of the losses so far, in at most 128 parts of equal length.

    >>> course = LossCourse()
    >>> for i in range(1000):
    ...     course.add(1.0 + max(0, 100 - i))
    >>> course.at_floor(1000), course.at_floor(80)
    (True, False)
    """

    _means: list[float] = field(default_factory=list)
    _length: int = 1
    """Losses in each part."""
    _sum: float = 0.0
    _count: int = 0

    def add(self, loss: float) -> None:
        """Adds a loss."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self._length:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 128:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._length *= 2

    def at_floor(self, losses: int, *, doubt: bool = True) -> bool:
        """Returns whether the loss no longer fell in the last quarter of the first losses.

        Args:
            losses: how many of the losses to judge by.
            doubt: whether the loss is taken to be falling where noise hides it, or where there are
                too few losses.
        """
        parts = self._means[: max(1, losses // self._length)]
        if self._means and abs(self._means[-1]) <= _SOLVED * abs(self._means[0]):
            return True
        if len(parts) < 8 or (doubt and losses < _SHORT):
            return not doubt
        quarter = len(parts) // 4
        before, last = parts[-2 * quarter : -quarter], parts[-quarter:]
        error = math.sqrt((variance(before) + variance(last)) / quarter)
        fall, bound = fmean(before) - fmean(last), _FALLING * abs(fmean(last))
        return fall + error <= bound if doubt else fall <= max(bound, error)
