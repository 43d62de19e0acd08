"""The detectors of every optimizer: asked in order, taught together."""

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
    """One set of detectors per optimizer.

    Args:
        detectors: what to ask, in order; every optimizer gets copies.
        optimizers: their indices.
        say: called with a line when a detector accepts a new regime.
    """

    def __init__(
        self, detectors: Sequence[Detector], optimizers: Iterable[int], say: Callable[[str], None]
    ) -> None:
        self._sets = {i: copy.deepcopy(list(detectors)) for i in optimizers}
        self._say = say
        self._replicas = Replicas()
        self.regime_change = False
        """Whether a detector has accepted, in this step, values that it had refused for long."""
        self._unheard: set[int] = set()
        """Detectors, by id, that had something to tell of this step and were not heard."""

    def verdict(self, stats: StepStats, *, voting: bool) -> tuple[Anomaly | None, bool]:
        """What is wrong with a step, and whether all ranks are known to have found the same.

        Args:
            stats: of the step.
            voting: whether the ranks vote on what they find in the gradients, which may be their
                own; see `lit_stability.distributed.collectives`. Otherwise all that is measured
                they have alike.
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
            self._say(
                f"step {stats.step}: the ranks' weights differ from the start of the fit on, and "
                "are not compared"
            )
        return anomaly

    def ask(self, stats: StepStats, part: Part = "all") -> Anomaly | None:
        """The first objection; one that only asks to be told of gives way to any other.

        Args:
            stats: of the step.
            part: "shared" for what follows from numbers other than gradients, "own" for the rest;
                a detector that has no ``shared_by_ranks`` belongs to the rest.
        """
        seen = stats if part != "shared" else _without_gradients(stats)
        told: Anomaly | None = None
        if part != "own":
            self._unheard.clear()
        for detector in self._sets[stats.optimizer]:
            if not _belongs(detector, part):
                continue
            regimes = getattr(detector, "regimes", 0)
            anomaly = detector.check(seen)
            if anomaly is not None and not anomaly.warn_only:
                return anomaly
            if anomaly is not None and told is not None:
                self._unheard.add(id(detector))
            told = told or anomaly
            if getattr(detector, "regimes", 0) > regimes:
                self._accepted(detector, stats)
        return told

    def _accepted(self, detector: Detector, stats: StepStats) -> None:
        """Say so; what has changed for one signal has changed for loss and gradients together."""
        self._say(
            f"step {stats.step}: {type(detector).__name__} accepts the values of late as the new "
            "normal and learns anew"
        )
        if not hasattr(detector, "reset_windows"):
            return
        self.regime_change = True
        for each in self._sets[stats.optimizer]:
            if hasattr(each, "reset_windows"):
                each.reset_windows()

    def learn(self, stats: StepStats) -> None:
        """Teach an accepted step, all but those that were not heard: they are to say it again."""
        for detector in self._sets[stats.optimizer]:
            if id(detector) not in self._unheard:
                detector.update(stats)

    def state_dict(self) -> dict[str, Any]:
        """The detectors' windows, each under what its detector is."""
        return {
            str(i): [
                [label, d.state_dict()] for label, d in zip(_labels(found), found, strict=True)
            ]
            for i, found in self._sets.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put windows back, each into the detector that it came from; others begin anew."""
        for index, saved in state.items():
            found = self._sets.get(int(index), [])
            windows = dict(saved)
            for label, detector in zip(_labels(found), found, strict=True):
                if label in windows:
                    detector.load_state_dict(windows[label])


def _labels(detectors: Sequence[Detector]) -> list[str]:
    """What tells detectors apart: class, signal, and a number where that is not enough."""
    kinds = [f"{type(each).__name__} {getattr(each, 'signal', '')}".strip() for each in detectors]
    return [f"{kind} {kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def _belongs(detector: Detector, part: Part) -> bool:
    shared = getattr(detector, "shared_by_ranks", "no")
    return part == "all" or shared == "in part" or (shared == "yes") == (part == "shared")


def _without_gradients(stats: StepStats) -> StepStats:
    return replace(stats, grad_norm=0.0, names=(), grad_norms=(), details=())
