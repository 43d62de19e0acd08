"""Whether the gradient norm grew before an event, and by how many steps it was ahead.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from lit_stability.checks.metric_log.series import Series
from lit_stability.detectors.rolling_window import Window

_HISTORY = 100
_FEWEST = 8
"""Ordinary norms needed to tell what is large."""
_SIGMAS, _RATIO = 4.0, 2.0
"""Excess over the median from which on a norm is large: robust standard deviations of the
logarithm, and a factor."""
_GROWN = 5.0
"""Factor over the median that the norm must reach before the event."""


@dataclass(frozen=True)
class GradientRise:
    """A gradient norm that grew up to an event."""

    step: int
    """First step at which it was above all that is ordinary."""
    lead: int
    """Steps from there to the event."""
    usual: float
    largest: float
    """Largest norm before the event; Inf or NaN if it was not finite."""

    def text(self) -> str:
        """Returns the rise in one phrase."""
        return (
            f"the gradient norm had grown from {self.usual:.3g} to {self.largest:.3g} "
            f"since step {self.step}, {self.lead} steps before"
        )


def rise_before(norms: Series | None, step: int) -> GradientRise | None:
    """Returns the rise of the gradient norm that leads to an event, or None.

    Args:
        norms: Gradient norms.
        step: Of the event. A norm that was logged with it does not count.

    >>> norms = Series("grad_norm")
    >>> for i in range(40):
    ...     norms.add(i, 1.0 + 0.1 * (i % 3) if i < 30 else 2.0 ** (i - 27))
    >>> rise_before(norms, 40).text()
    'the gradient norm had grown from 1.1 to 4.1e+03 since step 30, 10 steps before'
    """
    if norms is None:
        return None
    end = bisect_right(norms.steps, step - 1)
    window = Window(_HISTORY)
    values = norms.values[max(0, end - 2 * _HISTORY) : end]
    start = end - len(values)
    began: int | None = None
    usual = 0.0
    for i, value in enumerate(values):
        if math.isfinite(value) and value <= 0:
            continue
        high = not math.isfinite(value) or _is_high(window, value)
        if high and began is None:
            began, usual = start + i, math.exp(window.median)
        elif not high:
            began = None
            window.add(math.log(value))
    if began is None or len(window) < _FEWEST:
        return None
    grown = norms.values[began:end]
    largest = math.inf if not all(map(math.isfinite, grown)) else max(grown)
    if largest < _GROWN * usual:
        return None
    return GradientRise(norms.steps[began], step - norms.steps[began], usual, largest)


def _is_high(window: Window, value: float) -> bool:
    if len(window) < _FEWEST or value <= _RATIO * math.exp(window.median):
        return False
    return math.log(value) > window.median + _SIGMAS * window.spread
