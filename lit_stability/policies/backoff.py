"""How far the learning rate and the clipping threshold are lowered, and how they come back.

A state machine over floats: data in, data out, neither torch nor Lightning. It is monotone state:
a rollback never rewinds it, and a checkpoint carries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_stability.detectors import Window

_LASTING = 16
_MOST_PATIENCE = 64
"""Times the wait before a relaxation that was chosen: 1,280 steps, with the default."""


class Backoff:
    """A factor on the learning rate, one on the clipping threshold, and holds.

    Cuts multiply; after every ``relax_after`` calm steps both factors are doubled until they are
    1. A cut that follows a doubling says that it came too soon: the wait is four times as long from
    then on, until ten times as many calm steps have passed. A lasting cut, for a learning
    rate that is itself the cause, begins with a wait 16 times as long. A hold scales an optimizer's
    groups down for as long as its schedule stays up; it is let go when the schedule falls to a
    fifth or less from one step to the next, as one that comes back.

    Args:
        relax_after: calm steps between relaxations.

    >>> t = Backoff(relax_after=2)
    >>> t.cut(0.25, 0.5)
    >>> [t.calm(0, [1.0]) and t.lr_factor for _ in range(4)]
    [None, 0.5, None, 1.0]
    """

    def __init__(self, relax_after: int) -> None:
        if not relax_after >= 1:
            raise ValueError(f"relax_after must be at least 1, got {relax_after!r}")
        self.relax_after = relax_after
        self.lr_factor = 1.0
        """What the nominal learning rate is multiplied by, in (0, 1]."""
        self.clip_factor = 1.0
        """Clipping threshold over twice the median gradient norm; 1 means no clipping."""
        self.holds: dict[int, tuple[float, ...]] = {}
        """Further factor on the learning rate of each group, by optimizer."""
        self.patience = 1
        """What ``relax_after`` is multiplied by."""
        self._relaxed = False
        self.before: tuple[float, float, int, bool] | None = None
        """What was in force at the start of the last incident."""
        self._calm = 0
        self._schedule: dict[int, float] = {}

    @property
    def active(self) -> bool:
        """Whether a factor is below 1."""
        return self.lr_factor < 1 or self.clip_factor < 1

    def cut(self, lr_factor: float, clip_factor: float, *, lasting: bool = False) -> None:
        """Lower both by these factors, on top of what is in force."""
        if lasting:
            self.patience = max(self.patience, _LASTING)
        if self._relaxed and lr_factor < 1:
            self.patience = min(4 * self.patience, _MOST_PATIENCE)
            self._relaxed = False
        self.lr_factor *= lr_factor
        self.clip_factor *= clip_factor
        self._calm = 0

    def remember(self) -> None:
        """Note what is in force, at the start of an incident, for `put_back`."""
        self.before = self.lr_factor, self.clip_factor, self.patience, self._relaxed

    def put_back(self) -> bool:
        """Undo the cuts since the start of the incident; returns whether there were any.

        What has been relaxed since stays so.
        """
        if self.before is None:
            return False
        lr_factor, clip_factor, self.patience, self._relaxed = self.before
        cut = lr_factor > self.lr_factor or clip_factor > self.clip_factor
        self.lr_factor = max(lr_factor, self.lr_factor)
        self.clip_factor = max(clip_factor, self.clip_factor)
        self.before, self._calm = None, 0
        return cut

    def hold(self, optimizer: int, factors: Sequence[float]) -> None:
        """Scale an optimizer's groups down, on top of a hold that is in force."""
        before = self.holds.get(optimizer, (1.0,) * len(factors))
        self.holds[optimizer] = tuple(b * f for b, f in zip(before, factors, strict=True))
        self._schedule.pop(optimizer, None)

    def factors(self, optimizer: int, groups: int) -> list[float]:
        """What to multiply the nominal learning rate of each group by."""
        return [self.lr_factor * h for h in self.holds.get(optimizer, (1.0,) * groups)]

    def disturbed(self) -> None:
        """Count calm steps anew."""
        self._calm = 0

    def calm(self, optimizer: int, nominal: Sequence[float]) -> str | None:
        """Count a calm step; returns what was relaxed, in words, or None.

        Args:
            optimizer: whose step it was.
            nominal: learning rates of its groups as the scheduler wrote them.
        """
        self._calm += 1
        if self._release(optimizer, nominal):
            return "the learning rate is no longer held"
        wait = self.relax_after * self.patience
        if not self.active and self._calm >= 10 * wait:
            self.patience, self._relaxed = 1, False
        if not self.active or self._calm % wait:
            return None
        self.lr_factor = min(1.0, 2 * self.lr_factor)
        self.clip_factor = min(1.0, 2 * self.clip_factor)
        self._relaxed = True
        if self.active:
            return f"learning rate x{self.lr_factor:.3g}, clip x{self.clip_factor:.3g}"
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
        """What is in force, as plain floats."""
        return {
            "lr_factor": self.lr_factor,
            "clip_factor": self.clip_factor,
            "patience": self.patience,
            "relaxed": self._relaxed,
            "holds": {str(i): list(h) for i, h in self.holds.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""
        self.lr_factor = float(state["lr_factor"])
        self.clip_factor = float(state["clip_factor"])
        self.patience, self._relaxed = int(state["patience"]), bool(state["relaxed"])
        self.holds = {int(i): tuple(h) for i, h in state["holds"].items()}


class Baseline:
    """What gradient norms and update-to-weight ratios are on healthy steps.

    Args:
        window: healthy steps remembered.
        min_history: healthy steps before `excess` says anything.
    """

    def __init__(self, window: int = 100, min_history: int = 10) -> None:
        self._norms = Window(window)
        self._ratios = Window(window)
        self._min_history = min_history

    def add(self, grad_norm: float, update_ratio: float | None) -> None:
        """Learn a healthy step."""
        self._norms.add(grad_norm)
        if update_ratio:
            self._ratios.add(update_ratio)

    def state_dict(self) -> dict[str, list[float]]:
        """Both windows."""
        return {"norms": list(self._norms.values), "ratios": list(self._ratios.values)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Put such windows back."""
        self._norms.replace(state["norms"])
        self._ratios.replace(state["ratios"])

    def clip_threshold(self, factor: float) -> float | None:
        """Twice the median gradient norm times the factor; None at factor 1 or before any step."""
        if factor >= 1 or not len(self._norms) or self._norms.median <= 0:
            return None
        return 2 * self._norms.median * factor

    def excess(self, update_ratio: float | None) -> float:
        """How many times its median an update-to-weight ratio is, at least 1."""
        if not update_ratio or len(self._ratios) < self._min_history:
            return 1.0
        return max(1.0, update_ratio / self._ratios.median)
