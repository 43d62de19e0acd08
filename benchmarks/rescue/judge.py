"""Judges an outcome against its clean twin and against the same run without protection.

Processes data only: imports `scenario` and `run` for their types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.rescue.run import Outcome
    from benchmarks.rescue.scenario import Scenario

BARE = "none"
"""Name of the runs without protection."""
TOLERANCE = 1.05
"""Largest ratio of the held-out loss to the twin's with which a run counts as saved."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An outcome with its evaluation."""

    outcome: Outcome
    family: str
    beyond_remedy: bool
    """Whether no action during the run can save it."""
    ratio: float | None
    """Held-out loss divided by the twin's; None if either is missing."""
    saved: bool
    """Whether the run finished within the tolerance; beyond remedy, whether its cause was named."""
    detected: bool
    delay: int | None
    """Batches from the fault to the first alarm."""
    named: bool | None
    """Whether a correct cause was named; None without causes or for a healthy run."""
    lost: int | None
    """Batches trained on twice or skipped; None if uncountable or the run ended early."""
    false_alarms: int
    """Alarms before the fault; all alarms of a healthy run."""
    untouched: bool
    """Whether the final weights are bit-identical to those of the unprotected run."""
    slower: float | None
    """CPU time divided by that of the unprotected run."""


def judge(
    scenario: Scenario,
    outcome: Outcome,
    twin: Outcome | None,
    bare: Outcome | None,
    names_causes: bool,
) -> Verdict:
    """Judges one outcome.

    Args:
        scenario: The scenario that was run.
        outcome: Its outcome.
        twin: Outcome of the undisturbed, unprotected run with the same seed, if there is one.
        bare: Outcome of the same run without protection, if there is one.
        names_causes: Whether the protection names causes of faults.
    """
    ratio = None
    if outcome.loss is not None and twin is not None and twin.loss:
        ratio = outcome.loss / twin.loss
    after = [alarm - scenario.step for alarm in outcome.alarms if alarm >= scenario.step]
    named = outcome.cause in scenario.causes if names_causes and not scenario.healthy else None
    reference = None if twin is None else twin.loss
    within = outcome.ended == "finished" and within_tolerance(outcome.loss, reference)
    false_alarms = len(outcome.alarms) if scenario.healthy else len(outcome.alarms) - len(after)
    return Verdict(
        outcome=outcome,
        family=scenario.family,
        beyond_remedy=bool(scenario.beyond_remedy),
        ratio=ratio,
        saved=bool(named) if scenario.beyond_remedy else within,
        detected=bool(after) and not scenario.healthy,
        delay=min(after, default=None),
        named=named,
        lost=_lost(outcome, twin),
        false_alarms=false_alarms,
        untouched=bare is not None and bit_identical(outcome, bare),
        slower=outcome.cpu_seconds / bare.cpu_seconds if bare and bare.cpu_seconds else None,
    )


def within_tolerance(loss: float | None, reference: float | None) -> bool:
    """Returns whether a loss is at most 5 % of the reference's size above it.

    >>> within_tolerance(1.04, 1.0), within_tolerance(-1.04, -1.0), within_tolerance(-0.9, -1.0)
    (True, True, False)
    >>> within_tolerance(None, 1.0)
    False
    """
    if loss is None or reference is None:
        return False
    return loss <= reference + (TOLERANCE - 1) * abs(reference)


def bit_identical(outcome: Outcome, bare: Outcome) -> bool:
    """Returns whether two runs ended with the same weights and a finite held-out loss."""
    return outcome.loss is not None and (outcome.loss, outcome.weights) == (bare.loss, bare.weights)


def _lost(outcome: Outcome, twin: Outcome | None) -> int | None:
    """Returns the batches beyond the twin's, plus the updates that are missing."""
    if twin is None or outcome.ended not in ("finished", "NaN"):
        return None
    extra = outcome.batches - twin.batches
    if outcome.updates is None or twin.updates is None:
        return extra or None
    return extra + max(0, twin.updates - outcome.updates)


def judge_all(
    scenarios: Mapping[str, Scenario], outcomes: Iterable[Outcome], names_causes: frozenset[str]
) -> list[Verdict]:
    """Judges all outcomes.

    Args:
        scenarios: Scenarios and their twins, by name.
        outcomes: Outcomes of these scenarios.
        names_causes: Protections that name causes of faults.
    """
    outcomes = list(outcomes)
    bare = {(o.scenario, o.seed): o for o in outcomes if o.protection == BARE}
    verdicts = []
    for outcome in outcomes:
        scenario = scenarios[outcome.scenario]
        twin = bare.get((scenario.undisturbed().name, outcome.seed))
        same = bare.get((scenario.name, outcome.seed))
        verdicts.append(judge(scenario, outcome, twin, same, outcome.protection in names_causes))
    return verdicts
