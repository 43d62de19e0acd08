"""Thresholds given beforehand: one for all norms, or one for each range of them.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

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
    """Largest norm that gradients may keep."""

    def __post_init__(self) -> None:
        require(self.norm > 0, "norm", self.norm, "greater than 0")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`."""
        return self.norm

    def update(self, grad_norm: float) -> None:
        """There is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing evolves."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to put back."""


@dataclass
class _Cut:
    """A cut of the learning rate that is in force."""

    factor: float = 1.0
    left: int = 0
    """Steps that it is still to last."""


@dataclass(frozen=True, kw_only=True)
class TieredClip:
    """A threshold for each range of norms; the largest norms lower the learning rate too.

    The learning rate of the step in question is lowered and stays so for ``lr_steps`` steps; then
    it is what the schedule says, at once. Another large norm meanwhile starts the count anew, and
    lowers it no further: of two cuts the deeper one is in force.

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
    """``(above, clip_to, lr_factor)`` each, the highest first: a norm larger than ``above`` is
    clipped to ``clip_to``, and the learning rate is multiplied by ``lr_factor``."""
    otherwise: float = 1.0
    """What norms below all tiers are clipped to."""
    lr_steps: int = 20
    """Steps that a lowered learning rate lasts, with the one that lowered it."""
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
        """Count the step, and begin a cut of the learning rate where its norm asks for one."""
        if not teaches(grad_norm):
            return
        cut, asked = self._cut, self._tier(grad_norm)[1]
        if asked < 1:
            cut.factor, cut.left = min(asked, cut.factor), self.lr_steps
        cut.left = max(0, cut.left - 1)
        if cut.left == 0:
            cut.factor = 1.0

    def _tier(self, grad_norm: float) -> tuple[float, float]:
        """Threshold and learning-rate factor for a norm; NaN is above nothing."""
        found = ((to, factor) for above, to, factor in self.tiers if grad_norm > above)
        return next(found, (self.otherwise, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """The cut that is in force."""
        return {"factor": self._cut.factor, "left": self._cut.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back; it lasts no longer than one that begins today."""
        self._cut.left = min(int(state["left"]), self.lr_steps)
        self._cut.factor = float(state["factor"]) if self._cut.left else 1.0
