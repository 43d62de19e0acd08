"""A schedule in, the step of the report out: torch's schedulers, and losses that fall as usual."""

import math
import random

import pytest
import torch
from torch.optim import lr_scheduler as s

from lit_stability.detectors.dead_learning_rate import DeadLearningRate, LossCourse


def rates(make, steps, every=1, lr=1e-3):
    """The rates that a scheduler sets, which is stepped every so many steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    scheduler = make(optimizer)
    for i in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        if (i + 1) % every == 0:
            scheduler.step()


def losses(rates, seed=0, noise=0.05):
    """Falls with the sum of the rates, as a power law, with noise."""
    rng, trained = random.Random(seed), 0.0
    for rate in rates:
        yield (1 + trained / 1e-3) ** -0.3 + noise * rng.gauss(0, 1)
        trained += rate


def report(stream, noise=0.05):
    """The step of the report; None if there is none."""
    stream, watch = list(stream), DeadLearningRate()
    found = [
        i
        for i, (rate, loss) in enumerate(zip(stream, losses(stream, noise=noise), strict=True))
        if watch.update(i, 0, loss, [rate]) is not None
    ]
    assert len(found) <= 1, "reported once"
    return found[0] if found else None


def warm(inner, steps=100):
    """A warm-up from 0, and another schedule after it."""

    def make(optimizer):
        up = s.LambdaLR(optimizer, lambda i: min(1, i / steps))
        return s.SequentialLR(optimizer, [up, inner(optimizer)], [steps])

    return make


def stable_then_decay(total):
    return lambda o: s.LambdaLR(o, lambda i: min(1, i / 50, max(0, (total - i) / (0.2 * total))))


DEAD = {
    "gamma 0": (lambda o: s.ExponentialLR(o, 0.0), 2000, 20),
    "gamma of an epoch at every step": (lambda o: s.ExponentialLR(o, 0.9), 2000, 1),
    "gamma 0.1 at every epoch": (lambda o: s.StepLR(o, 1, 0.1), 2000, 20),
    "linear over a tenth of the run": (
        lambda o: s.LambdaLR(o, lambda i: max(0.0, 1 - i / 300)),
        3000,
        1,
    ),
    "cosine that stays at 0": (
        lambda o: s.LambdaLR(o, lambda i: 0.5 * (1 + math.cos(math.pi * min(1, i / 200)))),
        2000,
        1,
    ),
    "after a warm-up": (warm(lambda o: s.ExponentialLR(o, 0.8)), 2000, 1),
}


@pytest.mark.parametrize(("make", "steps", "every"), DEAD.values(), ids=DEAD)
def test_rate_that_dies_while_the_loss_falls_is_reported_within_a_fifth_of_the_run(
    make, steps, every
):
    found = report(rates(make, steps, every))
    assert found is not None
    assert found < steps / 5


HEALTHY = {
    "constant": (lambda o: s.ConstantLR(o, 1.0), 2000, 1),
    "cosine to 0": (lambda o: s.CosineAnnealingLR(o, 2000), 2000, 1),
    "cosine by epoch": (lambda o: s.CosineAnnealingLR(o, 50), 1000, 20),
    "linear to 0": (lambda o: s.LinearLR(o, 1.0, 0.0, 2000), 2000, 1),
    "polynomial": (lambda o: s.PolynomialLR(o, 2000, 4.0), 2000, 1),
    "one cycle": (lambda o: s.OneCycleLR(o, 1e-3, total_steps=2000), 2000, 1),
    "warm-up from 0": (warm(lambda o: s.CosineAnnealingLR(o, 1900)), 2000, 1),
    "long warm-up from 0": (lambda o: s.LambdaLR(o, lambda i: i / 1e6), 2000, 1),
    "a late start": (lambda o: s.LambdaLR(o, lambda i: float(i > 500)), 2000, 1),
    "warm-up, stable, decay": (stable_then_decay(2000), 2000, 1),
    "warm restarts": (lambda o: s.CosineAnnealingWarmRestarts(o, 200), 2000, 1),
    "cyclic from 0": (lambda o: s.CyclicLR(o, 0.0, 1e-3, 100, cycle_momentum=False), 2000, 1),
    "steps of a tenth": (lambda o: s.StepLR(o, 600, 0.1), 2000, 1),
    "slow exponential decay": (lambda o: s.ExponentialLR(o, 0.995), 2000, 1),
    "held at a share": (lambda o: s.LambdaLR(o, lambda i: 1.0 if i < 100 else 1e-4), 2000, 1),
    "frozen on purpose": (lambda o: s.LambdaLR(o, lambda i: 0.0), 2000, 1),
}


@pytest.mark.parametrize(("make", "steps", "every"), HEALTHY.values(), ids=HEALTHY)
def test_rate_of_a_healthy_schedule_is_silent(make, steps, every):
    assert report(rates(make, steps, every)) is None


def test_rate_that_dies_after_the_loss_has_reached_its_floor_is_silent():
    """As with a schedule that is shorter than the run, which something else ends."""
    watch = DeadLearningRate()
    for i in range(3000):
        loss = 0.5 + 2 * math.exp(-i / 100) + 0.05 * math.sin(i)
        assert watch.update(i, 0, loss, [1e-3 if i < 1000 else 0.0]) is None


def test_rate_that_dies_once_the_task_is_solved_is_silent():
    watch = DeadLearningRate()
    for i in range(500):
        loss = max(0.0, 1 - i / 50)
        assert watch.update(i, 0, loss, [1e-3 if i < 60 else 0.0]) is None


@pytest.mark.parametrize("falls", [True, False])
def test_rate_lowered_for_a_metric_is_reported_only_if_the_loss_contradicts_it(falls):
    """As with ``mode="max"`` for a loss."""
    watch = DeadLearningRate()
    found = [
        watch.update(i, 0, 3 - 2 * falls * i / 60, [1e-3 if i < 60 else 1e-9], metric=0.4)
        for i in range(200)
    ]
    assert any(found) is falls


def test_rate_lowered_for_a_metric_that_is_nan_is_reported_at_any_course_of_the_loss():
    watch = DeadLearningRate()
    found = [
        i
        for i in range(1000)
        if watch.update(i, 0, 1.0, [1e-3 if i < 500 else 1e-9], metric=math.nan) is not None
    ]
    assert found == [555], "when it has been dead for a tenth of the steps"


def test_group_that_is_frozen_beside_one_that_trains_is_silent():
    """A rate of 0 from the start, and another that is set to 0 for good, as a phase ends."""
    watch = DeadLearningRate()
    for i in range(1000):
        groups = [0.0, 1e-3 if i < 100 else 0.0, 1e-3]
        assert watch.update(i, 0, 1 - i / 1000, groups) is None


def test_optimizer_that_trains_beside_one_that_is_dead_is_silent():
    watch = DeadLearningRate()
    for i in range(1000):
        assert watch.update(2 * i, 0, 1 - i / 1000, [1e-3 if i < 100 else 0.0]) is None
        assert watch.update(2 * i + 1, 1, math.nan, [1e-3]) is None


def test_course_of_many_losses_keeps_few_numbers():
    course = LossCourse()
    for i in range(100_000):
        course.add(1 + 1 / (1 + i))
    assert len(course._means) <= 128
    assert course.at_floor(100_000)
