"""Causes in the model.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.diagnosis import evidence as c
from lit_stability.diagnosis.cause import Cause
from lit_stability.diagnosis.context import DiagnosisContext


def _advice_without_gradient(context: DiagnosisContext) -> str:
    if context.stats is not None and context.stats.names:
        return (
            "look at the last operations before the loss: a clamp, a ReLU or a mask that is 0 "
            "for every sample, a saturated output, a factor of 0"
        )
    return (
        "look for what cuts the graph between weights and loss: detach(), .data, no_grad(), "
        "argmax, a loss made into a new tensor with requires_grad=True; or for a zero_grad() "
        "between backward and step"
    )


MODEL = (
    Cause(
        name="attention-logit growth",
        rules=(
            (10, c.kind("attention collapse")),
            (4, c.kind("attention-logit growth")),
            (2, c.reading("attention_logit", 1000.0, "attention logits of {value:.3g} in {where}")),
        ),
        remedy="normalise queries and keys (qk-norm), or lower the learning rate of their "
        "projections; clipping gradients does not help",
        ignore_when="if the entropy stays well above 0 and the logits no longer grow",
        recommended_action="stop",
    ),
    Cause(
        name="zeroed gain",
        rules=((8, c.zero_gain),),
        remedy="initialise the gain with 1 and let it train; with a gain of 0, no layer before it "
        "receives a gradient",
        ignore_when="if a schedule raises it later: use `Diagnosis(stop_on_certain_cause=False)`",
        recommended_action="stop",
    ),
    Cause(
        name="dead part of the model",
        rules=((4, c.kind("dead gradients")),),
        remedy="look for a weight that is all 0, inactive units, an unused branch, a detach() or a "
        "mask that is all 0, after the named layers",
        ignore_when="if that part is unused on purpose, such as the head of a later task",
    ),
    Cause(
        name="no gradient reaches the optimizer",
        rules=((8, c.both(c.kind("vanishing gradient"), c.without_gradient)),),
        remedy=_advice_without_gradient,
        ignore_when="never: nothing is learnt",
    ),
    Cause(
        name="vanishing gradient",
        rules=((6, c.kind("vanishing gradient")),),
        contradictions=(c.without_gradient,),
        remedy="check the gradient flow layer by layer; use norms before the sublayers, residual "
        "connections or a larger initialisation; in fp16 raise the loss scale",
        ignore_when="during warm-up, and after the loss has converged: small gradients are normal "
        "then; lower `Vanishing(bound=...)`",
    ),
    Cause(
        name="initialisation",
        rules=(
            (1, c.both(c.BROKEN, c.early)),
            (1, c.both(c.SPIKES, c.early)),
            (1, c.no_warmup),
            (4, c.both(c.BROKEN, c.no_step_yet)),
            (-2, c.JUMPS),
            (-8, c.transient),
        ),
        remedy="run `lit-stability check`; initialise so that the first loss is that of a guess, "
        "and warm up",
        ignore_when="if the loss decreases as expected",
    ),
    Cause(
        name="exploding gradient",
        rules=(
            (2, c.SPIKES),
            (1, c.large_gradient),
            (1, c.unclipped),
            (1, c.other_batches),
            (-2, c.despite_clipping),
            (-2, c.transient),
        ),
        contradictions=(c.ordinary_gradient,),
        remedy="set gradient_clip_val, or add AdaptiveGradientClipping; lower the learning rate if "
        "it recurs",
        ignore_when="if it was one step: it was skipped",
    ),
    Cause(
        name="recurrent gain too large",
        rules=((8, c.both(c.TROUBLE, c.steep_recurrence)), (-8, c.transient)),
        contradictions=(c.operation, c.constant),
        remedy="initialise the recurrent weights as an orthogonal matrix with a gain of 1, and set "
        "gradient_clip_val",
        ignore_when="if the loss decreases as expected",
        recommended_action="lower",
    ),
    Cause(
        name="layer out of its bounds",
        rules=((6, c.kind("layer bound")),),
        remedy="clip gradients, or raise the bound if the run is healthy",
        ignore_when="if the bound was a guess and the loss decreases",
    ),
)
