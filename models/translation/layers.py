"""Encoder and decoder layers: attention and feedforward sublayers with residual connections.

Shape suffixes: B batch, S source length, T target length, L either length, P target positions
including cached ones, D model dimension, F hidden dimension of the feedforward, 1 broadcast.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from models.translation.attention import KeyValue, MultiHeadAttention
from models.translation.config import TransformerConfig


@dataclass
class LayerCache:
    """Cached keys and values of one decoder layer."""

    self_kv: KeyValue | None = None
    """Keys and values of the target tokens so far; grows at every decoding step."""
    cross_kv: KeyValue | None = None
    """Keys and values of the encoded source; computed in the first step."""

    def select(self, rows_B: Tensor) -> None:
        """Keeps the batch rows with these indices, in this order."""
        self.self_kv = self.self_kv.select(rows_B) if self.self_kv else None
        self.cross_kv = self.cross_kv.select(rows_B) if self.cross_kv else None


def make_norm(config: TransformerConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Creates the configured normalisation over `d_model`."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=1e-6)
    return nn.LayerNorm(config.d_model, eps=1e-6)


def make_attention(config: TransformerConfig) -> MultiHeadAttention:
    """Creates an attention block from the configuration."""
    return MultiHeadAttention(
        config.d_model,
        config.n_heads,
        config.dropout,
        config.attention,
        invert_mask=config.mask_convention == "masked",
    )


class FeedForward(nn.Module):
    """Position-wise feedforward network with ReLU or SwiGLU (Shazeer 2020, equation 6)."""

    def __init__(self, config: TransformerConfig) -> None:
        """Creates the linear layers; `gate` is None with ReLU."""
        super().__init__()
        gated = config.feedforward == "swiglu"
        self.hidden = nn.Linear(config.d_model, config.d_feedforward)
        self.gate = nn.Linear(config.d_model, config.d_feedforward) if gated else None
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.d_feedforward, config.d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Transforms each position independently."""
        if self.gate is None:
            hidden_BLF = F.relu(self.hidden(x_BLD))
        else:
            hidden_BLF = F.silu(self.gate(x_BLD)) * self.hidden(x_BLD)
        out_BLD: Tensor = self.output(self.dropout(hidden_BLF))
        return out_BLD


class Residual(nn.Module):
    """Residual connection: x + f(norm(x)) in pre-norm, norm(x + f(x)) in post-norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """Creates the norm and the dropout of the sublayer's output."""
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Adds the output of `sublayer` to the residual stream."""
        if self.pre_norm:
            out_BLD: Tensor = x_BLD + self.dropout(sublayer(self.norm(x_BLD)))
        else:
            out_BLD = self.norm(x_BLD + self.dropout(sublayer(x_BLD)))
        return out_BLD


class EncoderLayer(nn.Module):
    """Self-attention over the source, then the feedforward network."""

    def __init__(self, config: TransformerConfig) -> None:
        """Creates the two sublayers."""
        super().__init__()
        self.self_attention = make_attention(config)
        self.feedforward = FeedForward(config)
        self.attention_residual = Residual(config)
        self.feedforward_residual = Residual(config)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """Applies the layer to source positions; no position attends to padding."""

        def self_attend(in_BSD: Tensor) -> Tensor:
            attended_BSD: Tensor = self.self_attention(
                in_BSD, self.self_attention.project(in_BSD), mask_B11S
            )
            return attended_BSD

        x_BSD = self.attention_residual(x_BSD, self_attend)
        out_BSD: Tensor = self.feedforward_residual(x_BSD, self.feedforward)
        return out_BSD


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the encoded source, then the feedforward."""

    def __init__(self, config: TransformerConfig) -> None:
        """Creates the three sublayers."""
        super().__init__()
        self.self_attention = make_attention(config)
        self.cross_attention = make_attention(config)
        self.feedforward = FeedForward(config)
        self.self_residual = Residual(config)
        self.cross_residual = Residual(config)
        self.feedforward_residual = Residual(config)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor,
        target_mask_B1TP: Tensor,
        memory_mask_B11S: Tensor,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Applies the layer to T target positions, which follow any cached positions.

        Args:
            x_BTD: Residual stream of the target positions; with a cache, of the new ones only.
            memory_BSD: Encoder output.
            target_mask_B1TP: Target positions, cached ones included, that each may attend to.
            memory_mask_B11S: Source positions that may be attended to.
            cache: Keys and values of this layer, updated in place.
        """

        def self_attend(in_BTD: Tensor) -> Tensor:
            key_value = _append_self_kv(self.self_attention.project(in_BTD), cache)
            attended_BTD: Tensor = self.self_attention(in_BTD, key_value, target_mask_B1TP)
            return attended_BTD

        def cross_attend(in_BTD: Tensor) -> Tensor:
            key_value = _cross_kv(self.cross_attention, memory_BSD, cache)
            attended_BTD: Tensor = self.cross_attention(in_BTD, key_value, memory_mask_B11S)
            return attended_BTD

        x_BTD = self.cross_residual(self.self_residual(x_BTD, self_attend), cross_attend)
        out_BTD: Tensor = self.feedforward_residual(x_BTD, self.feedforward)
        return out_BTD


def _append_self_kv(new: KeyValue, cache: LayerCache | None) -> KeyValue:
    """Appends keys and values of new target positions to the cache and returns all of them."""
    if cache is None:
        return new
    cache.self_kv = new if cache.self_kv is None else cache.self_kv.append(new)
    return cache.self_kv


def _cross_kv(
    attention: MultiHeadAttention, memory_BSD: Tensor, cache: LayerCache | None
) -> KeyValue:
    """Returns keys and values of the source; with a cache they are projected only once."""
    if cache is None:
        return attention.project(memory_BSD)
    if cache.cross_kv is None:
        cache.cross_kv = attention.project(memory_BSD)
    return cache.cross_kv
