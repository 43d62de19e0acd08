"""Checks a model and its first batch before the first training step.

    subject = Subject(model, step=lambda model, batch: loss(model, batch), batch=batch)
    print(preflight(subject).text())

Checks are pure functions, grouped by topic into files; each threshold states its reason. In the
tests, each check also runs on healthy models, where it must find nothing. May import torch; does
not import Lightning.
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
