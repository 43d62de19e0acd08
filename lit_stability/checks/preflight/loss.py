"""The first loss against the loss of a guess, and what can make it infinite.

Untrained, a classifier of V classes guesses: its cross entropy is ln V, and logits that spread by
s about their mean add s^2/2 to it. K + 1 binary terms begin at (K + 1) ln 2. A first loss far above
says that the head is badly scaled; far below, that the answer can be seen, or that the model was
trained before. May import torch through its neighbours; knows no Lightning.
"""

from __future__ import annotations

import math

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import NotApplicableError

HIGH_FACTOR, HIGH_NATS = 1.5, 1.0
"""Above 1.5 times the guess and 1 nat more, the logits spread by more than sqrt(2), as no common
initialisation lets them."""
ABSURD_FACTOR = 10.0
"""Above 10 times the guess the softmax is saturated: most gradients are those of a few outliers."""
LOW_FACTOR = 0.5
"""Below half the guess more is known than the frequencies of most label sets tell."""
_STARTLING = 1000.0
"""Nats from which on a sum of many terms is taken for an explosion."""
_SIGMAS, _SPREAD = 4.0, 1.0
"""Standard errors by which the mean over the batch may miss by chance, and the standard deviation
of a target's loss, nats: that of logits of variance 1. What spreads by more is the fault itself."""


def check_finite(seen: Observation) -> list[Finding]:
    """A loss, a module's output or a gradient that is not finite at the first step."""
    findings = []
    if not math.isfinite(seen.loss):
        findings.append(
            Finding(
                check="initial loss",
                severity="error",
                what=f"the first loss is {seen.loss}",
                where=tuple(name for name, out in seen.outputs.items() if not out.finite)[:1],
                why="every gradient is NaN with it, and no clipping mends a NaN",
                remedy="look at the module named (the first whose output is not finite) and the "
                "batch",
            )
        )
    bad = tuple(n for n, g in seen.gradients.items() if g is not None and not math.isfinite(g))
    if bad and not findings:
        findings.append(
            Finding(
                check="initial loss",
                severity="error",
                what=f"the loss is finite, the gradients of {len(bad)} parameters are not",
                where=bad,
                why="one step writes NaN into these weights; no clipping mends a NaN",
                remedy="look for sqrt, log, norm or a division at 0, also behind a torch.where",
            )
        )
    return findings


def check_operations(seen: Observation) -> list[Finding]:
    """Logarithms of 0, softmaxes over nothing, norms without variance, inverted causal masks."""
    harmed = not math.isfinite(seen.loss) or any(
        g is not None and not math.isfinite(g) for g in seen.gradients.values()
    )
    findings: dict[tuple[str, str], Finding] = {}
    for fault in seen.watch.faults:
        why, remedy, severe = _OPERATIONS[fault.operation]
        what = f"{fault.operation}, {fault.elements} of {fault.total}"
        findings[fault.operation, fault.module] = Finding(
            check="operations",
            severity="error" if harmed or severe else "warning",
            what=what,
            where=(fault.module or "training_step",),
            why=why,
            remedy=remedy,
        )
    return list(findings.values())


_OPERATIONS = {
    "log of 0 or less": (
        "it is -inf or NaN, and its gradient too, even where torch.where discards the value",
        "clamp the argument from below, or use log_softmax, logsigmoid, logsumexp, log1p",
        False,
    ),
    "softmax of a row that is all -inf": (
        "it is NaN, forward and backward, and poisons the whole batch",
        "let such a query attend to something and zero its output; see which rows are all masked",
        False,
    ),
    "attention of a query that may attend to nothing": (
        "its output is NaN or arbitrary, depending on the kernel",
        "in scaled_dot_product_attention True means 'may attend': pass ~mask if yours means the "
        "opposite; else look for empty rows in the batch",
        False,
    ),
    "attention mask that opens the future only": (
        "a position sees exactly what it must predict, and not itself: the mask is inverted",
        "pass ~mask: in scaled_dot_product_attention True means 'may attend'",
        True,
    ),
    "layer norm of rows without variance": (
        "its output is its bias whatever comes in, and its gradient is of the order of 1/sqrt(eps)",
        "look for a module before it that is constant, or for an input of zeros",
        False,
    ),
}


def check_initial_loss(
    seen: Observation,
    *,
    classes: int | None = None,
    one_vs_rest: int | None = None,
    pretrained: bool = False,
) -> list[Finding]:
    """Compare the first loss with that of a guess.

    Without options each cross entropy and binary cross entropy that the step calls is compared by
    its own mean, whatever the step makes of it; with one, the loss that the step returns is.

    Args:
        seen: the first pass.
        classes: V, of a cross entropy written in any way: ln V nats are expected.
        one_vs_rest: K + 1, binary terms that are summed: (K + 1) ln 2 nats are expected.
        pretrained: the head has been trained, so a low loss is welcome.

    Raises:
        NotApplicableError: there is no formula for the loss.

    >>> seen = Observation(loss=2.35)
    >>> check_initial_loss(seen, classes=10)
    []
    >>> [f.severity for f in check_initial_loss(Observation(loss=9e5), one_vs_rest=10)]
    ['error']
    """
    if classes is not None:
        found = _judge("the loss", seen.loss, math.log(classes), f"ln {classes}")
    elif one_vs_rest is not None:
        expected = one_vs_rest * math.log(2)
        found = _judge("the loss", seen.loss, expected, f"{one_vs_rest} ln 2")
        if not found and expected >= _STARTLING and math.isfinite(seen.loss):
            found = [_no_explosion(seen.loss, one_vs_rest, expected)]
    else:
        found = _judge_calls(seen)
    return [each for each in found if not (pretrained and each.why.startswith("better"))]


def _beside_a_guess(name: str, loss: float, formula: str, guess: float) -> str:
    return (
        f"{name} is {loss:.4g} nats before the first step, and a guess has {formula} = {guess:.4g}"
    )


def _no_explosion(loss: float, terms: int, expected: float) -> Finding:
    return Finding(
        check="initial loss",
        severity="note",
        what=_beside_a_guess("the loss", loss, f"{terms} ln 2", expected),
        why="it is a sum of that many terms, and what knowing nothing costs; no gradient explodes",
        remedy="nothing; divide by the number of terms to compare it with other losses",
    )


def _judge_calls(seen: Observation) -> list[Finding]:
    calls = [call for call in seen.watch.losses if call.targets and call.classes > 1]
    if not calls:
        raise NotApplicableError("no classification loss was called; give classes= or one_vs_rest=")
    findings: list[Finding] = []
    for call in calls:
        slack = _SIGMAS * _SPREAD / math.sqrt(call.targets)
        name = f"the {call.kind} of {call.targets} targets"
        guess = math.log(call.classes)
        findings += _judge(name, call.mean, guess, f"ln {call.classes}", slack, call.module)
    return findings


def _judge(
    name: str, loss: float, guess: float, formula: str, slack: float = 0.0, where: str = ""
) -> list[Finding]:
    """Compare; a loss that is not finite is another check's."""
    told = _beside_a_guess(name, loss, formula, guess)
    places = (where,) if where else ()
    if loss > HIGH_FACTOR * guess + HIGH_NATS + slack and math.isfinite(loss):
        return [
            Finding(
                check="initial loss",
                severity="error" if loss > ABSURD_FACTOR * guess + slack else "warning",
                what=told,
                where=places,
                why="worse than a guess: the head gives large and confident answers that are "
                "wrong, and the first steps are spent, or lost, on taking them back",
                remedy="initialise the head small (Xavier with gain 0.1), look at the scale of "
                "what "
                "it is fed, and at the labels",
            )
        ]
    if loss < LOW_FACTOR * guess - slack:
        return [
            Finding(
                check="initial loss",
                severity="warning",
                what=told,
                where=places,
                why="better than a guess: the target can be seen (a causal mask missing, labels "
                "not shifted, a label among the inputs), or the labels are of one class",
                remedy="declare mask probes; if the weights are trained already, say so with "
                "Preflight(pretrained=True)",
            )
        ]
    return []
