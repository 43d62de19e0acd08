"""What is to be said of an outcome, against the clean twin and the same run unprotected.

Data in, data out: may import `scenario` for its type, and nothing that trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.rescue.run import Outcome
    from benchmarks.rescue.scenario import Scenario

BARE = "none"
"""The protection that is none."""
TOLERANCE = 1.05
"""Times the twin's held-out loss up to which a run counts as rescued."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An outcome, judged."""

    outcome: Outcome
    family: str
    beyond_remedy: bool
    """Whether nothing that is done during the run can save it."""
    ratio: float | None
    """Held-out loss over that of the twin; None where either is missing."""
    saved: bool
    """Whether it ended within the tolerance; where nothing can do that, whether it was named."""
    detected: bool
    delay: int | None
    """Batches from the strike to the first alarm."""
    named: bool | None
    """Whether the cause is an acceptable one; None where no cause is ever said, or none is due."""
    lost: int | None
    """Batches trained on twice or left out; None where they cannot be counted, and where the run
    did not go on to its end."""
    false_alarms: int
    """Alarms before the strike; of a healthy run, all."""
    untouched: bool
    """Whether it ended where the unprotected run ended, to the bit."""
    slower: float | None
    """CPU time over that of the unprotected run."""


def judge(
    scenario: Scenario,
    outcome: Outcome,
    twin: Outcome | None,
    bare: Outcome | None,
    says_causes: bool,
) -> Verdict:
    """Judge one outcome.

    Args:
        scenario: what was run.
        outcome: how it ended.
        twin: the undisturbed, unprotected run of the same seed, if there is one.
        bare: the same run unprotected, if there is one.
        says_causes: whether the protection ever says what a fault came from.
    """
    ratio = None
    if outcome.loss is not None and twin is not None and twin.loss:
        ratio = outcome.loss / twin.loss
    after = [alarm - scenario.step for alarm in outcome.alarms if alarm >= scenario.step]
    named = outcome.cause in scenario.causes if says_causes and not scenario.healthy else None
    reached = outcome.ended == "finished" and ratio is not None and ratio <= TOLERANCE
    false_alarms = len(outcome.alarms) if scenario.healthy else len(outcome.alarms) - len(after)
    return Verdict(
        outcome=outcome,
        family=scenario.family,
        beyond_remedy=bool(scenario.beyond_remedy),
        ratio=ratio,
        saved=bool(named) if scenario.beyond_remedy else reached,
        detected=bool(after) and not scenario.healthy,
        delay=min(after, default=None),
        named=named,
        lost=_lost(outcome, twin),
        false_alarms=false_alarms,
        untouched=bare is not None and outcome.loss is not None and outcome.loss == bare.loss,
        slower=outcome.cpu_seconds / bare.cpu_seconds if bare and bare.cpu_seconds else None,
    )


def _lost(outcome: Outcome, twin: Outcome | None) -> int | None:
    """Batches more than the twin took, and updates fewer than it made."""
    if twin is None or outcome.ended not in ("finished", "NaN"):
        return None
    again = outcome.batches - twin.batches
    if outcome.updates is None or twin.updates is None:
        return again or None
    return again + max(0, twin.updates - outcome.updates)


def judge_all(
    scenarios: Mapping[str, Scenario], outcomes: Iterable[Outcome], says_causes: frozenset[str]
) -> list[Verdict]:
    """Judge the outcomes of a table.

    Args:
        scenarios: by name, with the twins.
        outcomes: of any of them.
        says_causes: protections that say what a fault came from.
    """
    found = list(outcomes)
    bare = {(o.scenario, o.seed): o for o in found if o.protection == BARE}
    verdicts = []
    for outcome in found:
        scenario = scenarios[outcome.scenario]
        twin = bare.get((scenario.undisturbed().name, outcome.seed))
        same = bare.get((scenario.name, outcome.seed))
        says = outcome.protection in says_causes
        verdicts.append(judge(scenario, outcome, twin, same, says))
    return verdicts
