"""Learning-rate schedules on known answers."""

import math

import pytest
import torch

from models.translation.schedules import inverse_sqrt, make_scheduler, warmup_cosine


def rates(schedule, n_steps, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make_scheduler(schedule, optimizer, **options)
    seen = []
    for _ in range(n_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warmup_cosine_rises_linearly_and_falls_to_zero():
    expected = [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0, 0.0]
    factors = [warmup_cosine(step, warmup_steps=2, total_steps=6) for step in range(8)]
    assert factors == pytest.approx(expected)


def test_inverse_sqrt_halves_when_the_steps_are_four_times_the_warm_up():
    assert inverse_sqrt(99, warmup_steps=100) == pytest.approx(1.0)
    assert inverse_sqrt(399, warmup_steps=100) == pytest.approx(0.5)


def test_make_scheduler_multiplies_the_peak_rate():
    seen = rates("warmup_cosine", 6, warmup_steps=2, total_steps=6)
    assert seen[:3] == pytest.approx([1.0, 2.0, 2.0])
    seen = rates("inverse_sqrt", 16, warmup_steps=4, total_steps=math.inf)
    assert seen[3] == pytest.approx(2.0)
    assert seen[15] == pytest.approx(1.0)


def test_onecycle_peaks_at_the_warm_up_and_ends_near_zero():
    seen = rates("onecycle", 20, warmup_steps=5, total_steps=20)
    assert max(seen) == pytest.approx(2.0)
    assert seen.index(max(seen)) == 4
    assert seen[0] == pytest.approx(2.0 / 25)
    assert seen[-1] < 1e-3


def test_make_scheduler_of_none_leaves_the_rate_alone():
    """T4: no scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert make_scheduler("none", optimizer, warmup_steps=0, total_steps=math.inf) is None


@pytest.mark.parametrize("schedule", ["warmup_cosine", "onecycle"])
@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_run_shorter_than_its_warm_up_ends_on_the_way_up(schedule, total_steps):
    seen = rates(schedule, total_steps, warmup_steps=10, total_steps=total_steps)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("schedule", "total", "message"),
    [
        ("warmup_cosine", math.inf, "schedule='warmup_cosine' needs the number of steps"),
        ("onecycle", math.inf, "which is inf; set Trainer"),
    ],
)
def test_make_scheduler_that_cannot_end_says_what_to_set(schedule, total, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(ValueError, match=message):
        make_scheduler(schedule, optimizer, warmup_steps=5, total_steps=total)
