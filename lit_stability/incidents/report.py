"""The Markdown report of an incident, and its responses in words.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_stability.diagnosis import DiagnosisContext
from lit_stability.incidents.console_lines import outcome_text
from lit_stability.incidents.incident import Incident

PRUNED = "pruned to make room, only this report is left"
"""Text for a folder that `AnomalyCheckpoint` has emptied."""


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
            outcome_text(incident)
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


def _line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines())
