"""The report of the checks before the first step, and the exceptions that they raise.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_stability.checks.finding import Finding, Severity, count_by_severity, worst_first


class DeclarationError(ValueError):
    """Raised if what the user declared (a pattern, a probe) does not fit the model."""


class NotApplicableError(Exception):
    """Raised by a check that does not apply to the model; the message is the reason."""


@dataclass
class Report:
    """The findings, the checks that ran, and the reason why each of the others did not.

    >>> report = Report(ran=["batch"], skipped={"masks": "no probe is declared"})
    >>> print(report.text())
    preflight: nothing found in 1 check
      not run: masks (no probe is declared)
    """

    findings: list[Finding] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    """Names of the checks that ran, in order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Names of the checks that did not run, with the reason."""
    seconds: float = 0.0
    """Wall-clock time of all checks."""

    def of(self, *severities: Severity) -> list[Finding]:
        """Returns the findings of the given severities."""
        return [finding for finding in self.findings if finding.severity in severities]

    @property
    def errors(self) -> list[Finding]:
        """The findings of severity ``error``."""
        return self.of("error")

    def headline(self) -> str:
        """Returns one line with the number of findings by severity."""
        if self.skipped and not self.ran and not self.findings:
            return f"preflight: not run ({'; '.join(dict.fromkeys(self.skipped.values()))})"
        checks = f"{len(self.ran)} check{'' if len(self.ran) == 1 else 's'}"
        return f"preflight: {count_by_severity(self.findings) or 'nothing found'} in {checks}"

    def text(self) -> str:
        """Returns the headline, the findings (worst first), and the checks that did not run."""
        lines = [self.headline(), *(finding.text() for finding in self.ordered())]
        lines += [f"  not run: {check} ({reason})" for check, reason in self.skipped.items()]
        return "\n".join(lines)

    def ordered(self) -> list[Finding]:
        """Returns the findings, worst first."""
        return worst_first(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values that can be written as JSON."""
        return {
            "version": 1,
            "findings": [_as_dict(finding) for finding in self.ordered()],
            "ran": list(self.ran),
            "skipped": dict(self.skipped),
            "seconds": round(self.seconds, 3),
        }


def _as_dict(finding: Finding) -> dict[str, Any]:
    """Returns a finding under the keys of `preflight.json`, where the remedy is called ``do``."""
    return {
        "check": finding.check,
        "severity": finding.severity,
        "what": finding.what,
        "where": list(finding.where),
        "why": finding.why,
        "do": finding.remedy,
    }


class PreflightError(ValueError):
    """Raised before the first step by ``Preflight(on_error="stop")``; nothing was trained.

    Args:
        message: The errors, and how to train in spite of them.
        report: Of all checks; kept as the attribute `report`.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
