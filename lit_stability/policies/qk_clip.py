"""The factors that QK-clip applies to query and key heads. Imports neither torch nor Lightning."""

import math
from collections.abc import Sequence


def qk_clip_factors(
    logits: Sequence[float],
    query_groups: Sequence[int],
    key_groups: Sequence[int],
    threshold: float,
) -> tuple[dict[int, float], dict[int, float]]:
    """Returns the factor of each group of query rows and of each group of key rows.

    A head whose largest logit S exceeds the threshold t needs the factor ``g = min(1, t / S)`` on
    the product of its query and its key. With a key of its own each gets ``sqrt(g)`` (Kimi Team
    2025, arXiv 2507.20534, with alpha 0.5). Where heads share a key (grouped queries), the key gets
    the square root of the *largest* g among them, which is 1 as soon as one of them needs nothing,
    and each query what is left. So every product is what its head needs, no head changes that needs
    nothing, and no factor is above 1.

    Args:
        logits: largest absolute logit of each head; one that is not finite needs nothing.
        query_groups: for each head the number of its query rows; heads may share them.
        key_groups: for each head the number of its key rows.
        threshold: largest logit to leave as it is.

    >>> qk_clip_factors([400.0, 50.0], [0, 1], [0, 1], 100.0)
    ({0: 0.5, 1: 1.0}, {0: 0.5, 1: 1.0})
    >>> qk_clip_factors([400.0, 50.0], [0, 1], [0, 0], 100.0)
    ({0: 0.25, 1: 1.0}, {0: 1.0})
    >>> qk_clip_factors([400.0, 1600.0], [0, 1], [0, 0], 100.0)
    ({0: 0.5, 1: 0.125}, {0: 0.5})
    """
    needed: dict[int, float] = {}
    for logit, group in zip(logits, query_groups, strict=True):
        needed[group] = min(needed.get(group, 1.0), _needed(logit, threshold))
    pairs = sorted(set(zip(query_groups, key_groups, strict=True)))
    keys: dict[int, float] = {}
    for query, key in pairs:
        keys[key] = max(keys.get(key, 0.0), math.sqrt(needed[query]))
    queries: dict[int, float] = {}
    for query, key in pairs:
        queries[query] = min(queries.get(query, 1.0), needed[query] / keys[key])
    return queries, keys


def _needed(logit: float, threshold: float) -> float:
    return threshold / logit if threshold < logit < math.inf else 1.0
