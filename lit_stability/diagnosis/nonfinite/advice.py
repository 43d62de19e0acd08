"""What kind of accident an operation met, and what to try against it.

Data in, data out: imports neither torch nor Lightning.
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
"""``overflow``: too large for the format. ``domain error``: log or root of a number it is not
defined for. ``mean of nothing``: an average over no elements. ``fully masked row``: a softmax over
nothing but -inf. ``indeterminate form``: inf - inf, 0 * inf or inf / inf of infinities put there on
purpose. ``non-finite constant``: a NaN or Inf that the program itself writes reached the loss.
``unseen``: it came from another rank, from code outside torch, or from memory never written."""

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
    "overflow": "bound what goes in: normalise it, lower the learning rate, clip the gradients",
    "domain error": "clamp the argument into the range where the function is defined",
    "division by zero": "add an epsilon to what is divided by",
    "mean of nothing": "divide a sum by max(count, 1), or leave out a batch without targets",
    "fully masked row": "let every row attend to at least one position; look whether True in the "
    "mask means masked or attend",
    "indeterminate form": "put the infinity in with masked_fill or where instead of a product or "
    "a difference, or use the smallest finite number of the format",
    "non-finite constant": "look whether a target is among the masked-out positions",
    "non-finite parameter": "go back to weights from before; the damage is older than this step",
    "non-finite buffer": "go back to a state from before, or reset the module's running "
    "statistics; the damage is older than this step",
    "non-finite input": "look at the data: leave the sample out or mend it where it is loaded",
    "unseen": "look at what the other ranks found, and at code that computes outside torch",
}
"""By kind of accident. The first that applies is given: half precision, `OPS`, `LAYERS`, this."""

OPS: dict[tuple[str, str], str] = {
    ("overflow", "exp"): "subtract the maximum first, or use softmax, logsumexp, softplus",
    ("domain error", "log"): "clamp the argument above 0 before the log, or use log_softmax",
    ("domain error", "sqrt"): "clamp the argument at a positive epsilon before the root",
    ("domain error", "pow"): "clamp the base at a positive epsilon before the power",
    ("division by zero", "log"): "clamp the argument before the log: torch.where after it keeps "
    "its value out of the loss, and not its gradient",
    ("division by zero", "sqrt"): "add the epsilon inside the root: outside it the slope at 0 is "
    "infinite all the same",
    ("domain error", "ctc_loss"): "leave out targets that are longer than their inputs allow, or "
    "set zero_infinity=True",
    ("division by zero", "acos"): "keep the argument inside (-1, 1): the slope is infinite at 1",
    ("division by zero", "asin"): "keep the argument inside (-1, 1): the slope is infinite at 1",
    ("division by zero", "linalg_svd"): "its gradient divides by differences of singular values: "
    "use svdvals, or keep them apart",
    ("division by zero", "std"): "a deviation needs two elements, or correction=0",
    ("division by zero", "var"): "a variance needs two elements, or correction=0",
    ("division by zero", "pow"): "add the epsilon to the base: the slope at 0 is infinite",
}
"""By kind of accident and operation."""

LAYERS: dict[tuple[str, str], str] = {
    ("overflow", "attention"): "normalise queries and keys, or scale them before their product",
    ("overflow", "embedding"): "look at the norm of the embeddings; lower their learning rate",
    ("overflow", "linear"): "weights or inputs have grown: lower the learning rate, normalise "
    "what goes in",
    ("division by zero", "norm"): "give the norm an eps above 0: what it divides by is 0",
    ("non-finite parameter", "embedding"): "go back to weights from before; a row was spoiled, so "
    "only the batches that use it show it",
}
"""By kind of accident and a part of the module's class name, in lower case; yours to extend."""


def kind_of(
    kernel: str, *, is_nan: bool, wider_is_finite: bool, from_infinity: bool, zero_base: bool
) -> Kind:
    """Classify an operation that made a non-finite value of values that were as they should be.

    Args:
        kernel: name of the kernel, such as ``_softmax``.
        is_nan: whether there is a NaN among the results.
        wider_is_finite: whether the same in a wider format is finite.
        from_infinity: whether there was an Inf, put there on purpose, among the inputs.
        zero_base: whether the first input has an element that is 0.

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
    """One sentence: what to try, by kind of accident, operation and kind of layer.

    >>> advise("overflow", "linear", "Linear", "forward", overflow=True)
    'run linear in float32, or the whole step in bfloat16'
    """
    if overflow and phase == "backward":
        return f"lower the loss scale; if it is low already, run {op} in float32"
    if overflow:
        return f"run {op} in float32, or the whole step in bfloat16"
    if (kind, op) in OPS:
        return OPS[kind, op]
    layer = module_type.lower()
    for (met, part), sentence in LAYERS.items():
        if met == kind and part in layer:
            return sentence
    return ADVICE[kind]
