"""A stream of shares in, one objection out."""

import pytest

from lit_stability.detectors import LostUpdates
from lit_stability.measurement.step_stats import StepStats


def run(shares, rates=None, detector=None):
    """Steps at which it objects."""
    detector = detector or LostUpdates(window=3)
    out = []
    for step, share in enumerate(shares):
        rate = 1.0 if rates is None else rates[step]
        stats = StepStats(
            step=step, loss=1.0, grad_norm=1.0, stuck_share=share, update_learning_rate=rate
        )
        if detector.check(stats) is not None:
            out.append(step)
        detector.update(stats)
    return out


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        ([0.8] * 6, [3]),
        ([0.2] * 9, []),
        ([0.9, 0.2, 0.2, 0.9, 0.2, 0.2, 0.9], []),
        ([0.2, 0.2, 0.2, 0.9, 0.9, 0.9], [5]),
        ([None, 0.9, None, 0.9, None, 0.9, None], [6]),
        ([0.5] * 9, []),
    ],
)
def test_median_of_the_window_decides_and_it_is_reported_once(shares, steps):
    assert run(shares) == steps


def test_end_of_a_decay_is_not_objected_to():
    """Updates are to vanish there."""
    rates = [1.0] * 5 + [0.05] * 20
    assert run([0.1] * 5 + [1.0] * 20, rates) == []


def test_warning_is_not_repeated_after_a_resume():
    first, second = LostUpdates(window=3), LostUpdates(window=3)
    assert run([0.9] * 5, detector=first) == [3]
    second.load_state_dict(first.state_dict())
    assert run([0.9] * 5, detector=second) == []


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"window": 0}])
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        LostUpdates(**options)
