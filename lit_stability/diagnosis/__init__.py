"""Diagnosis: the likely causes of an anomaly, what to try, and when to ignore it.

`diagnose` weighs all causes of one registry in a `DiagnosisContext`; `register_cause` and
`register_layer_cause` add your own. Except for ``nonfinite/``, no file of this folder imports torch
or Lightning.

A cause has a name, evidence rules with points, and a remedy. A rule is a function of the context
that returns its evidence as a sentence, or None. A cause is possible from 2 points on, likely from
4 and certain from 8; evidence against a cause has negative points.

>>> from lit_stability.detectors import Anomaly
>>> def at_the_target(context: DiagnosisContext) -> str | None:
...     return "no model can be as good" if context.anomaly.kind == "too good" else None
>>> def from_the_start(context: DiagnosisContext) -> str | None:
...     return "it came within 100 steps" if context.anomaly.step < 100 else None
>>> leak = Cause(
...     name="target among the inputs",
...     rules=((4, at_the_target), (4, from_the_start)),
...     remedy="look at what the collate function returns, and at the attention mask",
...     ignore_when="on a task that is really solved",
... )
>>> register_cause(leak)
>>> anomaly = Anomaly(kind="too good", step=2, value=0.01, message="loss 0.01", signal="loss")
>>> diagnose(DiagnosisContext(anomaly=anomaly))[0].text()
'certain: target among the inputs (no model can be as good; it came within 100 steps)'
>>> del CAUSES["target among the inputs"]
"""

from lit_stability.diagnosis.assessment import Assessment, assess
from lit_stability.diagnosis.catalogue import register_catalogue
from lit_stability.diagnosis.cause import (
    CAUSES,
    Cause,
    EvidenceRule,
    LikelyCause,
    RecommendedAction,
    RuledOut,
    diagnose,
    register_cause,
)
from lit_stability.diagnosis.context import DiagnosisContext
from lit_stability.diagnosis.decision_tree import Answer, decision_tree
from lit_stability.diagnosis.layer_causes import register_layer_cause, register_layer_causes
from lit_stability.diagnosis.loss_pattern import LossPattern, loss_pattern

__all__ = [
    "CAUSES",
    "Answer",
    "Assessment",
    "Cause",
    "DiagnosisContext",
    "EvidenceRule",
    "LikelyCause",
    "LossPattern",
    "RecommendedAction",
    "RuledOut",
    "assess",
    "decision_tree",
    "diagnose",
    "loss_pattern",
    "register_cause",
    "register_layer_cause",
]

register_catalogue()
register_layer_causes()
