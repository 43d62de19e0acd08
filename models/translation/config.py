"""The shape of a translation Transformer as one frozen dataclass, checked on construction.

It imports nothing but the standard library, so a configuration can be read and checked
without torch.
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
    """Everything that decides the network; the defaults make a small one of about 1M weights.

    Raises:
        ValueError: A size is not positive, the heads do not divide the width, the width is odd,
            the dropout is not in [0, 1), a choice is unknown, or `inner_zero` meets post-norm.
    """

    vocabulary_size: int | None = None
    """Number of token ids, the special ones included; None until the data are known."""
    d_model: int = 128
    """Width of the residual stream; even, for sine and cosine, and divisible by `n_heads`."""
    n_heads: int = 4
    """Attention heads, each of width d_model / n_heads."""
    n_encoder_layers: int = 2
    """Layers that read the source."""
    n_decoder_layers: int = 2
    """Layers that write the target."""
    d_feedforward: int = 256
    """Hidden width of the feedforward; SwiGLU has three matrices of it where ReLU has two."""
    dropout: float = 0.1
    """Probability for embeddings, attention weights and sublayer outputs."""
    max_length: int = 64
    """Longest source or target, in tokens with bos and eos."""
    norm_position: NormPosition = "pre"
    """`pre` normalises what enters a sublayer, `post` what leaves the residual sum."""
    norm: Norm = "layernorm"
    """`rmsnorm` has a gain and no bias, and does not subtract the mean."""
    feedforward: FeedForwardKind = "relu"
    """`swiglu` is silu(x W) * (x V) before the output matrix (Shazeer 2020)."""
    scale_embedding: bool = True
    """Multiply embeddings by sqrt(d_model), so that positions of amplitude 1 do not drown them."""
    tie_weights: bool = True
    """One matrix for source embedding, target embedding and output projection."""
    attention: AttentionKind = "sdpa"
    """`manual` writes the formula out, `sdpa` calls torch's kernel; equal to rounding."""
    mask_convention: MaskConvention = "attend"
    """How attention reads True in a mask. `masked`, as "may not attend" where every mask says "may
    attend", is a fault to rehearse: padding and the future are all that is seen."""
    init: Init = "xavier"
    """`inner_zero`: gains of the inner norms 0. `zombie`: all gains 0, a fault to rehearse."""
    pad_id: int = 0
    """Token id that no query may attend to and no loss counts."""

    def __post_init__(self) -> None:
        """Check each value, then the values against each other."""
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
                "puts the residual stream itself through the inner norms, whose zero gains erase it"
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
                f"vocabulary_size={self.vocabulary_size} must exceed pad_id={self.pad_id}; leave "
                f"it out to take it from the data"
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
