"""An incident in words for people: a report in markdown, a table for the console.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lit_stability.diagnosis import DiagnosisContext
from lit_stability.incidents.incident import Incident

_WIDEST = 80
"""Characters of a response on the console."""


def markdown(incident: Incident) -> str:
    """What is known of an incident, the causes in their order, the questions asked first."""
    context = incident.current_context
    rows = [
        ("what", f"{incident.first.kind}: {incident.first.message}"),
        (
            "where",
            f"step {incident.first.step}, epoch {incident.epoch}, batch {incident.batch_idx}",
        ),
        ("layers", ", ".join(f"`{n}` {v:.4g}" for n, v in incident.first.layers) or "-"),
        ("born in", incident.origin.describe() if incident.origin else "-"),
        ("cause", incident.cause or "unknown"),
        ("since", f"step {incident.since}" + _phase(context)),
        ("evidence", "; ".join(incident.evidence) or "-"),
        ("done", incident.done or "nothing changed"),
        ("taken again", incident.verdict or "no"),
        (
            "outcome",
            incident.outcome
            + ("" if incident.closed_step is None else f" at step {incident.closed_step}"),
        ),
        ("to try", incident.remedy),
        ("scene", f"`{incident.path}`" if incident.path else "not saved"),
    ]
    # A table of two columns is what it wants to be; TensorBoard breaks words in the narrow one.
    body = "\n".join(f"* **{key}**: {_line(value)}" for key, value in rows)
    return f"## Incident {incident.id}\n\n{body}\n{_causes(incident)}"


def _phase(context: DiagnosisContext) -> str:
    if context.phase is None:
        return ""
    return f"; {context.phase_range.in_words() if context.phase_range else context.phase}"


def _causes(incident: Incident) -> str:
    """The causes in their order, and the questions asked first, as markdown lists."""
    causes = "".join(
        f"{i}. **{h.cause}** ({h.certainty}): {'; '.join(h.evidence)}\n"
        # Four spaces: with fewer, TensorBoard's markdown makes them causes of their own.
        f"    - to try: {h.remedy}\n    - leave it alone? {h.ignore_when}\n"
        for i, h in enumerate(incident.likely_causes, 1)
    )
    asked = "".join(f"* {each}\n" for each in incident.checks)
    return f"\n### Causes\n\n{causes or 'none known'}\n### Asked first\n\n{asked}"


def summary_table(incidents: Sequence[Incident]) -> list[str]:
    """Incidents as aligned lines for the console; of a long response its beginning."""
    head = ("id", "step", "kind", "strikes", "response", "outcome")
    rows = [
        (str(i.id), str(i.first.step), i.first.kind, str(i.occurrences), _cut(i.done), i.outcome)
        for i in incidents
    ]
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _cut(done: str) -> str:
    return textwrap.shorten(done, _WIDEST, placeholder=" ...") or "-"


def _line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines())
