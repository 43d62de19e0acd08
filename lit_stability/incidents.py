"""An incident: one episode of trouble, what is known of it, what was done, how it ended.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_stability.detectors import Anomaly
from lit_stability.responses import Response, describe
from lit_stability.stats import StepStats

Outcome = Literal["open", "recovered", "observed", "stopped", "unresolved"]

_REMEDIES = {
    "non-finite loss": "look at the batch in the incident's folder; check log(0), division by 0, "
    "fully masked rows; lower the learning rate if it returns",
    "non-finite gradient": "look for a sqrt, norm or log at 0 in the layers named; use bf16 "
    "instead of fp16; add an epsilon inside the root",
    "non-finite weight": "if it returns without a bad batch, suspect memory or a custom kernel",
    "gradient spike": "look at the batch in the incident's folder; set gradient_clip_val",
    "loss spike": "look at the batch in the incident's folder for labels or values out of range",
    "divergence": "lower the learning rate or warm up longer",
    "learning-rate jump": "mend the scheduler: it wrote a learning rate far above any before",
    "update spike": "lower the learning rate or raise Adam's epsilon; suspect the optimizer state",
    "optimizer state": "find what writes to the optimizer's moments, or suspect memory",
    "rank disagreement": "suspect the memory, the driver or the network of the rank that is named; "
    "look for code that runs on one rank only and changes weights, gradients or schedulers",
    "loss-scale collapse": "use bf16 or 32-bit precision, or add PrecisionFallback, which changes "
    "to it; scale inputs and targets to about 1",
    "loss-scale fall": "gradients grow, or a module overflows: bf16 does not; look at the layers "
    "named",
    "infinite loss": "compute the loss in float32: cast outputs and targets before it, or scale "
    "the targets",
    "lost updates": "train with bf16-mixed, which keeps float32 weights, or raise the learning "
    "rate",
    "layer bound": "raise the bound if the run is healthy, or clip gradients",
}


def _alone(said: Any) -> list[Any]:
    return [said]


class TrainingStopped(RuntimeError):
    """Raised out of ``Trainer.fit`` when no response in budget is left.

    Weights and optimizer are back at the last confirmed snapshot when it is raised.
    """

    def __init__(self, message: str, incident: Incident) -> None:
        super().__init__(message)
        self.incident = incident


@dataclass
class Incident:
    """One episode of trouble; it travels ``trainer.callbacks`` in order at each strike.

    A burst of bad steps is one incident: it stays open until enough healthy steps have passed.
    A callback with ``on_incident(trainer, pl_module, incident)`` is handed it before the update of
    the step in question; the first to call `settle` decides what is done.
    """

    id: int
    anomaly: Anomaly
    """The anomaly of the latest strike."""
    epoch: int = 0
    batch_idx: int = 0
    strikes: int = 1
    first: Anomaly = field(init=False)
    """The anomaly that opened it."""
    cause: str = ""
    """What is believed to have caused it."""
    evidence: list[str] = field(default_factory=list)
    """What speaks for the cause, a sentence each."""
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
    gather: Callable[[Any], list[Any]] = field(default=_alone, repr=False, compare=False)
    """What each rank says, in their order, given what this one says; to be called by all of them or
    none. An incident is offered to all ranks alike."""
    tape: Any = field(default=None, repr=False, compare=False)
    """The step of the latest strike, a `StepTape`, for callbacks that take it again beside training
    and say so by ``takes_steps_again = True``; else None."""
    origin: Any = None
    """The operation that made the first NaN or Inf, a `NonFiniteOrigin`; None if not known."""
    outcome: Outcome = "open"
    closed_step: int | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.first = self.anomaly

    @property
    def settled(self) -> bool:
        """Whether a response was chosen for the latest strike."""
        return self.response is not None

    def settle(self, response: Response) -> None:
        """Choose the response to the latest strike.

        Raises:
            RuntimeError: if another callback has chosen already.
        """
        if self.response is not None:
            raise RuntimeError(
                f"incident {self.id} is settled already ({describe(self.response)}); "
                "ask `incident.settled` before settling"
            )
        self.response = response
        self.responses.append(describe(response))

    def adjust(self, response: Response) -> None:
        """Record a change that may cure it, and leave to others what becomes of the step."""
        self.adjusted = True
        self.responses.append(describe(response))

    def strike(self, anomaly: Anomaly) -> None:
        """Take up another anomaly of the same episode, which needs a response of its own."""
        self.anomaly = anomaly
        self.strikes += 1
        self.response, self.adjusted = None, False

    def agree(self, found: bool) -> bool:
        """Whether any rank has found it; evidence and cause become those of all ranks together.

        To be called on every rank or on none. On one rank it is what was found.
        """
        said = self.gather((found, self.cause, list(self.evidence)))
        everywhere = set.intersection(*(set(evidence) for _, _, evidence in said))
        # In the order of the ranks, so that the record is the same whoever writes it.
        self.evidence = list(
            dict.fromkeys(
                line if line in everywhere else f"rank {rank}: {line}"
                for rank, (_, _, evidence) in enumerate(said)
                for line in evidence
            )
        )
        self.cause = next((cause for _, cause, _ in said if cause), "")
        return any(each for each, _, _ in said)

    def note(self, cause: str, evidence: str) -> None:
        """Record what is believed; a later cause replaces the earlier, evidence accumulates."""
        self.cause = cause
        if evidence not in self.evidence:
            self.evidence.append(evidence)

    @property
    def done(self) -> str:
        """The responses in order, in words; empty when nothing was done."""
        runs: list[list[Any]] = []
        for response in self.responses:
            if runs and runs[-1][0] == response:
                runs[-1][1] += 1
            else:
                runs.append([response, 1])
        return ", ".join(r if n == 1 else f"{r} ({n}x)" for r, n in runs)

    @property
    def remedy(self) -> str:
        """What a person can do about it."""
        if self.verdict == "transient":
            return (
                "nothing in data or model: it did not return when the same steps were taken again; "
                "if it happens often, suspect the hardware or a nondeterministic kernel"
            )
        if self.origin is not None:
            return str(self.origin.advice)
        return _REMEDIES.get(self.first.kind, "look at the scene in the incident's folder")

    def opening_line(self) -> str:
        """One line for the console when it opens."""
        done = self.done or "observed, nothing changed"
        born = f"; {self.origin.describe().splitlines()[0]}" if self.origin else ""
        where = f" | scene in {self.path}" if self.path else ""
        return (
            f"incident {self.id} at step {self.first.step} (epoch {self.epoch}, batch "
            f"{self.batch_idx}): {self.first.kind}: {self.first.message}{born} -> {done}{where}"
        )

    def closing_line(self) -> str:
        """One line for the console when it closes."""
        strikes = "" if self.strikes == 1 else f" after {self.strikes} strikes"
        return (
            f"incident {self.id} ({self.first.kind}) {self.outcome}{strikes}: "
            f"{self.done or 'nothing changed'}; step {self.closed_step} now"
        )

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
            "strikes": self.strikes,
            "origin": None if self.origin is None else self.origin.as_dict(),
            "cause": self.cause,
            "evidence": list(self.evidence),
            "remedy": self.remedy,
            "responses": list(self.responses),
            "path": self.path,
            "verdict": self.verdict,
            "outcome": self.outcome,
            "closed_step": self.closed_step,
            "time": self.started,
        }

    def as_markdown(self) -> str:
        """The incident for people, in a few lines of markdown."""
        rows = [
            ("what", f"{self.first.kind}: {self.first.message}"),
            ("where", f"step {self.first.step}, epoch {self.epoch}, batch {self.batch_idx}"),
            ("layers", ", ".join(f"`{n}` {v:.4g}" for n, v in self.first.layers) or "-"),
            ("born in", self.origin.describe() if self.origin else "-"),
            ("cause", self.cause or "unknown"),
            ("evidence", "; ".join(self.evidence) or "-"),
            ("done", self.done or "nothing changed"),
            ("taken again", self.verdict or "no"),
            (
                "outcome",
                self.outcome + ("" if self.closed_step is None else f" at step {self.closed_step}"),
            ),
            ("to try", self.remedy),
            ("scene", f"`{self.path}`" if self.path else "not saved"),
        ]
        body = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
        return f"## Incident {self.id}\n\n| | |\n|---|---|\n{body}\n"


def summary_table(incidents: Sequence[Incident]) -> list[str]:
    """Incidents as aligned lines for the console."""
    head = ("id", "step", "kind", "strikes", "response", "outcome")
    rows = [
        (str(i.id), str(i.first.step), i.first.kind, str(i.strikes), i.done or "-", i.outcome)
        for i in incidents
    ]
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
