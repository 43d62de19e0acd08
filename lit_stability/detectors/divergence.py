"""Detects a loss that rises and stays high."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rejection_streak import RejectionStreak
from lit_stability.detectors.rolling_window import Window
from lit_stability.detectors.trends import ROUNDING
from lit_stability.measurement.step_stats import StepStats
from lit_stability.renamed import renamed

_JUMP = 3.0
"""Factor over the largest of the last five losses from which on a loss has risen at once."""
_USUAL = 3.0
"""Factor on the median update up to which the weights have moved as usual."""
_LEVEL = 2.0
"""Factor on the median of the first half of a row up to which its second half is level."""


class Divergence:
    """Flags a loss that stays far above its window for ``persist`` consecutive steps.

    A loss is high when it exceeds the median by ``sigmas`` robust standard deviations, by ``rise``
    of the median's absolute value and by ``floor`` of the largest median so far, so that a loss
    which has reached 0 may leave it again. High losses are not learnt. Fewer than ``persist`` hard
    batches are ignored. If the detector would flag more than ``accept_after`` times without a lower
    loss in between, it accepts the level as a change of regime: it clears the window, counts in
    ``regimes`` and learns again from scratch. After a rollback the count goes on only if the next
    flag comes at the same step although the learning rate was lowered: a loss that the weights had
    driven up would rise at another step.

    A loss that rose at once while the weights moved as usual, and then stays level, was not driven
    up by the weights: if it comes back when the same steps are replayed, data or loss have changed,
    and it is accepted then. A loss that is high from a rollback on is not flagged while it falls.

    Args:
        rise: smallest rise that counts, as a share of the median's absolute value.
        sigmas: smallest rise that counts, in robust standard deviations.
        floor: smallest rise that counts, as a share of the largest absolute median so far.
        persist: consecutive high steps before the detector flags.
        window: number of accepted values in the window.
        min_history: accepted values before the first verdict.
        accept_after: flags before the level is accepted.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> from lit_stability.detectors import flagged
    >>> d = Divergence(persist=3, min_history=4)
    >>> losses = [2.0, 1.9, 2.0, 1.9, 9.0, 1.9, 5.0, 6.0, 8.0]
    >>> [i for i, x in enumerate(losses) if flagged(d, StepStats(step=i, loss=x, grad_norm=1.0))]
    [8]
    """

    shared_by_ranks = "yes"

    @renamed(give_up="accept_after")
    def __init__(
        self,
        *,
        rise: float = 0.5,
        sigmas: float = 8.0,
        floor: float = 1e-3,
        persist: int = 10,
        window: int = 200,
        min_history: int = 20,
        accept_after: int = 2,
    ) -> None:
        require(rise > 0, "rise", rise, "greater than 0")
        require(sigmas > 0, "sigmas", sigmas, "greater than 0")
        require(floor >= 0, "floor", floor, "at least 0")
        require(persist >= 1, "persist", persist, "at least 1")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        require(accept_after >= 1, "accept_after", accept_after, "at least 1")
        self.rise, self.sigmas, self.floor, self.persist = rise, sigmas, floor, persist
        self.min_history, self.accept_after = min_history, accept_after
        self.window = Window(window)
        self._highs: list[float] = []
        """The present row of high losses."""
        self._high_step = -1
        self._recent: deque[float] = deque(maxlen=5)
        """Last accepted losses."""
        self._moves = Window(window)
        """Update-to-weight ratios of accepted steps."""
        self._jumped = False
        """Whether the loss rose at once, at the first row of high losses in this place, while the
        weights moved as usual."""
        self._accepted_row = -1
        """Step of the last jump that was accepted. If training came back to it, as it diverged, the
        jump is not accepted at once again."""
        self._recurs = False
        """Whether the present row repeats the last one that was flagged."""
        self._undone = False
        """Whether the loss has been high from the first step after a rollback on."""
        self._row = self._flagged_row = -1
        """Step at which the present row of high losses began, and the last one that was flagged."""
        self._largest = 0.0
        """Largest absolute median of the window so far."""
        self._streak = RejectionStreak()
        self._rate = 0.0
        """Learning rate at the last flag."""
        self.regimes = 0

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if the loss has been high for ``persist`` consecutive steps."""
        if not self._is_high(stats.loss):
            return None
        # A step that is retried counts once.
        if stats.step != self._high_step:
            self._highs.append(stats.loss)
            self._high_step = stats.step
            if len(self._highs) == 1:
                self._row_began(stats)
        if len(self._highs) < self.persist:
            return None
        half = self.persist // 2
        early, late = median(self._highs[:half] or self._highs), median(self._highs[half:])
        self._highs = []
        if self._undone and late < early:
            return None
        level = late <= early + (_LEVEL - 1) * abs(early)
        self._flagged_row = self._row
        if self._recurs and self._jumped and level and self._row != self._accepted_row:
            self._accepted_row = self._row
            self.reset_windows()
            self.regimes += 1
            return None
        rate, before = max(stats.learning_rates, default=0.0), self._rate
        self._rate = rate
        if self._streak.rejected(stats.step, changed=rate < before) > self.accept_after:
            self.reset_windows()
            self.regimes += 1
            return None
        usual = self.window.median
        return Anomaly(
            kind="divergence",
            step=stats.step,
            value=stats.loss,
            signal="loss",
            baseline=usual,
            threshold=self._threshold(),
            optimizer=stats.optimizer,
            state_corrupted=True,
            replay_first=self._jumped,
            since=max(0, stats.step - self.persist),
            layers=tuple(stats.worst_layers()),
            message=f"loss {stats.loss:.4g} has stayed above {self._threshold():.4g} for "
            f"{self.persist} steps; its median was {usual:.4g}",
        )

    def update(self, stats: StepStats) -> None:
        """Learns an accepted loss, unless it is high."""
        if self._is_high(stats.loss):
            return
        self._highs, self._high_step, self._undone = [], -1, False
        self._streak.accepted(stats.step)
        self.window.add(stats.loss)
        self._recent.append(stats.loss)
        if stats.update_ratio:
            self._moves.add(stats.update_ratio)
        if len(self.window) >= self.min_history:
            self._largest = max(self._largest, abs(self.window.median))

    def reset_windows(self) -> None:
        """Clears window and counts after a change of regime, in this or in another detector."""
        self.window.replace([])
        self._streak, self._highs, self._undone = RejectionStreak(), [], False
        self._recent.clear()

    def _row_began(self, stats: StepStats) -> None:
        self._row = stats.step
        # Right after a rollback, when no update is known, the weights are those that had a low
        # loss at this step before: what is high now is so by the data or the loss.
        self._undone |= stats.update_ratio is None and stats.step < self._flagged_row
        self._recurs = self._undone or stats.step == self._flagged_row
        if not self._recurs:
            self._jumped = self._has_jumped(stats)

    def _has_jumped(self, stats: StepStats) -> bool:
        """Whether the loss rose at once although the weights moved as usual."""
        moved = stats.update_ratio
        if moved is None or not len(self._moves) or moved > _USUAL * self._moves.median:
            return False
        return stats.loss > _JUMP * max(self._recent, default=math.inf)

    def _threshold(self) -> float:
        median = self.window.median
        floor = max(self.floor * self._largest, ROUNDING)
        return median + max(self.rise * abs(median), self.sigmas * self.window.sigma, floor)

    def _is_high(self, loss: float) -> bool:
        if len(self.window) < self.min_history or not math.isfinite(loss):
            return False
        median = self.window.median
        # The cheap bound comes first: the threshold needs the spread of the window.
        return loss > median + self.rise * abs(median) and loss > self._threshold()

    def state_dict(self) -> dict[str, Any]:
        """Returns the window; without the counts, so that no restore undoes a change of regime."""
        return {"window": list(self.window.values), "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the window."""
        self.window.replace(state["window"])
        self._largest = max(self._largest, float(state.get("largest", 0.0)))
