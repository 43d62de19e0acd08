"""Scaled dot-product attention twice over, and the multi-head block around it.

`manual_attention` writes the formula out; `fused_attention` calls torch's kernel. They agree in
outputs and gradients, also for a query that may attend to nothing: its mixture is zero, where a
plain softmax over an empty row would be NaN and would poison every gradient of the batch.
Masks follow `models.translation.masks`: True means "may attend".

Letters of the shape suffixes: B batch, H heads, Q queries, S keys, K width of a head, D model
width, 1 broadcast.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AttentionName = Literal["manual", "sdpa"]


class KeyValue(NamedTuple):
    """The projected keys and values of one attention block, ready to be attended to."""

    key_BHSK: Tensor
    value_BHSK: Tensor

    def extend(self, newer: "KeyValue") -> "KeyValue":
        """Append the keys and values of later positions."""
        return KeyValue(*(torch.cat(pair, dim=2) for pair in zip(self, newer, strict=True)))

    def select(self, rows_B: Tensor) -> "KeyValue":
        """Pick batch rows, in the order given; a row may be picked more than once."""
        return KeyValue(self.key_BHSK[rows_B], self.value_BHSK[rows_B])


def manual_attention(
    query_BHQK: Tensor,
    key_BHSK: Tensor,
    value_BHSK: Tensor,
    mask_B1QS: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Mix values by softmax(q k / sqrt(K)), written out (Vaswani et al. 2017, equation 1).

    The query is scaled before the product, so that half precision overflows later.
    """
    open_B1QS, some_B1Q1 = _open_empty_rows(mask_B1QS)
    scaled_BHQK = query_BHQK / math.sqrt(query_BHQK.shape[-1])
    scores_BHQS = (scaled_BHQK @ key_BHSK.transpose(-2, -1)).masked_fill(~open_B1QS, -math.inf)
    weights_BHQS = F.dropout(scores_BHQS.softmax(dim=-1), dropout)
    return (weights_BHQS.to(value_BHSK.dtype) @ value_BHSK).masked_fill(~some_B1Q1, 0.0)


def fused_attention(
    query_BHQK: Tensor,
    key_BHSK: Tensor,
    value_BHSK: Tensor,
    mask_B1QS: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the same mixture with `scaled_dot_product_attention`."""
    open_B1QS, some_B1Q1 = _open_empty_rows(mask_B1QS)
    mixed_BHQK = F.scaled_dot_product_attention(
        query_BHQK, key_BHSK, value_BHSK, attn_mask=open_B1QS, dropout_p=dropout
    )
    return mixed_BHQK.masked_fill(~some_B1Q1, 0.0)


def _open_empty_rows(mask_B1QS: Tensor) -> tuple[Tensor, Tensor]:
    """Open the rows in which nothing may be attended, and tell which rows were not so."""
    some_B1Q1 = mask_B1QS.any(dim=-1, keepdim=True)
    return mask_B1QS | ~some_B1Q1, some_B1Q1


ATTENTIONS = {"manual": manual_attention, "sdpa": fused_attention}


class MultiHeadAttention(nn.Module):
    """Attention in `n_heads` subspaces, joined by an output projection.

    Keys and values are projected by `project`, apart from `forward`, so that a decoder can keep
    them between steps.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        attention: AttentionName = "sdpa",
        *,
        inverted: bool = False,
    ) -> None:
        """Build four square projections of width `d_model`.

        Args:
            d_model: Width of what goes in and out.
            n_heads: Heads, each of width d_model / n_heads.
            dropout: Probability for an attention weight.
            attention: Which implementation.
            inverted: Whether True is read as "may not attend": a fault to rehearse.
        """
        super().__init__()
        self.inverted = inverted
        self.n_heads = n_heads
        self.dropout = dropout
        self.attend = ATTENTIONS[attention]
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def project(self, memory_BSD: Tensor) -> KeyValue:
        """Turn the attended sequence into keys and values."""
        return KeyValue(self._split(self.key(memory_BSD)), self._split(self.value(memory_BSD)))

    def forward(self, x_BQD: Tensor, memory: KeyValue, mask_B1QS: Tensor) -> Tensor:
        """Let each position of `x_BQD` gather from `memory` what the mask allows."""
        dropout = self.dropout if self.training else 0.0
        if self.inverted:
            mask_B1QS = ~mask_B1QS
        mixed_BHQK = self.attend(self._split(self.query(x_BQD)), *memory, mask_B1QS, dropout)
        joined_BQD: Tensor = self.output(mixed_BHQK.transpose(1, 2).flatten(2))
        return joined_BQD

    def _split(self, x_BLD: Tensor) -> Tensor:
        n_rows, length, width = x_BLD.shape
        return x_BLD.view(n_rows, length, self.n_heads, width // self.n_heads).transpose(1, 2)
