"""QK-clip's factors: each product of a query and a key is what its head needs."""

import math

import pytest

from lit_stability.policies.qk_clip import qk_clip_factors

CASES = {
    "heads of their own": ([400.0, 50.0, 90.0], [0, 1, 2], [2, 1, 0]),
    "one key for all": ([400.0, 800.0, 50.0], [0, 1, 2], [0, 0, 0]),
    "all above": ([400.0, 800.0, 101.0], [0, 1, 2], [0, 0, 1]),
    "rows of a query are shared": ([400.0, 50.0], [0, 0], [0, 1]),
    "not finite": ([math.nan, math.inf, 50.0], [0, 1, 2], [0, 1, 2]),
}


@pytest.mark.parametrize(("logits", "queries", "keys"), CASES.values(), ids=CASES)
def test_no_head_exceeds_the_threshold_and_no_factor_exceeds_one(logits, queries, keys):
    query, key = qk_clip_factors(logits, queries, keys, 100.0)
    assert all(0 < f <= 1 for f in (*query.values(), *key.values()))
    shared = len(set(queries)) < len(queries)
    for logit, q, k in zip(logits, queries, keys, strict=True):
        product = query[q] * key[k]
        if not math.isfinite(logit):
            assert product == 1
        elif shared:
            assert product * logit <= 100 * (1 + 1e-12)
        else:
            assert product == pytest.approx(min(1.0, 100 / logit))
