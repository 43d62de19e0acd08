"""The four questions that are asked first of a run that breaks, with their answers.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_stability.diagnosis import evidence
from lit_stability.diagnosis.context import EARLY, DiagnosisContext


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of `decision_tree`, what the scene answers, and where that leads.

    `text` is all of it in one line, as a report has it.
    """

    question: str
    yes: bool
    lead: str

    def text(self) -> str:
        """One line."""
        return f"{self.question} {'yes' if self.yes else 'no'}: {self.lead}"


def decision_tree(context: DiagnosisContext) -> list[Answer]:
    """Answers the questions that the context has an answer to, in their order.

    Args:
        context: what is known of the incident.

    >>> from lit_stability.detectors import Anomaly
    >>> spike = Anomaly(kind="loss spike", step=7, value=90.0, message="loss 90", signal="loss")
    >>> context = DiagnosisContext(anomaly=spike, precision="16-mixed", restorable=False)
    >>> for answer in decision_tree(context):
    ...     print(answer.text())
    within the first 1000 steps? yes: check initialisation and warm-up
    mixed precision? yes: check the loss scale and conversions of dtype
    a good state to go back to? no: start anew with a lower learning rate and a tighter clip
    """
    answers = [
        _ask(
            f"within the first {EARLY} steps?",
            context.anomaly.step < EARLY,
            "check initialisation and warm-up",
            "go on",
        ),
        _ask(
            "mixed precision?",
            context.mixed,
            "check the loss scale and conversions of dtype",
            "check for numbers beyond float32",
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
                "a good state to go back to?",
                context.restorable,
                "go back to it, with other settings if it returns",
                "start anew with a lower learning rate and a tighter clip",
            )
        )
    return answers


def _ask(question: str, yes: bool, lead: str, otherwise: str) -> Answer:
    return Answer(question, yes, lead if yes else otherwise)
