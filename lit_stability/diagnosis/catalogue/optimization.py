"""Causes in the learning rate and the optimizer.

Imports neither torch nor Lightning.
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
                    " times what the learning rate allows",
                ),
            ),
            (3, c.other_batches),
            (2, c.despite_clipping),
            (4, c.stalled_after_warmup),
            (-3, c.unscaled),
            (-4, c.steep_recurrence),
            (-4, c.transient),
            (-4, c.kind("learning-rate jump", "optimizer state", "rank disagreement")),
        ),
        contradictions=(c.no_step_yet, c.ordinary_loss, c.sudden_nan, c.line_search_on_noise),
        remedy="lower the learning rate by 2 to 10, warm up longer, or clip gradients",
        ignore_when="if the loss oscillates and still decreases: full-batch descent trains at the "
        "edge of stability",
        recommended_action="lower",
    ),
    Cause(
        name="learning rate jumped",
        rules=((8, c.kind("learning-rate jump")),),
        remedy="fix the scheduler: it set a learning rate far above all earlier ones",
        ignore_when="if the jump is intended: raise `LearningRateJump(ratio=...)`",
    ),
    Cause(
        name="schedule of the learning rate",
        rules=((2, c.SWINGS), (3, c.rate_changed)),
        remedy="check the scheduler's options and `interval`: a schedule for epochs that is "
        "stepped every batch ends much too early",
        ignore_when="if the changes are intended, such as warm restarts",
    ),
    Cause(
        name="no warm-up",
        rules=(
            (2, c.both(c.no_warmup, c.early)),
            (1, c.GROWS),
            (1, c.DIVERGES),
            (1, c.large_gradient),
            (4, c.both(c.kind("stalled layers"), c.no_warmup)),
            (-8, c.kind("learning-rate jump", "optimizer state", "rank disagreement")),
        ),
        contradictions=(c.no_step_yet, c.needs_no_warmup),
        remedy="warm up over a few hundred steps (post-norm Transformers with Adam do not train "
        "without warm-up), or use pre-norm layers",
        ignore_when="if the loss decreases as expected",
    ),
)

OPTIMIZER = (
    Cause(
        name="optimizer state damaged",
        rules=((8, c.kind("optimizer state")), (3, c.kind("update spike")), (2, c.SWINGS)),
        contradictions=(c.no_moments,),
        remedy="find what writes to the optimizer's moments (a hook, a partly loaded checkpoint), "
        "or check the memory",
        ignore_when="never, if it recurs",
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
        name="LBFGS on mini-batches",
        rules=((8, c.both(c.TROUBLE, c.line_search_on_noise)), (-8, c.transient)),
        remedy="train LBFGS on the whole data in one batch, with line_search_fn='strong_wolfe', or "
        "use Adam on mini-batches",
        ignore_when="never: its estimate of the curvature assumes the same function in each step",
    ),
    Cause(
        name="momentum too high",
        rules=((2, c.both(c.GROWS, c.high_momentum)), (2, c.both(c.SWINGS, c.high_momentum))),
        remedy="lower the momentum to 0.9, or divide the learning rate by 0.1 / (1 - momentum)",
        ignore_when="if the loss recovers by itself",
    ),
    Cause(
        name="gradients added up and not averaged",
        rules=((2, c.both(c.GROWS, c.accumulates)),),
        remedy="divide the loss by the number of accumulated batches; Lightning does it in "
        "automatic optimization only",
        ignore_when="if the learning rate was chosen for the sum",
    ),
)
