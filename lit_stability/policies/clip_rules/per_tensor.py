"""Clipping of each tensor by itself. Imports neither torch nor Lightning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_stability.detectors.anomaly import require
from lit_stability.policies.clip_rules.rule import teaches


@dataclass
class _Averages:
    """What is known of each tensor, by name."""

    norms: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    """Number of norms learned."""
    whole: int = 0
    """Number of steps learned."""


@dataclass(frozen=True, kw_only=True)
class PerTensorClip:
    """Clips each tensor to a little more than the moving average of its own clipped norms.

    After AdaGC (Wang et al. 2025, arXiv 2502.11034). For the first ``known_after`` steps the whole
    gradient is clipped to ``until_known``, and each tensor's average is the smallest norm seen;
    then each tensor is limited to ``ratio`` times its average, which learns the clipped norm. A
    spike in one tensor thus leaves the others as they are, and however large it is or long it
    lasts, the average rises by at most ``(ratio - 1) * (1 - decay)`` of itself per step: 0.1 % with
    the defaults. That is also how slowly it follows gradients that grow for good.

    Other than in the paper, a norm of 0 teaches nothing: it would be the smallest for ever, and the
    tensor never train again. A tensor that first gets a gradient later has its own first steps,
    without a limit of its own.

    Raises:
        ValueError: if an option is out of its range.

    >>> rule = PerTensorClip(ratio=1.5, decay=0.5, known_after=2)
    >>> for norm in (3.0, 2.0, 100.0, 2.0):
    ...     (limit,) = rule.tensor_thresholds(["weight"])
    ...     print(norm, limit)
    ...     rule.update_tensors(["weight"], [min(norm, limit)])
    3.0 inf
    2.0 inf
    100.0 3.0
    2.0 3.75
    """

    ratio: float = 1.05
    """Largest norm of a tensor, relative to its average."""
    decay: float = 0.98
    """Weight of the past in the average, in [0, 1)."""
    until_known: float = 1.0
    """Threshold of the whole gradient until ``known_after`` steps are known; Inf for none."""
    known_after: int = 100
    """Number of steps needed for an average."""
    _known: _Averages = field(default_factory=_Averages, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(1 < self.ratio < math.inf, "ratio", self.ratio, "greater than 1 and finite")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        require(self.until_known > 0, "until_known", self.until_known, "greater than 0")
        require(self.known_after >= 1, "known_after", self.known_after, "at least 1")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`; Inf once tensors have limits of their own."""
        return self.until_known if self._known.whole < self.known_after else math.inf

    def update(self, grad_norm: float) -> None:
        """Counts an accepted step."""
        if teaches(grad_norm):
            self._known.whole += 1

    def tensor_thresholds(self, names: Sequence[str]) -> list[float]:
        """See `ClipsTensors`."""
        known, enough = self._known, self.known_after
        return [
            self.ratio * known.norms[name] if known.steps.get(name, 0) >= enough else math.inf
            for name in names
        ]

    def update_tensors(self, names: Sequence[str], norms: Sequence[float]) -> None:
        """Learns the clipped norms of an accepted step."""
        known = self._known
        for name, norm in zip(names, norms, strict=True):
            if not teaches(norm) or norm == 0:
                continue
            steps = known.steps.get(name, 0)
            if steps < self.known_after:
                known.norms[name] = min(norm, known.norms.get(name, norm))
                known.steps[name] = steps + 1
            else:
                known.norms[name] += (1 - self.decay) * (norm - known.norms[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages and the counts."""
        known = self._known
        return {"norms": dict(known.norms), "steps": dict(known.steps), "whole": known.whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        norms = {str(name): float(norm) for name, norm in state["norms"].items()}
        self._known.norms = {name: norm for name, norm in norms.items() if teaches(norm)}
        self._known.steps = {
            str(name): int(n) for name, n in state["steps"].items() if name in self._known.norms
        }
        self._known.whole = int(state["whole"])
