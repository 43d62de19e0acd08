"""What the examination of a metric log found, as plain values.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_stability.checks.finding import SHOWN_NAMES, Finding
from lit_stability.checks.text_table import wrap
from lit_stability.diagnosis.cause import LikelyCause


@dataclass(frozen=True, kw_only=True)
class LogFinding(Finding):
    """A finding about the course of a run, with its steps and its likely causes."""

    step: int | None = None
    """Step at which it began; None if it is about the whole run."""
    until: int | None = None
    """Last step at which it was so, None if it lasts or is about one step."""
    certainty: Literal["certain", "likely"] = "certain"
    """Whether the log shows it, or it is concluded from what the log shows."""
    causes: tuple[LikelyCause, ...] = ()
    """The best supported first."""

    def text(self, names: int | None = SHOWN_NAMES) -> str:
        """Returns the lines of a `Finding`, and one for each likely cause with its evidence."""
        lines = [super().text(names)]
        for cause in self.causes:
            lines += wrap(cause.text(), first="  cause, ", following="    ")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding as JSON types."""
        return {
            "severity": self.severity,
            "check": self.check,
            "what": self.what,
            "where": list(self.where),
            "why": self.why,
            "remedy": self.remedy,
            "step": self.step,
            "until": self.until,
            "certainty": self.certainty,
            "causes": [
                {
                    "cause": cause.cause,
                    "certainty": cause.certainty,
                    "evidence": list(cause.evidence),
                    "remedy": cause.remedy,
                }
                for cause in self.causes
            ],
        }


@dataclass(frozen=True, kw_only=True)
class SeriesSummary:
    """One metric of a log in a few numbers."""

    name: str
    points: int
    first_step: int
    last_step: int
    minimum: float
    """Smallest finite value, NaN if there is none."""
    last: float
    non_finite: int
    """Number of points that are NaN or Inf."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the summary as JSON types; NaN and Inf become strings."""
        return {key: _json(value) for key, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class LogReport:
    """The findings on one run, worst first, and what they are based on."""

    format: str
    path: str
    files: tuple[str, ...]
    used: dict[str, tuple[str, ...]]
    """Role -> names of the metrics, such as ``loss`` -> ``("train_loss_step",)``."""
    first_step: int
    last_step: int
    points: int
    """Points of the training loss."""
    last_written: float
    """Time of the last point or of the file, in seconds since 1970."""
    complete: bool | None
    """Whether the log has the end of the run, None if its format does not record it."""
    planned_steps: int | None
    problems: tuple[str, ...]
    """What could not be read."""
    findings: tuple[LogFinding, ...]
    series: tuple[SeriesSummary, ...] = field(default=(), repr=False)

    @property
    def healthy(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON types; `docs/doctor.md` lists the keys."""
        own: dict[str, Any] = {key: value for key, value in vars(self).items() if key != "series"}
        return {
            "schema": 1,
            "healthy": self.healthy,
            **own,
            "files": list(self.files),
            "problems": list(self.problems),
            "used": {role: list(names) for role, names in self.used.items()},
            "findings": [finding.as_dict() for finding in self.findings],
            "series": [summary.as_dict() for summary in self.series],
        }


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
