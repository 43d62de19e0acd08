"""Attention logits that grow, until each query looks at one key only and the model stops learning.

Judges what an `AttentionProbe` has read; without one it is silent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.trends import Plateau
from lit_stability.measurement.step_stats import StepStats


class AttentionLogits:
    """Tells of logits beyond a bound that still grow, and objects when attention has collapsed.

    Grown logits, two readings in a row beyond ``bound`` and the second the larger, are told of once
    per fit: the step is good, and some time is left. Collapse is three things together: a module's
    logits were above ``bound`` in ``persist`` readings in a row, its entropy is below ``share`` of
    the largest possible, *and* the loss has stopped falling: the medians of two windows in a row
    are not below the lowest before, see `Plateau`. Each alone is seen in healthy runs. No step
    taken again brings back a collapsed attention, so it too is objected to once.

    Both have to have come about in training: there are pretrained models whose logits are in the
    thousands by a bias alone, and whose heads rest on one token. So a module's logits must be
    ``rise`` times what was first read of it, and its entropy have been ``rise`` times ``share``.

    Logits of 10,000 and more with an entropy near 0 are how ViT-22B diverged (Dehghani et al. 2023,
    arXiv 2302.05442) and what precedes divergence in small models at a high learning
    rate (Wortsman et al. 2023, arXiv 2309.14322); that loss of entropy goes with
    instability is from Zhai et al. 2023 (arXiv 2303.06296). The bound is a tenth of that: healthy
    byte-level models of `benchmarks` stay below 50.

    Args:
        bound: largest absolute logit of a run that is well.
        share: entropy below which attention has collapsed, as a share of the largest.
        persist: readings in a row.
        rise: how far a module must have come from its first reading.
        window: steps of which the loss's median is taken.
        fall: smallest fall of that median that counts, as a share of its absolute value.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import ProbeReading, StepStats
    >>> d = AttentionLogits()
    >>> for i, logit in enumerate([9.0, 400.0, 1500.0, 1800.0]):
    ...     reading = ProbeReading("attention_logit", "blocks.0", logit)
    ...     stats = StepStats(step=50 * i, loss=2.0, grad_norm=1.0, readings=(reading,))
    ...     told = d.check(stats)
    ...     if told is not None:
    ...         print(told.step, told.message)
    ...     d.update(stats)
    150 attention logits of blocks.0 have grown to 1800, beyond 1000, and still grow
    """

    shared_by_ranks = "yes"

    def __init__(
        self,
        *,
        bound: float = 1000.0,
        share: float = 0.05,
        persist: int = 3,
        rise: float = 3.0,
        window: int = 50,
        fall: float = 0.01,
    ) -> None:
        require(bound > 0, "bound", bound, "greater than 0")
        require(0 < share < 1, "share", share, "in (0, 1)")
        require(persist >= 1, "persist", persist, "at least 1")
        require(rise >= 1, "rise", rise, "at least 1")
        self.bound, self.share, self.persist, self.rise = bound, share, persist, rise
        self._plateau = Plateau(block=window, fall=fall)
        self._first: dict[str, float] = {}
        self._first_entropy: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._high: dict[str, int] = {}
        self._told: list[str] = []

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        high = [r for r in stats.readings_of("attention_logit") if r.value > self.bound]
        if not high:
            return None
        return self._collapse(stats, dict(_pairs(high))) or self._growth(stats, _pairs(high))

    def _collapse(self, stats: StepStats, logits: Mapping[str, float]) -> Anomaly | None:
        if "collapse" in self._told or self._plateau.stale < 2:
            return None
        found = [
            (r.where, r.value)
            for r in stats.readings_of("attention_entropy")[::-1]
            if r.value < self.share and self._high.get(r.where, 0) + 1 >= self.persist
            if self._risen(r.where, logits.get(r.where, 0.0))
            if self._first_entropy.get(r.where, 0.0) >= self.rise * self.share
        ]
        if not found:
            return None
        self._told.append("collapse")
        (where, entropy), plateau = found[0], self._plateau
        return Anomaly(
            kind="attention collapse",
            step=stats.step,
            value=logits[where],
            signal="attention_logit",
            threshold=self.bound,
            optimizer=stats.optimizer,
            state_corrupted=True,
            layers=tuple((name, logits[name]) for name, _ in found[:5]),
            message=f"attention of {where or 'the model'} has collapsed: logits of "
            f"{logits[where]:.4g}, entropy {entropy:.1%} of the largest, and the loss has not "
            f"fallen below {plateau.lowest:.4g} for {plateau.stale * plateau.block} steps",
        )

    def _growth(self, stats: StepStats, high: list[tuple[str, float]]) -> Anomaly | None:
        grown = [(name, value) for name, value in high if self._grows(name, value)]
        if self._told or not grown:
            return None
        name, value = grown[0]
        return Anomaly(
            kind="attention-logit growth",
            step=stats.step,
            value=value,
            signal="attention_logit",
            baseline=self._last[name],
            threshold=self.bound,
            optimizer=stats.optimizer,
            warn_only=True,
            layers=tuple(grown[:5]),
            message=f"attention logits of {name or 'the model'} have grown to {value:.4g}, beyond "
            f"{self.bound:g}, and still grow",
        )

    def _grows(self, name: str, value: float) -> bool:
        """Whether a reading beyond the bound is larger than the one before, beyond it as well."""
        return self.bound < self._last.get(name, math.inf) < value and self._risen(name, value)

    def _risen(self, name: str, value: float) -> bool:
        return value >= self.rise * self._first.get(name, math.inf)

    def update(self, stats: StepStats) -> None:
        """Learn readings and loss of an accepted step."""
        readings = _pairs(stats.readings_of("attention_logit"))
        if any(self._grows(name, value) for name, value in readings):
            self._told = [*dict.fromkeys([*self._told, "growth"])]
        for name, entropy in _pairs(stats.readings_of("attention_entropy")):
            self._first_entropy.setdefault(name, entropy)
        for name, value in readings:
            self._first.setdefault(name, value)
            self._last[name] = value
            self._high[name] = self._high.get(name, 0) + 1 if value > self.bound else 0
        if stats.has_loss:
            self._plateau.update(stats.loss)

    def state_dict(self) -> dict[str, Any]:
        """First and last readings, how long they were high, the loss's windows, what was told."""
        return {
            "first": dict(self._first),
            "first_entropy": dict(self._first_entropy),
            "last": dict(self._last),
            "high": dict(self._high),
            "plateau": self._plateau.state_dict(),
            "told": list(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""
        self._first = dict(state.get("first", {}))
        self._first_entropy = dict(state.get("first_entropy", {}))
        self._last, self._high = dict(state["last"]), dict(state["high"])
        self._plateau.load_state_dict(state["plateau"])
        self._told = list(state["told"])


def _pairs(readings: list[Any]) -> list[tuple[str, float]]:
    return [(r.where, r.value) for r in readings]
