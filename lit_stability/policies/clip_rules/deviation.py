"""Clipping rules with a threshold of some standard deviations above the mean of recent norms.

Imports neither torch nor Lightning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import require
from lit_stability.policies.clip_rules.rule import teaches

_LEAST_SPREAD = 0.01
"""Smallest standard deviation, relative to the mean. Nearly constant norms are then not clipped for
their noise, and a spread that has shrunk to 0 does not fix the threshold for the rest of the run.
"""

_MAD_TO_SIGMA = 1.4826
"""Ratio of standard deviation to median absolute deviation, for a Gaussian."""


@dataclass
class _Recent:
    """Recent norms and their threshold; None until it is computed."""

    norms: list[float] = field(default_factory=list)
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class MeanSigmaClip:
    """Clips to the mean of recent norms plus some standard deviations.

    A norm above the threshold is learned as the threshold: a spike of 1000 among a thousand norms
    of 1, learned as it is, would double the mean and raise the threshold to 97 for a thousand
    steps. Norms that stay high raise the threshold until they are no longer clipped. Spikes among
    the first ``known_after`` norms are limited in the same way, relative to the median.

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
    """Distance of the threshold from the mean, in standard deviations."""
    window: int = 1000
    """Number of norms kept."""
    until_known: float = 10.0
    """Threshold until ``known_after`` norms are known; Inf for no clipping."""
    known_after: int = 100
    """Number of norms needed for mean and deviation."""
    _recent: _Recent = field(default_factory=_Recent, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(0 < self.sigmas < math.inf, "sigmas", self.sigmas, "greater than 0 and finite")
        require(self.window >= 1, "window", self.window, "at least 1")
        require(self.until_known > 0, "until_known", self.until_known, "greater than 0")
        enough = 1 <= self.known_after <= self.window
        require(enough, "known_after", self.known_after, f"in 1..window={self.window}")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`; does not depend on ``grad_norm``."""
        if self._recent.threshold is None:
            self._recent.threshold = self._compute()
        return self._recent.threshold

    def _compute(self) -> float:
        norms = self._recent.norms
        if len(norms) < self.known_after:
            return self.until_known
        mean = math.fsum(norms) / len(norms)
        sigma = math.dist(norms, [mean] * len(norms)) / math.sqrt(len(norms))
        return _above(mean, self.sigmas, sigma) or self.until_known

    def update(self, grad_norm: float) -> None:
        """Learns a norm, or the threshold if the norm is above it."""
        if not teaches(grad_norm):
            return
        norms = list(self._recent.norms)
        known = len(norms) >= self.known_after
        norms.append(min(grad_norm, self.threshold(grad_norm)) if known else grad_norm)
        just_known = len(norms) == self.known_after and not known
        self._hold(_without_spikes(norms, self.sigmas) if just_known else norms)

    def _hold(self, norms: Sequence[float]) -> None:
        self._recent.norms, self._recent.threshold = list(norms[-self.window :]), None

    def state_dict(self) -> dict[str, Any]:
        """Returns the norms."""
        return {"norms": list(self._recent.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the norms, limited to the last ``window``."""
        self._hold([float(norm) for norm in state["norms"] if teaches(norm)])


@dataclass
class _Moments:
    """Exponential averages of the norm and of its squared distance from the mean."""

    mean: float = 0.0
    variance: float = 0.0
    first: list[float] = field(default_factory=list)
    """First norms, from which the averages are initialised once there are enough."""
    known: bool = False


@dataclass(frozen=True, kw_only=True)
class ZScoreClip:
    """Clips norms whose z-score is too large, the harder the larger they are.

    Mean and variance are exponential averages (Finch 2009, "Incremental calculation of weighted
    mean and variance", equations 124 and 143), initialised from the first ``known_after`` norms;
    spikes among these are limited to ``z_max`` robust standard deviations above their median.
    With ``z = (norm - mean) / sigma``, a norm of ``z > z_max`` is clipped to
    ``mean + z_max**2 / z * sigma``. After ZClip (Kumar et al. 2025, arXiv 2504.02507), with two
    differences. Non-finite norms are never learned, so no NaN stays in the averages. And a clipped
    norm is learned as ``mean + z_max * sigma``, not as the norm it was clipped to: that is so close
    to the mean that norms which stay high would shrink sigma and always be clipped.

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
    """Weight of the previous average per step, in [0, 1)."""
    until_known: float = 10.0
    """Threshold until ``known_after`` norms are known; Inf for no clipping."""
    known_after: int = 25
    """Number of norms needed for the averages."""
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
        """Learns a norm, or the largest unclipped norm if it is above that."""
        if not teaches(grad_norm):
            return
        moments, weight = self._moments, 1 - self.decay
        if not moments.known:
            self._begin(grad_norm)
            return
        distance = min(grad_norm, self._largest()) - moments.mean
        moments.mean += weight * distance
        moments.variance = self.decay * (moments.variance + weight * distance * distance)

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
        """Returns the largest norm that is not clipped."""
        if not self._moments.known:
            return self.until_known
        sigma = math.sqrt(self._moments.variance)
        return _above(self._moments.mean, self.z_max, sigma) or self.until_known

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages, and the first norms until there are enough."""
        return {**vars(self._moments), "first": list(self._moments.first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._moments.mean, self._moments.variance = float(state["mean"]), float(state["variance"])
        self._moments.first = [float(norm) for norm in state["first"]]
        self._moments.known = bool(state["known"])


def _above(mean: float, sigmas: float, sigma: float) -> float:
    """Returns a mean plus some standard deviations; 0 if all norms are 0."""
    return mean + sigmas * max(sigma, _LEAST_SPREAD * mean)


def _without_spikes(norms: Sequence[float], sigmas: float) -> list[float]:
    """Limits norms to some robust standard deviations above their median.

    >>> _without_spikes([1.0, 2.0, 3.0, 1e6], sigmas=3)
    [1.0, 2.0, 3.0, 6.9478]
    """
    middle = median(norms)
    sigma = _MAD_TO_SIGMA * median(abs(norm - middle) for norm in norms)
    largest = _above(middle, sigmas, sigma)
    return [min(norm, largest) for norm in norms]
