"""Why an operation made a NaN or Inf: the kinds of numerical errors.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "overflow",
    "softmax overflow",
    "domain error",
    "infinite slope",
    "division by zero",
    "degenerate matrix",
    "mean of nothing",
    "fully masked row",
    "masked value",
    "indeterminate form",
    "non-finite constant",
    "non-finite parameter",
    "non-finite buffer",
    "non-finite input",
    "unseen",
]
"""``overflow``: too large for the data type. ``softmax overflow``: exponentials that overflow
before they are divided by their sum, or before the logarithm of their sum. ``domain error``: log
or root of a number for which it is not defined. ``infinite slope``: the value is finite, but its
argument is 0, too small, or at the edge of the domain, so that the gradient is not finite.
``division by zero``: a divisor that is 0 or too small. ``degenerate matrix``: singular, not
positive definite, or with equal eigenvalues. ``mean of nothing``: an average over no elements.
``fully masked row``: a softmax over only -inf. ``masked value``: an Inf that was set on purpose
is part of the loss. ``indeterminate form``: inf - inf, 0 * inf or inf / inf of intended
infinities. ``non-finite constant``: a NaN or Inf in the program itself reached the loss.
``unseen``: it came from another rank, from code outside of torch, or from uninitialised memory."""

_DIVISIONS = ("div", "true_divide", "reciprocal", "remainder", "fmod")
_DIVIDING = (*_DIVISIONS, "rsqrt", "norm", "var", "std", "cosine_similarity", "normalize")
_POLES = (
    *("log", "xlogy", "xlog1py", "digamma", "lgamma", "polygamma", "zeta", "erfinv", "ndtri"),
    *("sqrt", "acos", "asin", "arccos", "arcsin", "atanh", "arctanh", "entr", "special_entr"),
    "ctc_loss",
)
_STEEP = (
    *("log", "xlogy", "xlog1py", "entr", "special_entr", "sqrt", "rsqrt", "pow", "float_power"),
    *("norm", "linalg_norm", "linalg_vector_norm", "vector_norm", "dist", "cdist"),
    *("pairwise_distance", "angle", "hypot", "atan2", "arctan2", "acos", "asin", "acosh", "arccos"),
    *("arcsin", "arccosh", "atanh", "arctanh", "erfinv", "special_erfinv", "digamma", "lgamma"),
    *("special_logit", "special_ndtri", "std", "var"),
)
"""Operations whose slope is infinite at a point of their domain, mostly at 0."""
_OF_MATRICES = (
    *("cholesky", "logdet", "slogdet", "det", "inverse", "pinverse", "svd", "svdvals", "qr", "lu"),
    *("lstsq", "triangular_solve", "lobpcg", "pca_lowrank", "svd_lowrank", "geqrf", "ormqr"),
)
_OF_PRODUCTS = (
    *("linalg_norm", "linalg_vector_norm", "linalg_matrix_norm", "linalg_cross", "linalg_vecdot"),
    *("linalg_multi_dot", "linalg_matrix_power", "linalg_matrix_exp", "linalg_vander"),
)
"""Functions of ``torch.linalg`` that neither invert nor decompose."""
_MASKING = (
    *("masked_fill", "where", "index_fill", "index_put", "fill", "full", "scatter"),
    *("masked_scatter", "new_full", "full_like", "tril", "triu"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What `kind_of` must know of an operation that made a non-finite value from valid inputs."""

    kernel: str
    """Name of the kernel, such as ``_softmax``."""
    op: str = ""
    """Name of the operation in the program; in the backward pass, of the forward pass."""
    backward: bool = False
    is_nan: bool = False
    """Whether a result is NaN."""
    half: bool = False
    """Whether the result has 16 bits."""
    wider_is_finite: bool = False
    """Whether the result is finite in a wider data type."""
    from_infinity: bool = False
    """Whether an input contains an intended Inf."""
    zero_base: bool = False
    """Whether the first input contains a 0."""
    small_divisor: bool = False
    """Whether the divisor is farther from 1 than the dividend is, on a logarithmic scale."""


def kind_of(facts: Facts) -> Kind:
    """Classifies an operation that made a non-finite value from valid inputs.

    Args:
        facts: of the operation.

    >>> kind_of(Facts(kernel="exp", op="exp"))
    'overflow'
    >>> kind_of(Facts(kernel="div", op="log", backward=True, wider_is_finite=True))
    'infinite slope'
    """
    if facts.from_infinity:
        masked = "softmax" in facts.kernel or "attention" in facts.kernel
        return "fully masked row" if masked else "indeterminate form"
    if facts.half and facts.wider_is_finite:
        return "overflow"
    if _is_of_matrices(facts.op) or _is_of_matrices(facts.kernel):
        return "degenerate matrix"
    return _kind_in_backward(facts) if facts.backward else _kind_in_forward(facts)


def _kind_in_forward(facts: Facts) -> Kind:
    kernel = facts.kernel
    if facts.wider_is_finite:
        return "division by zero" if facts.small_divisor else "overflow"
    if kernel.startswith(("mean", "nll_loss", "nanmean")):
        return "mean of nothing"
    if any(part in kernel for part in _DIVIDING):
        return "division by zero"
    if kernel.startswith("pow") and facts.zero_base and not facts.is_nan:
        return "division by zero"
    return "domain error" if facts.is_nan or kernel.startswith(_POLES) else "overflow"


def _kind_in_backward(facts: Facts) -> Kind:
    is_power = facts.op.startswith(("pow", "float_power", "square"))
    if facts.op.startswith(_DIVISIONS):
        return "division by zero"
    # The slope of a power is large at large numbers too.
    if facts.op.startswith(_STEEP) and (not is_power or facts.zero_base):
        return "infinite slope"
    return _kind_in_forward(facts)


def kind_of_constant(op: str, *, is_nan: bool) -> Kind:
    """Classifies a NaN or Inf that is a plain number in the program.

    Args:
        op: name of the operation that it is an argument of.
        is_nan: whether the result is NaN.

    >>> kind_of_constant("masked_fill", is_nan=False), kind_of_constant("mul", is_nan=True)
    ('masked value', 'non-finite constant')
    """
    if _is_of_matrices(op):  # a log of a negative determinant is written as a constant
        return "degenerate matrix"
    return "masked value" if op.startswith(_MASKING) and not is_nan else "non-finite constant"


def _is_of_matrices(name: str) -> bool:
    name = name.strip("_")
    if name.startswith(_OF_PRODUCTS):
        return False
    return name.startswith(("linalg_", *_OF_MATRICES)) or name in ("inv", "eig", "eigh", "solve")
