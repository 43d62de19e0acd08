"""An incident: one episode of trouble, what is known of it, what was done, how it ended.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lit_stability.detectors import Anomaly
from lit_stability.diagnosis import (
    CAUSES,
    Assessment,
    DiagnosisContext,
    LikelyCause,
    RecommendedAction,
    assess,
)
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import Response, describe

Outcome = Literal["open", "recovered", "observed", "stopped", "unresolved"]


class TrainingStopped(RuntimeError):
    """Raised out of ``Trainer.fit`` when no response in budget is left.

    Weights and optimizer are back at the last confirmed snapshot when it is raised.

    Args:
        message: the reason, the remedy and where the record is.
        incident: that could not be cured, kept as an attribute of that name.
    """

    def __init__(self, message: str, incident: Incident) -> None:
        super().__init__(message)
        self.incident = incident


@dataclass
class Incident:
    """One episode of trouble; it travels ``trainer.callbacks`` in order at each strike.

    A burst of bad steps is one incident: it stays open until enough healthy steps have passed.
    A callback with ``on_incident(trainer, pl_module, incident)`` is handed it before the update of
    the step in question; the first to call `resolve` decides what is done.
    """

    id: int
    anomaly: Anomaly
    """The anomaly of the latest strike."""
    epoch: int = 0
    batch_idx: int = 0
    occurrences: int = 1
    first: Anomaly = field(init=False)
    """The anomaly that opened it."""
    shown: dict[str, str] = field(default_factory=dict)
    """Causes that were shown by trial, each with how; see `note`."""
    evidence: list[str] = field(default_factory=list)
    """What was found out about it, a sentence each."""
    context: DiagnosisContext | None = field(default=None, repr=False)
    """What causes are judged by, from a `Diagnosis`; without one, the anomaly alone."""
    may_stop: bool = True
    """Whether a cause that is certain may end the fit."""
    response: Response | None = None
    """What was decided at the latest strike; None while nobody has decided."""
    responses: list[str] = field(default_factory=list)
    """Every response given, in words."""
    adjusted: bool = False
    """Whether something was changed for the latest strike that may cure it."""
    path: str | None = None
    """Folder in which the scene was saved."""
    record: str | None = None
    """The file in which the incident is recorded."""
    stats: StepStats | None = field(default=None, repr=False)
    """The measurement of the latest strike."""
    verdict: str = ""
    """"transient" if it did not return when the steps were taken again, else "deterministic"."""
    recorded_step: Any = field(default=None, repr=False, compare=False)
    """The step of the latest strike, a `RecordedStep`, for callbacks that take it again beside
    training and say so by ``needs_recorded_step = True``; else None."""
    origin: Any = None
    """The operation that made the first NaN or Inf, a `NonFiniteOrigin`; None if not known."""
    _assessment: Assessment | None = field(default=None, repr=False, compare=False)
    _sealed: bool = field(default=False, repr=False, compare=False)
    outcome: Outcome = "open"
    closed_step: int | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.first = self.anomaly

    @property
    def resolved(self) -> bool:
        """Whether a response was chosen for the latest strike."""
        return self.response is not None

    def resolve(self, response: Response) -> None:
        """Choose the response to the latest strike.

        Raises:
            RuntimeError: if another callback has chosen already.
        """
        if self.response is not None:
            raise RuntimeError(
                f"incident {self.id} is resolved already ({describe(self.response)}); "
                "ask `incident.resolved` first"
            )
        self.response = response
        self.responses.append(describe(response))

    def adjust(self, response: Response) -> None:
        """Record a change that may cure it, and leave to others what becomes of the step."""
        self.adjusted = True
        self.responses.append(describe(response))

    def recur(self, anomaly: Anomaly) -> None:
        """Take up another anomaly of the same episode, which needs a response of its own."""
        self.anomaly = anomaly
        self.occurrences += 1
        self.response, self.adjusted = None, False

    def agree(self, found: bool, gather: Callable[[Any], list[Any]]) -> bool:
        """Returns whether any rank has found something; merges evidence and shown causes of all.

        Args:
            found: whether this rank has found it.
            gather: collects a value from every rank, in their order. Every rank must call it, or
                none, and so this method.
        """
        answers = gather((found, dict(self.shown), list(self.evidence)))
        everywhere = set.intersection(*(set(evidence) for _, _, evidence in answers))
        # In the order of the ranks, so that the record is the same whoever writes it.
        self.evidence = list(
            dict.fromkeys(
                line if line in everywhere else f"rank {rank}: {line}"
                for rank, (_, _, evidence) in enumerate(answers)
                for line in evidence
            )
        )
        self.shown = {
            cause: how for _, shown, _ in reversed(answers) for cause, how in shown.items()
        }
        return any(each for each, _, _ in answers)

    def note(self, cause: str, evidence: str) -> None:
        """Record a cause that was shown by trial, and how.

        Args:
            cause: a name of the registry `lit_stability.diagnosis.CAUSES`, or another.
            evidence: one sentence.
        """
        self.shown.setdefault(cause, evidence)
        if evidence not in self.evidence:
            self.evidence.append(evidence)

    @property
    def assessment(self) -> Assessment:
        """The diagnosis: computed again only when what it depends on has changed, until `seal`."""
        known = self._assessment
        if known is None or (not self._sealed and known.context != self.current_context):
            known = self._assessment = assess(self.current_context)
        return known

    @property
    def likely_causes(self) -> list[LikelyCause]:
        """Causes with evidence for them, the best supported first; see `diagnosis.diagnose`."""
        return list(self.assessment.likely_causes)

    @property
    def since(self) -> int:
        """Optimizer step at which the trouble began, as far as the losses show it."""
        return self.assessment.since

    @property
    def checks(self) -> list[str]:
        """The questions of the decision tree with their answers."""
        return list(self.assessment.checks)

    def close(self, outcome: Outcome, step: int) -> None:
        """Sets the outcome and the optimizer step at which the incident ended."""
        self.outcome, self.closed_step = outcome, step

    def seal(self) -> None:
        """Makes the diagnosis final and releases the steps that it was computed from."""
        final = self.assessment
        context = replace(self.current_context, history=(), stats=None)
        self._assessment, self._sealed = replace(final, context=context), True
        if self.context is not None:
            self.context = context

    @property
    def cause(self) -> str:
        """The best supported cause, "" where nothing speaks for any."""
        unknown = (cause for cause in self.shown if cause not in CAUSES)
        return next(unknown, "") or next((h.cause for h in self.likely_causes), "")

    @property
    def recommended_action(self) -> RecommendedAction:
        """What the best supported cause asks of the ladder; only a `Diagnosis` asks anything."""
        found = self.likely_causes
        if (
            self.context is None
            or not found
            or (found[0].recommended_action == "stop" and not self.may_stop)
        ):
            return "usual"
        return found[0].decides

    @property
    def current_context(self) -> DiagnosisContext:
        """The scene, with what was found out since."""
        context = self.context or DiagnosisContext(anomaly=self.first)
        return replace(
            context,
            shown=dict(self.shown),
            origin=self.origin,
            verdict=self.verdict,
            occurrences=self.occurrences,
        )

    @property
    def remedy(self) -> str:
        """What a person can do about it."""
        found = self.likely_causes
        return found[0].remedy if found else "look at the scene in the incident's folder"

    def as_dict(self) -> dict[str, Any]:
        """The incident as JSON types."""
        return {
            "id": self.id,
            "kind": self.first.kind,
            "step": self.first.step,
            "epoch": self.epoch,
            "batch_idx": self.batch_idx,
            "signal": self.first.signal,
            "value": self.first.value,
            "baseline": self.first.baseline,
            "threshold": self.first.threshold,
            "message": self.first.message,
            "layers": [list(pair) for pair in self.first.layers],
            "strikes": self.occurrences,
            "origin": None if self.origin is None else self.origin.as_dict(),
            "cause": self.cause,
            "hypotheses": [cause.as_dict() for cause in self.likely_causes],
            "since": self.since,
            "phase": self.current_context.phase,
            "checks": self.checks,
            "evidence": list(self.evidence),
            "remedy": self.remedy,
            "responses": list(self.responses),
            "path": self.path,
            "verdict": self.verdict,
            "outcome": self.outcome,
            "closed_step": self.closed_step,
            "time": self.started,
        }
