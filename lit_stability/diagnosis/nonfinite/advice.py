"""Kinds of numerical errors, and what to try against each.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "overflow",
    "domain error",
    "division by zero",
    "mean of nothing",
    "fully masked row",
    "indeterminate form",
    "non-finite constant",
    "non-finite parameter",
    "non-finite buffer",
    "non-finite input",
    "unseen",
]
"""``overflow``: too large for the data type. ``domain error``: log or root of a number for which it
is not defined. ``mean of nothing``: an average over no elements. ``fully masked row``: a softmax
over only -inf. ``indeterminate form``: inf - inf, 0 * inf or inf / inf of intended infinities.
``non-finite constant``: a NaN or Inf in the program itself reached the loss. ``unseen``: it came
from another rank, from code outside of torch, or from uninitialised memory."""

_DIVIDING = ("div", "reciprocal", "rsqrt", "norm", "var", "std", "remainder", "fmod")
_POLES = (
    "log",
    "xlogy",
    "digamma",
    "lgamma",
    "logit",
    "atanh",
    "sqrt",
    "acos",
    "asin",
    "erfinv",
    "ctc_loss",
)

ADVICE: dict[str, str] = {
    "overflow": "bound the inputs: normalise them, lower the learning rate, clip the gradients",
    "domain error": "clamp the argument into the range where the function is defined",
    "division by zero": "add an epsilon to the divisor",
    "mean of nothing": "divide a sum by max(count, 1), or skip batches without targets",
    "fully masked row": "let every row attend to at least one position; check whether True in the "
    "mask means masked or attend",
    "indeterminate form": "set the infinity with masked_fill or where instead of a product or a "
    "difference, or use the smallest finite number of the data type",
    "non-finite constant": "check whether a target is among the masked positions",
    "non-finite parameter": "restore earlier weights; the damage is older than this step",
    "non-finite buffer": "restore an earlier state, or reset the module's running "
    "statistics; the damage is older than this step",
    "non-finite input": "check the data: skip the sample, or fix it where it is loaded",
    "unseen": "check what the other ranks report, and code that computes outside of torch",
}
"""Kind -> what to try. Used last, after the advice for half precision, `OPS` and `LAYERS`."""

OPS: dict[tuple[str, str], str] = {
    ("overflow", "exp"): "subtract the maximum first, or use softmax, logsumexp, softplus",
    ("domain error", "log"): "clamp the argument above 0 before the log, or use log_softmax",
    ("domain error", "sqrt"): "clamp the argument at a positive epsilon before the root",
    ("domain error", "pow"): "clamp the base at a positive epsilon before the power",
    ("division by zero", "log"): "clamp the argument before the log: torch.where after it "
    "removes its value from the loss, but not its gradient",
    ("division by zero", "sqrt"): "add the epsilon inside the root: outside, the slope at 0 is "
    "still infinite",
    ("domain error", "ctc_loss"): "skip targets that are longer than their inputs allow, or "
    "set zero_infinity=True",
    ("division by zero", "acos"): "keep the argument inside (-1, 1): the slope is infinite at 1",
    ("division by zero", "asin"): "keep the argument inside (-1, 1): the slope is infinite at 1",
    ("division by zero", "linalg_svd"): "its gradient divides by differences of singular values: "
    "use svdvals, or keep the values apart",
    ("division by zero", "std"): "a standard deviation needs two elements, or correction=0",
    ("division by zero", "var"): "a variance needs two elements, or correction=0",
    ("division by zero", "pow"): "add the epsilon to the base: the slope at 0 is infinite",
}
"""Kind and operation -> what to try."""

LAYERS: dict[tuple[str, str], str] = {
    ("overflow", "attention"): "normalise queries and keys, or scale them before their product",
    ("overflow", "embedding"): "check the norm of the embeddings; lower their learning rate",
    ("overflow", "linear"): "weights or inputs have grown: lower the learning rate, normalise "
    "the inputs",
    ("division by zero", "norm"): "set eps of the norm above 0: its divisor is 0",
    ("non-finite parameter", "embedding"): "restore earlier weights; a row is damaged, and only "
    "batches that use it fail",
}
"""Kind and lower-case part of the module's class name -> what to try. You may extend it."""


def kind_of(
    kernel: str, *, is_nan: bool, wider_is_finite: bool, from_infinity: bool, zero_base: bool
) -> Kind:
    """Classifies an operation that made a non-finite value from valid inputs.

    Args:
        kernel: name of the kernel, such as ``_softmax``.
        is_nan: whether a result is NaN.
        wider_is_finite: whether the result is finite in a wider data type.
        from_infinity: whether an input contains an intended Inf.
        zero_base: whether the first input contains a 0.

    >>> kind_of("exp", is_nan=False, wider_is_finite=False, from_infinity=False, zero_base=False)
    'overflow'
    """
    if from_infinity:
        masked = "softmax" in kernel or "attention" in kernel
        return "fully masked row" if masked else "indeterminate form"
    if wider_is_finite:
        return "overflow"
    if kernel.startswith(("mean", "nll_loss", "nanmean")):
        return "mean of nothing"
    if any(part in kernel for part in _DIVIDING):
        return "division by zero"
    if kernel.startswith("pow") and zero_base and not is_nan:
        return "division by zero"
    if is_nan or kernel.startswith(_POLES):
        return "domain error"
    return "overflow"


def advise(kind: str, op: str, module_type: str, phase: str, *, overflow: bool) -> str:
    """Returns what to try, in one sentence.

    Args:
        kind: a `Kind`.
        op: name of the operation.
        module_type: class name of the module.
        phase: ``forward`` or ``backward``.
        overflow: whether the operation is finite in float32.

    >>> advise("overflow", "linear", "Linear", "forward", overflow=True)
    'run linear in float32, or the whole step in bfloat16'
    """
    if overflow and phase == "backward":
        return f"lower the loss scale; if it is already low, run {op} in float32"
    if overflow:
        return f"run {op} in float32, or the whole step in bfloat16"
    if (kind, op) in OPS:
        return OPS[kind, op]
    layer = module_type.lower()
    for (listed, part), sentence in LAYERS.items():
        if listed == kind and part in layer:
            return sentence
    return ADVICE[kind]
