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
from collections.abc import Iterator, Mapping


class SecondMomentRatio:
    """Keeps the sums from step to step, each step's norms once its update is seen to be taken.

    >>> s = SecondMomentRatio()
    >>> for norm in (1.0, 1.0, 1.0, 4.0):
    ...     found = s.measure({"w": norm}, {"w": 0.9}, taken=True)
    >>> round(found[0], 3), found[1]
    (1.727, 'w')
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after the weights were put back."""
        self._kept: dict[str, tuple[float, float]] = {}
        """Sum and rest, see below, of each parameter as it was last put aside."""
        self._names: list[str] = []
        """Parameters of the last step; what follows is in their order."""
        self._pending: list[float] = []
        """Their norms, until their update is seen to be taken."""
        self._sums: list[float] = []
        """Sum of the second moment; 0 where there is none."""
        self._rests: list[float] = []
        """Its decay to the power of the steps learnt, of which the bias correction divides by what
        is missing to 1."""
        self._rates: list[float] = []
        """Its decay; 1 where there is none, as nothing is learnt then."""
        self._decays: Mapping[str, float] = {}

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
        self._follow(self._names, decays)
        if taken:
            self._learn()
        self._follow([*norms], decays)
        self._pending = [*norms.values()]
        ratios = [
            x * x * (1 - b * rest) / (b * value + (1 - b) * x * x)
            if value > 0 and x * x < math.inf
            else 0.0
            for x, value, rest, b in self._rows()
        ]
        worst = max(ratios, default=0.0)
        return (math.sqrt(worst), self._names[ratios.index(worst)]) if worst > 0 else None

    def _rows(self) -> Iterator[tuple[float, float, float, float]]:
        return zip(self._pending, self._sums, self._rests, self._rates, strict=True)

    def _learn(self) -> None:
        """Take the last step's gradients up in the sums, those that are finite."""
        rests = [b * rest if x < math.inf else rest for x, _, rest, b in self._rows()]
        self._sums = [
            b * value + (1 - b) * x * x if x < math.inf else value
            for x, value, _, b in self._rows()
        ]
        self._rests = rests

    def _follow(self, names: list[str], decays: Mapping[str, float]) -> None:
        """Put the sums aside and take others up, where these are not the same parameters."""
        if names == self._names and (decays is self._decays or decays == self._decays):
            return
        rows = zip(self._names, self._sums, self._rests, strict=True)
        self._kept |= {n: (value, rest) for n, value, rest in rows if n in self._decays}
        found = [self._kept.get(n, (0.0, 1.0)) if n in decays else (0.0, 1.0) for n in names]
        self._names, self._decays = names, decays
        self._sums, self._rests = [value for value, _ in found], [rest for _, rest in found]
        self._rates = [decays.get(n, 1.0) for n in names]
