"""Metrics of an epoch."""

import math

import pytest
import torch

from models.causal.batches import Batch
from models.causal.heads import Cauchy, Prediction
from models.causal.metrics import CausalMetrics

NUM = 3


def batch(targets, values):
    empty = torch.zeros(len(targets), 1)
    value = torch.tensor([0.0 if each is None else each for each in values])
    known = torch.tensor([each is not None for each in values])
    return Batch(*[empty] * 4, torch.tensor(targets), value, known)


def prediction(locs, values):
    loc = torch.tensor(locs)
    value = torch.tensor(values)
    return Prediction(Cauchy(loc, torch.ones_like(loc)), Cauchy(value, torch.ones_like(value)))


FOUND = prediction(
    [[0, 0, 0, 9.0], [5.0, 4.0, 0, 3.0], [5.0, 0, 0, 1.0], [0, 0, 0, 1.0]], [1.0, 5.0, 0.0, 0.0]
)
TRUE = batch([NUM, NUM, 0, 1], [3.0, 4.0, None, None])


def test_figures_of_a_batch_are_known():
    metrics = CausalMetrics(NUM, threshold=0.0)
    metrics.update(FOUND, TRUE)
    found = {name: each.item() for name, each in metrics.compute().items()}
    p = (0.5 + math.atan(9.0) / math.pi, 0.5 + math.atan(3.0) / math.pi)
    expected = {"accuracy": 0.5, "num_accuracy": 0.5, "num_rank": 2.0, "num_false": 0.5}
    expected |= {"num_probability": sum(p) / 2, "value_mae": 1.5, "value_median_error": 1.0}
    assert found == pytest.approx(expected, rel=1e-5)


def test_figures_of_several_batches_are_those_of_all_sentences():
    whole, parts = (CausalMetrics(NUM, threshold=0.0) for _ in range(2))
    whole.update(FOUND, TRUE)
    for rows in (slice(0, 1), slice(1, 4)):
        part = Prediction(*(Cauchy(c.loc[rows], c.scale[rows]) for c in FOUND))
        parts.update(part, Batch(*(each[rows] for each in TRUE)))
    one, other = whole.compute(), parts.compute()
    assert {n: v.item() for n, v in one.items()} == pytest.approx(
        {n: v.item() for n, v in other.items()}
    )


def test_kind_that_was_not_seen_has_no_figure():
    metrics = CausalMetrics(NUM, threshold=0.0)
    metrics.update(prediction([[5.0, 0, 0, 0]], [0.0]), batch([0], [None]))
    found = metrics.compute()
    assert found["accuracy"] == 1.0
    assert found["num_accuracy"].isnan()
    assert found["value_mae"].isnan()
