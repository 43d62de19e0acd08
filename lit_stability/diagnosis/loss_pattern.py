"""The shape in which a loss goes wrong: at once, by growth, or by growing swings.

Data in, data out: imports neither torch nor Lightning.
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
"""Losses looked at, the last of a series."""
_LONGEST = 20
"""Steps of growth looked at."""
_FEWEST = 3
"""Steps that growth takes, without the calm before it."""
_SWINGS = 5
"""Turns that a swing takes to be told from noise, two of three of whose steps turn as well."""


@dataclass(frozen=True, slots=True)
class LossPattern:
    """How a loss went wrong, as `loss_pattern` finds it: a ``name``, and what was seen in ``text``.

    ``steps`` is how long it took, to the last finite loss.
    """

    name: PatternName
    steps: int
    """Steps that it took, to the last finite loss; 0 where it was finite and then was not."""
    text: str
    """What was seen, in words."""


def loss_pattern(losses: Sequence[float]) -> LossPattern | None:
    """Name the pattern in which a series of losses ends, or None where it ends like it began.

    * *sudden jump*: one step of twice what the loss is, and of ten times its usual steps; or it is
      NaN or Inf after an ordinary one;
    * *exponential growth*: three steps or more, three of four of which rise, by more than half and
      by five usual steps, and none of them most of the way;
    * *oscillating divergence*: the loss swings up and down, each swing larger than those before.

    Args:
        losses: oldest first, the last that of the bad step; at least three finite ones are needed,
            unless a non-finite one follows at once. Values after a non-finite one are not looked
            at.

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
    """Whether swings grow: to three times the first, and from one of a side to the next."""
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
                continue  # a jump after a chance rise that the noise explains
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
    """Share of the largest step in a rise, in logarithms of the distance from its foot."""
    foot = min(rising)
    heights = [math.log1p((x - foot) / size) for x in rising]
    return max(b - a for a, b in pairwise(heights)) / heights[-1]


def _noise(losses: Sequence[float]) -> float:
    """Median step from one loss to the next."""
    return median([abs(b - a) for a, b in pairwise(losses)] or [0.0])


def _size(losses: Sequence[float]) -> float:
    """What counts as much for a loss: the median of its magnitudes, at least something."""
    return max(median(abs(x) for x in losses), 1e-12) if losses else 1.0
