"""The encoder-decoder Transformer that translates classical into modern Chinese.

What is notable:

- Plain ``nn.Module``s; no Lightning, no trainer, no tokenizer.
- One mask convention, stated in `models.translation.masks`: True means "may attend"; to read it
  the other way round is a fault to rehearse.
- A query that may attend to nothing yields zero, never NaN, in both attention implementations.
- Pre-norm or post-norm, LayerNorm or RMSNorm, ReLU or SwiGLU; final norms on both stacks.
- Sinusoidal positions; embeddings scaled by sqrt(d_model) so that positions do not drown them.
- One matrix embeds source and target and projects to the vocabulary, unless untied.
- A cache of keys and values makes a decoding step cost one position instead of all of them.
- Three initialisations: Xavier; inner gains zero; all gains zero, the "zombie" that stalls.

Letters of the shape suffixes: B batch, S source, T target, L either, D model width, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from models.translation.config import TransformerConfig
from models.translation.initialisation import initialise
from models.translation.layers import DecoderLayer, EncoderLayer, LayerCache, make_norm
from models.translation.masks import causal_mask, padding_mask


def sinusoidal_positions(max_length: int, d_model: int) -> Tensor:
    """Compute the table of positions, float32 of shape (L, D), sines and cosines interleaved.

    sin(p w_i) and cos(p w_i) with w_i = 10000^(-2i/D) (Vaswani et al. 2017, section 3.5).
    """
    position_L1 = torch.arange(max_length, dtype=torch.float32)[:, None]
    exponent_D = torch.arange(0, d_model, 2, dtype=torch.float32) / d_model
    angle_LD = position_L1 * torch.exp(-math.log(10_000.0) * exponent_D)
    return torch.stack((angle_LD.sin(), angle_LD.cos()), dim=-1).flatten(1)


class DecoderCache:
    """The keys and values of every decoder layer, and how many positions they cover."""

    def __init__(self, n_layers: int) -> None:
        """Start empty."""
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.length = 0

    def select(self, rows_B: Tensor) -> None:
        """Keep the given batch rows, in that order, as beam search needs it."""
        for layer in self.layers:
            layer.select(rows_B)


class Encoder(nn.Module):
    """The layers that read the source, and their final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build `n_encoder_layers` layers."""
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layers))
        self.norm = make_norm(config)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """Encode the embedded source."""
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask_B11S)
        normed_BSD: Tensor = self.norm(x_BSD)
        return normed_BSD


class Decoder(nn.Module):
    """The layers that write the target, and their final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build `n_decoder_layers` layers."""
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layers))
        self.norm = make_norm(config)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor,
        target_mask: Tensor,
        memory_mask: Tensor,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Decode the embedded target against the encoded source."""
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x_BTD = layer(x_BTD, memory_BSD, target_mask, memory_mask, layer_cache)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD


class Transformer(nn.Module):
    """Encoder and decoder between one embedding and one projection.

    Raises:
        ValueError: The configuration has no vocabulary size, or a sequence is too long.
    """

    positions_LD: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        """Build and initialise the network that `config` describes."""
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
        """Give the logits (B, T, V) of the token after each target position (teacher forcing)."""
        return self.decode(target_BT, self.encode(source_BS), source_BS)

    def encode(self, source_BS: Tensor) -> Tensor:
        """Encode padded source ids into a memory of shape (B, S, D)."""
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
        """Give the logits (B, T, V) for `target_BT`, of which a cache has seen the beginning.

        Args:
            target_BT: Target ids from bos on; with a cache only those it has not seen yet.
            memory_BSD: What `encode` made of the source.
            source_BS: The source ids, for their padding.
            cache: Extended in place. Padding may then follow eos, but must not precede a token.
        """
        seen = 0 if cache is None else cache.length
        n_new = target_BT.shape[1]
        target_mask = causal_mask(n_new, seen + n_new, target_BT.device)
        if cache is None:
            target_mask = target_mask & padding_mask(target_BT, self.config.pad_id)
        else:
            cache.length += n_new
        memory_mask = padding_mask(source_BS, self.config.pad_id)
        x_BTD = self._embed(self.target_embedding, target_BT, seen)
        x_BTD = self.decoder(x_BTD, memory_BSD, target_mask, memory_mask, cache)
        logits_BTV: Tensor = self.projection(x_BTD)
        return logits_BTV

    def new_cache(self) -> DecoderCache:
        """Make an empty cache for `decode`."""
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
