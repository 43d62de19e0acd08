"""The decision tree: four questions to ask first when a run fails, with their answers.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_stability.diagnosis import evidence
from lit_stability.diagnosis.context import EARLY, DiagnosisContext


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of `decision_tree` with its answer, and what to do next."""

    question: str
    yes: bool
    lead: str
    """What to do next."""

    def text(self) -> str:
        """Returns question, answer and next action in one line."""
        return f"{self.question} {'yes' if self.yes else 'no'}: {self.lead}"


def decision_tree(context: DiagnosisContext) -> list[Answer]:
    """Answers the questions for which the context has the data, in their order.

    Args:
        context: what is known of the incident.

    >>> from lit_stability.detectors import Anomaly
    >>> spike = Anomaly(kind="loss spike", step=7, value=90.0, message="loss 90", signal="loss")
    >>> context = DiagnosisContext(anomaly=spike, precision="16-mixed", restorable=False)
    >>> for answer in decision_tree(context):
    ...     print(answer.text())
    within the first 1000 steps? yes: check initialisation and warm-up
    mixed precision? yes: check the loss scale and dtype conversions
    a good state to restore? no: restart with a lower learning rate and a tighter clip
    """
    answers = [
        _ask(
            f"within the first {EARLY} steps?",
            context.anomaly.step < EARLY,
            "check initialisation and warm-up",
            "continue",
        ),
        _ask(
            "mixed precision?",
            context.mixed,
            "check the loss scale and dtype conversions",
            "check for values outside the range of float32",
        ),
    ]
    if context.gradient_ratio is not None:
        answers.append(
            _ask(
                "abnormally large gradients?",
                evidence.ordinary_gradient(context) is None,
                "lower the learning rate or clip more tightly",
                "check the data and the loss function",
            )
        )
    if context.restorable is not None:
        answers.append(
            _ask(
                "a good state to restore?",
                context.restorable,
                "restore it, with other settings if the anomaly recurs",
                "restart with a lower learning rate and a tighter clip",
            )
        )
    return answers


def _ask(question: str, yes: bool, lead: str, otherwise: str) -> Answer:
    return Answer(question, yes, lead if yes else otherwise)
