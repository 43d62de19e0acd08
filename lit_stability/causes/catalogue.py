"""The causes that are known: one row each, with its clues, what to try, and when to leave it alone.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.causes import clues as c
from lit_stability.causes.cause import Cause, register_cause
from lit_stability.causes.scene import Scene

GROWS = c.pattern("exponential growth")
SWINGS = c.pattern("oscillating divergence")
JUMPS = c.pattern("sudden jump")
_BROKEN = c.kind("non-finite loss", "non-finite gradient", "non-finite weight")
_DIVERGES = c.kind("divergence", "oscillation", "predicted divergence")
_SPIKES = c.kind("gradient spike", "loss spike")


def _as_the_origin_says(scene: Scene) -> str:
    return str(scene.origin.advice) if scene.origin else "look at the operation that is named"


DATA = (
    Cause(
        name="bad batch",
        clues=(
            (8, c.bad_input),
            (2, _BROKEN),
            (2, _SPIKES),
            (2, JUMPS),
            (2, c.deterministic),
            (-2, GROWS),
            (-4, c.transient),
            (-4, c.operation),
            (-4, c.overflow),
            (-6, c.other_batches),
        ),
        do="look at the batch in the incident's folder: values and labels out of range, empty or "
        "overlong samples; mend it where it is loaded",
        leave="if it is one of thousands: it was left out of the run",
    ),
    Cause(
        name="batches too different from each other",
        clues=((2, SWINGS), (1, c.ordinary_gradient)),
        do="shuffle, sort no longer by length or source, make batches larger, or pad dynamically "
        "with an attention mask",
        leave="if the swings come with a change of the data that is meant, such as a curriculum",
    ),
    Cause(
        name="loss or labels",
        clues=((1, c.kind("non-finite loss", "loss spike")), (1, c.ordinary_gradient)),
        do="look at the loss function for log(0), division by a count of zero and labels out of "
        "range",
        leave="never, if it returns",
    ),
)

NUMERICS = (
    Cause(
        name="operation outside its domain",
        clues=((8, c.operation),),
        do=_as_the_origin_says,
        leave="never: the next such batch does it again",
    ),
    Cause(
        name="numeric precision",
        clues=(
            (8, c.overflow),
            (6, c.kind("loss-scale collapse")),
            (4, c.kind("loss-scale fall")),
            (2, c.both(_BROKEN, c.mixed_precision)),
            (-4, c.transient),
        ),
        do="use bf16 or 32-bit precision, or compute the module that is named in float32 "
        "(PrecisionFallback does either); bring inputs and targets to about 1",
        leave="during the first steps in fp16: the loss scaler looks for its scale by overflowing",
    ),
    Cause(
        name="loss computed in 16 bits",
        clues=((8, c.kind("infinite loss")),),
        do="compute the loss in float32: cast outputs and targets before it, or scale the targets",
        leave="never: the loss tells nothing while it is infinite",
    ),
    Cause(
        name="updates lost to rounding",
        clues=((8, c.kind("lost updates")),),
        do="train in bf16-mixed, which keeps float32 weights, or raise the learning rate",
        leave="at the end of a decay of the learning rate",
    ),
)

LEARNING_RATE = (
    Cause(
        name="learning rate too high",
        clues=(
            (3, GROWS),
            (2, SWINGS),
            (2, _DIVERGES),
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
        clues=((2, SWINGS), (3, c.rate_changed)),
        do="look at the scheduler's options and at `interval`: a schedule meant for epochs that is "
        "stepped by batch runs through in a moment",
        leave="if the changes are meant, such as warm restarts",
    ),
    Cause(
        name="no warm-up",
        clues=(
            (2, c.both(c.no_warmup, c.early)),
            (1, GROWS),
            (1, _DIVERGES),
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
        clues=((8, c.kind("optimizer state")), (3, c.kind("update spike")), (2, SWINGS)),
        do="find what writes to the optimizer's moments (a hook, a partly loaded checkpoint), or "
        "suspect memory",
        leave="never, if it returns",
    ),
    Cause(
        name="stale second moment",
        clues=((6, c.kind("stale moments")), (1, c.large_update)),
        do="lower Adam's beta2 (0.95 is usual for language models), raise its epsilon, or clip "
        "updates",
        leave="if the loss comes back by itself within some ten steps",
    ),
    Cause(
        name="momentum too high",
        clues=((2, c.both(GROWS, c.high_momentum)), (2, c.both(SWINGS, c.high_momentum))),
        do="lower the momentum to 0.9, or the learning rate by as much as 1 - momentum rises",
        leave="if the loss comes back by itself",
    ),
    Cause(
        name="gradients added up and not averaged",
        clues=((2, c.both(GROWS, c.accumulates)),),
        do="divide the loss by the number of accumulated batches; Lightning does it in automatic "
        "optimization, in manual optimization it is yours to do",
        leave="if the learning rate was chosen for the sum",
    ),
)

MODEL = (
    Cause(
        name="attention-logit growth",
        clues=(
            (10, c.kind("attention collapse")),
            (6, c.kind("attention logits")),
            (2, c.reading("attention_logit", 1000.0, "attention logits of {value:.3g} in {where}")),
        ),
        do="normalise queries and keys (qk-norm), or lower the learning rate of their projections; "
        "clipping gradients does not help",
        leave="never: attention that has become one-hot learns no more",
        course="stop",
    ),
    Cause(
        name="zeroed gain",
        clues=((8, c.zero_gain),),
        do="initialise the gain with 1 and let it train; nothing before it gets a gradient as it "
        "is",
        leave="if a schedule is to open it later: `Diagnosis(stop=False)`",
        course="stop",
    ),
    Cause(
        name="dead part of the model",
        clues=((4, c.kind("dead gradients")),),
        do="look for a weight that is all 0, units that never fire, a branch that is not used, a "
        "detach() or a mask that is all zero, behind the layers named",
        leave="if that part is meant to rest, such as the head of a task that comes later",
    ),
    Cause(
        name="frozen by mistake",
        clues=((8, c.both(c.kind("no learning"), c.signal("update_ratio"))),),
        do="look at requires_grad, at what the optimizer was given, and at the learning rate; "
        "`lit-stability check` lists them",
        leave="while a schedule keeps the learning rate at zero",
    ),
    Cause(
        name="model that cannot learn",
        clues=((4, c.kind("no learning")), (-4, c.signal("update_ratio", "weight_path"))),
        do="run `lit-stability check`: masks, dead branches, labels, the first loss against that "
        "of a guess; have 20 samples learnt by heart",
        leave="if the task is as hard as the loss says",
    ),
    Cause(
        name="vanishing gradient",
        clues=((6, c.kind("vanishing gradient")),),
        do="look at the gradient flow layer by layer; norms before the sublayers, residual "
        "connections and a larger initialisation keep it alive; in fp16 raise the loss scale",
        leave="during warm-up, and when the loss has converged: small gradients are due then; lower"
        " `Vanishing(bound=...)`",
    ),
    Cause(
        name="initialisation",
        clues=(
            (1, c.both(_BROKEN, c.early)),
            (1, c.both(_SPIKES, c.early)),
            (1, c.no_warmup),
            (-2, JUMPS),
            (-8, c.transient),
        ),
        do="run `lit-stability check`; initialise so that the first loss is that of a guess, and "
        "warm up",
        leave="if the loss falls as it should",
    ),
    Cause(
        name="exploding gradient",
        clues=(
            (2, _SPIKES),
            (1, c.large_gradient),
            (1, c.unclipped),
            (1, c.other_batches),
            (-2, c.transient),
        ),
        do="set gradient_clip_val, or add AdaptiveGradientClipping; lower the learning rate if it "
        "returns",
        leave="if it was one step: it was not taken",
    ),
    Cause(
        name="weights drift",
        clues=((6, c.kind("weight drift")),),
        do="add weight decay, lower the learning rate, or normalise what grows",
        leave="if weights grow slowly and the loss falls",
    ),
    Cause(
        name="layer out of its bounds",
        clues=((6, c.kind("layer bound")),),
        do="clip gradients, or raise the bound if the run is healthy",
        leave="if the bound was a guess and the loss falls",
    ),
)

MACHINE = (
    Cause(
        name="glitch",
        clues=((9, c.transient),),
        do="nothing in data or model: it did not return when the same steps were taken again; if "
        "it happens often, suspect the hardware or a nondeterministic kernel",
        leave="if it happens once",
    ),
    Cause(
        name="weights damaged from outside",
        clues=(
            (8, c.kind("weight corruption")),
            (8, c.bad_state),
            (4, c.kind("non-finite weight")),
            (2, c.kind("update spike")),
        ),
        do="go on from a state before it; if it returns without a bad batch, suspect memory, a "
        "custom kernel, or code that writes into the weights",
        leave="if it happens once: the weights were put back",
    ),
    Cause(
        name="rank out of step",
        clues=((8, c.kind("rank disagreement")),),
        do="suspect the memory, the driver or the network of the rank that is named; look for code "
        "that runs on one rank only and changes weights, gradients or schedulers",
        leave="if it happens once: all ranks went back to the same state",
    ),
)


def register_catalogue() -> None:
    """Fill the registry."""
    for row in (*DATA, *NUMERICS, *LEARNING_RATE, *OPTIMIZER, *MODEL, *MACHINE):
        register_cause(row)
