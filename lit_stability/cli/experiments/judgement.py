"""Compares an expectation with an outcome, item by item.

Pure logic on plain data; imports neither torch nor Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_stability.cli.experiments.expectation import Comparison, Expectation
from lit_stability.cli.experiments.outcome import Outcome

_LONGEST = 80
"""Maximum number of characters of a finding in a verdict."""


@dataclass(frozen=True)
class Verdict:
    """One expected item, what was observed, and whether they agree."""

    expected: str
    observed: str
    met: bool


def judge(expect: Expectation, outcome: Outcome) -> list[Verdict]:
    """Compares each item of an expectation with the outcome of a run; how it ended comes first.

    Args:
        expect: the expectation of a config.
        outcome: the outcome from the folder of a run.

    >>> from lit_stability.cli.experiments.outcome import Ending
    >>> ending = Ending(ends="finished", started=0.0, seconds=3.0)
    >>> expect = Expectation(metrics={"loss": "< 2"}, incidents=[])
    >>> for each in judge(expect, Outcome(ending=ending, metrics={"loss": 2.5})):
    ...     print(each.met, each.expected, "|", each.observed)
    True finished | finished
    False loss < 2 | 2.5
    True no incident | none
    """
    return [
        _end(expect, outcome),
        *_metrics(expect.metrics or {}, outcome.metrics),
        *_incidents(expect, outcome.incidents),
        *_preflight(expect.preflight, outcome.preflight),
    ]


def summary(verdicts: Sequence[Verdict]) -> str:
    """Returns one line: that all items were met, or the items that were not.

    >>> summary([Verdict("loss < 2", "2.5", False), Verdict("no incident", "none", True)])
    'expectation NOT met: loss < 2, observed 2.5'
    """
    missed = [f"{each.expected}, observed {each.observed}" for each in verdicts if not each.met]
    if missed:
        return f"expectation NOT met: {'; '.join(missed)}"
    return f"expectation met: {', '.join(each.expected for each in verdicts)}"


def kinds_of(incidents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the kinds of incidents, each once, in order of appearance."""
    return list(dict.fromkeys(str(each.get("kind")) for each in incidents))


def _end(expect: Expectation, outcome: Outcome) -> Verdict:
    ending = outcome.ending
    first_line = next(iter(ending.why.splitlines()), "")
    met = ending.ends == expect.ends
    # The reason is shown only if the run ended in an unexpected way.
    why = f": {first_line}" if first_line and not met else ""
    return Verdict(expect.ends, f"{ending.ends}{why}", met)


def _metrics(wanted: Mapping[str, str], found: Mapping[str, float]) -> Iterator[Verdict]:
    for name, text in wanted.items():
        value = found.get(name)
        observed = "not logged" if value is None else f"{value:.4g}"
        yield Verdict(f"{name} {text}", observed, Comparison(text).holds(value))


def _incidents(expect: Expectation, found: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    if expect.incidents is not None:
        kinds = kinds_of(found)
        words = f"incidents: {', '.join(expect.incidents)}" if expect.incidents else "no incident"
        yield Verdict(words, _listed(kinds), set(kinds) == set(expect.incidents))
    causes = list(dict.fromkeys(str(each["cause"]) for each in found if each.get("cause")))
    for cause in expect.causes or ():
        yield Verdict(f"cause: {cause}", _listed(causes), any(cause in each for each in causes))
    if expect.locates is not None:
        places = list(dict.fromkeys(_place(each["origin"]) for each in found if each.get("origin")))
        met = any(expect.locates in each for each in places)
        yield Verdict(f"origin in {expect.locates}", _listed(places), met)


def _place(origin: Mapping[str, Any]) -> str:
    """Returns operation, module, bad tensor and source line of a `NonFiniteOrigin`."""
    line = f"{Path(origin['file']).name}:{origin.get('line')}" if origin.get("file") else ""
    parts = [origin.get(key) for key in ("op", "module", "module_type", "tensor")]
    return " ".join(str(each) for each in (*parts, line) if each)


def _preflight(
    wanted: Mapping[str, str] | None, report: Mapping[str, Any] | None
) -> Iterator[Verdict]:
    if wanted is None:
        return
    found: dict[str, list[str]] = {}
    for each in report["findings"] if report else ():
        if each["severity"] != "note":
            found.setdefault(each["check"], []).append(each["what"])
    observed = "preflight did not run" if report is None else _listed(list(found))
    if not wanted:
        yield Verdict("preflight: nothing", observed, report is not None and not found)
    for check, words in wanted.items():
        matching = [finding for finding in found.get(check, []) if words in finding]
        text = f"preflight {check}{f': {words}' if words else ''}"
        seen = textwrap.shorten(matching[0], _LONGEST, placeholder=" ...") if matching else observed
        yield Verdict(text, seen, bool(matching))
    others = [check for check in found if check not in wanted]
    if wanted and others:
        yield Verdict("preflight: no other finding", _listed(others), False)


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
