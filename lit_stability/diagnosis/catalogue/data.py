"""Causes in the data, in numerics and in the machine.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.diagnosis import evidence as c
from lit_stability.diagnosis.cause import Cause
from lit_stability.diagnosis.context import DiagnosisContext


def _as_the_origin_says(context: DiagnosisContext) -> str:
    return str(context.origin.advice) if context.origin else "look at the operation that is named"


DATA = (
    Cause(
        name="bad batch",
        rules=(
            (8, c.bad_input),
            (2, c.kind("non-finite loss", "non-finite gradient")),
            (2, c.SPIKES),
            (2, c.JUMPS),
            (2, c.deterministic),
            (-2, c.GROWS),
            (-4, c.transient),
            (-4, c.operation),
            (-4, c.overflow),
            (-6, c.other_batches),
        ),
        remedy="look at the batch in the incident's folder: values and labels out of range, empty "
        "or overlong samples; mend it where it is loaded",
        ignore_when="if it is one of thousands: it was left out of the run",
    ),
    Cause(
        name="batches too different from each other",
        rules=((2, c.SWINGS), (1, c.ordinary_gradient)),
        remedy="shuffle, sort no longer by length or source, make batches larger, or pad "
        "dynamically with an attention mask",
        ignore_when="if the swings come with a change of the data that is meant, such as a "
        "curriculum",
    ),
    Cause(
        name="change of regime",
        rules=((-8, c.transient),),
        remedy="look for what changes there: the loss and its weights, the data or their scale, "
        "the parts that train; let it come gradually, or train in stages, each with a fit of its "
        "own",
        ignore_when="if it is meant",
    ),
    Cause(
        name="loss or labels",
        rules=((1, c.kind("non-finite loss", "loss spike")), (1, c.ordinary_gradient)),
        remedy="look at the loss function for log(0), division by a count of zero and labels out "
        "of range",
        ignore_when="never, if it returns",
    ),
)

NUMERICS = (
    Cause(
        name="operation outside its domain",
        rules=((8, c.operation), (-8, c.transient)),
        remedy=_as_the_origin_says,
        ignore_when="never: the next such batch does it again",
    ),
    Cause(
        name="numeric precision",
        rules=(
            (8, c.overflow),
            (6, c.kind("loss-scale collapse")),
            (4, c.kind("loss-scale fall")),
            (2, c.both(c.BROKEN, c.mixed_precision)),
            (-4, c.transient),
        ),
        remedy="use bf16 or 32-bit precision, or compute the module that is named in float32 "
        "(PrecisionFallback does either); bring inputs and targets to about 1",
        ignore_when="during the first steps in fp16: the loss scaler looks for its scale by "
        "overflowing",
    ),
    Cause(
        name="loss computed in 16 bits",
        rules=((8, c.kind("infinite loss")),),
        remedy="compute the loss in float32: cast outputs and targets before it, or scale the "
        "targets",
        ignore_when="never: the loss tells nothing while it is infinite",
    ),
    Cause(
        name="updates lost to rounding",
        rules=((8, c.kind("lost updates")),),
        remedy="train in bf16-mixed, which keeps float32 weights, or raise the learning rate",
        ignore_when="at the end of a decay of the learning rate",
    ),
)

MACHINE = (
    Cause(
        name="glitch",
        rules=((11, c.transient), (-8, c.DAMAGE)),
        remedy="nothing in data or model: it did not return when the same steps were taken again; "
        "if it happens often, suspect the hardware or a nondeterministic kernel",
        ignore_when="if it happens once",
    ),
    Cause(
        name="weights damaged from outside",
        rules=(
            (8, c.kind("weight corruption")),
            (8, c.bad_state),
            (6, c.kind("non-finite weight")),
            (2, c.kind("update spike")),
            (3, c.both(c.DAMAGE, c.transient)),
        ),
        remedy="go on from a state before it; if it returns without a bad batch, suspect memory, a "
        "custom kernel, or code that writes into the weights",
        ignore_when="if it happens once: the weights were put back",
    ),
    Cause(
        name="rank out of step",
        rules=((8, c.kind("rank disagreement")),),
        remedy="suspect the memory, the driver or the network of the rank that is named; look for "
        "code that runs on one rank only and changes weights, gradients or schedulers",
        ignore_when="if it happens once: all ranks went back to the same state",
    ),
)
