"""Counted shares are those of a cast, whatever the tensor."""

import pytest
import torch

from lit_stability.checks.precision_ranges import tally
from lit_stability.checks.precision_ranges.bins import EDGES, JUDGED
from lit_stability.measurement.float_formats import FLOAT16, FORMATS
from tests.checks.precision_ranges.examples import row_of


def spread(n=20_000):
    """Magnitudes over all of float32, those at every edge, zeros, both signs."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.rand(n, generator=generator, dtype=torch.float64) * 278 - 149
    edges = torch.tensor(EDGES, dtype=torch.float32)
    near = [edges, edges.nextafter(edges * 0), edges.nextafter(edges * 2)]
    values = torch.cat([(2**powers).float(), *near, torch.zeros(7)])
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return (values * signs)[values.isfinite()]


def cast(values, each):
    return values.to(getattr(torch, each.name)).float()


@pytest.mark.parametrize("each", JUDGED, ids=lambda f: f.name)
def test_counts_are_those_of_a_cast(each):
    """S9: overflow, subnormal and flushed to zero, exactly."""
    values = spread()
    row, after = row_of(values), cast(values, each)
    lost = after.isinf() if not each.finite_only else (values.abs() > 464.0)
    small = after.abs() < each.smallest_normal
    assert row.overflowing(each) == lost.sum() >= 2
    assert row.subnormal(each) == (small & (after != 0)).sum() > 100
    assert row.vanishing(each) == ((after == 0) & (values != 0)).sum() > 100
    assert row.zeros == (values == 0).sum() >= 7
    assert row.elements == len(values) == row.nonzero + row.zeros


@pytest.mark.parametrize("scale", [-20, -1, 0, 3, 16, 40])
def test_zeros_under_a_loss_scale_are_those_of_a_cast(scale):
    """S9."""
    values = spread()
    scaled = (values.double() * 2.0**scale).half()
    row = row_of(values)
    assert row.vanishing(FLOAT16, scale) == ((scaled == 0) & (values != 0)).sum()


def test_squares_that_become_zero_are_those_of_a_cast():
    """S9: the second moment of Adam in fp16."""
    values = spread()
    squares = values.double().square().half()
    assert row_of(values).squares_vanishing(FLOAT16) == ((squares == 0) & (values != 0)).sum()


def test_what_is_not_finite_is_counted_apart():
    row = row_of([1.0, float("inf"), float("nan"), -float("inf"), 0.0, -3.0])
    assert (row.elements, row.non_finite, row.zeros, row.nonzero) == (6, 3, 1, 2)
    assert (row.smallest, row.largest, row.overflowing(FLOAT16)) == (1.0, 3.0, 0)


def test_exponents_are_open_below_and_closed_above():
    """Known answer: the bin k holds (2**(k-1), 2**k], also where a format's edge divides it."""
    row = row_of([1.0, 1.5, 2.0, 2.1, 65519.0, 65521.0, 65536.0, 0.0])
    assert row.exponents() == {0: 1, 1: 2, 2: 1, 16: 3}


@pytest.mark.parametrize(
    ("values", "median"),
    [([0.0, 0.0], 0.0), ([3.0], 3.0), ([0.0, 5.0, 5.5, 1000.0], 32**0.5)],
)
def test_median_is_known_to_the_middle_of_its_bin(values, median):
    assert row_of(values).median == pytest.approx(median)


def test_tensor_in_pieces_counts_as_the_tensor(monkeypatch):
    whole = row_of(spread(1000))
    monkeypatch.setattr(tally, "_CHUNK", 97)
    assert row_of(spread(1000)) == whole


def test_several_tensors_add_up():
    counted = tally.Tally()
    parts = [torch.ones(2, 3).t(), torch.full((2,), -4.0).half(), torch.empty(0)]
    for part in [*parts, torch.eye(3).to_sparse()]:
        counted.add(part)
    row = counted.row("weights", "layer")
    assert row.exponents() == {0: 9, 2: 2}
    assert row.zeros == 0, "of a sparse tensor the stored elements count"


def test_edges_are_float32_and_hold_every_power_of_two():
    assert torch.tensor(EDGES, dtype=torch.float32).double().tolist() == list(EDGES)
    assert {2.0**k for k in range(-149, 128)} <= set(EDGES)
    assert EDGES[-1] == FORMATS["float32"].largest
