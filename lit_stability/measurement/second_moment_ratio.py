"""Ratio of a gradient to what Adam's second moment expects, from gradient norms alone.

Summed over a parameter's elements, ``v_t = b v_(t-1) + (1 - b) g_t^2`` (Kingma & Ba 2015, Algorithm
1) becomes ``S_t = b S_(t-1) + (1 - b) |g_t|^2``: the sum of the second moment follows exactly from
the gradient norms, which are measured anyway. Nothing is read from the device, all ranks get the
same number, and rarely used rows of an embedding count no more than in its gradient.

The norms are those before clipping, and so is the second moment that is kept here. It differs from
the optimizer's own where that has seen clipped gradients. Imports numpy, but neither torch nor
Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

_Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


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
        self._pending: _Numbers = np.empty(0)
        """Their gradient norms, until the update is known to be applied."""
        self._sums: _Numbers = np.empty(0)
        """Sum of the second moment; 0 if there is none."""
        self._decay_powers: _Numbers = np.empty(0)
        """Decay to the power of the learnt steps; the bias correction divides by 1 minus that."""
        self._rates: _Numbers = np.empty(0)
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
        self._pending = np.fromiter(norms.values(), float, len(norms))
        if not norms:
            return None
        x, b = self._pending, self._rates
        with np.errstate(all="ignore"):
            grown = b * self._sums + (1 - b) * x * x
            ratios = x * x * (1 - b * self._decay_powers) / grown
        ratios[~((self._sums > 0) & (x * x < math.inf))] = 0.0
        worst = int(ratios.argmax())
        return (math.sqrt(ratios[worst]), self._names[worst]) if ratios[worst] > 0 else None

    def _learn(self) -> None:
        """Adds the finite gradients of the last step to the sums."""
        x, b = self._pending, self._rates
        finite = x < math.inf
        with np.errstate(all="ignore"):
            self._sums = np.where(finite, b * self._sums + (1 - b) * x * x, self._sums)
        self._decay_powers = np.where(finite, b * self._decay_powers, self._decay_powers)

    def _follow(self, names: list[str], decays: Mapping[str, float]) -> None:
        """Switches to other parameters if they changed; keeps the sums of the previous ones."""
        if names == self._names and (decays is self._decays or decays == self._decays):
            return
        rows = zip(self._names, self._sums.tolist(), self._decay_powers.tolist(), strict=True)
        self._kept |= {n: (value, power) for n, value, power in rows if n in self._decays}
        found = [self._kept.get(n, (0.0, 1.0)) if n in decays else (0.0, 1.0) for n in names]
        self._names, self._decays = names, decays
        self._sums = np.array([value for value, _ in found])
        self._decay_powers = np.array([power for _, power in found])
        self._rates = np.array([decays.get(n, 1.0) for n in names])
