"""What a check before the first step has found, and the report of all of them.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

Severity: TypeAlias = Literal["error", "warning", "note"]
"""``error``: this run cannot learn what it is meant to, or dies. ``warning``: almost surely not
meant. ``note``: worth knowing, and found in healthy runs too."""

_MOST_NAMES = 4
"""Names printed of a finding that concerns many; the record has them all."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found before the first step.

    Raises:
        ValueError: the severity is unknown.

    >>> print(Finding(check="initial loss", severity="error", what="the loss is nan",
    ...               why="nothing can be learnt from it", do="look at the batch").text())
    error: the loss is nan [initial loss]
      why: nothing can be learnt from it
      do:  look at the batch
    """

    check: str
    """Name of the check."""
    severity: Severity
    what: str
    """What was seen, with its numbers."""
    where: tuple[str, ...] = ()
    """Modules, parameters or parts of the batch, by name."""
    why: str
    """Why it matters."""
    do: str
    """What to do about it."""

    def __post_init__(self) -> None:
        if self.severity not in get_args(Severity):
            raise ValueError(
                f"severity={self.severity!r} is unknown; choose one of {get_args(Severity)}"
            )

    def text(self) -> str:
        """Readable, three lines or four."""
        lines = [f"{self.severity}: {self.what} [{self.check}]"]
        if self.where:
            shown = ", ".join(self.where[:_MOST_NAMES])
            rest = len(self.where) - _MOST_NAMES
            lines.append(f"  where: {shown}{f' and {rest} more' if rest > 0 else ''}")
        return "\n".join([*lines, f"  why: {self.why}", f"  do:  {self.do}"])


class DeclarationError(ValueError):
    """Raised where what was declared (a pattern, a probe) does not fit the model."""


class NotApplicableError(Exception):
    """Raised by a check that has nothing to look at; the message is the reason."""


@dataclass
class Report:
    """What was found, which checks ran, and why the others could not.

    >>> report = Report(ran=["batch"], skipped={"masks": "no probe is declared"})
    >>> print(report.text())
    preflight: nothing found in 1 check
      not run: masks (no probe is declared)
    """

    findings: list[Finding] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    """Names of the checks that ran, in their order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The others, with the reason."""
    seconds: float = 0.0
    """Wall-clock time that the checks took."""

    def of(self, *severities: Severity) -> list[Finding]:
        """The findings of some severities."""
        return [each for each in self.findings if each.severity in severities]

    @property
    def errors(self) -> list[Finding]:
        """The findings of severity ``error``."""
        return self.of("error")

    def headline(self) -> str:
        """How many were found, by severity."""
        if self.skipped and not self.ran and not self.findings:
            return f"preflight: not run ({'; '.join(dict.fromkeys(self.skipped.values()))})"
        counts = [(len(self.of(kind)), kind) for kind in get_args(Severity)]
        found = ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for n, kind in counts if n)
        checks = f"{len(self.ran)} check{'' if len(self.ran) == 1 else 's'}"
        return f"preflight: {found or 'nothing found'} in {checks}"

    def text(self) -> str:
        """Readable: the headline, the findings with the worst first, what did not run."""
        lines = [self.headline(), *(each.text() for each in self.ordered())]
        lines += [f"  not run: {check} ({reason})" for check, reason in self.skipped.items()]
        return "\n".join(lines)

    def ordered(self) -> list[Finding]:
        """The findings, the worst first."""
        order: Sequence[str] = get_args(Severity)
        return sorted(self.findings, key=lambda each: order.index(each.severity))

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        findings = [asdict(each) | {"where": list(each.where)} for each in self.ordered()]
        return {
            "version": 1,
            "findings": findings,
            "ran": list(self.ran),
            "skipped": dict(self.skipped),
            "seconds": round(self.seconds, 3),
        }


class PreflightError(ValueError):
    """Raised before the first step by ``Preflight(on_error="stop")``; nothing was trained.

    Args:
        message: the errors, and how to train all the same.
        report: of all checks, kept as an attribute of that name.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
