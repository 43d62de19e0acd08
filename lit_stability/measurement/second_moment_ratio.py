"""Ratio of a gradient to what Adam's second moment expects, from gradient norms alone.

Summed over a parameter's elements, ``v_t = b v_(t-1) + (1 - b) g_t^2`` (Kingma & Ba 2015, Algorithm
1) becomes ``S_t = b S_(t-1) + (1 - b) |g_t|^2``: the sum of the second moment follows exactly from
the gradient norms, which are measured anyway. Nothing is read from the device, all ranks get the
same number, and rarely used rows of an embedding count no more than in its gradient.

The norms are those before clipping, and so is the second moment that is kept here. It differs from
the optimizer's own where that has seen clipped gradients. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping


class SecondMomentRatio:
    """Tracks the sums from step to step; learns a step's norms once its update was applied.

    >>> s = SecondMomentRatio()
    >>> for norm in (1.0, 1.0, 1.0, 4.0):
    ...     found = s.measure({"w": norm}, {"w": 0.9}, taken=True)
    >>> round(found[0], 3), found[1]
    (1.727, 'w')
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Clears all sums, as after the weights were restored."""
        self._kept: dict[str, tuple[float, float]] = {}
        """Sum and decay power (see below) of each parameter, saved when the parameters changed."""
        self._names: list[str] = []
        """Parameters of the last step; the lists below are in their order."""
        self._pending: list[float] = []
        """Their gradient norms, until the update is known to be applied."""
        self._sums: list[float] = []
        """Sum of the second moment; 0 if there is none."""
        self._decay_powers: list[float] = []
        """Decay to the power of the learnt steps; the bias correction divides by 1 minus that."""
        self._rates: list[float] = []
        """Decay of the second moment; 1 if there is none, so that nothing is learnt."""
        self._decays: Mapping[str, float] = {}

    def measure(
        self, norms: Mapping[str, float], decays: Mapping[str, float], *, taken: bool
    ) -> tuple[float, str] | None:
        """Returns the largest ratio of a gradient to its second moment, and the parameter's name.

        The ratio is ``|g| / sqrt(S)`` with a bias-corrected ``S`` that includes this gradient. It
        is at most ``1 / sqrt(1 - b)``, and 1 if all gradients have the same size. It approximates
        the root mean square of ``g / sqrt(v)`` (Wortsman et al. 2023, arXiv 2304.13013) by separate
        means of numerator and denominator.

        Args:
            norms: gradient norm of each parameter in this step.
            decays: b of each parameter that has a second moment.
            taken: whether the update of the previously measured step was applied.

        Returns:
            None if no parameter has a second moment with earlier gradients.
        """
        self._follow(self._names, decays)
        if taken:
            self._learn()
        self._follow([*norms], decays)
        self._pending = [*norms.values()]
        ratios = [
            x * x * (1 - b * power) / (b * value + (1 - b) * x * x)
            if value > 0 and x * x < math.inf
            else 0.0
            for x, value, power, b in self._rows()
        ]
        worst = max(ratios, default=0.0)
        return (math.sqrt(worst), self._names[ratios.index(worst)]) if worst > 0 else None

    def _rows(self) -> Iterator[tuple[float, float, float, float]]:
        return zip(self._pending, self._sums, self._decay_powers, self._rates, strict=True)

    def _learn(self) -> None:
        """Adds the finite gradients of the last step to the sums."""
        decay_powers = [b * power if x < math.inf else power for x, _, power, b in self._rows()]
        self._sums = [
            b * value + (1 - b) * x * x if x < math.inf else value
            for x, value, _, b in self._rows()
        ]
        self._decay_powers = decay_powers

    def _follow(self, names: list[str], decays: Mapping[str, float]) -> None:
        """Switches to other parameters if they changed; keeps the sums of the previous ones."""
        if names == self._names and (decays is self._decays or decays == self._decays):
            return
        rows = zip(self._names, self._sums, self._decay_powers, strict=True)
        self._kept |= {n: (value, power) for n, value, power in rows if n in self._decays}
        found = [self._kept.get(n, (0.0, 1.0)) if n in decays else (0.0, 1.0) for n in names]
        self._names, self._decays = names, decays
        self._sums, self._decay_powers = (
            [value for value, _ in found],
            [power for _, power in found],
        )
        self._rates = [decays.get(n, 1.0) for n in names]
