"""Patterns of a diverging loss: sudden jump, exponential growth, oscillating divergence.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from statistics import median
from typing import Literal

PatternName = Literal["sudden jump", "exponential growth", "oscillating divergence"]

_SPAN = 40
"""Number of losses examined, from the end of a series."""
_LONGEST = 20
"""Largest number of steps of growth examined."""
_FEWEST = 3
"""Smallest number of steps of growth, without the calm steps before it."""
_SWINGS = 5
"""Changes of direction needed for an oscillation, since two of three steps of noise change too."""


@dataclass(frozen=True, slots=True)
class LossPattern:
    """The pattern in which a loss diverges, as `loss_pattern` returns it."""

    name: PatternName
    steps: int
    """Length of the pattern, up to the last finite loss; 0 for a step from finite to NaN or Inf."""
    text: str
    """Description with values."""


def loss_pattern(losses: Sequence[float]) -> LossPattern | None:
    """Returns the pattern in which a series of losses diverges, or None if it does not.

    * *sudden jump*: one step by twice the median loss and ten times the median step; or NaN or Inf
      after a normal loss;
    * *exponential growth*: three or more steps, three in four of which rise, in total by more than
      half the median loss and five median steps, while no single step is most of the rise;
    * *oscillating divergence*: the loss alternates up and down with growing amplitude.

    Args:
        losses: the oldest first, the loss of the bad step last. At least three finite losses are
            needed, unless a non-finite one follows. Losses after a non-finite one are ignored.

    >>> nan = float("nan")
    >>> loss_pattern([2.1, 2.0, 1.9, 8734.5, nan]).name
    'sudden jump'
    >>> loss_pattern([2.1, 2.3, 2.8, 4.5, 12.3, 89.7, nan]).name
    'exponential growth'
    >>> loss_pattern([2.1, 1.8, 2.5, 1.6, 3.2, 1.4, 5.8, nan]).name
    'oscillating divergence'
    >>> loss_pattern([2.1, 2.0, 2.05, 1.9, 1.95, 1.8])
    """
    finite = [*takewhile(math.isfinite, losses)]
    broken = len(finite) < len(losses)
    finite = finite[-_SPAN:]
    found = _swings(finite) or _growth(finite) or _jump(finite)
    if found is None and broken and finite:
        return LossPattern("sudden jump", 0, f"the loss was {finite[-1]:.4g} the step before")
    return found


def _swings(losses: Sequence[float]) -> LossPattern | None:
    steps = [b - a for a, b in pairwise(losses)]
    count = 0
    while count + 1 < len(steps) and steps[-1 - count] * steps[-2 - count] < 0:
        count += 1
    sizes = [abs(step) for step in steps[len(steps) - count - 1 :]]
    if count < _SWINGS or not _grows(sizes):
        return None
    text = f"the last {count + 1} steps go up and down, by {sizes[0]:.3g} and then {sizes[-1]:.3g}"
    return LossPattern("oscillating divergence", count + 1, text)


def _grows(sizes: Sequence[float]) -> bool:
    """Returns whether the amplitude grows: to three times the first, and mostly step by step."""
    grown = sum(b > a for a, b in zip(sizes, sizes[2:], strict=False))
    return sizes[-1] >= 3 * max(sizes[0], sizes[1]) and grown >= 0.75 * (len(sizes) - 2)


def _growth(losses: Sequence[float]) -> LossPattern | None:
    size = _size(losses)
    for steps in range(min(_LONGEST, len(losses) - 1), _FEWEST - 1, -1):
        part = losses[-1 - steps :]
        rising = sum(b > a for a, b in pairwise(part)) >= 0.75 * steps
        if not rising or part[1] <= part[0] or part[-1] < max(part):
            continue
        noise = _noise(losses[: -1 - steps])
        if part[-1] - part[0] > max(0.5 * size, 5 * noise) and _largest_share(part, size) <= 0.9:
            calm = max(i for i, x in enumerate(part) if x <= min(part) + 3 * noise)
            part = part[calm:]
            if len(part) <= _FEWEST:
                continue  # a jump after a rise that noise explains
            text = f"the loss grew for {len(part) - 1} steps, from {part[0]:.4g} to {part[-1]:.4g}"
            return LossPattern("exponential growth", len(part) - 1, text)
    return None


def _jump(losses: Sequence[float]) -> LossPattern | None:
    if len(losses) < 3:
        return None
    at = max(range(1, len(losses)), key=lambda i: losses[i] - losses[i - 1])
    before, after = losses[at - 1], losses[at]
    if after - before < max(10 * _noise(losses[:at]), 2 * _size(losses[:at])):
        return None
    steps = len(losses) - at
    return LossPattern("sudden jump", steps, f"the loss went from {before:.4g} to {after:.4g}")


def _largest_share(rising: Sequence[float], size: float) -> float:
    """Returns the share of the largest step in a rise, on a logarithmic scale from its minimum."""
    lowest = min(rising)
    heights = [math.log1p((x - lowest) / size) for x in rising]
    return max(b - a for a, b in pairwise(heights)) / heights[-1]


def _noise(losses: Sequence[float]) -> float:
    """Returns the median absolute step from one loss to the next."""
    return median([abs(b - a) for a, b in pairwise(losses)] or [0.0])


def _size(losses: Sequence[float]) -> float:
    """Returns the median magnitude of losses, at least 1e-12."""
    return max(median(abs(x) for x in losses), 1e-12) if losses else 1.0
