"""Weight norms and losses in, drift out."""

import math

import pytest

from lit_stability.detectors import WeightDrift
from tests.detectors.streams import steps_of, told, told_with_a_resume


def small():
    return WeightDrift(window=5, block=5)


def rows(norms, losses=2.8):
    """One scan in two steps."""
    losses = [losses] * len(norms) if isinstance(losses, float) else losses
    out = []
    for norm, loss in zip(norms, losses, strict=True):
        scanned = {"weight_norm": norm, "weight_norms": (("a", norm), ("b", 1.0), ("c", 0.0))}
        out += [{"loss": loss}, {"loss": loss, **scanned}]
    return out


GROWING = [10.0 * 1.3**i for i in range(20)]


@pytest.mark.parametrize(
    ("norms", "losses", "expected"),
    [
        ([10.0] * 20, 2.8, []),
        # 1.3^5 = 3.7 in five scans, once the loss is known to stand.
        (GROWING, 2.8, [15]),
        ([10.0] * 10 + GROWING, 2.8, [31]),
        # The loss falls with it: that is training.
        (GROWING, [5.0 - 0.2 * i for i in range(20)], []),
        # 1.2^5 = 2.5.
        ([10.0 * 1.2**i for i in range(20)], 2.8, []),
        # One leap and no growth: weights were replaced.
        ([10.0] * 10 + [100.0] * 10, 2.8, []),
        ([10.0] * 10 + [math.nan, math.inf] * 5, 2.8, []),
        ([0.0] * 10 + [1.0] * 10, 2.8, []),
        # Told again after it had stopped.
        ([*GROWING, *[2000.0] * 10, *[2000.0 * 1.3**i for i in range(1, 11)]], 2.8, [15, 69]),
    ],
)
def test_norm_that_multiplies_while_the_loss_stands_is_told_of(norms, losses, expected):
    assert steps_of(told(small(), rows(norms, losses))) == expected


def test_what_has_grown_most_is_named():
    (anomaly,) = told(small(), rows(GROWING))
    assert anomaly.layers == (("a", pytest.approx(1.3**7)), ("b", 1.0))
    assert anomaly.warn_only
    assert "from 16.9 to 62.75 in 5 scans" in anomaly.message


def test_resume_neither_forgets_nor_tells_twice():
    for at in (5, 14, 16, 20):
        assert steps_of(told_with_a_resume(small, rows(GROWING), at)) == [15]


@pytest.mark.parametrize("options", [{"factor": 1.0}, {"window": 1}])
def test_option_out_of_range_is_refused_and_repeated(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        WeightDrift(**options)
