"""An incident as a card for a notebook.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from lit_stability.incidents.console_lines import (
    cause_text,
    closing_line,
    counted,
    opening_lines,
    outcome_text,
    response_text,
    short_path,
    what_text,
    where_text,
)
from lit_stability.incidents.incident import Incident
from lit_stability.incidents.verdict import ignore_in

_COLOURS: Mapping[str, str] = {
    "recovered": "#007a5a",
    "handled": "#007a5a",
    "stopped": "#b3261e",
    "open": "#0b57a4",
    "observed": "#57606a",
}
"""Outcome -> colour of the edge; `_DOUBT` for any other."""
_DOUBT = "#9a5b00"
_CARD = (
    '<div style="border:1px solid #8884;border-left:4px solid {colour};border-radius:4px;'
    'padding:8px 12px;margin:4px 0;max-width:60em;font-family:sans-serif;line-height:1.4">'
    "{body}</div>"
)
_ROW = (
    '<div style="display:flex"><span style="flex:0 0 7em;opacity:.7">{name}</span>'
    '<span style="overflow-wrap:anywhere">{text}</span></div>'
)


class IncidentCard:
    """What a notebook shows of an incident: one card, which changes as the incident goes on.

    Args:
        incident: to show.
    """

    def __init__(self, incident: Incident) -> None:
        self.incident = incident

    def __repr__(self) -> str:
        """Returns the lines of the console, for a frontend that shows no HTML."""
        if self.incident.closed_step is None:
            return opening_lines(self.incident)
        return f"{opening_lines(self.incident)}\n{closing_line(self.incident)}"

    def _repr_html_(self) -> str:
        incident = self.incident
        rows = {
            "where": where_text(incident),
            "cause": cause_text(incident),
            "done": _done(incident),
            "to do": incident.remedy,
            "safe to ignore": ignore_in(incident.as_dict()),
            "details": short_path(incident.path or incident.record or ""),
        }
        title = f"Incident {incident.id} at step {incident.first.step}: {what_text(incident)}"
        step = "" if incident.closed_step is None else f" at step {incident.closed_step}"
        outcome = f"{outcome_text(incident)}{step}"
        colour = _COLOURS.get(incident.outcome, _DOUBT)
        head = f'<b>{escape(title)}</b> <span style="color:{colour}">{escape(outcome)}</span>'
        lines = (_ROW.format(name=name, text=escape(text)) for name, text in rows.items() if text)
        return _CARD.format(colour=colour, body=head + "".join(lines))


def _done(incident: Incident) -> str:
    """Returns the response; once there are several, how often each kind was given."""
    if len(incident.responses) < 2:
        return response_text(incident) or "nothing changed"
    return counted(incident.responses)
