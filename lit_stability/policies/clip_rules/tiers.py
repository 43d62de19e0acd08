"""Constant thresholds: one for all norms, or one for each range of norms.

Imports neither torch nor Lightning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_stability.detectors.anomaly import require
from lit_stability.policies.clip_rules.rule import teaches


@dataclass(frozen=True, kw_only=True)
class FixedClip:
    """Clips every step to the same norm, like ``Trainer(gradient_clip_val=norm)``.

    Raises:
        ValueError: if the norm is not positive.

    >>> FixedClip(norm=0.75).threshold(16.62)
    0.75
    """

    norm: float = 1.0
    """Largest norm of the clipped gradients."""

    def __post_init__(self) -> None:
        require(self.norm > 0, "norm", self.norm, "greater than 0")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`."""
        return self.norm

    def update(self, grad_norm: float) -> None:
        """Does nothing: the threshold is constant."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the state is empty."""


@dataclass
class _Cut:
    """The current cut of the learning rate."""

    factor: float = 1.0
    left: int = 0
    """Steps until it ends."""


@dataclass(frozen=True, kw_only=True)
class TieredClip:
    """A threshold for each range of norms; the largest norms also lower the learning rate.

    The learning rate is lowered for ``lr_steps`` steps, the step with the large norm included;
    then it returns to the schedule at once. Another large norm during these steps restarts the
    count. Cuts do not multiply: of two cuts, the deeper one applies.

    Raises:
        ValueError: if an option is out of its range, or the tiers are not in order.

    >>> rule = TieredClip(lr_steps=2)
    >>> for norm in (0.7, 16.62, 0.7, 6.0):
    ...     print(norm, rule.threshold(norm), rule.lr_factor(norm))
    ...     rule.update(norm)
    0.7 1.0 1.0
    16.62 5.0 0.5
    0.7 1.0 0.5
    6.0 2.0 1.0
    """

    tiers: Sequence[tuple[float, float, float]] = ((10.0, 5.0, 0.5), (5.0, 2.0, 1.0))
    """``(above, clip_to, lr_factor)`` tuples, the highest first: a norm larger than ``above`` is
    clipped to ``clip_to``, and the learning rate is multiplied by ``lr_factor``."""
    otherwise: float = 1.0
    """Threshold of norms below all tiers."""
    lr_steps: int = 20
    """Number of steps with a lowered learning rate, the one that lowered it included."""
    _cut: _Cut = field(default_factory=_Cut, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(tuple(tier) for tier in self.tiers))
        above = math.inf
        for tier in self.tiers:
            require(len(tier) == 3, "each of tiers", tier, "(above, clip_to, lr_factor)")
            require(tier[0] < above, "above", tier[0], f"in descending order, below {above}")
            require(0 < tier[1] <= tier[0], "clip_to", tier[1], f"in (0, above={tier[0]}]")
            require(0 < tier[2] <= 1, "lr_factor", tier[2], "in (0, 1]")
            above = tier[0]
        require(self.otherwise > 0, "otherwise", self.otherwise, "greater than 0")
        require(self.lr_steps >= 1, "lr_steps", self.lr_steps, "at least 1")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`."""
        return self._tier(grad_norm)[0]

    def lr_factor(self, grad_norm: float = 0.0) -> float:
        """See `CutsLearningRate`."""
        return min(self._tier(grad_norm)[1], self._cut.factor)

    def update(self, grad_norm: float) -> None:
        """Counts the step, and starts a cut of the learning rate if its norm requires one."""
        if not teaches(grad_norm):
            return
        cut, factor = self._cut, self._tier(grad_norm)[1]
        if factor < 1:
            cut.factor, cut.left = min(factor, cut.factor), self.lr_steps
        cut.left = max(0, cut.left - 1)
        if cut.left == 0:
            cut.factor = 1.0

    def _tier(self, grad_norm: float) -> tuple[float, float]:
        """Returns threshold and learning-rate factor for a norm; NaN is in no tier."""
        found = ((to, factor) for above, to, factor in self.tiers if grad_norm > above)
        return next(found, (self.otherwise, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Returns the current cut."""
        return {"factor": self._cut.factor, "left": self._cut.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the cut, for ``lr_steps`` at most."""
        self._cut.left = min(int(state["left"]), self.lr_steps)
        self._cut.factor = float(state["factor"]) if self._cut.left else 1.0
