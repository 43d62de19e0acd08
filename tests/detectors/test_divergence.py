"""Divergence after a rollback: what was restored, and what recurs."""

from lit_stability.detectors import Divergence
from lit_stability.measurement.step_stats import StepStats


def flags_of(detector, rows):
    """Steps that are flagged; each row is a first step, its losses, and whether it was restored."""
    found = []
    for start, losses, restored in rows:
        for i, loss in enumerate(losses):
            ratio = None if restored and i == 0 else 1e-3
            seen = StepStats(step=start + i, loss=loss, grad_norm=1.0, update_ratio=ratio)
            if detector.check(seen) is not None:
                found.append(seen.step)
            detector.update(seen)
    return found


def test_loss_that_falls_from_a_rollback_on_is_not_flagged_and_one_that_rises_is():
    usual, high = [1.0, 1.1] * 15, [9.0 + i for i in range(5)]
    before = [(0, usual, False), (30, high, False)]
    falling = [9.0 - 0.5 * i for i in range(10)]
    assert flags_of(Divergence(persist=5), [*before, (20, falling, True)]) == [34]
    rising = [9.0 * 2**i for i in range(5)]
    assert flags_of(Divergence(persist=5), [*before, (20, rising, True)]) == [34, 24]


def test_jump_that_shows_at_any_step_of_a_replay_is_a_change_of_regime():
    detector = Divergence(persist=5)
    level = [30.0, 31.0, 32.0, 30.0, 31.0]
    rows = [(0, [1.0, 1.1] * 15, False), (30, level, False), (20, level, True)]
    assert flags_of(detector, rows) == [34]
    assert detector.regimes == 1


def test_jump_after_which_the_run_diverged_is_not_accepted_at_once_again():
    detector = Divergence(persist=5)
    usual, level = [1.0, 1.1] * 15, [30.0, 31.0, 32.0, 30.0, 31.0]
    rows = [(0, usual, False), (30, level, False), (30, level, True)]
    assert flags_of(detector, rows) == [34]
    assert detector.regimes == 1
    assert flags_of(detector, [(0, usual, True), (30, level, False)]) == [34]
