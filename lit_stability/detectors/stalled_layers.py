"""Lower layers that the gradient no longer reaches while the loss stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.trends import LearningRateTrend, LossTrend
from lit_stability.measurement.step_stats import StepStats

_EVERY = 10
"""Steps between looks at the depth: what is sought lasts for hundreds."""
LAYERS = 4
"""Layers of a stack, at the least: with fewer a third of it is one layer, and one layer may differ
from another for many reasons."""


class Stall:
    """Objects, once an episode, to a gradient that dies on its way down while the loss stands.

    Looked at is the median gradient norm of the first third of the parameters over that of the last
    third, in the order in which the model registered them, on one step in ten: in each stack of
    layers, see `stacks`, or in the whole where there is none. In an encoder-decoder the top of the
    encoder is fed by the decoder's, so that the whole does not show what each stack does. An
    episode is ``persist`` such ratios of a stack in a row below ``share``, with a settled learning
    rate and a loss that has not fallen for two blocks. A first third whose median is exactly 0 is
    for `DeadGradients`.

    The known case is a deep post-norm Transformer without warm-up (Xiong et al. 2020,
    arXiv 2002.04745): within ten steps its residual stream is dominated by its branches, each
    layer passes on a tenth of the gradient, and the loss stands at the entropy of its single
    tokens. The total gradient norm looks healthy all the while.

    Args:
        share: ratio of the medians.
        persist: looks in a row, ten steps apart.
        block: losses per median; see `LossTrend`.

    Raises:
        ValueError: if an argument is out of its range.

    >>> d = Stall(persist=3, block=10)
    >>> for i in range(200):
    ...     stats = StepStats(step=i, loss=3.1, grad_norm=0.5, learning_rates=(0.1,),
    ...                       names=("low", "middle", "high"), grad_norms=(1e-4, 0.02, 0.5))
    ...     if anomaly := d.check(stats):
    ...         print(i, anomaly.message)
    ...     d.update(stats)
    60 the first third of the parameters receives 0.0002 of the gradient of the last third
    """

    def __init__(self, *, share: float = 0.02, persist: int = 10, block: int = 50) -> None:
        require(0 < share < 1, "share", share, "in (0, 1)")
        require(persist >= 1, "persist", persist, "at least 1")
        self.share, self.persist = share, persist
        self._rate, self._trend = LearningRateTrend(), LossTrend(block=block)
        self._steps = 0
        self._low_for: dict[str, int] = {}
        self._told = False
        self._names: tuple[str, ...] = ()
        self._stacks: dict[str, list[int]] = {}

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        most = max(self._low_for.values(), default=0)
        if self._told or self._steps % _EVERY or most + 1 < self.persist:
            return None
        if not self._rate.stable or self._trend.stale < 2:
            return None
        low = [
            (ratio, stack)
            for stack, ratio in self._ratios(stats).items()
            if ratio < self.share and self._low_for.get(stack, 0) + 1 >= self.persist
        ]
        return self._anomaly(stats, *min(low)) if low else None

    def _anomaly(self, stats: StepStats, ratio: float, stack: str) -> Anomaly:
        places = self._stacks[stack]
        first = [(stats.names[i], stats.grad_norms[i]) for i in places[: len(places) // 3]]
        return Anomaly(
            kind="stalled layers",
            step=stats.step,
            value=ratio,
            signal="grad_norm",
            baseline=1.0,
            threshold=self.share,
            optimizer=stats.optimizer,
            warn_only=True,
            layers=tuple(sorted(first, key=lambda pair: pair[1])[:5]),
            message=f"the first third of the parameters{f' of {stack}' if stack else ''} receives "
            f"{ratio:.2g} of the gradient of the last third",
        )

    def update(self, stats: StepStats) -> None:
        """Learn an accepted step; what was objected to is told of once."""
        self._told = self._told or self.check(stats) is not None
        self._rate.update(stats)
        self._trend.update(stats.loss)
        if self._steps % _EVERY == 0 and (ratios := self._ratios(stats)):
            low = {stack for stack, ratio in ratios.items() if ratio < self.share}
            unknown = {s: n for s, n in self._low_for.items() if s not in ratios}
            self._low_for = unknown | {s: self._low_for.get(s, 0) + 1 for s in low}
            self._told = self._told and bool(low)
        self._steps += 1

    def _ratios(self, stats: StepStats) -> dict[str, float]:
        """How much of the gradient of its top reaches the bottom of each stack, where known."""
        if not stats.finite_gradients:
            return {}
        if stats.names != self._names:
            self._names = stats.names
            self._stacks = stacks(stats.names) or {"": [*range(len(stats.names))]}
        ratios = {
            stack: _passed_down([stats.grad_norms[i] for i in places])
            for stack, places in self._stacks.items()
        }
        return {stack: ratio for stack, ratio in ratios.items() if ratio is not None}

    def state_dict(self) -> dict[str, Any]:
        """The courses, the counts, and whether it was told."""
        return {
            "rate": self._rate.state_dict(),
            "course": self._trend.state_dict(),
            "steps": self._steps,
            "low_for": dict(self._low_for),
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._rate.load_state_dict(state["rate"])
        self._trend.load_state_dict(state["course"])
        self._steps, low_for = int(state["steps"]), state["low_for"]
        # Before stacks were told apart it was one number, for the whole.
        self._low_for = {"": int(low_for)} if isinstance(low_for, int) else dict(low_for)
        self._told = bool(state["told"])


def stacks(names: Sequence[str], least: int = LAYERS) -> dict[str, list[int]]:
    """Places of the parameters of each stack: layers that differ by a number in their names.

    Where stacks lie inside each other, the outermost counts; what is in none is left out.

    Args:
        names: of parameters.
        least: layers of a stack.

    >>> names = [f"{part}.layers.{i}.up.{k}" for part in "ab" for i in range(3) for k in range(2)]
    >>> stacks(["embedding", *names, "head.weight"], least=3)
    {'a.layers': [1, 2, 3, 4, 5, 6], 'b.layers': [7, 8, 9, 10, 11, 12]}
    """
    inside = [_numbered(name) for name in names]
    layers: dict[str, set[str]] = {}
    for stack, number in chain.from_iterable(inside):
        layers.setdefault(stack, set()).add(number)
    found: dict[str, list[int]] = {}
    for place, pairs in enumerate(inside):
        outermost = next((s for s, _ in pairs if len(layers[s]) >= least), None)
        if outermost is not None:
            found.setdefault(outermost, []).append(place)
    return found


def _numbered(name: str) -> list[tuple[str, str]]:
    """What stands before each number of a name, and the number."""
    parts = name.split(".")
    return [(".".join(parts[:i]), part) for i, part in enumerate(parts) if part.isdecimal()]


def _passed_down(norms: Sequence[float]) -> float | None:
    """Median of the first third over that of the last; None if not known."""
    third = len(norms) // 3
    if not third:
        return None
    low, high = median(norms[:third]), median(norms[-third:])
    return low / high if low > 0 and 0 < high < math.inf else None
