"""Text for people: console lines of an incident, its Markdown report, the table of all incidents.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from lit_stability.diagnosis import DiagnosisContext
from lit_stability.incidents.incident import Incident

PRUNED = "pruned to make room, only this report is left"
"""Text for a folder that `AnomalyCheckpoint` has emptied."""
_WIDEST = 80
"""Longest response in the table, in characters."""


def opening_line(incident: Incident) -> str:
    """Returns the console line for an incident that opens.

    Args:
        incident: to describe.
    """
    response = responses_text(incident) or "observed, nothing changed"
    cause = f"; {incident.origin.describe().splitlines()[0]}" if incident.origin else ""
    where = f" | saved to {incident.path}" if incident.path else ""
    if incident.cause and not cause:
        cause = f"; {_cause(incident)}"
    first = incident.first
    return (
        f"incident {incident.id} at step {first.step} (epoch {incident.epoch}, batch "
        f"{incident.batch_idx}): {first.kind}: {first.message}{cause} -> {response}{where}"
    )


def closing_line(incident: Incident) -> str:
    """Returns the console line for an incident that closes.

    Args:
        incident: to describe.
    """
    occurrences = "" if incident.occurrences == 1 else f" after {incident.occurrences} occurrences"
    return (
        f"incident {incident.id} ({incident.first.kind}) {_outcome(incident)}{occurrences}: "
        f"{responses_text(incident) or 'nothing changed'}; {_cause(incident)}; "
        f"step {incident.closed_step} now"
    )


def _outcome(incident: Incident) -> str:
    """Returns the outcome, and for a recurring incident the one that it repeats."""
    if not incident.repeats:
        return incident.outcome
    count, first = len(incident.repeats) + 1, incident.repeats[0].id
    return f"{incident.outcome} ({count} times since incident {first})"


def _cause(incident: Incident) -> str:
    """Returns the cause with its certainty, as the console prints it and the report repeats it."""
    certainty = next((c.certainty for c in incident.likely_causes if c.cause == incident.cause), "")
    return f"{certainty} cause: {incident.cause}".lstrip() if incident.cause else "cause unknown"


def responses_text(incident: Incident) -> str:
    """Returns the responses in order, repeated ones counted; empty when nothing was done.

    Args:
        incident: whose responses to list.
    """
    return responses_in_words(incident.responses)


def responses_in_words(responses: Sequence[str]) -> str:
    """Returns responses in order, repeated ones counted.

    >>> responses_in_words(["step retried", "step skipped", "step skipped"])
    'step retried, step skipped (2x)'
    """
    return ", ".join(r if n == 1 else f"{r} ({n}x)" for r, n in _counted(responses))


def _counted(responses: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yields responses, and pairs of responses, with the number of times that each is repeated.

    >>> [*_counted(["step retried", "step skipped"] * 3 + ["rolled back"])]
    [('step retried and skipped', 3), ('rolled back', 1)]
    """
    rest = list(responses)
    while rest:
        single = _repeats(rest, 1)
        pairs = _repeats(rest, 2) if rest[:2] == ["step retried", "step skipped"] else 0
        if pairs > 1:
            yield "step retried and skipped", pairs
            rest = rest[2 * pairs :]
        else:
            yield rest[0], single
            rest = rest[single:]


def _repeats(items: Sequence[str], length: int) -> int:
    """Returns how often the first ``length`` items are repeated at the beginning."""
    count = 1
    while items[count * length : (count + 1) * length] == items[:length]:
        count += 1
    return count


def markdown(incident: Incident) -> str:
    """Returns the report of an incident: facts, likely causes and the decision tree.

    Args:
        incident: to describe.
    """
    context = incident.current_context
    rows = [
        ("what", f"{incident.first.kind}: {incident.first.message}"),
        (
            "where",
            f"step {incident.first.step}, epoch {incident.epoch}, batch {incident.batch_idx}",
        ),
        ("layers", ", ".join(f"`{n}` {v:.4g}" for n, v in incident.first.layers) or "-"),
        ("origin", incident.origin.describe() if incident.origin else "-"),
        ("cause", incident.cause or "unknown"),
        ("since", f"step {incident.since}" + _phase(context)),
        ("evidence", "; ".join(incident.evidence) or "-"),
        ("response", responses_text(incident) or "nothing changed"),
        ("retried", incident.verdict or "no"),
        (
            "outcome",
            _outcome(incident)
            + ("" if incident.closed_step is None else f" at step {incident.closed_step}"),
        ),
        ("to try", incident.remedy),
        ("saved to", _place(incident)),
    ]
    # A list and not a table: TensorBoard breaks words in the narrow first column.
    body = "\n".join(f"* **{key}**: {_line(value)}" for key, value in rows)
    return f"## Incident {incident.id}\n\n{body}\n{_causes(incident)}"


def _place(incident: Incident) -> str:
    if incident.path is None:
        return "not saved"
    return f"`{incident.path}`" + (f": {PRUNED}" if incident.pruned else "")


def _phase(context: DiagnosisContext) -> str:
    if context.phase is None:
        return ""
    return f"; {context.phase_range.in_words() if context.phase_range else context.phase}"


def _causes(incident: Incident) -> str:
    """Returns the likely causes and the decision tree as Markdown lists."""
    causes = "".join(
        f"{i}. **{h.cause}** ({h.certainty}): {'; '.join(h.evidence)}\n"
        # With fewer than four spaces, TensorBoard shows these lines as causes of their own.
        f"    - to try: {h.remedy}\n    - when to ignore: {h.ignore_when}\n"
        for i, h in enumerate(incident.likely_causes, 1)
    )
    checks = "".join(f"* {check}\n" for check in incident.checks)
    cleared = "".join(f"* {each.text()}\n" for each in incident.ruled_out)
    excluded = f"\n### Ruled out\n\n{cleared}" if cleared else ""
    known = causes if incident.cause else f"The cause is unknown.\n\n{causes}"
    return f"\n### Causes\n\n{known}{excluded}\n### Decision tree\n\n{checks}"


def summary_table(incidents: Sequence[Incident]) -> list[str]:
    """Returns one aligned line per incident, after a header; long responses are cut.

    Args:
        incidents: in the order of the lines.
    """
    head = ("id", "step", "kind", "occurrences", "response", "outcome")
    rows = [
        (
            *(str(i.id), str(i.first.step), i.first.kind, str(i.occurrences)),
            *(_cut(responses_text(i)), i.outcome),
        )
        for i in incidents
    ]
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _cut(text: str) -> str:
    return textwrap.shorten(text, _WIDEST, placeholder=" ...") or "-"


def _line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines())
