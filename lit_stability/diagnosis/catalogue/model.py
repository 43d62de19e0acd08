"""Causes in the model.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.diagnosis import evidence as c
from lit_stability.diagnosis.cause import Cause

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
        ignore_when="while entropy stays well above 0 and the logits no longer grow",
        recommended_action="stop",
    ),
    Cause(
        name="zeroed gain",
        rules=((8, c.zero_gain),),
        remedy="initialise the gain with 1 and let it train; nothing before it gets a gradient as "
        "it is",
        ignore_when="if a schedule is to open it later: `Diagnosis(stop=False)`",
        recommended_action="stop",
    ),
    Cause(
        name="dead part of the model",
        rules=((4, c.kind("dead gradients")),),
        remedy="look for a weight that is all 0, units that never fire, a branch that is not used, "
        "a detach() or a mask that is all zero, behind the layers named",
        ignore_when="if that part is meant to rest, such as the head of a task that comes later",
    ),
    Cause(
        name="vanishing gradient",
        rules=((6, c.kind("vanishing gradient")),),
        remedy="look at the gradient flow layer by layer; norms before the sublayers, residual "
        "connections and a larger initialisation keep it alive; in fp16 raise the loss scale",
        ignore_when="during warm-up, and when the loss has converged: small gradients are due "
        "then; lower `Vanishing(bound=...)`",
    ),
    Cause(
        name="initialisation",
        rules=(
            (1, c.both(c.BROKEN, c.early)),
            (1, c.both(c.SPIKES, c.early)),
            (1, c.no_warmup),
            (-2, c.JUMPS),
            (-8, c.transient),
        ),
        remedy="run `lit-stability check`; initialise so that the first loss is that of a guess, "
        "and warm up",
        ignore_when="if the loss falls as it should",
    ),
    Cause(
        name="exploding gradient",
        rules=(
            (2, c.SPIKES),
            (1, c.large_gradient),
            (1, c.unclipped),
            (1, c.other_batches),
            (-2, c.transient),
        ),
        remedy="set gradient_clip_val, or add AdaptiveGradientClipping; lower the learning rate if "
        "it returns",
        ignore_when="if it was one step: it was not taken",
    ),
    Cause(
        name="layer out of its bounds",
        rules=((6, c.kind("layer bound")),),
        remedy="clip gradients, or raise the bound if the run is healthy",
        ignore_when="if the bound was a guess and the loss falls",
    ),
)
