"""Checks before the first step, as pure functions over a model and its first batch.

    subject = Subject(model, step=lambda model, batch: loss(model, batch), batch=batch)
    print(preflight(subject).text())

Each check is in the file of its family, with the reason of each threshold beside it; each has a
healthy twin in the tests on which it is silent. May import torch; knows no Lightning.
"""

from lit_stability.checks.finding import Finding, Severity
from lit_stability.checks.preflight.checklist import Expectations, preflight
from lit_stability.checks.preflight.masks import MaskProbe, nudged
from lit_stability.checks.preflight.memorise import Memorise
from lit_stability.checks.preflight.positions import PositionProbe
from lit_stability.checks.preflight.report import (
    DeclarationError,
    NotApplicableError,
    PreflightError,
    Report,
)
from lit_stability.checks.preflight.subject import StepError, Subject, rehearsing

__all__ = [
    "DeclarationError",
    "Expectations",
    "Finding",
    "MaskProbe",
    "Memorise",
    "NotApplicableError",
    "PositionProbe",
    "PreflightError",
    "Report",
    "Severity",
    "StepError",
    "Subject",
    "nudged",
    "preflight",
    "rehearsing",
]
