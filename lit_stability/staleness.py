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


class Staleness:
    """Keeps the sums from step to step, each step's norms once its update is seen to be taken.

    >>> s = Staleness()
    >>> for norm in (1.0, 1.0, 1.0, 4.0):
    ...     found = s.measure({"w": norm}, {"w": 0.9}, taken=True)
    >>> round(found[0], 3), found[1]
    (1.727, 'w')
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        """Sum of the second moment, and its decay to the power of the steps learnt, of which the
        bias correction divides by what is missing to 1."""
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
        square of ``g / sqrt(v)`` (Wortsman et al. 2023, arXiv 2304.13013), with the
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
        worst, whose = 0.0, ""
        for name, norm in norms.items():
            if name not in decays or name not in self._sums:
                continue
            (value, rest), decay, square = self._sums[name], decays[name], norm * norm
            if value > 0 and square < math.inf:
                ratio = square * (1 - decay * rest) / (decay * value + (1 - decay) * square)
                if ratio > worst:
                    worst, whose = ratio, name
        return (math.sqrt(worst), whose) if whose else None

    def _learn(self, decays: Mapping[str, float]) -> None:
        for name, norm in self._pending.items():
            if name in decays and math.isfinite(norm):
                decay = decays[name]
                value, rest = self._sums.get(name, (0.0, 1.0))
                self._sums[name] = (decay * value + (1 - decay) * norm * norm, decay * rest)
