"""Detects lower layers that the gradient no longer reaches while the loss does not fall."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.trends import LearningRateTrend, LossTrend
from lit_stability.measurement.step_stats import StepStats

_EVERY = 10
"""Steps between checks; a stall lasts for hundreds of steps."""
LAYERS = 4
"""Smallest number of layers in a stack: with fewer, a third of it is one layer, and two single
layers may differ for many reasons."""


class Stall:
    """Warns, once per episode, of a gradient that fades towards the input while the loss stalls.

    On one step in ten the detector divides the median gradient norm of the first third of the
    parameters by that of the last third, in registration order. It does so for each stack of layers
    (see `stacks`), or for the whole model if there is none. Stacks are separate because the decoder
    feeds the top of the encoder in an encoder-decoder, which hides a stall in the whole model. An
    episode is ``persist`` consecutive ratios of a stack below ``share``, with a stable learning
    rate and a loss that has not fallen for two blocks. A first third whose median is exactly 0 is
    left to `DeadGradients`.

    The known case is a deep post-norm Transformer without warm-up (Xiong et al. 2020,
    arXiv 2002.04745): within ten steps its branches dominate the residual stream, each layer passes
    on a tenth of the gradient, and the loss stays at the entropy of single tokens. The total
    gradient norm looks healthy the whole time.

    Args:
        share: ratio of the medians below which a stack stalls.
        persist: consecutive checks, ten steps apart.
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
        self._rate_trend, self._loss_trend = LearningRateTrend(), LossTrend(block=block)
        self._steps = 0
        self._low_for: dict[str, int] = {}
        self._reported = False
        self._names: tuple[str, ...] = ()
        self._stacks: dict[str, list[int]] = {}

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if a stack has stalled."""
        most = max(self._low_for.values(), default=0)
        if self._reported or self._steps % _EVERY or most + 1 < self.persist:
            return None
        if not self._rate_trend.stable or self._loss_trend.stale < 2:
            return None
        low = [
            (ratio, stack)
            for stack, ratio in self._ratios(stats).items()
            if ratio < self.share and self._low_for.get(stack, 0) + 1 >= self.persist
        ]
        return self._anomaly(stats, *min(low)) if low else None

    def _anomaly(self, stats: StepStats, ratio: float, stack: str) -> Anomaly:
        indices = self._stacks[stack]
        first = [(stats.names[i], stats.grad_norms[i]) for i in indices[: len(indices) // 3]]
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
        """Learns from an accepted step."""
        self._reported = self._reported or self.check(stats) is not None
        self._rate_trend.update(stats)
        self._loss_trend.update(stats.loss)
        if self._steps % _EVERY == 0 and (ratios := self._ratios(stats)):
            low = {stack for stack, ratio in ratios.items() if ratio < self.share}
            unknown = {s: n for s, n in self._low_for.items() if s not in ratios}
            self._low_for = unknown | {s: self._low_for.get(s, 0) + 1 for s in low}
            self._reported = self._reported and bool(low)
        self._steps += 1

    def _ratios(self, stats: StepStats) -> dict[str, float]:
        """Returns, by stack, the share of the top's gradient that reaches the bottom, if known."""
        if not stats.finite_gradients:
            return {}
        if stats.names != self._names:
            self._names = stats.names
            self._stacks = stacks(stats.names) or {"": [*range(len(stats.names))]}
        ratios = {
            stack: _passed_down([stats.grad_norms[i] for i in indices])
            for stack, indices in self._stacks.items()
        }
        return {stack: ratio for stack, ratio in ratios.items() if ratio is not None}

    def state_dict(self) -> dict[str, Any]:
        """Returns the trends, the counts, and whether a warning was given."""
        return {
            "rate": self._rate_trend.state_dict(),
            "course": self._loss_trend.state_dict(),
            "steps": self._steps,
            "low_for": dict(self._low_for),
            "told": self._reported,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._rate_trend.load_state_dict(state["rate"])
        self._loss_trend.load_state_dict(state["course"])
        self._steps, low_for = int(state["steps"]), state["low_for"]
        # An older state has a single number, for the whole model.
        self._low_for = {"": int(low_for)} if isinstance(low_for, int) else dict(low_for)
        self._reported = bool(state["told"])


def stacks(names: Sequence[str], least: int = LAYERS) -> dict[str, list[int]]:
    """Returns the indices of the parameters of each stack of layers.

    The layers of a stack differ by a number in their names. Of nested stacks the outermost counts;
    parameters outside all stacks are skipped.

    Args:
        names: of parameters.
        least: smallest number of layers in a stack.

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
    """Returns, for each number in a name, the prefix before it and the number."""
    parts = name.split(".")
    return [(".".join(parts[:i]), part) for i, part in enumerate(parts) if part.isdecimal()]


def _passed_down(norms: Sequence[float]) -> float | None:
    """Returns the median of the first third over that of the last; None if it is unknown."""
    third = len(norms) // 3
    if not third:
        return None
    low, high = median(norms[:third]), median(norms[-third:])
    return low / high if low > 0 and 0 < high < math.inf else None
