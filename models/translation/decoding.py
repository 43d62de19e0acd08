"""Greedy and beam decoding of a trained Transformer, with or without a key-value cache.

Both decode a batch of padded sources and stop when every sentence has an eos or the maximum
length is reached. The cache saves computation and does not change the tokens. Imports only torch
and the network.

Shape suffixes: B batch, S source length, T target length, W beam size, N = B x W,
V vocabulary size, X = W x V.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.translation.transformer import DecoderCache, Transformer
from models.translation.vocabulary import BOS, EOS, PAD


class Decoded(NamedTuple):
    """Decoded tokens and scores of a batch."""

    tokens_BT: Tensor
    """Token ids without bos, with eos, then padding; T is the longest sentence of the batch."""
    score_B: Tensor
    """Sum of log probabilities, eos included, divided by the length penalty; float32."""


@torch.no_grad()
def greedy_decode(
    model: Transformer, source_BS: Tensor, *, max_length: int | None = None, use_cache: bool = True
) -> Decoded:
    """Decodes by taking the most probable token at each step.

    Args:
        model: The network, in eval mode unless dropout is wanted.
        source_BS: Padded source ids.
        max_length: Maximum number of generated tokens, eos included; the model's by default.
        use_cache: Whether to keep keys and values between steps.
    """
    n_steps = _max_steps(model, max_length)
    decoder = _IncrementalDecoder(model, source_BS, use_cache)
    tokens_BT = source_BS.new_full((len(source_BS), 1), BOS)
    score_B = torch.zeros(len(source_BS), device=source_BS.device)
    finished_B = torch.zeros_like(score_B, dtype=torch.bool)
    for _ in range(n_steps):
        log_prob_B, token_B = decoder.next_log_probs(tokens_BT).max(dim=-1)
        token_B = token_B.masked_fill(finished_B, PAD)
        score_B = score_B + log_prob_B.masked_fill(finished_B, 0.0)
        tokens_BT = torch.cat((tokens_BT, token_B[:, None]), dim=1)
        finished_B = finished_B | (token_B == EOS)
        if finished_B.all():
            break
    return Decoded(tokens_BT[:, 1:], score_B)


@torch.no_grad()
def beam_decode(
    model: Transformer,
    source_BS: Tensor,
    *,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    max_length: int | None = None,
    use_cache: bool = True,
) -> Decoded:
    """Decodes by beam search and returns the best sequence of each source.

    A finished sequence stays in the beam with its score. The best sequence has the largest
    log P / lp(T) with lp(T) = ((5 + T) / 6)^a and T tokens, eos included (Wu et al. 2016,
    "Google's neural machine translation system", equation 14). A beam of 1 is greedy decoding.

    Args:
        model: The network, in eval mode unless dropout is wanted.
        source_BS: Padded source ids.
        beam_size: Number W of sequences per source.
        length_penalty: Exponent a: 0 prefers short sentences, 1 is almost the mean per token.
        max_length: Maximum number of generated tokens, eos included; the model's by default.
        use_cache: Whether to keep keys and values between steps.

    Raises:
        ValueError: `beam_size` is less than 1, or `max_length` is out of range.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size={beam_size} must be at least 1")
    n_steps, batch_size = _max_steps(model, max_length), len(source_BS)
    decoder = _IncrementalDecoder(model, source_BS.repeat_interleave(beam_size, dim=0), use_cache)
    tokens_NT = source_BS.new_full((batch_size * beam_size, 1), BOS)
    # All sequences of a source start equal, so only the first one may branch in the first step.
    score_BW = torch.full((batch_size, beam_size), -torch.inf, device=source_BS.device)
    score_BW[:, 0] = 0.0
    first_row_B1 = torch.arange(batch_size, device=source_BS.device)[:, None] * beam_size
    for _ in range(n_steps):
        log_probs_NV = _freeze_finished(decoder.next_log_probs(tokens_NT), tokens_NT)
        n_tokens = log_probs_NV.shape[-1]
        candidate_BX = (score_BW.flatten()[:, None] + log_probs_NV).view(
            batch_size, beam_size * n_tokens
        )
        score_BW, choice_BW = candidate_BX.topk(beam_size, dim=-1)
        rows_N = (first_row_B1 + choice_BW // n_tokens).flatten()
        token_N = (choice_BW % n_tokens).flatten()
        tokens_NT = torch.cat((tokens_NT[rows_N], token_N[:, None]), dim=1)
        decoder.select(rows_N)
        if _finished(tokens_NT).all():
            break
    return _best(tokens_NT[:, 1:].view(batch_size, beam_size, -1), score_BW, length_penalty)


class _IncrementalDecoder:
    """Encodes a batch of sources once and predicts one next token at a time."""

    def __init__(self, model: Transformer, source_NS: Tensor, use_cache: bool) -> None:
        self.model = model
        self.source_NS = source_NS
        self.memory_NSD = model.encode(source_NS)
        self.cache: DecoderCache | None = model.new_cache() if use_cache else None

    def next_log_probs(self, tokens_NT: Tensor) -> Tensor:
        """Returns log probabilities (N, V) of the next token in float32; padding has -inf."""
        new_NT = tokens_NT if self.cache is None else tokens_NT[:, self.cache.length :]
        logits_NTV = self.model.decode(new_NT, self.memory_NSD, self.source_NS, self.cache)
        log_probs_NV = logits_NTV[:, -1].float().log_softmax(dim=-1)
        log_probs_NV[:, PAD] = -torch.inf
        return log_probs_NV

    def select(self, rows_N: Tensor) -> None:
        """Reorders the cache by sequence; rows of one sentence share source and memory."""
        if self.cache is not None:
            self.cache.select(rows_N)


def _max_steps(model: Transformer, max_length: int | None) -> int:
    limit = model.config.max_length
    if max_length is None:
        return limit
    if not 1 <= max_length <= limit:
        raise ValueError(f"max_length={max_length} must be between 1 and the model's {limit}")
    return max_length


def _finished(tokens_NT: Tensor) -> Tensor:
    return (tokens_NT == EOS).any(dim=-1)


def _freeze_finished(log_probs_NV: Tensor, tokens_NT: Tensor) -> Tensor:
    """Makes padding the only continuation of a finished sequence, with log probability 0."""
    only_pad_V = torch.full_like(log_probs_NV[0], -torch.inf)
    only_pad_V[PAD] = 0.0
    return torch.where(_finished(tokens_NT)[:, None], only_pad_V, log_probs_NV)


def _best(tokens_BWT: Tensor, score_BW: Tensor, length_penalty: float) -> Decoded:
    length_BW = (tokens_BWT != PAD).sum(dim=-1)
    final_BW = score_BW / ((5.0 + length_BW) / 6.0) ** length_penalty
    score_B, best_B = final_BW.max(dim=-1)
    tokens_BT = tokens_BWT[torch.arange(len(best_B), device=best_B.device), best_B]
    longest = int((tokens_BT != PAD).sum(dim=-1).max())
    return Decoded(tokens_BT[:, :longest], score_B)
