"""Text of incidents for the console: a few short lines each, and a summary by cause.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from lit_stability.incidents.incident import Incident
from lit_stability.incidents.verdict import place_in, verdict_of

_SHORT = 64
"""Longest text that is taken over from elsewhere, in characters."""
_LONGEST = 160
"""Longest verdict, in characters."""
_VERBS = {
    "step retried": "retry",
    "step skipped": "skip",
    "gradients clipped": "clip",
    "rolled back": "rollback",
    "learning rate held": "hold",
}
"""Beginning of a description of `lit_stability.policies.actions` -> word under which it counts."""
_STOP = "stopped: "
_RAISED_AT = re.compile(r" at (\S+:\d+ in [^\s;]+)")
"""Place in the message of an exception; see `trainer_internals.step_exceptions.raised_at`."""
_OUTCOMES = {
    "contained": "contained, not learning",
    "handled": "handled, the run ended before it was confirmed",
}
"""Outcomes that need more than their word."""
_HEAD = ("incident", "step", "cause", "done", "outcome")


def opening_lines(incident: Incident, alike: Incident | None = None) -> str:
    """Returns at most four lines: what happened, where, what was done and is to do, details.

    Args:
        incident: that was opened, with the response to it.
        alike: an earlier incident with the same cause, which says what is to do.
    """
    response = response_text(incident) or "nothing changed"
    details = incident.path or incident.record
    cause = cause_text(incident) if alike is None else f"the same as incident {alike.id}"
    lines = [
        f"incident {incident.id} at step {incident.first.step}: {what_text(incident)}; {cause}",
        f"where: {where_text(incident)}",
        f"done: {response}" + (f". To do: {incident.remedy}" if alike is None else ""),
        f"details: {short_path(details)}" if details else "",
    ]
    return "\n  ".join(filter(None, lines))


def continued_line(incident: Incident, responses: Sequence[str]) -> str:
    """Returns the line for an open incident that recurs and gets another kind of response.

    Args:
        incident: that recurs.
        responses: descriptions of what was done for the first time in it.
    """
    done = ", ".join(map(_without_factors, responses)) + _rates(incident)
    times = f"{incident.occurrences} times now"
    return f"incident {incident.id} recurs at step {incident.anomaly.step}, {times}: {done}"


def cause_line(incident: Incident, before: str) -> str:
    """Returns the line for a cause that has changed since it was logged.

    Args:
        incident: whose cause has changed.
        before: its `cause_text` as it was logged.
    """
    return f"incident {incident.id}: {cause_text(incident)}; before, {before}"


def closing_line(incident: Incident) -> str:
    """Returns the line for an incident that closes: outcome, responses, cause.

    Args:
        incident: to describe.
    """
    done = ", ".join(filter(None, [counted(incident.responses), _rates(incident).lstrip(", ")]))
    parts = [done or "nothing changed", *_losses(incident), cause_text(incident)]
    return f"incident {incident.id} {_ending(incident)}: {'; '.join(parts)}"


def _losses(incident: Incident) -> list[str]:
    """Returns the loss after and before the incident, if that is why it is only contained."""
    if incident.outcome != "contained" or incident.after is None:
        return []
    before = "" if incident.before is None else f", {incident.before.middle:.3g} before"
    return [f"loss {incident.after.middle:.3g}{before}"]


def _ending(incident: Incident) -> str:
    """Returns the outcome as a predicate, with its steps."""
    now, at = incident.closed_step, incident.anomaly.step
    if incident.outcome == "stopped":
        reason = next((r for r in reversed(incident.responses) if r.startswith(_STOP)), _STOP)
        back = f", weights restored to step {now}" if now is not None and now < at else ""
        why = textwrap.shorten(reason.removeprefix(_STOP), 2 * _SHORT, placeholder=" ...")
        return f"stopped the run at step {at}{back}" + (f" ({why})" if why else "")
    return outcome_text(incident) + ("" if now is None else f" at step {now}")


def outcome_text(incident: Incident) -> str:
    """Returns the outcome in words, and for a recurring incident the one that it repeats."""
    if not incident.repeats:
        return _OUTCOMES.get(incident.outcome, incident.outcome)
    count, first = len(incident.repeats) + 1, incident.repeats[0].id
    return f"{incident.outcome} ({count} times since incident {first})"


def cause_text(incident: Incident) -> str:
    """Returns the cause with its certainty, as the console prints it and the report repeats it."""
    certainty = next((c.certainty for c in incident.likely_causes if c.cause == incident.cause), "")
    return f"{certainty} cause: {incident.cause}".lstrip() if incident.cause else "cause unknown"


def response_text(incident: Incident) -> str:
    """Returns the latest responses with the learning rates before and after; empty if none."""
    if not incident.responses:
        return ""
    text = ", ".join(map(_without_factors, incident.responses)) + _rates(incident)
    return text.replace("learning rate held, learning rate", "learning rate held,")


def verb_of(response: str) -> str:
    """Returns the word under which a response is counted.

    >>> verb_of("rolled back and replayed, learning rate x0.5"), verb_of("net.0 kept in fp32")
    ('rollback', 'net.0 kept in fp32')
    """
    return next((verb for start, verb in _VERBS.items() if response.startswith(start)), response)


def counted(responses: Iterable[str]) -> str:
    """Returns how often each kind of response was given, in the order of the first of each.

    >>> counted(["step retried", "step skipped"] * 3 + ["rolled back, learning rate x0.5"])
    'retry x3, skip x3, rollback'
    """
    verbs = Counter(verb_of(each) for each in responses if not each.startswith(_STOP))
    return ", ".join(f"{verb} x{n}" if n > 1 else verb for verb, n in verbs.items())


def _without_factors(response: str) -> str:
    """Returns a description without factors, beside which the learning rates are given."""
    return response.split(", ")[0] if verb_of(response) in ("rollback", "hold") else response


def _rates(incident: Incident) -> str:
    """Returns the learning rate before the first response that lowered it and after the last."""
    if not incident.rates:
        return ""
    return f", learning rate {incident.rates[0][0]:.3g} -> {incident.rates[-1][1]:.3g}"


def what_text(incident: Incident) -> str:
    """Returns kind and observation in a few words."""
    first, origin = incident.first, incident.origin
    message = " ".join(first.message.split())
    if first.kind == "exception":
        message = _RAISED_AT.sub("", message)
    if first.state_corrupted:  # what was flagged comes first, the damage that was found last
        message = message.split("; ")[-1]
    if origin is not None and origin.cause == "operation":
        message = f"{origin.op} made {origin.value}"
    elif origin is not None:
        message = f"{origin.kind} {origin.tensor}".rstrip()
    return f"{first.kind}: {textwrap.shorten(message, _SHORT, placeholder=' ...')}"


def where_text(incident: Incident) -> str:
    """Returns operation or layer, and epoch, batch and sample."""
    if incident.at_start:
        return "before the first step"
    origin = incident.origin
    place = ""
    if origin is not None:
        module = f"{origin.module} ({origin.module_type})" if origin.module else origin.module_type
        line = f", {PurePath(origin.file).name}:{origin.line}" if origin.file else ""
        place = f"{origin.op} in {module}{line}, {origin.phase} pass"
    elif incident.first.layers:
        place = incident.first.layers[0][0]
    elif incident.first.kind == "exception" and (
        found := _RAISED_AT.search(incident.first.message)
    ):
        place = found[1]
    data = f"epoch {incident.epoch}, batch {incident.batch_idx}{_samples(incident)}"
    return "; ".join(filter(None, [place, data]))


def _samples(incident: Incident) -> str:
    """Returns the position of the bad samples in their batch."""
    if not incident.samples:
        return ""
    word = "sample" if len(incident.samples) == 1 else "samples"
    more = len(incident.samples) - 3
    numbers = ", ".join(map(str, incident.samples[:3])) + (f" and {more} more" if more > 0 else "")
    text = f", {word} {numbers} of {incident.batch_size}"
    same = incident.same_sample_as
    return text + (f" (the same sample as #{same})" if same is not None else "")


def short_path(path: str) -> str:
    """Returns a path relative to the working directory if it is below it."""
    try:
        return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
    except OSError:  # the working directory was deleted
        return path


def place_of(incident: Incident) -> str:
    """Returns what incidents with the same cause have in common; see `verdict.place_in`."""
    origin = incident.origin
    known = ("op", "file", "line", "cause")
    return place_in(
        {
            "kind": incident.first.kind,
            "cause": incident.cause,
            "verdict": incident.verdict,
            "origin": origin and {name: getattr(origin, name) for name in known},
        }
    )


def summary(incidents: Sequence[Incident]) -> str:
    """Returns the text at the end of a fit: causes, a row for each, and what is left to do.

    Args:
        incidents: of the fit, at least one.
    """
    groups: dict[str, list[Incident]] = {}
    for each in incidents:
        groups.setdefault(place_of(each), []).append(each)
    rows = [_HEAD, *(_row(place, group) for place, group in groups.items())]
    widths = [max(len(row[c]) for row in rows) for c in range(len(_HEAD))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    verdict = verdict_of([each.as_dict() for each in incidents]).line()
    last = textwrap.shorten(f"verdict: {verdict}", _LONGEST, placeholder=" ...")
    return "\n".join([_headline(incidents, list(groups)), *lines, last])


def _headline(incidents: Sequence[Incident], places: Sequence[str]) -> str:
    count = "1 incident" if len(incidents) == 1 else f"{len(incidents)} incidents"
    causes = f"one cause: {places[0]}" if len(places) == 1 else f"{len(places)} causes"
    skips = sum(r.startswith("step skipped") for i in incidents for r in i.responses)
    skipped = f"; {skips} {'batch' if skips == 1 else 'batches'} skipped" if skips else ""
    return f"summary: {count}, {causes}{skipped}"


def _row(place: str, group: Sequence[Incident]) -> tuple[str, ...]:
    done = counted(response for incident in group for response in incident.responses)
    outcomes = Counter(incident.outcome for incident in group)
    return (
        _span([incident.id for incident in group]),
        _span([incident.first.step for incident in group]),
        textwrap.shorten(place, 40, placeholder=" ..."),
        textwrap.shorten(done, 40, placeholder=" ...") or "-",
        ", ".join(f"{o} x{n}" if len(outcomes) > 1 and n > 1 else o for o, n in outcomes.items()),
    )


def _span(numbers: Sequence[int]) -> str:
    """Returns the first and the last of several numbers.

    >>> _span([3]), _span([3, 4, 9])
    ('3', '3..9')
    """
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"
