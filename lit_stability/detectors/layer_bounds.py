"""Bounds on the gradient norm of chosen layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.measurement.step_stats import StepStats


class LayerBounds:
    """Objects to a parameter whose gradient norm is outside the bounds given for its name.

    Above the upper bound the step is bad. Below the lower one nothing is wrong with the step:
    after ``persist`` steps in a row it is said once, and nothing is done, as a small gradient for
    a while is what warm-up looks like. A gradient of exactly 0 does not count as small.

    Args:
        bounds: glob pattern of parameter names -> the largest gradient norm, or a pair of the
            smallest and the largest; of several patterns that fit a name the first counts.
        persist: steps in a row below the lower bound before it is said.

    Raises:
        ValueError: if a bound is not positive, or a pair is not in order.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> d = LayerBounds({"head.*": 10.0, "*": (1e-8, 100.0)})
    >>> names, norms = ("body.weight", "head.weight"), (50.0, 20.0)
    >>> d.check(StepStats(step=0, loss=1.0, grad_norm=54.0, names=names, grad_norms=norms)).layers
    (('head.weight', 20.0),)
    """

    def __init__(
        self, bounds: Mapping[str, float | tuple[float, float]], *, persist: int = 50
    ) -> None:
        require(persist >= 1, "persist", persist, "at least 1")
        self.persist = persist
        self.bounds: dict[str, tuple[float, float]] = {}
        for pattern, bound in bounds.items():
            low, high = (0.0, bound) if isinstance(bound, (int, float)) else bound
            require(high > 0, f"the bound of {pattern!r}", bound, "greater than 0")
            require(0 <= low < high, f"the bound of {pattern!r}", bound, "in order: low, high")
            self.bounds[pattern] = (low, high)
        self._resolved: dict[str, tuple[float, float] | None] = {}
        self._low_for: dict[str, int] = {}

    def require_fit(self, names: Sequence[str]) -> None:
        """Refuse a pattern that no parameter has: it would bound nothing, in silence.

        Args:
            names: of all parameters.

        Raises:
            ValueError: with the pattern, and names that are there.
        """
        for pattern in self.bounds:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"no parameter is named like {pattern!r}, which is given a bound; there are "
                    f"{len(names)}, as {', '.join(names[:3])}"
                )

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        over: list[tuple[str, float, float]] = []
        low: list[tuple[str, float, float]] = []
        for name, norm in zip(stats.names, stats.grad_norms, strict=True):
            bounds = self._bounds(name)
            if bounds is None:
                continue
            if norm > bounds[1]:
                over.append((name, norm, bounds[1]))
            if 0 < norm < bounds[0]:
                self._low_for[name] = self._low_for.get(name, 0) + 1
                if self._low_for[name] == self.persist:
                    low.append((name, norm, bounds[0]))
            else:
                self._low_for.pop(name, None)
        if over:
            return self._anomaly(stats, over, "above")
        return self._anomaly(stats, low, f"for {self.persist} steps below") if low else None

    @staticmethod
    def _anomaly(stats: StepStats, rows: list[tuple[str, float, float]], how: str) -> Anomaly:
        name, norm, bound = max(rows, key=lambda row: abs(row[1] / row[2] - 1))
        return Anomaly(
            kind="layer bound",
            step=stats.step,
            value=norm,
            signal="grad_norm",
            threshold=bound,
            optimizer=stats.optimizer,
            warn_only=how != "above",
            layers=tuple((n, v) for n, v, _ in rows[:5]),
            message=f"gradient norm {norm:.4g} of {name} is {how} its bound {bound:.4g}",
        )

    def _bounds(self, name: str) -> tuple[float, float] | None:
        if name not in self._resolved:
            fits = (b for pattern, b in self.bounds.items() if fnmatchcase(name, pattern))
            self._resolved[name] = next(fits, None)
        return self._resolved[name]

    def update(self, stats: StepStats) -> None:
        """There is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing that evolves is worth keeping."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to put back."""
