"""Greedy and beam decoding of a trained Transformer, with or without its cache.

Both write batches of padded sources at once, stop when every sentence has its eos or the length is
used up, and give the same tokens with the cache as without it: the cache only saves work. Torch
is all this file knows.

Letters of the shape suffixes: B batch, S source, T target, W width of the beam, N = B x W,
V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.translation.transformer import DecoderCache, Transformer
from models.translation.vocabulary import BOS, EOS, PAD


class Decoded(NamedTuple):
    """What decoding gives for a batch."""

    tokens_BT: Tensor
    """Ids without bos, with eos, padded after it; T is the longest of the batch."""
    score_B: Tensor
    """Sum of log probabilities, eos included, divided by the length penalty; float32."""


@torch.no_grad()
def greedy_decode(
    model: Transformer, source_BS: Tensor, *, max_length: int | None = None, use_cache: bool = True
) -> Decoded:
    """Take the likeliest token each time.

    Args:
        model: In eval mode, unless dropout is wanted.
        source_BS: Source ids, padded.
        max_length: Most tokens to write, eos included; by default what the model can hold.
        use_cache: Keep keys and values between steps.
    """
    steps = _steps(model, max_length)
    session = _Session(model, source_BS, use_cache)
    tokens_BT = source_BS.new_full((len(source_BS), 1), BOS)
    score_B = torch.zeros(len(source_BS), device=source_BS.device)
    done_B = torch.zeros_like(score_B, dtype=torch.bool)
    for _ in range(steps):
        best_B, token_B = session.next_log_probs(tokens_BT).max(dim=-1)
        token_B = token_B.masked_fill(done_B, PAD)
        score_B = score_B + best_B.masked_fill(done_B, 0.0)
        tokens_BT = torch.cat((tokens_BT, token_B[:, None]), dim=1)
        done_B = done_B | (token_B == EOS)
        if done_B.all():
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
    """Keep the `beam_size` likeliest beginnings, and return the best finished sentence.

    A finished sentence keeps its place in the beam with its score as it stands. The winner has
    the largest log P / lp(T) with lp(T) = ((5 + T) / 6)^a, T tokens with eos (Wu et al. 2016,
    "Google's neural machine translation system", equation 14). A beam of 1 is greedy decoding.

    Args:
        model: In eval mode, unless dropout is wanted.
        source_BS: Source ids, padded.
        beam_size: Width W of the beam.
        length_penalty: The exponent a: 0 prefers short sentences, 1 is almost the mean.
        max_length: Most tokens to write, eos included; by default what the model can hold.
        use_cache: Keep keys and values between steps.

    Raises:
        ValueError: `beam_size` is less than 1, or `max_length` out of range.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size={beam_size} must be at least 1")
    steps, n_sources, width = _steps(model, max_length), len(source_BS), beam_size
    session = _Session(model, source_BS.repeat_interleave(width, dim=0), use_cache)
    tokens_NT = source_BS.new_full((n_sources * width, 1), BOS)
    # All beams of a sentence begin alike: only the first may fork.
    score_BW = torch.full((n_sources, width), -torch.inf, device=source_BS.device)
    score_BW[:, 0] = 0.0
    first_row_B1 = torch.arange(n_sources, device=source_BS.device)[:, None] * width
    for _ in range(steps):
        log_NV = _freeze_finished(session.next_log_probs(tokens_NT), tokens_NT)
        n_tokens = log_NV.shape[-1]
        candidate_BX = (score_BW.flatten()[:, None] + log_NV).view(n_sources, width * n_tokens)
        score_BW, choice_BW = candidate_BX.topk(width, dim=-1)
        rows_N = (first_row_B1 + choice_BW // n_tokens).flatten()
        token_N = (choice_BW % n_tokens).flatten()
        tokens_NT = torch.cat((tokens_NT[rows_N], token_N[:, None]), dim=1)
        session.select(rows_N)
        if _finished(tokens_NT).all():
            break
    return _best(tokens_NT[:, 1:].view(n_sources, width, -1), score_BW, length_penalty)


class _Session:
    """The model with one batch of sources, asked for one token after another."""

    def __init__(self, model: Transformer, source_NS: Tensor, use_cache: bool) -> None:
        self.model = model
        self.source_NS = source_NS
        self.memory_NSD = model.encode(source_NS)
        self.cache: DecoderCache | None = model.new_cache() if use_cache else None

    def next_log_probs(self, tokens_NT: Tensor) -> Tensor:
        """Give float32 log probabilities (N, V) of the next token, which is never padding."""
        new_NT = tokens_NT if self.cache is None else tokens_NT[:, self.cache.length :]
        logits_NTV = self.model.decode(new_NT, self.memory_NSD, self.source_NS, self.cache)
        log_NV = logits_NTV[:, -1].float().log_softmax(dim=-1)
        log_NV[:, PAD] = -torch.inf
        return log_NV

    def select(self, rows_N: Tensor) -> None:
        """Follow the beams; the rows of one sentence share source and memory."""
        if self.cache is not None:
            self.cache.select(rows_N)


def _steps(model: Transformer, max_length: int | None) -> int:
    longest = model.config.max_length
    if max_length is None:
        return longest
    if not 1 <= max_length <= longest:
        raise ValueError(f"max_length={max_length} must be between 1 and the model's {longest}")
    return max_length


def _finished(tokens_NT: Tensor) -> Tensor:
    return (tokens_NT == EOS).any(dim=-1)


def _freeze_finished(log_NV: Tensor, tokens_NT: Tensor) -> Tensor:
    """Let a finished sentence go on with padding alone, at no cost."""
    only_pad_V = torch.full_like(log_NV[0], -torch.inf)
    only_pad_V[PAD] = 0.0
    return torch.where(_finished(tokens_NT)[:, None], only_pad_V, log_NV)


def _best(tokens_BWT: Tensor, score_BW: Tensor, length_penalty: float) -> Decoded:
    length_BW = (tokens_BWT != PAD).sum(dim=-1)
    final_BW = score_BW / ((5.0 + length_BW) / 6.0) ** length_penalty
    score_B, best_B = final_BW.max(dim=-1)
    tokens_BT = tokens_BWT[torch.arange(len(best_B), device=best_B.device), best_B]
    longest = int((tokens_BT != PAD).sum(dim=-1).max())
    return Decoded(tokens_BT[:, :longest], score_B)
