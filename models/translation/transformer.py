"""Encoder-decoder Transformer (Vaswani et al. 2017) that translates Classical Chinese.

Properties:

- Plain ``nn.Module``s without Lightning or a tokenizer.
- One mask convention, `models.translation.masks`: True means "may attend".
- A query that may attend to no key gives zero, never NaN, in both attention implementations.
- Pre-norm or post-norm, LayerNorm or RMSNorm, ReLU or SwiGLU; a final norm after each stack.
- Sinusoidal positions; embeddings scaled by sqrt(d_model).
- One matrix for both embeddings and the output projection, unless untied.
- A key-value cache, with which a decoding step computes one position instead of all.
- Initialisations `xavier`, `inner_zero` and `zombie` (`models.translation.initialisation`).

Shape suffixes: B batch, S source length, T target length, L either length, D model dimension,
V vocabulary size, 1 broadcast.
"""

import math

import torch
from torch import Tensor, nn

from models.translation.config import TransformerConfig
from models.translation.initialisation import initialise
from models.translation.layers import DecoderLayer, EncoderLayer, LayerCache, make_norm
from models.translation.masks import causal_mask, padding_mask


def sinusoidal_positions(max_length: int, d_model: int) -> Tensor:
    """Computes sinusoidal position encodings: float32 (L, D), sines and cosines interleaved.

    Position p has sin(p w_i) and cos(p w_i), w_i = 10000^(-2i/D) (Vaswani et al. 2017, sec. 3.5).
    """
    position_L1 = torch.arange(max_length, dtype=torch.float32)[:, None]
    exponent_D = torch.arange(0, d_model, 2, dtype=torch.float32) / d_model
    angle_LD = position_L1 * torch.exp(-math.log(10_000.0) * exponent_D)
    return torch.stack((angle_LD.sin(), angle_LD.cos()), dim=-1).flatten(1)


class DecoderCache:
    """Cached keys and values of all decoder layers, and the number of cached positions."""

    def __init__(self, n_layers: int) -> None:
        """Creates an empty cache."""
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.length = 0

    def select(self, rows_B: Tensor) -> None:
        """Keeps the batch rows with these indices, in this order; used by beam search."""
        for layer in self.layers:
            layer.select(rows_B)


class Encoder(nn.Module):
    """Encoder layers and a final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """Creates `n_encoder_layers` layers."""
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layers))
        self.norm = make_norm(config)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """Encodes the embedded source."""
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask_B11S)
        normed_BSD: Tensor = self.norm(x_BSD)
        return normed_BSD


class Decoder(nn.Module):
    """Decoder layers and a final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """Creates `n_decoder_layers` layers."""
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layers))
        self.norm = make_norm(config)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor,
        target_mask: Tensor,
        memory_mask_B11S: Tensor,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Decodes the embedded target with cross-attention to the encoded source."""
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x_BTD = layer(x_BTD, memory_BSD, target_mask, memory_mask_B11S, layer_cache)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD


class Transformer(nn.Module):
    """Encoder-decoder Transformer with embeddings and output projection.

    Raises:
        ValueError: The configuration has no vocabulary size, or a sequence exceeds `max_length`.
    """

    positions_LD: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        """Creates and initialises the network."""
        super().__init__()
        if config.vocabulary_size is None:
            raise ValueError(
                "vocabulary_size=None: the network needs the size of its vocabulary; set it with "
                "dataclasses.replace(config, vocabulary_size=len(vocabulary))"
            )
        self.config = config
        self.source_embedding = nn.Embedding(config.vocabulary_size, config.d_model)
        self.target_embedding = nn.Embedding(config.vocabulary_size, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.projection = nn.Linear(config.d_model, config.vocabulary_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        positions_LD = sinusoidal_positions(config.max_length, config.d_model)
        self.register_buffer("positions_LD", positions_LD, persistent=False)
        if config.tie_weights:
            self.target_embedding.weight = self.source_embedding.weight
            self.projection.weight = self.source_embedding.weight
        initialise(self, config)

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """Returns the logits (B, T, V) of the token after each target position."""
        return self.decode(target_BT, self.encode(source_BS), source_BS)

    def encode(self, source_BS: Tensor) -> Tensor:
        """Encodes padded source ids; returns the memory (B, S, D)."""
        x_BSD = self._embed(self.source_embedding, source_BS, 0)
        encoded_BSD: Tensor = self.encoder(x_BSD, padding_mask(source_BS, self.config.pad_id))
        return encoded_BSD

    def decode(
        self,
        target_BT: Tensor,
        memory_BSD: Tensor,
        source_BS: Tensor,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Returns the logits (B, T, V) of the token after each position of `target_BT`.

        Args:
            target_BT: Target ids from bos on; with a cache, only the ids that are not cached yet.
            memory_BSD: Output of `encode`.
            source_BS: Source ids, which determine the padding mask of the memory.
            cache: Key-value cache, updated in place. With a cache, padding is not masked in the
                target and may only follow eos.
        """
        n_cached = 0 if cache is None else cache.length
        n_new = target_BT.shape[1]
        target_mask = causal_mask(n_new, n_cached + n_new, target_BT.device)
        if cache is None:
            target_mask = target_mask & padding_mask(target_BT, self.config.pad_id)
        else:
            cache.length += n_new
        memory_mask_B11S = padding_mask(source_BS, self.config.pad_id)
        x_BTD = self._embed(self.target_embedding, target_BT, n_cached)
        x_BTD = self.decoder(x_BTD, memory_BSD, target_mask, memory_mask_B11S, cache)
        logits_BTV: Tensor = self.projection(x_BTD)
        return logits_BTV

    def new_cache(self) -> DecoderCache:
        """Returns an empty cache for `decode`."""
        return DecoderCache(self.config.n_decoder_layers)

    def _embed(self, embedding: nn.Embedding, ids_BL: Tensor, offset: int) -> Tensor:
        end = offset + ids_BL.shape[1]
        if end > self.config.max_length:
            raise ValueError(
                f"a sequence of {end} tokens exceeds max_length={self.config.max_length}; "
                f"shorten it or build the network with a larger max_length"
            )
        x_BLD = embedding(ids_BL)
        if self.config.scale_embedding:
            x_BLD = x_BLD * math.sqrt(self.config.d_model)
        embedded_BLD: Tensor = self.dropout(x_BLD + self.positions_LD[offset:end])
        return embedded_BLD
