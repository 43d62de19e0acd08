"""Runs the detectors of every optimizer on a step, and lets them learn the accepted ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lit_stability.detectors.anomaly import Anomaly, Detector
from lit_stability.detectors.rank_agreement import Replicas, rates_differ
from lit_stability.measurement.step_stats import StepStats

Part = Literal["all", "shared", "own"]


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
        self._log = log
        self._replicas = Replicas()
        self.regime_change = False
        """Whether a detector accepted, in this step, values that it had rejected for long."""
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
        self.regime_change = False
        anomaly = rates_differ(stats) or self.ask(stats, "shared" if voting else "all")
        anomaly = self._compare_weights(anomaly, stats)
        if not voting:
            return anomaly, True
        if anomaly is None or anomaly.warn_only:
            return self.ask(stats, "own") or anomaly, False
        if anomaly.signal == "loss" and not anomaly.layers:
            anomaly = replace(anomaly, layers=tuple(stats.worst_layers()))
        return anomaly, True

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
        """Returns the first anomaly; one with ``warn_only`` only if no detector rejects the step.

        Args:
            stats: of the step.
            part: "shared" runs the detectors that use no gradients, "own" the others; a detector
                without ``shared_by_ranks`` is one of the others.
        """
        visible = stats if part != "shared" else _without_gradients(stats)
        warning: Anomaly | None = None
        if part != "own":
            self._deferred.clear()
        for detector in self._sets[stats.optimizer]:
            if not _belongs(detector, part):
                continue
            regimes = getattr(detector, "regimes", 0)
            anomaly = detector.check(visible)
            if anomaly is not None and not anomaly.warn_only:
                return anomaly
            if anomaly is not None and warning is not None:
                self._deferred.add(id(detector))
            warning = warning or anomaly
            if getattr(detector, "regimes", 0) > regimes:
                self._accepted(detector, stats)
        return warning

    def _accepted(self, detector: Detector, stats: StepStats) -> None:
        """Logs a change of regime and clears the windows of all detectors that have them.

        All, because what changes the loss changes the gradients too, and vice versa.
        """
        self._log(
            f"step {stats.step}: {type(detector).__name__} accepts the recent values as the new "
            "normal and learns again from scratch"
        )
        if not hasattr(detector, "reset_windows"):
            return
        self.regime_change = True
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
            str(i): [[label, d.state_dict()] for label, d in zip(_labels(ds), ds, strict=True)]
            for i, ds in self._sets.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the detectors whose label is in the state; the others are unchanged."""
        for index, saved in state.items():
            detectors = self._sets.get(int(index), [])
            states = dict(saved)
            for label, detector in zip(_labels(detectors), detectors, strict=True):
                if label in states:
                    detector.load_state_dict(states[label])


def _labels(detectors: Sequence[Detector]) -> list[str]:
    """Returns a unique label per detector: class, signal, and a number among equal ones."""
    kinds = [f"{type(d).__name__} {getattr(d, 'signal', '')}".strip() for d in detectors]
    return [f"{kind} {kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def _belongs(detector: Detector, part: Part) -> bool:
    shared = getattr(detector, "shared_by_ranks", "no")
    return part == "all" or shared == "in part" or (shared == "yes") == (part == "shared")


def _without_gradients(stats: StepStats) -> StepStats:
    return replace(stats, grad_norm=0.0, names=(), grad_norms=(), details=())
