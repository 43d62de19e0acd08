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
_BLOCK = 2**24
"""Most logits that are computed at once for `head_logits`."""
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
    closed, logits_GQS = _without_masked(scores_GQS)
    logit = logits_GQS.abs().amax()
    scores_GQS = scores_GQS.float()
    logs_GQS = scores_GQS.masked_fill(closed, _NOWHERE).log_softmax(-1)
    entropy_GQ = -(logs_GQS.exp() * logs_GQS).sum(-1)
    keys_GQ = (~closed).sum(-1)
    counts = keys_GQ > 1
    share_GQ = entropy_GQ / keys_GQ.clamp(min=2).log()
    return torch.stack([logit, torch.where(counts, share_GQ, 0.0).sum(), counts.sum().float()])


def head_logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Returns the largest absolute logit of each query head, over all sequences and positions.

    An additive mask only closes positions here: what it adds to a logit is not counted.

    Args:
        query: shape ``(batch, heads, queries, width)``, or without the batch.
        key: shape ``(batch, heads, keys, width)``, with fewer heads as in `product_scores`.
        mask: as ``bias`` of `product_scores`.
        is_causal: as in `product_scores`.
        scale: as in `product_scores`.

    Returns:
        Shape ``(heads,)``, float32, on the device of the query. Memory is bounded: the queries are
        taken in blocks.
    """
    wanted = (*query.shape[:-1], key.shape[-2])
    mask = None if mask is None else _with_batch(_is_open(mask).expand(wanted))
    q_BHQK, k_BHSK = _with_batch(query).float(), _with_batch(key).float()
    batch, heads, length, width = q_BHQK.shape
    keys = k_BHSK.shape[-2]
    q_BGHQK = q_BHQK.reshape(batch, k_BHSK.shape[1], -1, length, width)
    k_BGHKS = k_BHSK.transpose(-2, -1)[:, :, None]
    factor = 1 / math.sqrt(width) if scale is None else scale
    block = max(1, _BLOCK // (batch * heads * keys))
    largest = []
    for start in range(0, length, block):
        rows = slice(start, start + block)
        logits_BHQS = (factor * (q_BGHQK[..., rows, :] @ k_BGHKS)).flatten(1, 2).abs()
        if mask is not None:
            logits_BHQS = logits_BHQS.masked_fill(~mask[..., rows, :], 0.0)
        if is_causal:
            queries = torch.arange(length, device=query.device)[rows, None]
            later = torch.arange(keys, device=query.device) > queries
            logits_BHQS = logits_BHQS.masked_fill(later, 0.0)
        largest.append(logits_BHQS.amax((0, 2, 3)))
    return torch.stack(largest).amax(0)


def head_logits_of_scores(scores: Tensor) -> Tensor:
    """Returns the largest absolute logit of each head, from the input of a softmax.

    Masks are recognised as in `score_statistics`; a bias is counted, as it cannot be separated
    from the rest.

    Args:
        scores: shape ``(batch, heads, queries, keys)``, or without the batch.

    Returns:
        Shape ``(heads,)``, float32.
    """
    _, logits_BHQS = _without_masked(_with_batch(scores))
    return logits_BHQS.abs().amax((0, 2, 3))


def _without_masked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where a mask is certain, and the scores in float32 with 0 where one is likely."""
    closed = scores <= _CLOSED.get(scores.dtype, _CLOSED_ELSE)
    scores = scores.float()
    top = scores.amax(-1, keepdim=True)
    return closed, scores.masked_fill(closed | (scores < top - _ADDED) | (top < -_ADDED), 0.0)


def _is_open(mask: Tensor) -> Tensor:
    """Returns True where a query may attend, for a mask of bools or of numbers to add."""
    return mask if mask.dtype == torch.bool else mask > -_ADDED


def _with_batch(tensor: Tensor) -> Tensor:
    """Returns a view of four dimensions, of which the first holds the sequences."""
    return tensor[None] if tensor.dim() == 3 else tensor.flatten(0, -4)


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
