"""Lowers the learning rate and the clipping threshold, and raises both again on calm steps.

Imports neither torch nor Lightning. A rollback does not restore its state; checkpoints contain it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import lt
from typing import Any

from lit_stability.detectors import Window

_LASTING = 16
"""Patience after a lasting cut."""
_MOST_PATIENCE = 64
"""Largest patience: 1,280 steps with the default ``relax_after``."""


class Backoff:
    """Factors on the learning rate and the clipping threshold, and holds of single optimizers.

    Cuts multiply. Where the learning rate is itself the cause they also limit it, as a schedule
    that rises would lead back to the value at which the run failed, and beyond it. After every
    ``relax_after`` calm steps factors and limits are doubled, until the factors are 1 and the
    limits above the schedule. A cut after a doubling shows that the doubling came too early: the
    wait is then four times as long, until ten waits of calm steps have passed without a cut in
    force. A lasting cut, for a learning rate that is itself the cause, begins with a wait 16 times
    as long. A hold scales the groups of one optimizer down while its schedule stays high; it is
    released when the schedule falls to a fifth or less from one step to the next.

    Args:
        relax_after: calm steps between relaxations.

    >>> backoff = Backoff(relax_after=2)
    >>> backoff.cut(0.25, 0.5)
    >>> [backoff.healthy_step(0, [1.0]) and backoff.lr_factor for _ in range(4)]
    [None, 0.5, None, 1.0]
    """

    def __init__(self, relax_after: int) -> None:
        if not relax_after >= 1:
            raise ValueError(f"relax_after must be at least 1, got {relax_after!r}")
        self.relax_after = relax_after
        self.lr_factor = 1.0
        """Factor on the nominal learning rate, in (0, 1]."""
        self.clip_factor = 1.0
        """Ratio of clipping threshold to twice the median gradient norm; 1 means no clipping."""
        self.limits: dict[int, tuple[float, ...]] = {}
        """Optimizer index -> largest learning rate of each group, ``inf`` for none."""
        self.holds: dict[int, tuple[float, ...]] = {}
        """Optimizer index -> additional factor on the learning rate of each group."""
        self.patience = 1
        """Factor on ``relax_after``."""
        self._relaxed = False
        self.before: dict[str, Any] | None = None
        """The `state_dict` at the start of the last incident."""
        self._calm = 0
        self._schedule: dict[int, float] = {}

    @property
    def active(self) -> bool:
        """Whether a factor is below 1 or a learning rate is limited."""
        return self.lr_factor < 1 or self.clip_factor < 1 or bool(self.limits)

    def cut(
        self,
        lr_factor: float,
        clip_factor: float,
        *,
        lasting: bool = False,
        failed_at: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        """Multiplies both factors, in addition to earlier cuts.

        Args:
            lr_factor: factor on the learning rate.
            clip_factor: factor on the clipping threshold.
            lasting: whether the learning rate is itself the cause.
            failed_at: optimizer index -> learning rate of each group with which the run failed;
                the limit is the factor times this.
        """
        if lasting:
            self.patience = max(self.patience, _LASTING)
        if self._relaxed and lr_factor < 1:
            self.patience = min(4 * self.patience, _MOST_PATIENCE)
            self._relaxed = False
        self.lr_factor *= lr_factor
        self.clip_factor *= clip_factor
        if lr_factor < 1:
            for optimizer, rates in (failed_at or {}).items():
                self.limits[optimizer] = tuple(lr_factor * rate or math.inf for rate in rates)
        self._calm = 0

    def remember(self) -> None:
        """Stores the current factors at the start of an incident, for `undo_cuts`."""
        self.before = self.state_dict()

    def undo_cuts(self) -> bool:
        """Undoes the cuts since the start of the incident; returns whether there were any.

        Relaxations since then are kept.
        """
        if self.before is None:
            return False
        before = Backoff(self.relax_after)
        before.load_state_dict(self.before)
        cut = before.lr_factor > self.lr_factor or before.clip_factor > self.clip_factor
        self.lr_factor = max(before.lr_factor, self.lr_factor)
        self.clip_factor = max(before.clip_factor, self.clip_factor)
        self.limits = {
            optimizer: tuple(map(max, before.limits[optimizer], limits))
            for optimizer, limits in self.limits.items()
            if optimizer in before.limits
        }
        self.patience, self._relaxed = before.patience, before._relaxed
        self.before, self._calm = None, 0
        return cut

    def hold(self, optimizer: int, factors: Sequence[float]) -> None:
        """Scales an optimizer's groups down, in addition to an existing hold."""
        before = self.holds.get(optimizer, (1.0,) * len(factors))
        self.holds[optimizer] = tuple(b * f for b, f in zip(before, factors, strict=True))
        self._schedule.pop(optimizer, None)

    def factors(self, optimizer: int, groups: int) -> list[float]:
        """Returns the factor on the nominal learning rate of each group."""
        return [self.lr_factor * h for h in self.holds.get(optimizer, (1.0,) * groups)]

    def limits_of(self, optimizer: int, groups: int) -> tuple[float, ...] | None:
        """Returns the largest learning rate of each group; None without a limit."""
        limits = self.limits.get(optimizer, ())
        # Limits do not apply if groups were added since, or differ from those of a checkpoint.
        return limits if len(limits) == groups else None

    def disturbed(self) -> None:
        """Restarts the count of calm steps."""
        self._calm = 0

    def healthy_step(self, optimizer: int, nominal: Sequence[float]) -> str | None:
        """Counts a calm step; returns a description of what was relaxed, or None.

        Args:
            optimizer: index of the optimizer.
            nominal: learning rates of its groups as the scheduler set them.
        """
        self._calm += 1
        if self._release(optimizer, nominal):
            return "the learning rate is no longer held"
        wait = self.relax_after * self.patience
        if not self.active and self._calm >= 10 * wait:
            self.patience, self._relaxed = 1, False
        relax = self.active and self._calm % wait == 0
        if relax:
            self.lr_factor = min(1.0, 2 * self.lr_factor)
            self.clip_factor = min(1.0, 2 * self.clip_factor)
            self.limits = {i: tuple(2 * x for x in limits) for i, limits in self.limits.items()}
            self._relaxed = True
        if self.lr_factor == 1 and not any(map(lt, self.limits.get(optimizer, ()), nominal)):
            self.limits.pop(optimizer, None)
        if not relax:
            return None
        if self.lr_factor < 1 or self.clip_factor < 1:
            return f"learning rate x{self.lr_factor:.3g}, clip x{self.clip_factor:.3g}"
        if optimizer in self.limits:
            return f"learning rate at most {max(self.limits[optimizer]):.3g}"
        return "learning rate and clip are back to normal"

    def _release(self, optimizer: int, nominal: Sequence[float]) -> bool:
        if optimizer not in self.holds:
            return False
        now = max(nominal, default=0.0)
        before = self._schedule.get(optimizer, now)
        self._schedule[optimizer] = now
        if now > before / 5:
            return False
        del self.holds[optimizer], self._schedule[optimizer]
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns factors, patience and holds as plain values."""
        return {
            "lr_factor": self.lr_factor,
            "clip_factor": self.clip_factor,
            "patience": self.patience,
            "relaxed": self._relaxed,
            "limits": {str(i): list(limits) for i, limits in self.limits.items()},
            "holds": {str(i): list(h) for i, h in self.holds.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.lr_factor = float(state["lr_factor"])
        self.clip_factor = float(state["clip_factor"])
        self.patience, self._relaxed = int(state["patience"]), bool(state["relaxed"])
        self.limits = {int(i): tuple(limits) for i, limits in state.get("limits", {}).items()}
        self.holds = {int(i): tuple(h) for i, h in state["holds"].items()}


class Baseline:
    """Gradient norms and update-to-weight ratios of recent healthy steps.

    Args:
        window: number of healthy steps kept.
        min_history: ratios needed before `excess` can be above 1.
    """

    def __init__(self, window: int = 100, min_history: int = 10) -> None:
        self._norms = Window(window)
        self._ratios = Window(window)
        self._min_history = min_history

    def add(self, grad_norm: float, update_ratio: float | None) -> None:
        """Adds a healthy step."""
        self._norms.add(grad_norm)
        if update_ratio:
            self._ratios.add(update_ratio)

    def state_dict(self) -> dict[str, list[float]]:
        """Returns both windows."""
        return {"norms": list(self._norms.values), "ratios": list(self._ratios.values)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restores both windows."""
        self._norms.replace(state["norms"])
        self._ratios.replace(state["ratios"])

    def clip_threshold(self, factor: float) -> float | None:
        """Returns twice the median norm times a factor; None at factor 1 or without a norm."""
        if factor >= 1 or not len(self._norms) or self._norms.median <= 0:
            return None
        return 2 * self._norms.median * factor

    def excess(self, update_ratio: float | None) -> float:
        """Returns an update-to-weight ratio divided by the median, at least 1."""
        if not update_ratio or len(self._ratios) < self._min_history:
            return 1.0
        return max(1.0, update_ratio / self._ratios.median)
