"""An incident: one anomaly or a burst of them, its diagnosis, the responses and the outcome.

Imports neither torch nor Lightning.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lit_stability.detectors import Anomaly
from lit_stability.detectors.anomaly import AT_START
from lit_stability.diagnosis import (
    CAUSES,
    Assessment,
    DiagnosisContext,
    LikelyCause,
    RecommendedAction,
    RuledOut,
    assess,
)
from lit_stability.incidents.learning import Level
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import (
    ClipStep,
    HoldLearningRate,
    Response,
    RollBack,
    describe,
)

Outcome = Literal[
    "open", "recovered", "contained", "recurring", "observed", "handled", "stopped", "unresolved"
]
"""``recovered``: the run learns again. ``contained``: its steps are healthy again, but it does not
learn; see `learning`. ``recurring``: an incident at the same place came before or after; see
`recurrence`. ``observed``: nothing was done. ``handled``: healthy steps followed, but the run ended
before they were enough. ``unresolved``: it ended without any."""


@dataclass
class Incident:
    """One or more anomalies of the same episode: what is known of them and what was done.

    A burst of bad steps is one incident: it stays open until enough healthy steps have passed.
    Callbacks with ``on_incident(trainer, pl_module, incident)`` receive it before the update of
    each bad step, in the order of ``trainer.callbacks``; the first that calls `resolve` chooses
    the response.

    >>> anomaly = Anomaly(kind="gradient spike", step=7, value=90.0, signal="grad_norm",
    ...                   message="gradient norm 90, usually 3")
    >>> incident = Incident(id=1, anomaly=anomaly)
    >>> incident.resolved, incident.outcome
    (False, 'open')
    """

    id: int
    anomaly: Anomaly
    """The latest anomaly."""
    epoch: int = 0
    batch_idx: int = 0
    occurrences: int = 1
    """Number of anomalies so far."""
    first: Anomaly = field(init=False)
    """The anomaly that opened the incident."""
    shown: dict[str, str] = field(default_factory=dict)
    """Causes confirmed by an experiment -> how they were confirmed; see `note`."""
    evidence: list[str] = field(default_factory=list)
    """Findings, one sentence each."""
    context: DiagnosisContext | None = field(default=None, repr=False)
    """Input of the diagnosis, set by `Diagnosis`; None diagnoses from the first anomaly alone."""
    may_stop: bool = True
    """Whether a certain cause may end the fit."""
    response: Response | None = None
    """Response to the latest anomaly; None while no callback has chosen one."""
    responses: list[str] = field(default_factory=list)
    """Description of every response so far."""
    rates: list[tuple[float, float]] = field(default_factory=list)
    """Learning rate before and after each response that lowered it."""
    adjusted: bool = False
    """Whether a setting was changed for the latest anomaly that may remove its cause."""
    run: str = ""
    """Id of the run: ids of incidents start again in another run in the same folder."""
    path: str | None = None
    """Folder of the incident checkpoint."""
    pruned: bool = False
    """Whether that folder was emptied to make room, except for its ``report.md``."""
    record: str | None = None
    """File in which the incident is recorded."""
    stats: StepStats | None = field(default=None, repr=False)
    """Measurement of the latest bad step."""
    verdict: str = ""
    """Empty until the steps were run again; then "transient" if the anomaly did not recur, or
    "deterministic" if it did."""
    recorded_step: Any = field(default=None, repr=False, compare=False)
    """The latest bad step as a `RecordedStep`, which can be run again in isolation; None unless a
    callback has ``needs_recorded_step = True``."""
    origin: Any = None
    """Operation that made the first NaN or Inf, a `NonFiniteOrigin`; None if not known."""
    same_sample_as: int | None = None
    """The first incident of the fit that one of the bad samples has made too."""
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    """Snapshots that were kept when it happened: number, places, bytes, and what is lost by it."""
    cadence: dict[str, Any] = field(default_factory=dict, repr=False)
    """Steps between snapshots when it happened, and the seconds that a capture and a step take."""
    outcome: Outcome = "open"
    repeats: list["Incident"] = field(default_factory=list, repr=False, compare=False)
    """Earlier incidents at the same place."""
    closed_step: int | None = None
    before: Level | None = None
    """Level of the loss before the incident; None if it is not known."""
    after: Level | None = None
    """Level of the loss when the outcome was found."""
    started: float = field(default_factory=time.time)
    _rerun_lowered: bool = field(default=False, init=False, repr=False, compare=False)
    _assessment: Assessment | None = field(default=None, init=False, repr=False, compare=False)
    _sealed: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.first = self.anomaly

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes for a pickle or a copy, without the step in progress."""
        return {**vars(self), "recorded_step": None}

    @property
    def at_start(self) -> bool:
        """Whether the state was damaged before the first step."""
        return self.first.kind == AT_START

    @property
    def lowered(self) -> bool:
        """Whether a response lowered learning rate or clip."""
        return bool(self.rates) or any(", clip x" in response for response in self.responses)

    @property
    def resolved(self) -> bool:
        """Whether a response to the latest anomaly was chosen."""
        return self.response is not None

    def resolve(self, response: Response) -> None:
        """Chooses the response to the latest anomaly.

        Raises:
            RuntimeError: if another callback has already chosen one.
        """
        if self.response is not None:
            raise RuntimeError(
                f"incident {self.id} is already resolved ({describe(self.response)}); "
                "check `incident.resolved` first"
            )
        self.response = response
        self.responses.append(describe(response))
        self._note_rates(response)
        self._rerun_lowered |= isinstance(response, RollBack) and (
            response.lr_factor < 1 or response.clip_factor < 1
        )

    def _note_rates(self, response: Response) -> None:
        """Record the largest learning rate before and after a response that lowers it."""
        rates = () if self.stats is None else self.stats.learning_rates
        factors: tuple[float, ...] = ()
        if isinstance(response, RollBack) and response.lr_factor < 1:
            factors = (response.lr_factor,) * len(rates)
        elif isinstance(response, HoldLearningRate):
            factors = response.factors
        if rates and factors:
            self.rates.append(max((r, r * f) for r, f in zip(rates, factors, strict=False)))

    def adjust(self, response: Response) -> None:
        """Records a change that may remove the cause; another callback still resolves the step."""
        self.adjusted = True
        self.responses.append(describe(response))

    def recur(self, anomaly: Anomaly) -> None:
        """Adds another anomaly of the same episode, which needs its own response."""
        self.anomaly = anomaly
        self.occurrences += 1
        self.response, self.adjusted = None, False

    def agree(self, found: bool, gather: Callable[[Any], list[Any]]) -> bool:
        """Returns whether any rank has found something; merges evidence and shown causes of all.

        Args:
            found: whether this rank has found it.
            gather: collects a value from every rank, in their order. Since every rank must call
                it, or none, the same holds for this method.
        """
        answers = gather((found, dict(self.shown), list(self.evidence)))
        everywhere = set.intersection(*(set(evidence) for _, _, evidence in answers))
        # In the order of the ranks, so that the record is the same whichever rank writes it.
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
        return any(found_there for found_there, _, _ in answers)

    def note(self, cause: str, evidence: str) -> None:
        """Records a cause that an experiment has confirmed.

        Args:
            cause: a name of the registry `lit_stability.diagnosis.CAUSES`, or another.
            evidence: how it was confirmed, in one sentence.
        """
        self.shown.setdefault(cause, evidence)
        if evidence not in self.evidence:
            self.evidence.append(evidence)

    def withdraw(self, cause: str) -> None:
        """Removes a cause of `note` that a later experiment contradicts.

        Args:
            cause: as it was noted; nothing happens if it was not.
        """
        evidence = self.shown.pop(cause, None)
        if evidence in self.evidence:
            self.evidence.remove(evidence)

    @property
    def assessment(self) -> Assessment:
        """The diagnosis; computed again only when its input has changed, and final after `seal`."""
        known = self._assessment
        if known is None or (not self._sealed and known.context != self.current_context):
            known = self._assessment = assess(self.current_context)
        return known

    @property
    def likely_causes(self) -> list[LikelyCause]:
        """Causes with evidence for them, the best supported first; see `diagnosis.diagnose`."""
        return list(self.assessment.likely_causes)

    @property
    def ruled_out(self) -> list[RuledOut]:
        """Causes that had evidence for them, and the evidence that clears them."""
        return list(self.assessment.ruled_out)

    @property
    def since(self) -> int:
        """Optimizer step at which the trouble began, as far as the losses show it."""
        return self.assessment.since

    @property
    def checks(self) -> list[str]:
        """Questions of the decision tree with their answers, one line each."""
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
        """The best supported cause that is likely or certain; "" if it is unknown."""
        unregistered = (cause for cause in self.shown if cause not in CAUSES)
        likely = (c.cause for c in self.likely_causes if c.certainty != "possible")
        return next(unregistered, "") or next(likely, "")

    @property
    def recommended_action(self) -> RecommendedAction:
        """What the best supported cause recommends; "usual" if no `Diagnosis` set the context."""
        causes = self.likely_causes
        if (
            self.context is None
            or not causes
            or (causes[0].recommended_action == "stop" and not self.may_stop)
        ):
            return "usual"
        return causes[0].action

    @property
    def current_context(self) -> DiagnosisContext:
        """The context together with what was found since it was set."""
        context = self.context or DiagnosisContext(anomaly=self.first)
        return replace(
            context,
            shown=dict(self.shown),
            origin=self.origin,
            verdict=self.verdict,
            rerun_lowered=self._rerun_lowered,
            occurrences=self.occurrences,
            clipped=self.responses.count(describe(ClipStep())),
        )

    @property
    def samples(self) -> list[int]:
        """Positions in the batch of the samples that made a NaN or Inf; empty if not known."""
        return [] if self.origin is None else list(getattr(self.origin, "samples", ()))

    @property
    def batch_size(self) -> int:
        """Number of samples in the batch; 0 if not known."""
        return 0 if self.origin is None else int(getattr(self.origin, "batch_size", 0))

    @property
    def remedy(self) -> str:
        """What to try, in one sentence."""
        cause, causes = self.cause, self.likely_causes
        if cause in self.shown and cause not in CAUSES:
            return f"see how it was found: {self.shown[cause]}"
        if cause and causes:
            return causes[0].remedy
        return "inspect the files in the incident folder; the cause is unknown"

    @property
    def advice(self) -> str:
        """What to try, and the files with more of it, for the message of an exception."""
        files = {"Record": self.record, "Details": None if self.pruned else self.path}
        named = [f"{what}: {path}" for what, path in files.items() if path]
        return ". ".join([f"What to try: {self.remedy}", *named])

    def as_dict(self) -> dict[str, Any]:
        """Returns the incident as JSON types."""
        return {
            "id": self.id,
            "run": self.run,
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
            "samples": self.samples,
            "batch_size": self.batch_size,
            "same_sample_as": self.same_sample_as,
            "origin": None if self.origin is None else self.origin.as_dict(),
            "cause": self.cause,
            "hypotheses": [cause.as_dict() for cause in self.likely_causes],
            "ruled_out": [[each.cause, each.why] for each in self.ruled_out],
            "since": self.since,
            "phase": self.current_context.phase,
            "checks": self.checks,
            "evidence": list(self.evidence),
            "remedy": self.remedy,
            "responses": list(self.responses),
            "memory": dict(self.memory),
            "cadence": dict(self.cadence),
            "path": self.path,
            "pruned": self.pruned,
            "verdict": self.verdict,
            "outcome": self.outcome,
            "loss_before": None if self.before is None else self.before.middle,
            "loss_after": None if self.after is None else self.after.middle,
            "repeats": [each.id for each in self.repeats],
            "closed_step": self.closed_step,
            "time": self.started,
        }


class TrainingStopped(RuntimeError):
    """Raised out of ``Trainer.fit`` when the escalation policy stops the training.

    Weights and optimizer state are those of the last confirmed snapshot when it is raised.

    >>> def train(trainer, model):
    ...     try:
    ...         trainer.fit(model)
    ...     except TrainingStopped as stop:
    ...         print(stop.incident.anomaly.message)

    Args:
        message: the reason, what to try and the path of the record.
        incident: the incident that led to the stop; kept as an attribute.
    """

    def __init__(self, message: str, incident: Incident) -> None:
        super().__init__(message)
        self.incident = incident
