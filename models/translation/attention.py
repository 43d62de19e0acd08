"""Multi-head attention with two implementations of scaled dot-product attention.

`manual_attention` computes the formula step by step; `fused_attention` calls torch's kernel. Both
give the same outputs and gradients. A query that may attend to no key gets a zero output in both:
a plain softmax over a fully masked row is NaN, which makes every gradient of the batch NaN.
Masks follow `models.translation.masks`: True means "may attend".

Shape suffixes: B batch, H heads, Q query length, S key length, K head dimension, D model
dimension, L sequence length, 1 broadcast.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.translation.config import AttentionKind


class KeyValue(NamedTuple):
    """Projected keys and values of one attention block, split into heads."""

    key_BHSK: Tensor
    value_BHSK: Tensor

    def append(self, new: "KeyValue") -> "KeyValue":
        """Returns these keys and values followed by those of later positions."""
        return KeyValue(*(torch.cat(pair, dim=2) for pair in zip(self, new, strict=True)))

    def select(self, rows_B: Tensor) -> "KeyValue":
        """Returns the batch rows with these indices; an index may occur more than once."""
        return KeyValue(self.key_BHSK[rows_B], self.value_BHSK[rows_B])


def manual_attention(
    query_BHQK: Tensor,
    key_BHSK: Tensor,
    value_BHSK: Tensor,
    mask_B1QS: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Computes softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017, equation 1).

    Scales the query before the product, so that half precision overflows later.
    """
    safe_mask_B1QS, has_key_B1Q1 = _unmask_empty_rows(mask_B1QS)
    scaled_BHQK = query_BHQK / math.sqrt(query_BHQK.shape[-1])
    scores_BHQS = (scaled_BHQK @ key_BHSK.transpose(-2, -1)).masked_fill(~safe_mask_B1QS, -math.inf)
    weights_BHQS = F.dropout(scores_BHQS.softmax(dim=-1), dropout)
    return (weights_BHQS.to(value_BHSK.dtype) @ value_BHSK).masked_fill(~has_key_B1Q1, 0.0)


def fused_attention(
    query_BHQK: Tensor,
    key_BHSK: Tensor,
    value_BHSK: Tensor,
    mask_B1QS: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Computes the same output with `torch.nn.functional.scaled_dot_product_attention`."""
    safe_mask_B1QS, has_key_B1Q1 = _unmask_empty_rows(mask_B1QS)
    attended_BHQK = F.scaled_dot_product_attention(
        query_BHQK, key_BHSK, value_BHSK, attn_mask=safe_mask_B1QS, dropout_p=dropout
    )
    return attended_BHQK.masked_fill(~has_key_B1Q1, 0.0)


def _unmask_empty_rows(mask_B1QS: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mask with fully masked rows opened, and which rows have at least one key."""
    has_key_B1Q1 = mask_B1QS.any(dim=-1, keepdim=True)
    return mask_B1QS | ~has_key_B1Q1, has_key_B1Q1


ATTENTION_FUNCTIONS = {"manual": manual_attention, "sdpa": fused_attention}


class MultiHeadAttention(nn.Module):
    """Multi-head attention with separate query, key, value and output projections.

    `project` computes keys and values outside `forward`, so that a decoder can cache them.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        attention: AttentionKind = "sdpa",
        *,
        invert_mask: bool = False,
    ) -> None:
        """Creates the four projections, each `d_model` x `d_model`.

        Args:
            d_model: Input and output dimension.
            n_heads: Number of heads, each of dimension d_model / n_heads.
            dropout: Dropout probability of the attention weights.
            attention: Implementation, `manual` or `sdpa`.
            invert_mask: Reads True as "may not attend"; a deliberate fault for experiments.
        """
        super().__init__()
        self.invert_mask = invert_mask
        self.n_heads = n_heads
        self.dropout = dropout
        self.attend = ATTENTION_FUNCTIONS[attention]
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def project(self, memory_BSD: Tensor) -> KeyValue:
        """Projects the attended sequence to keys and values."""
        return KeyValue(
            self._split_heads(self.key(memory_BSD)), self._split_heads(self.value(memory_BSD))
        )

    def forward(self, x_BQD: Tensor, memory: KeyValue, mask_B1QS: Tensor) -> Tensor:
        """Attends from each position of `x_BQD` to the keys in `memory` that the mask allows."""
        dropout = self.dropout if self.training else 0.0
        if self.invert_mask:
            mask_B1QS = ~mask_B1QS
        query_BHQK = self._split_heads(self.query(x_BQD))
        attended_BHQK = self.attend(query_BHQK, *memory, mask_B1QS, dropout)
        out_BQD: Tensor = self.output(attended_BHQK.transpose(1, 2).flatten(2))
        return out_BQD

    def _split_heads(self, x_BLD: Tensor) -> Tensor:
        batch_size, length, d_model = x_BLD.shape
        d_head = d_model // self.n_heads
        return x_BLD.view(batch_size, length, self.n_heads, d_head).transpose(1, 2)
