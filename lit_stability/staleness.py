"""How far a gradient is beyond what Adam's second moment expects, from gradient norms alone.

Summed over a parameter's elements, ``v_t = b v_(t-1) + (1 - b) g_t^2`` (Kingma & Ba 2015, Algorithm
1) reads ``S_t = b S_(t-1) + (1 - b) |g_t|^2``: the sum of the second moment follows exactly from
the norms that are measured anyway. Nothing is read from the device, all ranks have the same number,
and rows of an embedding that are rarely used weigh no more than they do in its gradient.

The norms are those before clipping, and so is the second moment kept here: where the optimizer's
own saw clipped gradients the two do not mix. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class _Sum(NamedTuple):
    """The second moment of one parameter, summed over its elements."""

    value: float = 0.0
    uncorrected: float = 1.0
    """Decay to the power of the steps learnt: what the bias correction divides by is the rest."""

    def after(self, square: float, decay: float) -> _Sum:
        return _Sum(decay * self.value + (1 - decay) * square, decay * self.uncorrected)


class Staleness:
    """Keeps the sums from step to step, each step's norms once its update is seen to be taken.

    >>> s = Staleness()
    >>> for norm in (1.0, 1.0, 1.0, 4.0):
    ...     found = s.measure({"w": norm}, {"w": 0.9}, taken=True)
    >>> round(found[0], 3), found[1]
    (1.727, 'w')
    """

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}
        self._pending: Mapping[str, float] = {}

    def forget(self) -> None:
        """Begin anew, as after the weights were put back."""
        self._sums, self._pending = {}, {}

    def measure(
        self, norms: Mapping[str, float], decays: Mapping[str, float], *, taken: bool
    ) -> tuple[float, str] | None:
        """The largest ratio of a gradient to what its second moment expects, and whose it is.

        The ratio is ``|g| / sqrt(S)``, ``S`` bias-corrected and with this gradient in it: at most
        ``1 / sqrt(1 - b)``, and 1 where all gradients have the same size. It is the root mean
        square of ``g / sqrt(v)`` (Wortsman et al. 2023, arXiv 2304.13013, section 3.3), with the
        mean of numerator and denominator each.

        Args:
            norms: gradient norm of each parameter, in this step.
            decays: b of each parameter that has a second moment.
            taken: whether the step measured before this one was taken.

        Returns:
            None where no parameter has a second moment with gradients before this one in it.
        """
        if taken:
            self._learn(decays)
        self._pending = norms
        rows = [(self._square(n, norms[n] ** 2, b), n) for n, b in decays.items() if n in norms]
        square, name = max((row for row in rows if row[0] > 0), default=(0.0, ""))
        return (math.sqrt(square), name) if name else None

    def _learn(self, decays: Mapping[str, float]) -> None:
        for name, norm in self._pending.items():
            if name in decays and math.isfinite(norm):
                self._sums[name] = self._sums.get(name, _Sum()).after(norm**2, decays[name])

    def _square(self, name: str, square: float, decay: float) -> float:
        """The ratio squared; 0 where there is nothing to compare with, NaN where the norm is."""
        before = self._sums.get(name)
        if before is None or before.value <= 0 or square == math.inf:
            return 0.0
        now = before.after(square, decay)
        return square * (1 - now.uncorrected) / now.value
