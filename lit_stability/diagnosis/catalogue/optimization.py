"""Causes in the learning rate and the optimizer.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.diagnosis import evidence as c
from lit_stability.diagnosis.cause import Cause

LEARNING_RATE = (
    Cause(
        name="learning rate too high",
        rules=(
            (3, c.GROWS),
            (2, c.SWINGS),
            (2, c.DIVERGES),
            (2, c.kind("curvature beyond the edge")),
            (1, c.large_update),
            (1, c.large_gradient),
            (1, c.warming_up),
            (
                2,
                c.reading(
                    "curvature_ratio",
                    1.0,
                    "the curvature along the gradient is {value:.3g}"
                    " times what the learning rate bears",
                ),
            ),
            (4, c.other_batches),
            (-4, c.transient),
            (-4, c.kind("learning-rate jump", "optimizer state", "rank disagreement")),
        ),
        remedy="lower the learning rate by 2 to 10, warm up longer, or clip gradients",
        ignore_when="if the loss swings and falls all the same: full-batch descent trains on the "
        "edge of stability",
        recommended_action="lower",
    ),
    Cause(
        name="learning rate jumped",
        rules=((8, c.kind("learning-rate jump")),),
        remedy="mend the scheduler: it wrote a learning rate far above any before",
        ignore_when="if the jump is meant: raise `LearningRateJump(ratio=...)`",
    ),
    Cause(
        name="schedule of the learning rate",
        rules=((2, c.SWINGS), (3, c.rate_changed)),
        remedy="look at the scheduler's options and at `interval`: a schedule meant for epochs "
        "that is stepped by batch runs through in a moment",
        ignore_when="if the changes are meant, such as warm restarts",
    ),
    Cause(
        name="no warm-up",
        rules=(
            (2, c.both(c.no_warmup, c.early)),
            (1, c.GROWS),
            (1, c.DIVERGES),
            (1, c.large_gradient),
            (4, c.kind("stalled layers")),
            (-8, c.kind("learning-rate jump", "optimizer state", "rank disagreement")),
        ),
        remedy="warm up over some hundred steps (post-norm Transformers with Adam do not train "
        "without), or put the norms first",
        ignore_when="if the loss falls as it should",
    ),
)

OPTIMIZER = (
    Cause(
        name="optimizer state damaged",
        rules=((8, c.kind("optimizer state")), (3, c.kind("update spike")), (2, c.SWINGS)),
        remedy="find what writes to the optimizer's moments (a hook, a partly loaded checkpoint), "
        "or suspect memory",
        ignore_when="never, if it returns",
    ),
    Cause(
        name="stale second moment",
        rules=((3, c.stale_moments), (1, c.large_update)),
        remedy="lower Adam's beta2 (0.95 is usual for language models, 0.9 on a full batch), raise "
        "its epsilon, or clip updates",
        ignore_when="if the data or the scale of the loss changed once, and it passes within "
        "1 / (1 - beta2) steps",
    ),
    Cause(
        name="momentum too high",
        rules=((2, c.both(c.GROWS, c.high_momentum)), (2, c.both(c.SWINGS, c.high_momentum))),
        remedy="lower the momentum to 0.9, or the learning rate by as much as 1 - momentum rises",
        ignore_when="if the loss comes back by itself",
    ),
    Cause(
        name="gradients added up and not averaged",
        rules=((2, c.both(c.GROWS, c.accumulates)),),
        remedy="divide the loss by the number of accumulated batches; Lightning does it in "
        "automatic optimization, in manual optimization it is yours to do",
        ignore_when="if the learning rate was chosen for the sum",
    ),
)
