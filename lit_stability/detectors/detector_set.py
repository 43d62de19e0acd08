"""Runs the detectors of every optimizer on a step, and lets them learn the accepted ones."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lit_stability.detectors.anomaly import Anomaly, Detector
from lit_stability.detectors.program_writes import ProgramWrites
from lit_stability.detectors.rank_agreement import Replicas, rates_differ
from lit_stability.measurement.step_stats import StepStats

Part = Literal["all", "shared", "own"]

_WRITES = "ProgramWrites"
"""Label of their state."""


@dataclass(frozen=True)
class RegimeChange:
    """Values that were rejected and are accepted as normal from now on."""

    cause: str
    what: str
    """What is accepted, in one sentence."""


class DetectorSet:
    """One list of detectors per optimizer.

    Args:
        detectors: run in this order; every optimizer gets its own copies.
        optimizers: indices of the optimizers.
        log: called with a line when a detector accepts a change of regime.
    """

    def __init__(
        self, detectors: Sequence[Detector], optimizers: Iterable[int], log: Callable[[str], None]
    ) -> None:
        self._sets = {i: copy.deepcopy(list(detectors)) for i in optimizers}
        self._with_regimes = frozenset(
            id(d) for own in self._sets.values() for d in own if hasattr(d, "regimes")
        )
        """Ids of the detectors that accept changes of regime; asking all would take longer."""
        self._writes = {i: ProgramWrites() for i in optimizers}
        self._log = log
        self._replicas = Replicas()
        self.regime_change: RegimeChange | None = None
        """What was accepted as normal in this step although it was rejected before."""
        self._deferred: set[int] = set()
        """Ids of the detectors whose warning about this step waits, as another's was reported."""

    def verdict(self, stats: StepStats, *, voting: bool) -> tuple[Anomaly | None, bool]:
        """Returns the anomaly of a step, and whether every rank is known to have found the same.

        Args:
            stats: of the step.
            voting: whether the ranks vote on anomalies in their gradients, which may differ from
                rank to rank (see `lit_stability.distributed.collectives`). If False, all ranks have
                the same measurements.
        """
        self.regime_change = None
        written = self._written_outside(stats)
        anomaly = rates_differ(stats) or written or self.ask(stats, "shared" if voting else "all")
        anomaly = self._compare_weights(anomaly, stats)
        if not voting:
            return anomaly, True
        if anomaly is None or anomaly.warn_only:
            return self.ask(stats, "own") or anomaly, False
        if anomaly.signal == "loss" and not anomaly.layers:
            anomaly = replace(anomaly, layers=tuple(stats.worst_layers()))
        return anomaly, True

    def optimizer_replaced(self, index: int) -> None:
        """Forgets how an optimizer moved the weights: the program has put another in its place."""
        for detector in self._sets.get(index, []):
            if hasattr(detector, "optimizer_replaced"):
                detector.optimizer_replaced()

    def damage(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly of damaged weights for a step without loss and gradients, or None.

        Only the detectors that use no gradients are asked. What a forward pass that was cut short
        has left in the buffers is no damage, as it is undone with the step.
        """
        self.regime_change = None
        anomaly = self._written_outside(stats) or self.ask(stats, "shared")
        if anomaly is None or not anomaly.state_corrupted or anomaly.kind == "non-finite buffer":
            return None
        return anomaly

    def _written_outside(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly for a write that the program is not known to make."""
        writes = self._writes[stats.optimizer]
        anomaly = writes.check(stats)
        if writes.newly_accepted:
            names = ", ".join(writes.newly_accepted[:3])
            more = len(writes.newly_accepted) - 3
            names += f" and {more} more" if more > 0 else ""
            what = f"the program writes {names} outside of the optimizer step"
            self._accept(stats, RegimeChange("weights written by the program", what))
        return anomaly

    def rolled_back_for(self, anomaly: Anomaly) -> None:
        """Records that a response may undo the steps up to an anomaly of damaged state."""
        self._writes[anomaly.optimizer].rolled_back_for(anomaly)

    @property
    def knows_writes(self) -> bool:
        """Whether the program is known to write weights, so that writes have to be watched."""
        return any(writes.accepted for writes in self._writes.values())

    def _compare_weights(self, anomaly: Anomaly | None, stats: StepStats) -> Anomaly | None:
        compared = not self._replicas.given_up
        if anomaly is None:
            anomaly = self._replicas.check(stats)
        else:
            anomaly = self._replicas.explain(anomaly, stats)
        if compared and self._replicas.given_up:
            self._log(
                f"step {stats.step}: the ranks' weights have differed since the start of the fit "
                "and are no longer compared"
            )
        return anomaly

    def ask(self, stats: StepStats, part: Part = "all") -> Anomaly | None:
        """Returns the gravest anomaly: damaged state, then a bad step, then a warning.

        Of equally grave ones the first counts.

        Args:
            stats: of the step.
            part: "shared" runs the detectors that use no gradients, "own" the others; a detector
                without ``shared_by_ranks`` is one of the others.
        """
        visible = stats if part != "shared" else _without_gradients(stats)
        found: Anomaly | None = None
        if part != "own":
            self._deferred.clear()
        for detector in self._sets[stats.optimizer]:
            if part != "all" and not _belongs(detector, part):
                continue
            counts = id(detector) in self._with_regimes
            regimes = getattr(detector, "regimes", 0) if counts else 0
            anomaly = detector.check(visible)
            if anomaly is not None:
                if anomaly.warn_only and found is not None:
                    self._deferred.add(id(detector))
                found = _graver(found, self._unexplained(anomaly, stats))
            if counts and getattr(detector, "regimes", 0) > regimes:
                self._accepted(detector, stats)
        return found

    def _unexplained(self, anomaly: Anomaly | None, stats: StepStats) -> Anomaly | None:
        """Returns the anomaly, or None if it follows from what the program has written."""
        writes = self._writes[stats.optimizer]
        knew_moments = writes.writes_moments
        if anomaly is None or not writes.explains(anomaly):
            return anomaly
        if anomaly.kind == "optimizer state":
            if not knew_moments:
                names = ", ".join(name for name, _ in anomaly.layers)
                what = f"the program writes moments of the optimizer, such as those of {names}"
                self._accept(stats, RegimeChange("weights written by the program", what))
        elif anomaly.kind != "weight corruption":
            what = f"{anomaly.message}, right after the program has written weights"
            self._accept(stats, RegimeChange("weights written by the program", what))
        return None

    def _accepted(self, detector: Detector, stats: StepStats) -> None:
        """Logs that a detector has accepted a change of regime, and acts on it."""
        what = f"{type(detector).__name__} accepts the recent values as the new normal"
        if not hasattr(detector, "reset_windows"):
            self._log(f"step {stats.step}: {what}")
            return
        self._accept(stats, RegimeChange("change of regime", what))

    def _accept(self, stats: StepStats, change: RegimeChange) -> None:
        """Accepts a change of regime: all detectors that have windows learn from scratch.

        All, because what changes the loss changes the gradients too, and vice versa.
        """
        self._log(f"step {stats.step}: {change.what}; the detectors learn again from scratch")
        self.regime_change = change
        for other in self._sets[stats.optimizer]:
            if hasattr(other, "reset_windows"):
                other.reset_windows()

    def learn(self, stats: StepStats) -> None:
        """Lets the detectors learn an accepted step, except those whose warning still waits.

        These repeat it at the next step.
        """
        for detector in self._sets[stats.optimizer]:
            if id(detector) not in self._deferred:
                detector.update(stats)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every detector with its label, by optimizer."""
        return {
            str(i): [
                *([label, d.state_dict()] for label, d in zip(_labels(ds), ds, strict=True)),
                *([_WRITES, w.state_dict()] for w in [self._writes[i]] if w.has_learnt),
            ]
            for i, ds in self._sets.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the detectors whose label is in the state; the others are unchanged."""
        for index, saved in state.items():
            detectors = self._sets.get(int(index), [])
            states = dict(saved)
            if _WRITES in states and int(index) in self._writes:
                self._writes[int(index)].load_state_dict(states[_WRITES])
            for label, detector in zip(_labels(detectors), detectors, strict=True):
                if label in states:
                    detector.load_state_dict(states[label])


def _labels(detectors: Sequence[Detector]) -> list[str]:
    """Returns a unique label per detector: class, signal, and a number among equal ones."""
    kinds = [f"{type(d).__name__} {getattr(d, 'signal', '')}".strip() for d in detectors]
    return [f"{kind} {kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def _graver(first: Anomaly | None, second: Anomaly | None) -> Anomaly | None:
    """Returns the graver of two anomalies, the first if they are equally grave."""
    return first if _gravity(first) >= _gravity(second) else second


def _gravity(anomaly: Anomaly | None) -> int:
    if anomaly is None:
        return 0
    return 1 if anomaly.warn_only else 3 if anomaly.state_corrupted else 2


def _belongs(detector: Detector, part: Part) -> bool:
    shared = getattr(detector, "shared_by_ranks", "no")
    return part == "all" or shared == "in part" or (shared == "yes") == (part == "shared")


def _without_gradients(stats: StepStats) -> StepStats:
    return replace(stats, grad_norm=0.0, names=(), grad_norms=(), details=())
