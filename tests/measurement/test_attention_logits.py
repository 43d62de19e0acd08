"""The arithmetic of attention logits and entropy, against answers known without it."""

import math

import pytest
import torch

from lit_stability.measurement.attention_logits import (
    QUERIES,
    product_scores,
    sampled_scores,
    score_statistics,
)

INF, LN2 = math.inf, math.log(2)
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def statistics(rows):
    """Largest logit, mean entropy share, rows that count."""
    logit, entropy, count = score_statistics(torch.as_tensor(rows)[None]).tolist()
    return logit, entropy / count if count else None, count


@pytest.mark.parametrize(
    ("rows", "logit", "share", "count"),
    [
        ([[0.0, 0.0, 0.0, 0.0]], 0.0, 1.0, 1),
        ([[3.0, 3.0], [-7.0, -7.0]], 7.0, 1.0, 2),
        ([[100.0, 0.0, 0.0]], 100.0, 0.0, 1),
        ([[0.0, 0.0, -INF, -INF]], 0.0, 1.0, 1),
        ([[2.0, -INF], [1.0, 1.0]], 2.0, 1.0, 1),
        ([[2.0, -INF]], 2.0, None, 0),
        ([[-INF, -INF], [1.0, 1.0]], 1.0, 1.0, 1),
        ([[math.log(3.0), 0.0]], math.log(3.0), 2 - 0.75 * math.log(3.0) / LN2, 1),
        ([[5.0, 5.0, -1e9]], 5.0, 1.0, 1),
        ([[5.0, 5.0, torch.finfo(torch.float32).min]], 5.0, 1.0, 1),
        ([[-1e9, -1e9], [1.0, 1.0]], 1.0, 1.0, 1),
        # A mask of -10000 cannot be distinguished from a logit by itself: it is a key, of weight 0.
        ([[5.0, 5.0, -9995.0, -9995.0]], 5.0, 0.5, 1),
        ([[-9995.0, -9997.0], [1.0, 1.0]], 1.0, None, 2),
        ([[9000.0, -9000.0, 0.0]], 9000.0, 0.0, 1),
    ],
)
def test_score_statistics_known_answer(rows, logit, share, count):
    found = statistics(rows)
    assert found[0] == pytest.approx(logit)
    assert found[2] == count
    if share is not None:
        assert found[1] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_score_statistics_in_another_format_are_those_of_float32(dtype):
    rows = torch.tensor([[1.0, 2.0, torch.finfo(dtype).min], [0.5, 0.25, 4.0]], dtype=dtype)
    wide = torch.tensor([[1.0, 2.0, -INF], [0.5, 0.25, 4.0]])
    assert statistics(rows) == pytest.approx(statistics(wide), abs=1e-6)


def test_score_statistics_of_nan_are_nan():
    assert math.isnan(statistics([[1.0, math.nan]])[0])


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({"is_causal": True}, CAUSAL),
        ({"bias": CAUSAL}, CAUSAL),
        ({"bias": torch.zeros(4, 4).masked_fill(~CAUSAL, -INF)}, CAUSAL),
        ({"bias": CAUSAL[None, None].expand(3, 1, 4, 4)}, CAUSAL),
        ({"scale": 1.0}, None),
    ],
)
def test_product_scores_are_those_of_the_formula(options, mask):
    q, k = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 8)
    wanted = q[0] @ k[0].transpose(-2, -1) * options.get("scale", 1 / math.sqrt(8))
    if mask is not None:
        wanted = wanted.masked_fill(~mask, -INF)
    assert torch.allclose(product_scores(q, k, **options), wanted, atol=1e-6)


def test_product_scores_with_grouped_queries_repeat_each_key_head_in_a_row():
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 4, 8)
    wanted = product_scores(q, k[:, [0, 0, 0, 1, 1, 1]])
    assert torch.equal(product_scores(q, k), wanted)


def test_product_scores_of_half_precision_do_not_overflow():
    q = torch.full((1, 1, 2, 4), 400.0, dtype=torch.float16)
    assert product_scores(q, q).max() == 4 * 400.0**2 / 2


def test_sample_of_long_sequences_has_the_first_and_the_last_query_and_one_sequence():
    scores = torch.arange(1000.0)[None, None, :, None].expand(5, 3, 1000, 7)
    sample = sampled_scores(scores)
    assert sample.shape == (3, QUERIES, 7)
    assert (sample[0, 0, 0], sample[0, -1, 0]) == (0.0, 999.0)
    q = torch.randn(2, 2, 1000, 4)
    causal = product_scores(q, q, is_causal=True)
    assert (causal[:, -1] > -INF).all()
    assert (causal[:, 0] > -INF).sum() == 2
