"""Boolean attention masks, with the one convention of this package.

**True means: this query may attend to this key.** No function, argument or buffer of
``models.translation`` uses another meaning, but for an attention built to rehearse the fault.
`torch.nn.functional.scaled_dot_product_attention` shares it; `torch.nn.MultiheadAttention` and many
textbook implementations have the opposite one, under which a network sees only padding and the
future, and still trains after a fashion. Hence
`check_mask_convention`, which any attention function can be given before it is trusted.

Letters of the shape suffixes: B batch, H heads, Q queries, S keys, K width of a head, 1 broadcast.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query_BHQK, key_BHSK, value_BHSK, mask_B1QS) -> mixed_BHQK."""


def padding_mask(ids_BS: Tensor, pad_id: int) -> Tensor:
    """Let every query attend to the tokens that are not padding: bool of shape (B, 1, 1, S)."""
    return (ids_BS != pad_id)[:, None, None, :]


def causal_mask(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """Let each query attend to itself and to what precedes it: bool of shape (1, 1, Q, S).

    The queries are the last `n_queries` of the `n_keys` positions, so one query against a
    cache of S - 1 keys sees all S of them.

    Raises:
        ValueError: There are more queries than keys.
    """
    if n_queries > n_keys:
        raise ValueError(
            f"a causal mask needs at least as many keys as queries, got {n_queries} queries "
            f"and {n_keys} keys; pass the length of the cache plus that of the new tokens"
        )
    full_QS = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return full_QS.tril(n_keys - n_queries)[None, None]


def check_mask_convention(attend: Attend, *, tolerance: float = 1e-4) -> None:
    """Prove on a known answer that `attend` reads True as "may attend".

    One query meets three keys, the mask opens the first, and the values are 1, 2 and 4: the
    answer is 1. Read the other way round it is a mixture of 2 and 4; ignored, of all three.

    Raises:
        ValueError: The mask is read inverted, or not at all; the message says which.
    """
    query_BHQK, key_BHSK = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
    value_BHSK = torch.tensor([1.0, 2.0, 4.0])[None, None, :, None].expand(1, 1, 3, 2)
    mask_B1QS = torch.tensor([True, False, False])[None, None, None]
    answer = attend(query_BHQK, key_BHSK, value_BHSK, mask_B1QS).flatten()[0].item()
    if abs(answer - 1.0) <= tolerance:
        return
    if abs(answer - 3.0) <= tolerance:
        fault = "the mask is read inverted (True as 'masked out'): pass ~mask, or flip its test"
    elif abs(answer - 7.0 / 3.0) <= tolerance:
        fault = "the mask is ignored: hand it on to the softmax"
    else:
        fault = "the mask is neither obeyed nor inverted: compare with attention.manual_attention"
    raise ValueError(f"attention over values 1, 2, 4 with only 1 open gave {answer:.4g}: {fault}")
