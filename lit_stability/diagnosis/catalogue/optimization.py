"""Causes in the learning rate and the optimizer.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.diagnosis import evidence as c
from lit_stability.diagnosis.cause import Cause

LEARNING_RATE = (
    Cause(
        name="learning rate too high",
        clues=(
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
        do="lower the learning rate by 2 to 10, warm up longer, or clip gradients",
        leave="if the loss swings and falls all the same: full-batch descent trains on the edge of "
        "stability",
        course="lower",
    ),
    Cause(
        name="learning rate jumped",
        clues=((8, c.kind("learning-rate jump")),),
        do="mend the scheduler: it wrote a learning rate far above any before",
        leave="if the jump is meant: raise `LearningRateJump(ratio=...)`",
    ),
    Cause(
        name="schedule of the learning rate",
        clues=((2, c.SWINGS), (3, c.rate_changed)),
        do="look at the scheduler's options and at `interval`: a schedule meant for epochs that is "
        "stepped by batch runs through in a moment",
        leave="if the changes are meant, such as warm restarts",
    ),
    Cause(
        name="no warm-up",
        clues=(
            (2, c.both(c.no_warmup, c.early)),
            (1, c.GROWS),
            (1, c.DIVERGES),
            (1, c.large_gradient),
            (4, c.kind("stalled layers")),
            (-8, c.kind("learning-rate jump", "optimizer state", "rank disagreement")),
        ),
        do="warm up over some hundred steps (post-norm Transformers with Adam do not train "
        "without), or put the norms first",
        leave="if the loss falls as it should",
    ),
    Cause(
        name="learning rate too low",
        clues=((8, c.both(c.kind("no learning"), c.signal("weight_path"))),),
        do="raise the learning rate tenfold; look whether it is meant to be divided twice, by a "
        "scheduler and by hand",
        leave="while the learning rate warms up",
    ),
)

OPTIMIZER = (
    Cause(
        name="optimizer state damaged",
        clues=((8, c.kind("optimizer state")), (3, c.kind("update spike")), (2, c.SWINGS)),
        do="find what writes to the optimizer's moments (a hook, a partly loaded checkpoint), or "
        "suspect memory",
        leave="never, if it returns",
    ),
    Cause(
        name="stale second moment",
        clues=((6, c.kind("stale second moment")), (3, c.stale_moments), (1, c.large_update)),
        do="lower Adam's beta2 (0.95 is usual for language models, 0.9 on a full batch), raise its "
        "epsilon, or clip updates",
        leave="if the data or the scale of the loss changed once, and it passes within "
        "1 / (1 - beta2) steps",
    ),
    Cause(
        name="momentum too high",
        clues=((2, c.both(c.GROWS, c.high_momentum)), (2, c.both(c.SWINGS, c.high_momentum))),
        do="lower the momentum to 0.9, or the learning rate by as much as 1 - momentum rises",
        leave="if the loss comes back by itself",
    ),
    Cause(
        name="gradients added up and not averaged",
        clues=((2, c.both(c.GROWS, c.accumulates)),),
        do="divide the loss by the number of accumulated batches; Lightning does it in automatic "
        "optimization, in manual optimization it is yours to do",
        leave="if the learning rate was chosen for the sum",
    ),
)
