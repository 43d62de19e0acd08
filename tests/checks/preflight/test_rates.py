"""C5: one update on a copy, with known answers."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lit_stability.checks.preflight import Subject
from lit_stability.checks.preflight.rates import check_rates, peak_rates, update
from lit_stability.checks.preflight.report import NotApplicableError


def line(lr, schedule=None, clip=None, weight=2.0):
    """Loss w x with w = 2, x = 1: the gradient is 1, the update lr, its ratio lr / 2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    schedulers = [] if schedule is None else [schedule(optimizer)]
    step = lambda model, x: model(x).sum()  # noqa: E731
    return Subject(model, step, torch.ones(1, 1), [optimizer], schedulers, clip)


@pytest.mark.parametrize(("lr", "ratio"), [(0.2, 0.1), (0.002, 0.001), (8.0, 4.0)])
def test_update_is_the_change_over_the_weights(lr, ratio):
    done = update(line(lr), [lr])
    assert done.ratio == pytest.approx(ratio, rel=1e-4)
    assert (done.before, done.after) == (2.0, pytest.approx(2.0 - lr))


def test_update_is_clipped_as_training_will_clip_it():
    def clip(model, optimizer):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    assert update(line(0.2, clip=clip), [0.2]).ratio == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(
    ("lr", "steps", "severity"),
    [
        (2e-8, 1e6, "error"),  # below rounding, however often
        (1e-6, 100, "warning"),
        (1e-6, 1e4, None),
        (1e-6, float("inf"), None),
        (1e-6, 10, None),  # a test run
    ],
)
def test_steps_that_come_to_nothing_together_are_reported(lr, steps, severity):
    """C5: a learning rate so low that the model is dead."""
    subject = line(lr)
    subject.steps = steps
    assert [each.severity for each in check_rates(subject)] == ([severity] if severity else [])


def bowl(lr, optimizer=torch.optim.SGD):
    """Loss 4 |w|^2 from |w| = 1: SGD multiplies w by 1 - 8 lr."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    return Subject(
        model,
        lambda model, _: 4 * model.weight.square().sum(),
        torch.zeros(1),
        [optimizer(model.parameters(), lr=lr)],
    )


@pytest.mark.parametrize(
    ("lr", "severity"),
    [
        (1e-9, "error"),  # the ratio is 8e-9, below the rounding of fp32
        (1e-6, None),
        (0.1, None),  # most of the way to the bottom in one step, and lower
        (0.255, "error"),  # beyond the mirror image: larger than the weights, and higher
        (10.0, "error"),
    ],
)
def test_rates_of_a_bowl_are_judged_by_what_a_step_does(lr, severity):
    """C5: so high that it explodes, so low that the model is dead."""
    assert [f.severity for f in check_rates(bowl(lr))] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (None, 0.5),
        (lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 10), 50.0),
        (lambda o: lr_scheduler.OneCycleLR(o, 3.0, total_steps=50), 3.0),
        (lambda o: lr_scheduler.StepLR(o, 10), 0.5),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), 0.5),
    ],
)
def test_peak_rate_is_the_highest_of_the_next_steps_and_leaves_the_schedule(schedule, peak):
    subject = line(0.5, schedule)
    before = [s.state_dict() for s in subject.schedulers], subject.optimizers[0].state_dict()
    assert peak_rates(subject, 1000) == pytest.approx([peak])
    after = [s.state_dict() for s in subject.schedulers], subject.optimizers[0].state_dict()
    assert str(after) == str(before)


def test_rates_of_a_schedule_that_stays_at_zero_are_dead():
    """C5."""
    (found,) = check_rates(line(0.5, lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.0)))
    assert "is 0, and stays 0" in found.what


def test_rates_of_a_warm_up_to_a_rate_that_tears_the_weights_are_named():
    """C5."""
    warm = lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 100)  # noqa: E731
    assert check_rates(line(0.05, warm)) == []
    (found,) = check_rates(line(5.0, warm))
    assert (found.severity, "highest learning rate" in found.what) == ("warning", True)


@pytest.mark.parametrize("count", [0, 2])
def test_rates_of_other_than_one_optimizer_are_not_judged(count):
    subject = line(0.1)
    subject.optimizers = [*subject.optimizers] * count
    with pytest.raises(NotApplicableError, match=f"there are {count} optimizers"):
        check_rates(subject)
