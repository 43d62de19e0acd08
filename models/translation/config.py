"""Configuration of the translation Transformer: a frozen dataclass, validated on construction.

Imports only the standard library, so that a configuration can be checked without torch.
"""

from dataclasses import dataclass
from typing import Literal, get_args

NormPosition = Literal["pre", "post"]
Norm = Literal["layernorm", "rmsnorm"]
FeedForwardKind = Literal["relu", "swiglu"]
AttentionKind = Literal["manual", "sdpa"]
Init = Literal["xavier", "inner_zero", "zombie"]
MaskConvention = Literal["attend", "masked"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Hyperparameters of the network; the defaults give about 0.7M parameters with the grammar.

    Raises:
        ValueError: A size is not positive, `n_heads` does not divide `d_model`, `d_model` is odd,
            `dropout` is not in [0, 1), a choice is unknown, or `inner_zero` is combined with
            post-norm.
    """

    vocabulary_size: int | None = None
    """Number of token ids, special tokens included; None until the vocabulary is known."""
    d_model: int = 128
    """Dimension of embeddings and residual stream; even and divisible by `n_heads`."""
    n_heads: int = 4
    """Number of attention heads, each of dimension d_model / n_heads."""
    n_encoder_layers: int = 2
    """Number of encoder layers."""
    n_decoder_layers: int = 2
    """Number of decoder layers."""
    d_feedforward: int = 256
    """Hidden dimension of the feedforward network (d_ff); SwiGLU has three matrices, ReLU two."""
    dropout: float = 0.1
    """Dropout probability of embeddings, attention weights, hidden layers and sublayer outputs."""
    max_length: int = 64
    """Longest source or target in tokens, bos and eos included."""
    norm_position: NormPosition = "pre"
    """`pre` normalises the input of each sublayer (Xiong et al. 2020), `post` the residual sum."""
    norm: Norm = "layernorm"
    """`rmsnorm` has a gain but no bias and does not subtract the mean (Zhang & Sennrich 2019)."""
    feedforward: FeedForwardKind = "relu"
    """`swiglu` computes silu(x W) * (x V) before the output matrix (Shazeer 2020)."""
    scale_embedding: bool = True
    """Multiplies embeddings by sqrt(d_model), so that the positions do not dominate them."""
    tie_weights: bool = True
    """Shares one matrix among source embedding, target embedding and output projection."""
    attention: AttentionKind = "sdpa"
    """`manual` computes the formula, `sdpa` calls torch's kernel; equal up to rounding."""
    mask_convention: MaskConvention = "attend"
    """How attention reads True in a mask. `masked` reads it as "may not attend", although every
    mask means "may attend": a deliberate fault in which only padding and the future are visible."""
    init: Init = "xavier"
    """`inner_zero` sets the gains of the inner norms to 0; `zombie` sets all gains to 0, a
    deliberate fault."""
    pad_id: int = 0
    """Token id of padding, which attention masks and the loss ignores."""

    def __post_init__(self) -> None:
        """Checks each value, then the combinations."""
        self._check_sizes()
        self._check_choices()
        if self.d_model % 2 or self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} must be even and divisible by n_heads={self.n_heads}; "
                f"choose a multiple of {2 * self.n_heads}"
            )
        if self.init == "inner_zero" and self.norm_position == "post":
            raise ValueError(
                "init='inner_zero' needs norm_position='pre', got norm_position='post': post-norm "
                "passes the residual stream through the inner norms, whose zero gains erase it"
            )

    def _check_sizes(self) -> None:
        sizes = {
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "n_encoder_layers": self.n_encoder_layers,
            "n_decoder_layers": self.n_decoder_layers,
            "d_feedforward": self.d_feedforward,
            "max_length": self.max_length,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if self.vocabulary_size is not None and self.vocabulary_size <= self.pad_id:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size} must exceed pad_id={self.pad_id}; omit "
                f"vocabulary_size to take it from the data"
            )
        if self.pad_id < 0:
            raise ValueError(f"pad_id={self.pad_id} must be a token id, 0 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")

    def _check_choices(self) -> None:
        choices = {
            "norm_position": NormPosition,
            "norm": Norm,
            "feedforward": FeedForwardKind,
            "attention": AttentionKind,
            "mask_convention": MaskConvention,
            "init": Init,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {get_args(kind)}"
                )
