"""Boolean attention masks; True means that a query may attend to a key.

All of ``models.translation`` uses this convention, except attention with ``invert_mask=True``, a
deliberate fault. `torch.nn.functional.scaled_dot_product_attention` uses it too.
`torch.nn.MultiheadAttention` and many textbook implementations use the opposite one; with the two
confused, a network sees only padding and the future and still trains to some extent.
`check_mask_convention` tests any attention function for this.

Shape suffixes: B batch, H heads, Q query length, S key length, K head dimension, 1 broadcast.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query_BHQK, key_BHSK, value_BHSK, mask_B1QS) -> attended_BHQK."""


def padding_mask(ids_BS: Tensor, pad_id: int) -> Tensor:
    """Returns a bool mask (B, 1, 1, S) that is True for tokens other than padding."""
    return (ids_BS != pad_id)[:, None, None, :]


def causal_mask(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """Returns a bool mask (1, 1, Q, S) that is True for a query's own and earlier positions.

    The queries are the last `n_queries` of the `n_keys` positions, so one query with a cache of
    S - 1 keys may attend to all S keys.

    Raises:
        ValueError: There are more queries than keys.
    """
    if n_queries > n_keys:
        raise ValueError(
            f"a causal mask needs at least as many keys as queries, got {n_queries} queries "
            f"and {n_keys} keys; pass n_keys = length of the cache + n_queries"
        )
    full_QS = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return full_QS.tril(n_keys - n_queries)[None, None]


def check_mask_convention(attend: Attend, *, tolerance: float = 1e-4) -> None:
    """Checks with a known result that `attend` reads True as "may attend".

    One query, three equal keys with the values 1, 2 and 4, and a mask that allows only the first
    key must give 1. An inverted mask gives 3, the mean of 2 and 4; an ignored mask gives 7/3.

    Raises:
        ValueError: The mask is inverted, ignored or otherwise wrong; the message says which.
    """
    query_BHQK, key_BHSK = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
    value_BHSK = torch.tensor([1.0, 2.0, 4.0])[None, None, :, None].expand(1, 1, 3, 2)
    mask_B1QS = torch.tensor([True, False, False])[None, None, None]
    result = attend(query_BHQK, key_BHSK, value_BHSK, mask_B1QS).flatten()[0].item()
    if abs(result - 1.0) <= tolerance:
        return
    if abs(result - 3.0) <= tolerance:
        fault = "the mask is read inverted (True as 'masked out'): pass ~mask, or invert its use"
    elif abs(result - 7.0 / 3.0) <= tolerance:
        fault = "the mask is ignored: apply it before the softmax"
    else:
        fault = "the mask is neither applied nor inverted: compare with attention.manual_attention"
    raise ValueError(
        f"attention over values 1, 2, 4 with only the first unmasked gave {result:.4g}: {fault}"
    )
