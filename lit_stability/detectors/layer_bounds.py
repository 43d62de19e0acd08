"""Checks the gradient norms of chosen layers against bounds that the user gives."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.measurement.step_stats import StepStats


class LayerBounds:
    """Flags a parameter whose gradient norm is outside the bounds for its name.

    A norm above the upper bound rejects the step. A norm below the lower bound is reported once,
    after ``persist`` consecutive steps, and the step is taken: small gradients for a while are
    normal during warm-up. A gradient of exactly 0 does not count as small.

    Args:
        bounds: glob pattern of parameter names -> largest gradient norm, or a pair of smallest and
            largest; if several patterns match a name, the first one counts.
        persist: consecutive steps below the lower bound before it is reported.

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
        """Rejects a pattern that matches no parameter, as it would silently bound nothing.

        Args:
            names: of all parameters.

        Raises:
            ValueError: if a pattern matches no name; the message shows some names.
        """
        for pattern in self.bounds:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"no parameter matches {pattern!r}, for which a bound is given; there are "
                    f"{len(names)}, such as {', '.join(names[:3])}"
                )

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if a parameter's gradient norm violates its bounds."""
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
        """Does nothing: the bounds are fixed."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: the counts are not kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state to restore."""
