"""An expectation held against an outcome, point by point.

Data in, data out: imports neither torch nor Lightning.
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
"""Characters of a finding that a verdict repeats."""


@dataclass(frozen=True)
class Verdict:
    """One thing that was expected, what was seen of it, and whether they agree."""

    expected: str
    observed: str
    met: bool


def judge(expect: Expectation, outcome: Outcome) -> list[Verdict]:
    """Hold each part of an expectation against what a run has left; how it ended comes first.

    Args:
        expect: of a config.
        outcome: what the folder of a run tells.

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
    """One line: all met, or each that was not.

    >>> summary([Verdict("loss < 2", "2.5", False), Verdict("no incident", "none", True)])
    'expectation NOT met: loss < 2, observed 2.5'
    """
    missed = [f"{each.expected}, observed {each.observed}" for each in verdicts if not each.met]
    if missed:
        return f"expectation NOT met: {'; '.join(missed)}"
    return f"expectation met: {', '.join(each.expected for each in verdicts)}"


def kinds_of(incidents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of some incidents, each once, in order of appearance."""
    return list(dict.fromkeys(str(each["kind"]) for each in incidents))


def _end(expect: Expectation, outcome: Outcome) -> Verdict:
    ending = outcome.ending
    first_line = next(iter(ending.why.splitlines()), "")
    met = ending.ends == expect.ends
    # What ended a run that was meant to end so is no news.
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
    causes = list(dict.fromkeys(str(each["cause"]) for each in found if each["cause"]))
    for cause in expect.causes or ():
        yield Verdict(f"cause: {cause}", _listed(causes), any(cause in each for each in causes))
    if expect.locates is not None:
        places = list(dict.fromkeys(_place(each["origin"]) for each in found if each["origin"]))
        met = any(expect.locates in each for each in places)
        yield Verdict(f"born in {expect.locates}", _listed(places), met)


def _place(origin: Mapping[str, Any]) -> str:
    """Operation, module, what was bad before and source line of a `NonFiniteOrigin`."""
    line = f"{Path(origin['file']).name}:{origin['line']}" if origin["file"] else ""
    parts = (origin["op"], origin["module"], origin["module_type"], origin["tensor"], line)
    return " ".join(each for each in parts if each)


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
        said = [each for each in found.get(check, []) if words in each]
        text = f"preflight {check}{f': {words}' if words else ''}"
        seen = textwrap.shorten(said[0], _LONGEST, placeholder=" ...") if said else observed
        yield Verdict(text, seen, bool(said))
    others = [check for check in found if check not in wanted]
    if wanted and others:
        yield Verdict("preflight: no other finding", _listed(others), False)


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
