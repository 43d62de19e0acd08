"""Fits the coefficients and the calibration in `lit_stability.policies.crash_risk.model`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.prediction.traces import Trace
from lit_stability.policies.crash_risk import HORIZON
from lit_stability.policies.crash_risk.model import calibrated
from lit_stability.policies.crash_risk.trends import Trends

_BINS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85)
"""Where the scores are cut for the calibration."""


@dataclass(frozen=True)
class Moments:
    """Accepted steps of runs, each with what was known then and what came of it."""

    features: Tensor
    """Shape ``(moments, features)``, float64."""
    followed: Tensor
    """1.0 where a divergence began within the next `HORIZON` steps."""
    families: tuple[str, ...]

    def where(self, chosen: Sequence[bool]) -> Moments:
        """Some of them."""
        mask = torch.tensor(chosen)
        families = tuple(f for f, c in zip(self.families, chosen, strict=True) if c)
        return Moments(self.features[mask], self.followed[mask], families)


@dataclass(frozen=True)
class Model:
    """A logistic model and its calibration."""

    coefficients: tuple[float, ...]
    intercept: float
    calibration: tuple[tuple[float, float], ...]

    def scores(self, features: Tensor) -> Tensor:
        """The logistic function, not calibrated."""
        weights = torch.tensor(self.coefficients, dtype=torch.float64)
        return torch.sigmoid(features @ weights + self.intercept)


def moments_of(traces: Iterable[Trace]) -> Moments:
    """Every accepted step with a baseline behind it, up to the divergence."""
    rows: list[tuple[float, ...]] = []
    followed: list[float] = []
    families: list[str] = []
    for trace in traces:
        trends, onset = Trends(), trace.onset()
        for stats, accepted in zip(trace.stats()[:onset], trace.accepted[:onset], strict=True):
            if not accepted:
                continue
            trends.update(stats)
            if trends.known:
                rows.append(trends.features())
                followed.append(float(onset is not None and onset - stats.step <= HORIZON))
                families.append(trace.family)
    both = (torch.tensor(each, dtype=torch.float64) for each in (rows, followed))
    return Moments(*both, tuple(families))


def fit(moments: Moments) -> Model:
    """The most likely model, and its calibration."""
    weights = _logistic(moments)
    coefficients = tuple(round(float(w), 2) for w in weights[:-1])
    model = Model(coefficients, round(float(weights[-1]), 2), ())
    scores = model.scores(moments.features)
    return replace(model, calibration=_calibrate(scores, moments.followed))


def _logistic(moments: Moments) -> Tensor:
    """Logistic regression with a faint L2 penalty; the last weight is the intercept."""
    x, y = moments.features, moments.followed
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        loss = F.binary_cross_entropy_with_logits(logits, y) + 1e-4 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _calibrate(scores: Tensor, followed: Tensor) -> tuple[tuple[float, float], ...]:
    """Points of mean score and observed share by bin, made to rise by pooling neighbours."""
    pools: list[list[float]] = []
    for low, high in zip((0.0, *_BINS), (*_BINS, 1.01), strict=True):
        inside = (scores >= low) & (scores < high)
        if int(inside.sum()) < 20:
            continue
        n = float(inside.sum())
        pools.append([n, float(scores[inside].sum()), float(followed[inside].sum())])
        while len(pools) > 1 and pools[-2][2] / pools[-2][0] >= pools[-1][2] / pools[-1][0]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    points = [(round(s / n, 3), round(y / n, 3)) for n, s, y in pools]
    return ((0.0, 0.0), *points, (1.0, 1.0))


def left_out(fitted: Moments, tested: Moments) -> list[tuple[float, float]]:
    """Risk of each tested moment by a model that has seen no run of its family, and what came."""
    pairs: list[tuple[float, float]] = []
    for family in sorted(set(tested.families)):
        model = fit(fitted.where([f != family for f in fitted.families]))
        held = tested.where([f == family for f in tested.families])
        scores = model.scores(held.features).tolist()
        risks = (calibrated(score, model.calibration) for score in scores)
        pairs += zip(risks, held.followed.tolist(), strict=True)
    return pairs
