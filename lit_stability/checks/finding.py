"""One problem that a check found, the order of severities, and the printed form of findings.

Shared by the preflight, checkpoint and precision-range checks. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lit_stability.checks.text_table import join_names, wrap
from lit_stability.printing import printable

Severity: TypeAlias = Literal["error", "warning", "note"]
"""``error``: the run cannot learn as intended or fails, and no healthy run shows it. ``warning``:
almost certainly unintended. ``note``: worth knowing, but healthy runs show it too."""
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""The severities, worst first."""
SHOWN_NAMES = 4
"""Names of `Finding.where` that are printed by default; `as_dict` of a report writes all."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem that a check found.

    Raises:
        ValueError: If the severity is unknown.

    >>> print(Finding(check="initial loss", severity="error", what="the loss is nan",
    ...               why="nothing can be learnt from it", remedy="check the batch").text())
    error: the loss is nan [initial loss]
      why: nothing can be learnt from it
      do:  check the batch
    """

    severity: Severity
    what: str
    """What was found; with its numbers, or a short name of the problem."""
    where: tuple[str, ...] = ()
    """Names of modules, parameters, tensors, or parts of the batch or run, worst first."""
    why: str
    """Why it matters."""
    remedy: str
    """What to do about it."""
    check: str = ""
    """Name of the check that found it."""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity={self.severity!r} is unknown; choose one of {SEVERITIES}")

    def text(self, names: int | None = SHOWN_NAMES) -> str:
        """Returns the finding as a heading and up to three wrapped, labelled entries.

        Args:
            names: Largest number of names to print from `where`; None for all.
        """
        check = f" [{self.check}]" if self.check else ""
        lines = [f"{self.severity}: {printable(self.what)}{check}"]
        if self.where:
            lines.append(f"  where: {join_names(self.where, names)}")
        for label, sentence in (("  why: ", self.why), ("  do:  ", self.remedy)):
            lines += wrap(sentence, first=label, following=" " * len(label))
        return "\n".join(lines)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings by severity, worst first; the order within a severity is kept."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def count_by_severity(findings: Iterable[Finding]) -> str:
    """Returns how many findings there are of each severity, worst first; "" without findings.

    >>> warning = Finding(severity="warning", what="large weights", why="...", remedy="...")
    >>> count_by_severity([warning, warning])
    '2 warnings'
    """
    found = [finding.severity for finding in findings]
    counts = [(found.count(severity), severity) for severity in SEVERITIES]
    return ", ".join(f"{n} {severity}{'s' if n > 1 else ''}" for n, severity in counts if n)
