import math
from typing import get_args

import pytest
from lightning.fabric.connector import _PRECISION_INPUT_STR

from lit_stability.incidents.step_history import (
    AFTER,
    BEFORE,
    FIELDS,
    MOST,
    PRECISIONS,
    StepHistory,
    row_of,
)
from lit_stability.measurement.step_stats import StepStats


def take(attempts, step, *, taken=True):
    """One attempt, as a training step makes it; returns the span that it shows to be undone."""
    span = attempts.rolled_back_to(step)
    stats = StepStats(step=step, loss=1.0, grad_norm=1.0)
    number = attempts.begin()
    attempts.add(row_of(number, stats, clip_threshold=None, precision="32-true", taken=taken))
    return span


def column(window, name):
    return [row[FIELDS.index(name)] for row in window.rows]


@pytest.mark.parametrize(
    ("steps", "skipped", "spans"),
    [
        ([0, 1, 2, 3], [], []),
        ([0, 1, 2, 2, 3], [2], []),
        ([0, 1, 2, 3, 1, 2, 3], [], [[2, 4]]),
        ([0, 1, 2, 3, 1, 2, 3], [3], [[2, 4]]),
        ([0, 1, 2, 2, 1, 2], [2, 3], [[2, 4]]),
        ([0, 1, 2, 1, 2, 3, 2, 3], [], [[2, 3], [5, 6]]),
        ([0, 1, 2, 3, 2, 1, 2], [], [[3, 4], [2, 5]]),
    ],
    ids=["calm", "retried", "rolled back", "after a skip", "skips", "twice", "further"],
)
def test_attempts_that_were_rolled_back_are_found_by_their_steps(steps, skipped, spans):
    attempts = StepHistory()
    found = [take(attempts, s, taken=i not in skipped) for i, s in enumerate(steps)]
    assert [span for span in found if span] == spans


def test_rollback_further_than_the_kept_history_is_extrapolated():
    attempts = StepHistory()
    for step in range(MOST + 100):
        take(attempts, step)
    assert take(attempts, 20) == [21, MOST + 100]


def test_rollback_belongs_to_the_incidents_that_are_open():
    attempts = StepHistory()
    for step in range(10):
        take(attempts, step)
    closed, current = attempts.open(1, 9), attempts.open(2, 11)
    closed.closed_attempt = 10
    take(attempts, 5)
    assert (closed.spans, current.spans) == ([], [[6, 10]])


def test_window_holds_what_came_before_the_incident_and_what_came_after():
    """S1: attempt by attempt."""
    attempts = StepHistory()
    for step in range(100):
        take(attempts, step)
    window = attempts.open(1, 101)
    for step in range(100, 130):
        take(attempts, step)
    window.closed_attempt = 131
    for step in range(130, 200):
        assert window.complete == (step > 131 + AFTER - 1)
        take(attempts, step)
    assert column(window, "attempt") == list(range(101 - BEFORE, 131 + AFTER + 1))


def test_window_of_an_endless_incident_is_bounded_and_has_its_end():
    attempts = StepHistory()
    for step in range(5000):
        if step == 100:
            window = attempts.open(1, 101)
        if step == 4000:
            window.closed_attempt = 4000
        take(attempts, step)
    numbers = column(window, "attempt")
    assert len(numbers) == MOST
    assert numbers[0] == 101 - BEFORE
    assert numbers[-AFTER:] == list(range(4001, 4001 + AFTER))


def test_count_goes_on_in_another_fit_and_its_rows_do_not():
    attempts = StepHistory()
    for step in range(5):
        take(attempts, step)
    attempts.start()
    assert take(attempts, 0) is None, "another fit is no rollback"
    assert attempts.count == 6
    assert column(attempts.open(1, 7), "attempt") == [6]


def test_row_says_nan_for_what_is_not_there():
    stats = StepStats(step=3, loss=math.inf, grad_norm=2.0, loss_scale=8.0, update_ratio=0.5)
    row = dict(
        zip(
            FIELDS,
            row_of(4, stats, clip_threshold=None, precision="fp4", taken=False),
            strict=True,
        )
    )
    missing = {name for name, value in row.items() if math.isnan(value)}
    assert missing == {"learning_rate", "clip_threshold", "precision"}
    assert (row["loss"], row["loss_scale"], row["taken"]) == (math.inf, 8.0, 0.0)


def test_precisions_are_those_of_lightning():
    assert set(get_args(_PRECISION_INPUT_STR)) == set(PRECISIONS)
