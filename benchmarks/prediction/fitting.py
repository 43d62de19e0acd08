"""Fits the coefficients and the calibration of `lit_stability.policies.crash_risk.model`."""

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
"""Edges of the score bins of the calibration."""


@dataclass(frozen=True)
class Samples:
    """Accepted steps of runs, with features and labels."""

    features: Tensor
    """Shape ``(samples, features)``, float64."""
    labels: Tensor
    """1.0 if a divergence began within the next `HORIZON` steps, else 0.0."""
    families: tuple[str, ...]

    def select(self, selected: Sequence[bool]) -> Samples:
        """Returns the selected samples."""
        mask = torch.tensor(selected)
        families = tuple(f for f, s in zip(self.families, selected, strict=True) if s)
        return Samples(self.features[mask], self.labels[mask], families)


@dataclass(frozen=True)
class Model:
    """A logistic model and its calibration."""

    coefficients: tuple[float, ...]
    intercept: float
    calibration: tuple[tuple[float, float], ...]

    def scores(self, features: Tensor) -> Tensor:
        """Returns the uncalibrated probabilities."""
        weights = torch.tensor(self.coefficients, dtype=torch.float64)
        return torch.sigmoid(features @ weights + self.intercept)


def samples_of(traces: Iterable[Trace]) -> Samples:
    """Returns every accepted step before the divergence that has a baseline."""
    rows: list[tuple[float, ...]] = []
    labels: list[float] = []
    families: list[str] = []
    for trace in traces:
        trends, onset = Trends(), trace.onset()
        for stats, accepted in zip(trace.stats()[:onset], trace.accepted[:onset], strict=True):
            if not accepted:
                continue
            trends.update(stats)
            if trends.known:
                rows.append(trends.features())
                labels.append(float(onset is not None and onset - stats.step <= HORIZON))
                families.append(trace.family)
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (rows, labels))
    return Samples(*tensors, tuple(families))


def fit(samples: Samples) -> Model:
    """Fits the logistic model and its calibration."""
    weights = _logistic(samples)
    coefficients = tuple(round(float(w), 2) for w in weights[:-1])
    model = Model(coefficients, round(float(weights[-1]), 2), ())
    scores = model.scores(samples.features)
    return replace(model, calibration=_calibrate(scores, samples.labels))


def _logistic(samples: Samples) -> Tensor:
    """Logistic regression with a small L2 penalty; the last weight is the intercept."""
    x, y = samples.features, samples.labels
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


def _calibrate(scores: Tensor, labels: Tensor) -> tuple[tuple[float, float], ...]:
    """Returns mean score and observed share of each bin; pools neighbours until shares increase."""
    pools: list[list[float]] = []
    for low, high in zip((0.0, *_BINS), (*_BINS, 1.01), strict=True):
        inside = (scores >= low) & (scores < high)
        if int(inside.sum()) < 20:
            continue
        n = float(inside.sum())
        pools.append([n, float(scores[inside].sum()), float(labels[inside].sum())])
        while len(pools) > 1 and pools[-2][2] / pools[-2][0] >= pools[-1][2] / pools[-1][0]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    points = [(round(s / n, 3), round(y / n, 3)) for n, s, y in pools]
    return ((0.0, 0.0), *points, (1.0, 1.0))


def leave_family_out(fitting: Samples, evaluation: Samples) -> list[tuple[float, float]]:
    """Returns risk and label of each sample, with models fitted without the sample's family."""
    pairs: list[tuple[float, float]] = []
    for family in sorted(set(evaluation.families)):
        model = fit(fitting.select([f != family for f in fitting.families]))
        held_out = evaluation.select([f == family for f in evaluation.families])
        scores = model.scores(held_out.features).tolist()
        risks = (calibrated(score, model.calibration) for score in scores)
        pairs += zip(risks, held_out.labels.tolist(), strict=True)
    return pairs
