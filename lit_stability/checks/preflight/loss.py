"""Compares the first loss with that of a random guess, and finds causes of non-finite losses.

An untrained classifier of V classes guesses: its cross entropy is ln V, and logits with standard
deviation s add s^2/2 to it. K + 1 binary terms start at (K + 1) ln 2. A first loss far above means
that the head is badly scaled; far below, that the target leaks into the input, or that the model
is pretrained. Imports torch indirectly; does not import Lightning.
"""

from __future__ import annotations

import math

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.comparisons import Comparison
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import NotApplicableError

HIGH_FACTOR, HIGH_NATS = 1.5, 1.0
"""Above 1.5 times the guess plus 1 nat, the standard deviation of the logits exceeds sqrt(2), which
no common initialisation causes."""
ABSURD_FACTOR = 10.0
"""Above 10 times the guess the softmax is saturated: a few outliers dominate the gradients."""
_FAR = 10.0
"""Rms of the first errors, in units of the rms of the labels or of 1, above which they are out of
scale: a hundred times in squares."""
LOW_FACTOR = 0.5
"""Below half the guess, the model knows more than the class frequencies of most label sets."""
_LARGE_SUM = 1000.0
"""Nats above which users may mistake a sum of many terms for an explosion."""
_SIGMAS, _SPREAD = 4.0, 1.0
"""Tolerated deviation of the batch mean in standard errors, and standard deviation of the loss per
target in nats, as for logits of variance 1. A larger one is what the check looks for."""


def check_finite(seen: Observation) -> list[Finding]:
    """Finds a loss, a module's output or a gradient that is not finite in the first step."""
    findings = []
    if not math.isfinite(seen.loss):
        findings.append(
            Finding(
                check="initial loss",
                severity="error",
                what=f"the first loss is {seen.loss}",
                where=tuple(name for name, out in seen.outputs.items() if not out.finite)[:1],
                why="every gradient is NaN too, and clipping does not remove NaN",
                remedy="check the module named (the first whose output is not finite) and the "
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
                why="one step writes NaN into these weights; clipping does not remove NaN",
                remedy="look for sqrt, log, norm or a division at 0, also inside of a torch.where",
            )
        )
    return findings


def check_operations(seen: Observation) -> list[Finding]:
    """Finds logarithms of 0, fully masked softmaxes, norms without variance, inverted masks."""
    non_finite = not math.isfinite(seen.loss) or any(
        g is not None and not math.isfinite(g) for g in seen.gradients.values()
    )
    findings: dict[tuple[str, str], Finding] = {}
    for fault in seen.watch.faults:
        why, remedy, severe = _OPERATIONS[fault.operation]
        what = f"{fault.operation}, {fault.elements} of {fault.total}"
        findings[fault.operation, fault.module] = Finding(
            check="operations",
            severity="error" if non_finite or severe else "warning",
            what=what,
            where=(fault.module or "training_step",),
            why=why,
            remedy=remedy,
        )
    return list(findings.values())


_OPERATIONS = {
    "log of 0 or less": (
        "its value and gradient are infinite or NaN, even where torch.where discards the value",
        "clamp the argument from below, or use log_softmax, logsigmoid, logsumexp, log1p",
        False,
    ),
    "softmax of a row that is all -inf": (
        "it is NaN, forward and backward, and makes the loss of the whole batch NaN",
        "let this query attend to a position and zero its output; check which rows are all masked",
        False,
    ),
    "attention of a query that may attend to nothing": (
        "its output is NaN or arbitrary, depending on the kernel",
        "in scaled_dot_product_attention True means 'may attend': pass ~mask if yours means the "
        "opposite; otherwise look for empty rows in the batch",
        False,
    ),
    "attention mask that opens the future only": (
        "a position sees exactly what it must predict, but not itself: the mask is inverted",
        "pass ~mask: in scaled_dot_product_attention True means 'may attend'",
        True,
    ),
    "layer norm of rows without variance": (
        "its output is its bias for every input, and its gradient is of the order of 1/sqrt(eps)",
        "look for a module before it with a constant output, or for an input of zeros",
        False,
    ),
}


def check_comparisons(seen: Observation) -> list[Finding]:
    """Finds outputs that are compared with the labels of others, or are far larger than labels.

    Raises:
        NotApplicableError: If the step compares no outputs with labels that the check can see.
    """
    compared = seen.watch.comparisons.compared
    if not compared:
        raise NotApplicableError("the step compares no outputs with labels of the same kind")
    spread = [c for c in compared if c.is_spread]
    # Outputs of common initialisations are of the order of 1, whatever the labels are.
    large = [c for c in compared if c.error_rms > _FAR * max(c.label_rms, 1.0)]
    return [_spread(c) for c in spread[:1]] + [_far(c) for c in large[:1]]


def _spread(call: Comparison) -> Finding:
    return Finding(
        check="comparisons",
        severity="error",
        what=f"{call.operation} of outputs {list(call.output)} and labels {list(call.label)} "
        "compares each output with each label",
        where=(call.head,) if call.head else (),
        why="the loss is least where all outputs are equal, and stays at the variance of the "
        "labels",
        remedy="give both the same shape: squeeze(-1) the outputs, or unsqueeze(-1) the labels",
    )


def _far(call: Comparison) -> Finding:
    return Finding(
        check="comparisons",
        severity="error",
        what=f"the first outputs miss the labels by {call.error_rms:.4g} (rms); the rms of the "
        f"labels is {call.label_rms:.4g}",
        where=(call.head,) if call.head else (),
        why="the first steps only undo the initialisation, or diverge",
        remedy="initialise the named head small (Xavier with gain 0.1); look for a gain above 1 in "
        "recurrent layers, and for inputs that are not normalised",
    )


def check_probabilities(seen: Observation) -> list[Finding]:
    """Finds probabilities that are given to a loss of logits, or of logarithms."""
    return [
        Finding(
            check="probabilities",
            severity="error",
            what=f"{call.loss} is given probabilities",
            where=(call.head,) if call.head else (),
            why="the softmax or logarithm is taken a second time, or not at all: the loss cannot "
            "come near 0, and gradients are small",
            remedy="give a cross entropy the logits, without softmax or sigmoid; nll_loss and "
            "kl_div need log_softmax",
        )
        for call in dict.fromkeys(seen.watch.comparisons.probabilities)
    ]


def check_initial_loss(
    seen: Observation,
    *,
    classes: int | None = None,
    one_vs_rest: int | None = None,
    pretrained: bool = False,
) -> list[Finding]:
    """Compares the first loss with that of a random guess.

    With `classes` or `one_vs_rest` the loss that the step returns is compared. Otherwise the mean
    of each cross entropy and binary cross entropy that the step calls is compared, however the
    step weights it.

    Args:
        seen: The first pass.
        classes: Number of classes V of any cross entropy; the expected loss is ln V nats.
        one_vs_rest: Number of summed binary terms, K + 1; the expected loss is (K + 1) ln 2 nats.
        pretrained: Whether the head is pretrained, so that a low loss is accepted.

    Raises:
        NotApplicableError: If the expected loss is unknown.

    >>> seen = Observation(loss=2.35)
    >>> check_initial_loss(seen, classes=10)
    []
    >>> [f.severity for f in check_initial_loss(Observation(loss=9e5), one_vs_rest=10)]
    ['error']
    """
    if classes is not None:
        findings = _judge("the loss", seen.loss, math.log(classes), f"ln {classes}")
    elif one_vs_rest is not None:
        expected = one_vs_rest * math.log(2)
        findings = _judge("the loss", seen.loss, expected, f"{one_vs_rest} ln 2")
        if not findings and expected >= _LARGE_SUM and math.isfinite(seen.loss):
            findings = [_no_explosion(seen.loss, one_vs_rest, expected)]
    else:
        findings = _judge_calls(seen)
    return [f for f in findings if not (pretrained and f.why.startswith(_BETTER))]


def _compared(name: str, loss: float, formula: str, guess: float) -> str:
    return (
        f"{name} is {loss:.4g} nats before the first step; that of a guess is {formula} = "
        f"{guess:.4g}"
    )


def _no_explosion(loss: float, terms: int, expected: float) -> Finding:
    return Finding(
        check="initial loss",
        severity="note",
        what=_compared("the loss", loss, f"{terms} ln 2", expected),
        why="this large value is the sum of that many terms for a guess; no gradient explodes",
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
        where = call.module or call.head
        findings += _judge(name, call.mean, guess, f"ln {call.classes}", slack, where)
    return findings


_BETTER = "better than a guess"


def _judge(
    name: str, loss: float, guess: float, formula: str, slack: float = 0.0, where: str = ""
) -> list[Finding]:
    """Compares one loss; `check_finite` reports losses that are not finite."""
    what = _compared(name, loss, formula, guess)
    modules = (where,) if where else ()
    if loss > HIGH_FACTOR * guess + HIGH_NATS + slack and math.isfinite(loss):
        return [
            Finding(
                check="initial loss",
                severity="error" if loss > ABSURD_FACTOR * guess + slack else "warning",
                what=what,
                where=modules,
                why="worse than a guess: the head makes confident wrong predictions, and the first "
                "steps only undo them, or diverge",
                remedy="initialise the head small (Xavier with gain 0.1), check the scale of its "
                "inputs, and the labels",
            )
        ]
    if loss < LOW_FACTOR * guess - slack:
        return [
            Finding(
                check="initial loss",
                severity="warning",
                what=what,
                where=modules,
                why=f"{_BETTER}: the target leaks into the inputs (causal mask missing, labels not "
                "shifted, label among the inputs), or all labels are of one class",
                remedy="declare mask probes; if the weights are pretrained, set "
                "Preflight(pretrained=True)",
            )
        ]
    return []
