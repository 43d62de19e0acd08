"""Thresholds some standard deviations above a mean of norms.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import require
from lit_stability.policies.clip_rules.rule import teaches

_LEAST_SPREAD = 0.01
"""Smallest standard deviation that counts, over the mean. Norms that hardly vary are not clipped
for their noise, and a spread that was learnt away cannot keep a threshold down for ever."""

_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a Gaussian times this is its standard deviation."""


@dataclass
class _Learnt:
    """Norms, and the threshold that follows from them once it was asked for."""

    norms: list[float] = field(default_factory=list)
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class MeanSigmaClip:
    """Clips to the mean of the last norms plus some standard deviations.

    A norm beyond the threshold is learnt as the threshold: had a spike of 1000 among a thousand
    norms of 1 been learnt as it is, it would have doubled the mean and brought the threshold to 97
    for a thousand steps. Norms that stay high raise the threshold until they pass. The first
    ``known_after`` norms are held against their own median in the same way.

    Raises:
        ValueError: if an option is out of its range.

    >>> rule = MeanSigmaClip(window=4, known_after=2)
    >>> for norm in (1.0, 3.0, 100.0, 2.0):
    ...     print(norm, round(rule.threshold(norm), 3))
    ...     rule.update(norm)
    1.0 10.0
    3.0 10.0
    100.0 5.0
    2.0 7.899
    """

    sigmas: float = 3.0
    """Standard deviations above the mean."""
    window: int = 1000
    """Norms remembered."""
    until_known: float = 10.0
    """Threshold until enough norms are known; Inf for none."""
    known_after: int = 100
    """Norms that are enough."""
    _learnt: _Learnt = field(default_factory=_Learnt, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(0 < self.sigmas < math.inf, "sigmas", self.sigmas, "greater than 0 and finite")
        require(self.window >= 1, "window", self.window, "at least 1")
        require(self.until_known > 0, "until_known", self.until_known, "greater than 0")
        enough = 1 <= self.known_after <= self.window
        require(enough, "known_after", self.known_after, f"in 1..window={self.window}")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`; the coming norm itself plays no part in it."""
        if self._learnt.threshold is None:
            self._learnt.threshold = self._compute()
        return self._learnt.threshold

    def _compute(self) -> float:
        norms = self._learnt.norms
        if len(norms) < self.known_after:
            return self.until_known
        mean = math.fsum(norms) / len(norms)
        sigma = math.dist(norms, [mean] * len(norms)) / math.sqrt(len(norms))
        return _above(mean, self.sigmas, sigma) or self.until_known

    def update(self, grad_norm: float) -> None:
        """Learn a norm, or the threshold where it is beyond that."""
        if not teaches(grad_norm):
            return
        norms = list(self._learnt.norms)
        known = len(norms) >= self.known_after
        norms.append(min(grad_norm, self.threshold(grad_norm)) if known else grad_norm)
        just_known = len(norms) == self.known_after and not known
        self._hold(_without_spikes(norms, self.sigmas) if just_known else norms)

    def _hold(self, norms: Sequence[float]) -> None:
        self._learnt.norms, self._learnt.threshold = list(norms[-self.window :]), None

    def state_dict(self) -> dict[str, Any]:
        """What was learnt."""
        return {"norms": list(self._learnt.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back, or as much of its end as there is room for."""
        self._hold([float(norm) for norm in state["norms"] if teaches(norm)])


@dataclass
class _Moments:
    """Exponential averages of the norm and of its squared distance from the mean."""

    mean: float = 0.0
    variance: float = 0.0
    first: list[float] = field(default_factory=list)
    """The norms that they are to begin with, until these are enough."""
    known: bool = False


@dataclass(frozen=True, kw_only=True)
class ZScoreClip:
    """Clips norms whose z-score is too large, the harder the larger they are.

    Mean and variance are exponential averages (Finch 2009, "Incremental calculation of weighted
    mean and variance", equations 124 and 143), begun as those of the first ``known_after`` norms,
    of which spikes over their median count as its ``z_max`` standard deviations.
    With ``z = (norm - mean) / sigma``, a norm of ``z > z_max`` is clipped to
    ``mean + z_max**2 / z * sigma``. After ZClip (Kumar et al. 2025, arXiv 2504.02507), but for
    two things. What is not finite is never learnt, so that no NaN stays in the averages. And a
    clipped norm is learnt as ``mean + z_max * sigma`` and not as what it was clipped to: learnt so
    close to the mean, norms that have risen for good would narrow sigma and be clipped for ever.

    Raises:
        ValueError: if an option is out of its range.

    >>> rule = ZScoreClip(known_after=2)
    >>> for norm in (1.0, 3.0, 5.0, 22.0, float("nan"), 4.0):
    ...     print(norm, round(rule.threshold(norm), 3))
    ...     rule.update(norm)
    1.0 10.0
    3.0 10.0
    5.0 4.083
    22.0 2.436
    nan 5.035
    4.0 5.035
    """

    z_max: float = 2.5
    """Largest z-score that is not clipped."""
    decay: float = 0.97
    """What averages keep of themselves per step, in [0, 1)."""
    until_known: float = 10.0
    """Threshold until enough norms are known; Inf for none."""
    known_after: int = 25
    """Norms that are enough."""
    _moments: _Moments = field(default_factory=_Moments, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(0 < self.z_max < math.inf, "z_max", self.z_max, "greater than 0 and finite")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        require(self.until_known > 0, "until_known", self.until_known, "greater than 0")
        require(self.known_after >= 1, "known_after", self.known_after, "at least 1")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`."""
        largest = self._largest()
        mean = self._moments.mean
        if not self._moments.known or not grad_norm > largest:
            return largest
        # With d = norm - mean and m = z_max * sigma, z_max**2 / z * sigma is m**2 / d.
        return mean + (largest - mean) * ((largest - mean) / (grad_norm - mean))

    def update(self, grad_norm: float) -> None:
        """Learn a norm, or the largest that is not clipped where it is beyond that."""
        if not teaches(grad_norm):
            return
        moments, rest = self._moments, 1 - self.decay
        if not moments.known:
            self._begin(grad_norm)
            return
        away = min(grad_norm, self._largest()) - moments.mean
        moments.mean += rest * away
        moments.variance = self.decay * (moments.variance + rest * away * away)

    def _begin(self, grad_norm: float) -> None:
        moments = self._moments
        moments.first.append(grad_norm)
        if len(moments.first) < self.known_after:
            return
        norms = _without_spikes(moments.first, self.z_max)
        moments.mean = math.fsum(norms) / len(norms)
        moments.variance = math.dist(norms, [moments.mean] * len(norms)) ** 2 / len(norms)
        moments.first, moments.known = [], True

    def _largest(self) -> float:
        """The largest norm that is not clipped."""
        if not self._moments.known:
            return self.until_known
        sigma = math.sqrt(self._moments.variance)
        return _above(self._moments.mean, self.z_max, sigma) or self.until_known

    def state_dict(self) -> dict[str, Any]:
        """The averages, or the norms that they are to begin with."""
        return {**vars(self._moments), "first": list(self._moments.first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._moments.mean, self._moments.variance = float(state["mean"]), float(state["variance"])
        self._moments.first = [float(norm) for norm in state["first"]]
        self._moments.known = bool(state["known"])


def _above(mean: float, sigmas: float, sigma: float) -> float:
    """So many standard deviations above a mean; 0 where nothing but zeros is known."""
    return mean + sigmas * max(sigma, _LEAST_SPREAD * mean)


def _without_spikes(norms: Sequence[float], sigmas: float) -> list[float]:
    """Norms, at most so many robust standard deviations above their median.

    >>> _without_spikes([1.0, 2.0, 3.0, 1e6], sigmas=3)
    [1.0, 2.0, 3.0, 6.9478]
    """
    middle = median(norms)
    sigma = _MAD_TO_SIGMA * median(abs(norm - middle) for norm in norms)
    largest = _above(middle, sigmas, sigma)
    return [min(norm, largest) for norm in norms]
