"""Causes in the data, in numerics and in the hardware.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.detectors.anomaly import AT_START
from lit_stability.diagnosis import evidence as c
from lit_stability.diagnosis.cause import Cause
from lit_stability.diagnosis.context import DiagnosisContext


def _advice_for_origin(context: DiagnosisContext) -> str:
    return str(context.origin.advice) if context.origin else "check the operation that is named"


_RAISED = (
    (
        "of distribution",
        "keep the named parameter of the distribution in its range: softplus plus an epsilon, or "
        "exp of a clamped number, for a scale; a clamp for a probability",
    ),
    (
        "elements of target should be between 0 and 1",
        "scale the targets to [0, 1], and look for some outside of it",
    ),
    (
        "elements of input should be between 0 and 1",
        "bring the outputs into [0, 1] with a sigmoid, or use the loss of the logits",
    ),
    (
        "out of bounds",
        "compare the labels of the batch with the number of outputs: they must be 0 to C - 1, or "
        "the ignore_index",
    ),
    (
        "index out of range",
        "compare the indices of the batch with the rows of the embedding: they must be smaller",
    ),
    (
        "positive-definite",
        "add a small multiple of the identity to the matrix (jitter), and compute in float64",
    ),
)
"""Part of the message of an exception -> what to try."""


def _advice_for_exception(context: DiagnosisContext) -> str:
    known = (advice for part, advice in _RAISED if part in context.anomaly.message)
    return next(
        known,
        "look at the batch in the incident folder, and at what the message says of it: labels and "
        "indices out of range, empty or very long samples; fix it where it is loaded",
    )


DATA = (
    Cause(
        name="bad batch",
        rules=(
            (8, c.bad_input),
            (6, c.unusual_batch),
            (2, c.kind("non-finite loss", "non-finite gradient")),
            (2, c.SPIKES),
            (2, c.JUMPS),
            (2, c.deterministic),
            (-2, c.GROWS),
            (-4, c.transient),
            (-4, c.operation),
            (-4, c.overflow),
            (-4, c.bad_state),
            (-6, c.other_batches),
        ),
        contradictions=(c.constant, c.finite_batch, c.ordinary_batch),
        remedy="look at the batch in the incident folder: values and labels out of range, empty or "
        "very long samples; fix it where it is loaded",
        ignore_when="if it is one of thousands: it was skipped",
    ),
    Cause(
        name="data not normalised",
        rules=((6, c.both(c.TROUBLE, c.both(c.unscaled, c.early))), (-8, c.transient)),
        contradictions=(c.operation, c.constant, c.bad_state, c.calm_before),
        remedy="scale inputs and targets to variance 1, or to [0, 1]; take the logarithm of "
        "amounts and counts",
        ignore_when="if the loss decreases as expected",
    ),
    Cause(
        name="batches too different from each other",
        rules=((2, c.SWINGS), (1, c.ordinary_gradient)),
        remedy="shuffle, do not sort by length or source, use larger batches, or pad dynamically "
        "with an attention mask",
        ignore_when="if the data change on purpose, as in a curriculum",
    ),
    Cause(
        name="change of regime",
        rules=((-8, c.transient),),
        remedy="find what changes at this step: the loss and its weights, the data or their scale, "
        "the trainable parts; change it gradually, or train in stages with one fit each",
        ignore_when="if the change is intended",
    ),
    Cause(
        name="weights written by the program",
        rules=((-8, c.transient),),
        remedy="nothing, if the write is intended: its parameters are accepted from now on",
        ignore_when="if the write is intended, such as a reset, a restart of dead codes or pruning",
    ),
    Cause(
        name="random draw of the step",
        rules=((-8, c.bad_input),),
        remedy="bound what is drawn before it is used, such as a uniform number before its "
        "logarithm; any batch fails with such a draw",
        ignore_when="if it is rare: the step is retried with other random numbers",
    ),
    Cause(
        name="the model raises on this batch",
        rules=((4, c.kind("exception")), (-8, c.transient)),
        remedy=_advice_for_exception,
        ignore_when="never: a batch of this kind raises again",
    ),
    Cause(
        name="fault of one batch index",
        rules=((-8, c.bad_input),),
        remedy="look at what training_step does at this batch_idx only, such as a term that is "
        "added every so many batches",
        ignore_when="never: the index comes back in every epoch",
    ),
    Cause(
        name="loss or labels",
        rules=((1, c.kind("non-finite loss", "loss spike")), (1, c.ordinary_gradient)),
        remedy="check the loss function for log(0), division by a count of zero and labels out of "
        "range",
        ignore_when="never, if it recurs",
    ),
)

NUMERICS = (
    Cause(
        name="operation outside its domain",
        rules=((8, c.operation), (3, c.large_value), (-8, c.transient)),
        remedy=_advice_for_origin,
        ignore_when="never: the next batch of this kind fails as well",
    ),
    Cause(
        name="non-finite constant",
        rules=((6, c.constant), (2, c.lasting_constant), (-8, c.transient)),
        remedy="mend the number where it is computed: a weight divided by the count of a class "
        "without samples, a statistic of an empty column, a scale that was read as NaN",
        ignore_when="never: no batch and no learning rate changes it",
        recommended_action="stop",
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
        remedy="use bf16 or 32-bit precision, or compute the named module in float32 "
        "(PrecisionFallback can do both); scale inputs and targets to about 1",
        ignore_when="during the first steps in fp16: the loss scaler overflows until it has found "
        "its scale",
    ),
    Cause(
        name="loss computed in 16 bits",
        rules=((8, c.kind("infinite loss")),),
        remedy="compute the loss in float32: cast outputs and targets before it, or scale the "
        "targets",
        ignore_when="never: an infinite loss is useless for monitoring",
    ),
    Cause(
        name="updates lost to rounding",
        rules=((8, c.kind("lost updates")),),
        remedy="train in bf16-mixed, which keeps float32 weights, or raise the learning rate",
        ignore_when="at the end of a learning-rate decay",
    ),
)

MACHINE = (
    Cause(
        name="glitch",
        rules=((11, c.transient), (-8, c.DAMAGE)),
        remedy="nothing in data or model: it did not recur when the same steps were run again; if "
        "it happens often, check the hardware and look for nondeterministic kernels",
        ignore_when="if it happens once",
    ),
    Cause(
        name="silent data corruption",
        rules=((14, c.kind("silent data corruption")),),
        contradictions=(lambda context: context.shown.get("weights written by the program"),),
        remedy="continue from before the wrong numbers; if the same rank or host comes again, take "
        "it out and test its memory and processor (see integrity.jsonl)",
        ignore_when="if it happens once in weeks: a cosmic ray flips bits, too",
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
        remedy="continue from an earlier state; if it recurs without a bad batch, check memory, "
        "custom kernels, and code that writes to the weights",
        ignore_when="if it happens once: the weights were restored",
    ),
    Cause(
        name="damaged checkpoint",
        rules=((11, c.kind(AT_START)),),
        remedy="continue from an older checkpoint, or repair this one: `lit-stability doctor FILE` "
        "lists what is damaged in it",
        ignore_when="never: training goes on from it with the same damage",
    ),
    Cause(
        name="rank out of step",
        rules=((8, c.kind("rank disagreement")),),
        remedy="check memory, driver and network of the named rank; look for code that runs on one "
        "rank only and changes weights, gradients or schedulers",
        ignore_when="if it happens once: all ranks were restored to the same state",
    ),
)
