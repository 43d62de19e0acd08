"""What to try against each kind of numerical error.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from lit_stability.diagnosis.nonfinite.kinds import Kind

ADVICE: dict[Kind, str] = {
    "overflow": "the values are too large: normalise the inputs, lower the learning rate, clip the "
    "gradients",
    "softmax overflow": "subtract the maximum before the exponentials, or use softmax, log_softmax "
    "or logsumexp, which do",
    "domain error": "clamp the argument into the range where the function is defined",
    "infinite slope": "the argument is 0 or too small, or at the edge of the domain, where the "
    "slope is infinite: clamp the argument before the operation; a torch.where after it removes "
    "its value, but not its gradient",
    "division by zero": "the divisor is 0 or too small: add an epsilon to it, or clamp it",
    "degenerate matrix": "the matrix is singular or has equal eigenvalues: add a small multiple of "
    "the identity to it, and compute in float64",
    "mean of nothing": "divide a sum by max(count, 1), or skip batches without targets",
    "fully masked row": "let every row attend to at least one position; check whether True in the "
    "mask means masked or attend",
    "masked value": "check whether a target is among the masked positions, and whether a row is "
    "masked as a whole",
    "indeterminate form": "set the infinity with masked_fill or where instead of a product or a "
    "difference, or use the smallest finite number of the data type",
    "non-finite constant": "the program itself contains this NaN or Inf: look where the number is "
    "computed, for instance a weight divided by the count of a class without samples",
    "non-finite parameter": "restore earlier weights; the damage is older than this step",
    "non-finite buffer": "restore an earlier state, or reset the module's running statistics, if "
    "it was finite before; else look where it is computed, such as the weight of a class without "
    "samples",
    "non-finite input": "check the data: skip the sample, or fix it where it is loaded",
    "unseen": "check what the other ranks report, and code that computes outside of torch",
}
"""Kind -> what to try. Used last, after the advice for half precision, `LAYERS` and `OPS`."""

_OF_CIRCLE = ("acos", "arccos", "asin", "arcsin", "atanh", "arctanh", "erfinv", "special_erfinv")
_INSIDE = "keep the argument inside of (-1, 1), for instance clamp it to +-(1 - 1e-6)"
_EIGENVECTORS = (
    "its gradient divides by differences of {values}, which are equal: keep them apart, for "
    "instance by different small numbers added to the diagonal; use {only} where the vectors are "
    "not needed, or a Cholesky factor for whitening"
)
_ROWS: tuple[tuple[Kind, tuple[str, ...], str], ...] = (
    # Values that are too large.
    (
        "overflow",
        ("exp", "exp2", "expm1", "sinh", "cosh"),
        "the argument is too large: clamp it before the exponential (a log-variance to [-30, 20]), "
        "use softplus instead, or scale the inputs",
    ),
    (
        "overflow",
        ("prod", "cumprod"),
        "a product of many factors is too large: sum the logarithms of the factors instead",
    ),
    (
        "overflow",
        ("linear", "bilinear", "addmm", "conv1d", "conv2d", "conv3d"),
        "weights or inputs have grown: lower the learning rate, normalise the inputs",
    ),
    # Arguments for which the function is not defined.
    (
        "domain error",
        ("log", "log2", "log10", "xlogy", "special_entr"),
        "the argument is too small, 0 or negative: clamp it above 0 before the log, or compute the "
        "logarithm directly (log_softmax, logsigmoid, log_prob)",
    ),
    (
        "domain error",
        ("log1p",),
        "the argument is -1 or less: clamp it above -1 before the log1p",
    ),
    (
        "domain error",
        ("logit", "special_logit"),
        "keep the argument inside of (0, 1): pass eps to logit, or use the loss of the logits",
    ),
    ("domain error", _OF_CIRCLE, _INSIDE),
    ("domain error", ("sqrt",), "clamp the argument at a positive epsilon before the root"),
    ("domain error", ("pow",), "clamp the base at a positive epsilon before the power"),
    (
        "domain error",
        ("ctc_loss",),
        "skip targets that are longer than their inputs allow, or set zero_infinity=True",
    ),
    # Slopes at arguments that are too small, or at the edge.
    (
        "infinite slope",
        ("log", "log2", "log10", "xlogy", "special_entr"),
        "the argument is too small, so that the slope 1/x is infinite: clamp the argument before "
        "the log; torch.where after it removes its value from the loss, but not its gradient",
    ),
    (
        "infinite slope",
        ("sqrt", "rsqrt"),
        "the argument is 0 or too small: add the epsilon inside the root: outside, the slope at 0 "
        "is still infinite",
    ),
    (
        "infinite slope",
        ("norm", "linalg_norm", "linalg_vector_norm", "hypot", "dist", "cdist"),
        "a norm has no slope at 0: add an epsilon inside the root, or leave out vectors of zeros "
        "before it",
    ),
    (
        "infinite slope",
        ("pow",),
        "the base is 0 or too small: add the epsilon to the base: the slope at 0 is infinite",
    ),
    (
        "infinite slope",
        ("angle", "atan2", "arctan2"),
        "an angle has no slope at 0: replace elements of small magnitude before it is taken, or "
        "compute with cosine and sine instead",
    ),
    ("infinite slope", _OF_CIRCLE, f"the slope is infinite at 1 and -1: {_INSIDE}"),
    (
        "infinite slope",
        ("std", "var"),
        "a deviation has no slope at 0: take the root of the variance plus an epsilon",
    ),
    # Divisors.
    (
        "division by zero",
        ("std", "var"),
        "a variance or standard deviation needs two elements, or correction=0; drop_last=True "
        "avoids a last batch of one",
    ),
    (
        "division by zero",
        ("pow",),
        "the base is 0 under a negative exponent: clamp it away from 0",
    ),
    (
        "division by zero",
        ("weight_norm",),
        "a row of the weight is all 0 and has no direction: initialise it with other values",
    ),
    (
        "division by zero",
        ("kl_div",),
        "the target is 0 and needs a gradient, whose slope is log 0: pass its logarithm "
        "(log_softmax) with log_target=True, or detach it",
    ),
    (
        "division by zero",
        ("gaussian_nll_loss",),
        "a variance is 0: pass a larger eps, or predict its logarithm and clamp that from below",
    ),
    # Matrices.
    (
        "degenerate matrix",
        ("linalg_eigh", "linalg_eig", "eigh", "eig", "symeig"),
        _EIGENVECTORS.format(values="eigenvalues", only="eigvalsh"),
    ),
    (
        "degenerate matrix",
        ("linalg_svd", "svd", "pca_lowrank", "svd_lowrank"),
        _EIGENVECTORS.format(values="singular values", only="svdvals"),
    ),
    (
        "degenerate matrix",
        ("cholesky", "linalg_cholesky", "linalg_cholesky_ex", "cholesky_solve"),
        "the matrix is not positive definite: add a small multiple of the identity to it (jitter), "
        "and compute in float64",
    ),
    (
        "degenerate matrix",
        (
            *("linalg_inv", "linalg_inv_ex", "inverse", "inv", "linalg_tensorinv", "linalg_qr"),
            *("linalg_solve", "linalg_solve_ex", "linalg_solve_triangular", "triangular_solve"),
            *("linalg_lu_solve", "lu_solve", "linalg_lstsq", "linalg_pinv", "solve"),
        ),
        "the matrix is singular, or nearly so: add a small multiple of the identity to it, compute "
        "in float64, or use lstsq or pinv",
    ),
    (
        "degenerate matrix",
        ("logdet", "slogdet", "linalg_slogdet", "det", "linalg_det"),
        "the determinant is 0 or negative, as the matrix is singular or not positive definite: add "
        "a small multiple of the identity to it",
    ),
)
OPS: dict[tuple[Kind, str], str] = {
    (kind, op): sentence for kind, ops, sentence in _ROWS for op in ops
}
"""Kind and operation -> what to try."""

LAYERS: dict[tuple[Kind, str], str] = {
    ("overflow", "attention"): "normalise queries and keys, or scale them before their product",
    ("overflow", "embedding"): "check the norm of the embeddings; lower their learning rate",
    ("division by zero", "norm"): "set eps of the norm above 0: its divisor is 0",
    ("non-finite parameter", "embedding"): "restore earlier weights; a row is damaged, and only "
    "batches that use it fail",
}
"""Kind and lower-case part of the module's class name -> what to try. You may extend it."""


def advise(
    kind: Kind, op: str, module_type: str, phase: str, *, overflow: bool, kernel: str = ""
) -> str:
    """Returns what to try, in one sentence.

    Args:
        kind: a `Kind`.
        op: name of the operation.
        module_type: class name of the module.
        phase: ``forward`` or ``backward``.
        overflow: whether the operation is finite in float32.
        kernel: the ATen kernel, such as ``aten.exp.default``; it is looked up after ``op``.

    >>> advise("overflow", "linear", "Linear", "forward", overflow=True)
    'run linear in float32, or the whole step in bfloat16'
    """
    if overflow and phase == "backward":
        return f"lower the loss scale; if it is already low, run {op} in float32"
    if overflow:
        return f"run {op} in float32, or the whole step in bfloat16"
    layer = module_type.lower()
    in_layer = (v for (listed, part), v in LAYERS.items() if listed == kind and part in layer)
    by_op = (OPS.get((kind, name)) for name in (op, _base(kernel)))
    return next(in_layer, None) or next(filter(None, by_op), ADVICE[kind])


def _base(kernel: str) -> str:
    return kernel.removeprefix("aten.").partition(".")[0].strip("_")
