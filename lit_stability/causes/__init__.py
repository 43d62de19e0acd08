"""Named causes: what a detector's finding comes from, what to try, and when to leave it alone.

`diagnose` weighs every row of one registry against a `Scene`; `register_cause` and
`register_layer_cause` add rows of your own. No file of this folder imports torch or Lightning.
"""

from lit_stability.causes.by_layer import register_layer_cause, register_layer_causes
from lit_stability.causes.catalogue import register_catalogue
from lit_stability.causes.cause import (
    CAUSES,
    Cause,
    Clue,
    Course,
    Hypothesis,
    diagnose,
    register_cause,
)
from lit_stability.causes.decision_tree import Answer, decision_tree
from lit_stability.causes.pattern import LossPattern, loss_pattern
from lit_stability.causes.scene import Scene

__all__ = [
    "CAUSES",
    "Answer",
    "Cause",
    "Clue",
    "Course",
    "Hypothesis",
    "LossPattern",
    "Scene",
    "decision_tree",
    "diagnose",
    "loss_pattern",
    "register_cause",
    "register_layer_cause",
]

register_catalogue()
register_layer_causes()
