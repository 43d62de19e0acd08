"""Detects attention logits that grow until each query attends to one key only.

Uses the readings of an `AttentionProbe`; without one it flags nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.trends import Plateau
from lit_stability.measurement.step_stats import StepStats


class AttentionLogits:
    """Warns of logits beyond a bound that still grow, and flags attention that has collapsed.

    Growth is two consecutive readings above ``bound`` of which the second is larger. It is reported
    once per fit; the step is good, as training can go on for a while. Collapse needs three things
    at once: a module's logits were above ``bound`` in ``persist`` consecutive readings, its entropy
    is below ``share`` of the largest possible, *and* the loss has stopped falling, that is, the
    medians of two consecutive windows are not below the lowest before (see `Plateau`). Each alone
    occurs in healthy runs. Collapse is flagged once too, as repeating steps does not undo it.

    Both must have developed during training: some pretrained models have logits in the thousands
    from a bias alone, and heads that attend to one token. A module's logits must therefore be
    ``rise`` times its first reading, and its first entropy at least ``rise`` times ``share``.

    ViT-22B diverged with logits of 10,000 and more and an entropy near 0 (Dehghani et al. 2023,
    arXiv 2302.05442); the same precedes divergence in small models at a high learning rate
    (Wortsman et al. 2023, arXiv 2309.14322). Zhai et al. 2023 (arXiv 2303.06296) link low entropy
    to instability. The default bound is a tenth of that; healthy byte-level models of `benchmarks`
    stay below 50.

    Args:
        bound: largest absolute logit of a healthy run.
        share: entropy below which attention has collapsed, as a share of the largest possible.
        persist: consecutive readings above ``bound`` before a collapse is flagged.
        rise: smallest factor between a module's first reading and now.
        window: steps per median of the loss.
        fall: smallest fall of that median that counts, as a share of its absolute value.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import ProbeReading, StepStats
    >>> d = AttentionLogits()
    >>> for i, logit in enumerate([9.0, 400.0, 1500.0, 1800.0]):
    ...     reading = ProbeReading("attention_logit", "blocks.0", logit)
    ...     stats = StepStats(step=50 * i, loss=2.0, grad_norm=1.0, readings=(reading,))
    ...     if (anomaly := d.check(stats)) is not None:
    ...         print(anomaly.step, anomaly.message)
    ...     d.update(stats)
    150 attention logits of blocks.0 have grown to 1800, beyond 1000, and are still growing
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
        self._reported: list[str] = []

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly for collapsed attention, or else for growing logits."""
        high = [r for r in stats.readings_of("attention_logit") if r.value > self.bound]
        if not high:
            return None
        return self._collapse(stats, dict(_pairs(high))) or self._growth(stats, _pairs(high))

    def _collapse(self, stats: StepStats, logits: Mapping[str, float]) -> Anomaly | None:
        if "collapse" in self._reported or self._plateau.stale < 2:
            return None
        collapsed = [
            (r.where, r.value)
            for r in stats.readings_of("attention_entropy")[::-1]
            if r.value < self.share and self._high.get(r.where, 0) + 1 >= self.persist
            if self._risen(r.where, logits.get(r.where, 0.0))
            if self._first_entropy.get(r.where, 0.0) >= self.rise * self.share
        ]
        if not collapsed:
            return None
        self._reported.append("collapse")
        (where, entropy), plateau = collapsed[0], self._plateau
        return Anomaly(
            kind="attention collapse",
            step=stats.step,
            value=logits[where],
            signal="attention_logit",
            threshold=self.bound,
            optimizer=stats.optimizer,
            state_corrupted=True,
            layers=tuple((name, logits[name]) for name, _ in collapsed[:5]),
            message=f"attention of {where or 'the model'} has collapsed: logits of "
            f"{logits[where]:.4g}, entropy {entropy:.1%} of the largest, and the loss has not "
            f"fallen below {plateau.lowest:.4g} for {plateau.stale * plateau.block} steps",
        )

    def _growth(self, stats: StepStats, high: list[tuple[str, float]]) -> Anomaly | None:
        grown = [(name, value) for name, value in high if self._grows(name, value)]
        if self._reported or not grown:
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
            f"{self.bound:g}, and are still growing",
        )

    def _grows(self, name: str, value: float) -> bool:
        """Whether this reading and the one before exceed the bound, and this one is larger."""
        return self.bound < self._last.get(name, math.inf) < value and self._risen(name, value)

    def _risen(self, name: str, value: float) -> bool:
        return value >= self.rise * self._first.get(name, math.inf)

    def update(self, stats: StepStats) -> None:
        """Learns the readings and the loss of an accepted step."""
        readings = _pairs(stats.readings_of("attention_logit"))
        if any(self._grows(name, value) for name, value in readings):
            self._reported = [*dict.fromkeys([*self._reported, "growth"])]
        for name, entropy in _pairs(stats.readings_of("attention_entropy")):
            self._first_entropy.setdefault(name, entropy)
        for name, value in readings:
            self._first.setdefault(name, value)
            self._last[name] = value
            self._high[name] = self._high.get(name, 0) + 1 if value > self.bound else 0
        if stats.has_loss:
            self._plateau.update(stats.loss)

    def state_dict(self) -> dict[str, Any]:
        """Returns first and last readings, counts of high ones, loss trend, what was reported."""
        return {
            "first": dict(self._first),
            "first_entropy": dict(self._first_entropy),
            "last": dict(self._last),
            "high": dict(self._high),
            "plateau": self._plateau.state_dict(),
            "told": list(self._reported),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._first = dict(state.get("first", {}))
        self._first_entropy = dict(state.get("first_entropy", {}))
        self._last, self._high = dict(state["last"]), dict(state["high"])
        self._plateau.load_state_dict(state["plateau"])
        self._reported = list(state["told"])


def _pairs(readings: list[Any]) -> list[tuple[str, float]]:
    return [(r.where, r.value) for r in readings]
