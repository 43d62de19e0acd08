"""The diagnosis of an incident in one value: causes, first bad step, decision tree.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_stability.diagnosis.cause import LikelyCause, RuledOut, weigh_all
from lit_stability.diagnosis.context import DiagnosisContext
from lit_stability.diagnosis.decision_tree import decision_tree

_MOST = 4
"""Largest number of causes of an incident."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What `assess` concludes from a `DiagnosisContext`, which is kept as ``context``."""

    context: DiagnosisContext
    likely_causes: tuple[LikelyCause, ...]
    """Best supported cause first."""
    ruled_out: tuple[RuledOut, ...]
    """Causes that had evidence, and what clears them."""
    since: int
    """Optimizer step at which the trouble began, as far as the losses show it."""
    checks: tuple[str, ...]
    """Questions of the decision tree with their answers, one line each."""


def assess(context: DiagnosisContext) -> Assessment:
    """Weighs the registered causes and answers the decision tree.

    Args:
        context: what is known of the incident.
    """
    likely, cleared = weigh_all(context)
    return Assessment(
        context=context,
        likely_causes=tuple(likely[:_MOST]),
        ruled_out=tuple(cleared),
        since=context.since,
        checks=tuple(answer.text() for answer in decision_tree(context)),
    )
