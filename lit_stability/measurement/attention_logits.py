"""Statistics of attention at its softmax: the largest logit, and the entropy of the weights.

Plain functions of tensors; a large attention is sampled. May import torch. Letters of the shape
suffixes: G heads (of one sequence), Q sampled queries, S keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUERIES = 64
"""Number of sampled queries, evenly spread over the sequence."""
_ROWS_OF_HEADS = 16
"""Rows used of scores whose first dimension holds sequences and heads together."""
_ADDED = 5000.0
"""An additive mask lies at least this far below the largest score: usual are -10000, finfo.min."""
_CLOSED = {torch.float16: -6e4}
_CLOSED_ELSE = -1e8
"""A lower score is a mask (-1e9, finfo.min, -inf), not a logit; -6e4 in float16."""
_NOWHERE = -1e30
"""Score with a softmax of 0 whose logarithm, unlike that of -inf, is finite."""


def product_scores(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Computes a sample of the scores that a fused kernel hides: ``scale * Q K^T + bias``.

    Args:
        query: shape ``(batch, heads, queries, width)``.
        key: shape ``(batch, heads, keys, width)``; with fewer heads, each serves several
            consecutive query heads (grouped queries, Ainslie et al. 2023).
        bias: added to the scores, or bool with True where a query may attend; broadcast to
            ``(batch, heads, queries, keys)``.
        is_causal: whether query i attends to keys 0 to i only.
        scale: factor on the scores; None means ``1 / sqrt(width)``.

    Returns:
        Shape ``(G, Q, S)``, float32; -inf where a query may not attend.
    """
    length, keys = query.shape[-2], key.shape[-2]
    rows = _spread(length, query.device)
    q_GQK = _one_sequence(query)[:, rows].float()
    k_GSK = _one_sequence(key).float()
    k_GSK = k_GSK.repeat_interleave(len(q_GQK) // len(k_GSK), dim=0)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores_GQS = factor * (q_GQK @ k_GSK.transpose(-2, -1))
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], keys)
        scores_GQS = _biased(scores_GQS, _one_sequence(bias)[:, rows])
    if is_causal:
        later = torch.arange(keys, device=query.device) > rows[:, None]
        scores_GQS = scores_GQS.masked_fill(later, -math.inf)
    return scores_GQS


def sampled_scores(scores: Tensor) -> Tensor:
    """Returns a sample of scores that are the input of a softmax over the last dimension.

    Args:
        scores: shape ``(batch, heads, queries, keys)``, or ``(batch * heads, queries, keys)``, of
            which the first 16 rows are used.

    Returns:
        Shape ``(G, Q, S)``, in the dtype of the scores.
    """
    return _one_sequence(scores)[:, _spread(scores.shape[-2], scores.device)]


def score_statistics(scores_GQS: Tensor) -> Tensor:
    """Returns the largest absolute logit, the sum of the row entropies, and the number of rows.

    The entropy of a row is a share of ``log(visible keys)``: 1 if the query attends to all keys
    equally, 0 if to one key only. Rows with fewer than two visible keys do not count. Masks are
    recognised by their depth: scores that are 5000 below the largest of their row are no logits.

    Args:
        scores_GQS: after scaling and masking; any floating dtype.

    Returns:
        Shape ``(3,)``, float32, on the device of the scores.
    """
    closed = scores_GQS <= _CLOSED.get(scores_GQS.dtype, _CLOSED_ELSE)
    scores_GQS = scores_GQS.float()
    top_GQ1 = scores_GQS.amax(-1, keepdim=True)
    masked = closed | (scores_GQS < top_GQ1 - _ADDED) | (top_GQ1 < -_ADDED)
    logit = scores_GQS.masked_fill(masked, 0.0).abs().amax()
    logs_GQS = scores_GQS.masked_fill(closed, _NOWHERE).log_softmax(-1)
    entropy_GQ = -(logs_GQS.exp() * logs_GQS).sum(-1)
    keys_GQ = (~closed).sum(-1)
    counts = keys_GQ > 1
    share_GQ = entropy_GQ / keys_GQ.clamp(min=2).log()
    return torch.stack([logit, torch.where(counts, share_GQ, 0.0).sum(), counts.sum().float()])


def _biased(scores: Tensor, bias: Tensor) -> Tensor:
    if bias.dtype == torch.bool:
        return scores.masked_fill(~bias, -math.inf)
    return scores + bias.float()


def _one_sequence(tensor: Tensor) -> Tensor:
    """Returns the first sequence with all its heads, shape ``(G, rows, columns)``."""
    if tensor.dim() > 3:
        return tensor[0].flatten(0, -3)
    return tensor[:_ROWS_OF_HEADS]


def _spread(length: int, device: torch.device) -> Tensor:
    """Returns the indices of at most `QUERIES` rows, including the first and the last."""
    count = min(length, QUERIES)
    return torch.arange(count, device=device) * (length - 1) // max(count - 1, 1)
