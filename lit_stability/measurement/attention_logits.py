"""What an attention looks like at its softmax: its largest logit, and how widely it looks.

Plain functions of tensors; of a large attention a fixed sample is looked at. May import torch.
Letters of the shape suffixes: G heads (of one sequence), Q sampled queries, S keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUERIES = 64
"""Queries looked at, evenly spread over the sequence."""
_ROWS_OF_HEADS = 16
"""Taken of scores whose first dimension holds sequences and heads together."""
_ADDED = 5000.0
"""A mask that is added lies further below the row than this: -10000 and finfo.min are in use."""
_CLOSED = {torch.float16: -6e4}
_CLOSED_ELSE = -1e8
"""No logit is as low: it is a mask (-1e9, finfo.min, -inf)."""
_NOWHERE = -1e30
"""Has a softmax of 0, and unlike -inf a finite logarithm."""


def product_scores(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The scores that a fused kernel does not show, of a sample: ``scale * Q K^T + bias``.

    Args:
        query: shape ``(batch, heads, queries, width)``.
        key: shape ``(batch, heads, keys, width)``; with fewer heads, each serves several in a row
            (grouped queries, Ainslie et al. 2023).
        bias: added to the scores, or True where a query may look; broadcast to
            ``(batch, heads, queries, keys)``.
        is_causal: whether query i sees keys 0 to i only.
        scale: ``1 / sqrt(width)`` where it is None.

    Returns:
        Shape ``(G, Q, S)``, float32; -inf where a query may not look.
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
    """A sample of the scores that a softmax over the last dimension was given.

    Args:
        scores: shape ``(batch, heads, queries, keys)``, or ``(batch * heads, queries, keys)``, of
            which the first 16 are taken.

    Returns:
        Shape ``(G, Q, S)``, in the scores' own format.
    """
    return _one_sequence(scores)[:, _spread(scores.shape[-2], scores.device)]


def score_statistics(scores_GQS: Tensor) -> Tensor:
    """Largest logit, sum of the rows' entropies, number of these rows.

    A row's entropy is given as a share of ``log(keys it may see)``: 1 where it looks at all alike,
    0 where at one alone. Rows that may see one key or none have no say. A mask is known by its
    depth: in a row the scores that are 5000 below the largest do not count as logits.

    Args:
        scores_GQS: after scaling and masking; any floating format.

    Returns:
        Shape ``(3,)``, float32, on the scores' device.
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
    """The first sequence, all heads; shape ``(G, rows, columns)``."""
    if tensor.dim() > 3:
        return tensor[0].flatten(0, -3)
    return tensor[:_ROWS_OF_HEADS]


def _spread(length: int, device: torch.device) -> Tensor:
    """Indices of at most `QUERIES` rows, the first and the last among them."""
    count = min(length, QUERIES)
    return torch.arange(count, device=device) * (length - 1) // max(count - 1, 1)
