"""Exponents with known answers."""

import pytest

from benchmarks.scale import Wide, fit_power, sweep

SIZES = [10.0, 30.0, 100.0, 300.0, 1000.0, 1e4]


@pytest.mark.parametrize(
    ("floor", "factor", "exponent"), [(2.0, 0.1, 0.9), (0.0, 3.0, 1.0), (5.0, 1e-3, 1.5)]
)
def test_fit_of_a_power_law_finds_its_numbers(floor, factor, exponent):
    found = fit_power(SIZES, [floor + factor * x**exponent for x in SIZES])
    assert found.exponent == pytest.approx(exponent)
    assert (found.floor, found.factor) == pytest.approx((floor, factor), rel=1e-6, abs=1e-9)
    assert found.error < 1e-9


def test_fit_of_what_falls_below_a_power_law_has_no_negative_floor():
    assert fit_power([1.0, 2.0, 3.0], [0.1, 2.0, 4.0]).floor == 0.0


def test_fit_of_two_points_is_rejected():
    with pytest.raises(ValueError, match=r"at least three points .* got 2"):
        fit_power([1.0, 2.0], [1.0, 2.0])


def test_wide_model_has_as_many_elements_in_as_many_tensors():
    sizes = [p.numel() for p in Wide(1000, 20).parameters()]
    assert sizes == [50] * 20


def test_size_beyond_the_memory_is_skipped_with_the_numbers():
    points, skipped = sweep([(10**15, 50)])
    assert points == []
    assert skipped[0].startswith("1e+15 elements need")
