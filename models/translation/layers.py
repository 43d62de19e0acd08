"""The encoder and decoder layers: attention and feedforward sublayers on a residual stream.

Letters of the shape suffixes: B batch, S source, T target, L either, D model width, F hidden
width of the feedforward, Q queries, 1 broadcast.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from models.translation.attention import KeyValue, MultiHeadAttention
from models.translation.config import TransformerConfig


@dataclass
class LayerCache:
    """What one decoder layer keeps between two steps of decoding."""

    written: KeyValue | None = None
    """Keys and values of the target tokens so far; grows by one step at a time."""
    memory: KeyValue | None = None
    """Keys and values of the source; computed in the first step."""

    def select(self, rows_B: Tensor) -> None:
        """Keep the given batch rows, in that order."""
        self.written = self.written.select(rows_B) if self.written else None
        self.memory = self.memory.select(rows_B) if self.memory else None


def make_norm(config: TransformerConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Build the normalisation that the configuration names, over the model width."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=1e-6)
    return nn.LayerNorm(config.d_model, eps=1e-6)


def make_attention(config: TransformerConfig) -> MultiHeadAttention:
    """Build an attention block of the configured width, heads, implementation and convention."""
    return MultiHeadAttention(
        config.d_model,
        config.n_heads,
        config.dropout,
        config.attention,
        inverted=config.mask_convention == "masked",
    )


class FeedForward(nn.Module):
    """Two matrices with ReLU between them, or three with the SwiGLU gate (Shazeer 2020, eq. 6)."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the matrices; `gate` is None under ReLU."""
        super().__init__()
        gated = config.feedforward == "swiglu"
        self.hidden = nn.Linear(config.d_model, config.d_feedforward)
        self.gate = nn.Linear(config.d_model, config.d_feedforward) if gated else None
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.d_feedforward, config.d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Transform each position by itself."""
        if self.gate is None:
            hidden_BLF = F.relu(self.hidden(x_BLD))
        else:
            hidden_BLF = F.silu(self.gate(x_BLD)) * self.hidden(x_BLD)
        out_BLD: Tensor = self.output(self.dropout(hidden_BLF))
        return out_BLD


class Residual(nn.Module):
    """One residual sum with its norm: x + f(norm(x)) under pre-norm, norm(x + f(x)) under post."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the norm and the dropout on the sublayer's output."""
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the sublayer's output to the stream."""
        if self.pre:
            out_BLD: Tensor = x_BLD + self.dropout(sublayer(self.norm(x_BLD)))
        else:
            out_BLD = self.norm(x_BLD + self.dropout(sublayer(x_BLD)))
        return out_BLD


class EncoderLayer(nn.Module):
    """Self-attention over the source, then the feedforward."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build both sublayers."""
        super().__init__()
        self.self_attention = make_attention(config)
        self.feedforward = FeedForward(config)
        self.attention_residual = Residual(config)
        self.feedforward_residual = Residual(config)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """Read the source once more; padding is seen by nobody."""

        def look(normed_BSD: Tensor) -> Tensor:
            attended: Tensor = self.self_attention(
                normed_BSD, self.self_attention.project(normed_BSD), mask_B11S
            )
            return attended

        attended_BSD = self.attention_residual(x_BSD, look)
        out_BSD: Tensor = self.feedforward_residual(attended_BSD, self.feedforward)
        return out_BSD


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the encoded source, then the feedforward."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the three sublayers."""
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
        target_mask_B1TQ: Tensor,
        memory_mask_B11S: Tensor,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Write T target positions; with a cache they follow the ones written before.

        Args:
            x_BTD: The stream of the target positions, new ones only when there is a cache.
            memory_BSD: The encoded source.
            target_mask_B1TQ: Which target positions, cached ones included, each may attend to.
            memory_mask_B11S: Which source positions may be attended to.
            cache: Read and extended in place.
        """

        def look_back(normed_BTD: Tensor) -> Tensor:
            written = _remember(self.self_attention.project(normed_BTD), cache)
            attended: Tensor = self.self_attention(normed_BTD, written, target_mask_B1TQ)
            return attended

        def look_at_source(normed_BTD: Tensor) -> Tensor:
            memory = _recall(self.cross_attention, memory_BSD, cache)
            attended: Tensor = self.cross_attention(normed_BTD, memory, memory_mask_B11S)
            return attended

        looked_BTD = self.cross_residual(self.self_residual(x_BTD, look_back), look_at_source)
        out_BTD: Tensor = self.feedforward_residual(looked_BTD, self.feedforward)
        return out_BTD


def _remember(new: KeyValue, cache: LayerCache | None) -> KeyValue:
    """Append the new keys and values to the cache, and return all of them."""
    if cache is None:
        return new
    cache.written = new if cache.written is None else cache.written.extend(new)
    return cache.written


def _recall(block: MultiHeadAttention, memory_BSD: Tensor, cache: LayerCache | None) -> KeyValue:
    """Project the source, once per sentence when there is a cache."""
    if cache is None:
        return block.project(memory_BSD)
    if cache.memory is None:
        cache.memory = block.project(memory_BSD)
    return cache.memory
