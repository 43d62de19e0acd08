"""Bounds on the gradient norm of chosen layers."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.stats import StepStats


class LayerBounds:
    """Objects to a parameter whose gradient norm is above the bound given for its name.

    Args:
        bounds: glob pattern of parameter names -> largest gradient norm; of several patterns that
            fit a name the first counts.

    Raises:
        ValueError: if a bound is not positive.

    >>> from lit_stability.stats import StepStats
    >>> d = LayerBounds({"head.*": 10.0, "*": 100.0})
    >>> names, norms = ("body.weight", "head.weight"), (50.0, 20.0)
    >>> d.check(StepStats(step=0, loss=1.0, grad_norm=54.0, names=names, grad_norms=norms)).layers
    (('head.weight', 20.0),)
    """

    def __init__(self, bounds: Mapping[str, float]) -> None:
        for pattern, bound in bounds.items():
            require(bound > 0, f"the bound of {pattern!r}", bound, "greater than 0")
        self.bounds = dict(bounds)
        self._resolved: dict[str, float | None] = {}

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        over = [
            (name, norm, bound)
            for name, norm in zip(stats.names, stats.grad_norms, strict=True)
            if (bound := self._bound(name)) is not None and norm > bound
        ]
        if not over:
            return None
        name, norm, bound = max(over, key=lambda row: row[1] / row[2])
        return Anomaly(
            kind="layer bound",
            step=stats.step,
            value=norm,
            signal="grad_norm",
            threshold=bound,
            optimizer=stats.optimizer,
            layers=tuple((n, v) for n, v, _ in over[:5]),
            message=f"gradient norm {norm:.4g} of {name} is above its bound {bound:.4g}",
        )

    def _bound(self, name: str) -> float | None:
        if name not in self._resolved:
            fits = (b for pattern, b in self.bounds.items() if fnmatchcase(name, pattern))
            self._resolved[name] = next(fits, None)
        return self._resolved[name]

    def update(self, stats: StepStats) -> None:
        """There is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing evolves."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to put back."""
