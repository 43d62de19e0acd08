"""The learning rate that an update uses, against the one the scheduler wrote."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as s

from lit_stability.training_state.lr_multiplier import (
    LearningRateMultiplier,
    learning_rate_multiplier,
)

STEPS = 12
OWNER = "rollback"
SCHEDULERS = {
    "lambda": lambda o: s.LambdaLR(o, lambda i: 1 / (1 + i)),
    "multiplicative": lambda o: s.MultiplicativeLR(o, lambda i: 0.9),
    "one cycle": lambda o: s.OneCycleLR(o, 0.4, total_steps=STEPS + 2, cycle_momentum=False),
    "cyclic": lambda o: s.CyclicLR(o, 0.01, 0.2, step_size_up=3, cycle_momentum=False),
    "cosine": lambda o: s.CosineAnnealingLR(o, 8, eta_min=0.03),
    "warm restarts": lambda o: s.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
    "step": lambda o: s.StepLR(o, 3, 0.3),
    "multi step": lambda o: s.MultiStepLR(o, [2, 5], 0.2),
    "exponential": lambda o: s.ExponentialLR(o, 0.8),
    "constant": lambda o: s.ConstantLR(o, 0.1, 4),
    "linear": lambda o: s.LinearLR(o, 0.1, total_iters=5),
    "polynomial": lambda o: s.PolynomialLR(o, 10, power=2.0),
    "sequential": lambda o: s.SequentialLR(
        o, [s.LinearLR(o, 0.1, total_iters=4), s.ExponentialLR(o, 0.7)], [4]
    ),
    "chained": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.5, 3), s.ExponentialLR(o, 0.9)]),
    "plateau": lambda o: s.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


def make(optimizer=SGD, lr=0.1, **options):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))]
    rates = lr if isinstance(lr, (list, tuple)) else [lr, lr]
    groups = [{"params": [w], "lr": r} for w, r in zip(weights, rates, strict=True)]
    return weights, optimizer(groups, **options)


def step(weights, optimizer, i):
    for k, w in enumerate(weights):
        w.grad = torch.sin(torch.arange(4.0) + i + k)
    optimizer.step()


def advance(scheduler, i):
    if isinstance(scheduler, s.ReduceLROnPlateau):
        scheduler.step(float(i % 2))
    else:
        scheduler.step()


def rates(optimizer):
    return [float(g["lr"]) for g in optimizer.param_groups]


# SequentialLR of torch 2.8 itself passes the epoch.
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scale_under_any_scheduler_is_exact_and_leaves_the_schedule_alone(name, tensor, factor):
    """K3, S12: a learning rate cut by half is cut by half at every step."""

    def nominal_lr():
        return torch.tensor(0.1) if tensor else 0.1

    weights, optimizer = make(lr=[nominal_lr(), nominal_lr()], momentum=0.9)
    schedule = SCHEDULERS[name](optimizer)
    nominal = []
    for i in range(STEPS):
        nominal.append(rates(optimizer))
        step(weights, optimizer, i)
        advance(schedule, i)

    scaled, optimizer = make(lr=[nominal_lr(), nominal_lr()], momentum=0.9)
    schedule = SCHEDULERS[name](optimizer)
    learning_rate_multiplier(optimizer).set([factor] * len(optimizer.param_groups), OWNER)
    seen = []
    for i in range(STEPS):
        seen.append(rates(optimizer))
        step(scaled, optimizer, i)
        advance(schedule, i)
    assert seen == nominal

    by_hand, optimizer = make(lr=[nominal_lr(), nominal_lr()], momentum=0.9)
    for i in range(STEPS):
        for group, rate in zip(optimizer.param_groups, nominal[i], strict=True):
            group["lr"] = torch.tensor(rate * factor) if tensor else rate * factor
        step(by_hand, optimizer, i)
    for a, b in zip(scaled, by_hand, strict=True):
        assert torch.equal(a, b)


def update(lr, scale, lr_type=float):
    """How far one SGD step with gradients of 1 moves each group."""
    weights, optimizer = make(lr=[lr_type(r) for r in lr])
    scale(learning_rate_multiplier(optimizer))
    for w in weights:
        w.data.zero_()
        w.grad = torch.ones(4)
    optimizer.step()
    return [-float(w[0].detach()) for w in weights], rates(optimizer)


@pytest.mark.parametrize(
    ("lr", "factors", "effective"),
    [
        ([0.5, 0.25], [1.0, 1.0], [0.5, 0.25]),
        ([0.5, 0.25], [0.5, 0.5], [0.25, 0.125]),
        ([0.5, 0.25], [0.25, 1.0], [0.125, 0.25]),
        ([0.5, 0.0], [0.5, 0.5], [0.25, 0.0]),
    ],
)
@pytest.mark.parametrize("lr_type", [float, torch.tensor])
def test_set_scales_each_group(lr, factors, effective, lr_type):
    used, left = update(lr, lambda scale: scale.set(factors, OWNER), lr_type)
    assert used == effective
    assert left == lr


def test_effective_and_nominal_tell_what_the_next_update_uses():
    _, optimizer = make(lr=[0.5, 0.25])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5, 0.25], OWNER)
    assert scale.nominal() == [0.5, 0.25]
    assert scale.effective() == [0.25, 0.0625]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([0.0, 1.0], r"in \(0, 1\], got 0.0"),
        ([1.0, 1.5], "got 1.5"),
        ([-1, 1.0], "got -1"),
        ([1.0, float("nan")], "got nan"),
        ([0.5], "1 factors for 2 parameter groups"),
    ],
)
def test_set_refuses_what_makes_no_sense_and_keeps_what_was(factors, message):
    _, optimizer = make(lr=[0.5, 0.25])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5] * len(optimizer.param_groups), OWNER)
    with pytest.raises(ValueError, match=message):
        scale.set(factors, OWNER)
    assert scale.effective() == [0.25, 0.125]


@pytest.mark.parametrize(
    ("before", "inside", "used"),
    [
        (1.0, [0.5], 0.25),
        (0.5, [1.0], 0.5),
        (0.5, [0.25], 0.125),
        (1.0, [0.5, 1.0, 0.125], 0.0625),
        (0.5, [], 0.25),
    ],
)
@pytest.mark.parametrize("lr_type", [float, torch.tensor])
def test_set_inside_the_closure_is_obeyed_by_that_very_update(before, inside, used, lr_type):
    weights, optimizer = make(lr=[lr_type(0.5), lr_type(0.5)])
    scale = learning_rate_multiplier(optimizer)
    scale.set([before] * len(optimizer.param_groups), OWNER)

    def closure():
        for factor in inside:
            scale.set([factor] * len(optimizer.param_groups), OWNER)
            assert scale.nominal() == [0.5, 0.5]
        for w in weights:
            w.data.zero_()
            w.grad = torch.ones(4)

    optimizer.step(closure)
    assert [-float(w[0].detach()) for w in weights] == [used, used]
    assert rates(optimizer) == [0.5, 0.5]


def fail():
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("change", [None, 0.25, 1.0])
def test_exception_inside_a_step_leaves_the_next_step_at_the_nominal_rate(change):
    """S13."""
    weights, optimizer = make(lr=[0.5, 0.5])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5] * len(optimizer.param_groups), OWNER)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(fail)
    assert scale.nominal() == [0.5, 0.5]
    if change:
        scale.set([change] * len(optimizer.param_groups), OWNER)
    for w in weights:
        w.data.zero_()
        w.grad = torch.ones(4)
    optimizer.step()
    assert -float(weights[0][0].detach()) == 0.5 * (change or 0.5)
    assert rates(optimizer) == [0.5, 0.5]


def test_exception_inside_a_step_then_a_rate_of_someone_elses_is_kept():
    _, optimizer = make(lr=[0.5, 0.5])
    learning_rate_multiplier(optimizer).set([0.5] * len(optimizer.param_groups), OWNER)
    with pytest.raises(RuntimeError):
        optimizer.step(fail)
    for group in optimizer.param_groups:
        group["lr"] = 0.0625
    optimizer.step()
    assert rates(optimizer) == [0.0625, 0.0625]


@pytest.mark.parametrize("raised", [False, True])
def test_detach_leaves_the_optimizer_at_its_nominal_rate(raised):
    weights, optimizer = make(lr=[0.5, 0.5])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5] * len(optimizer.param_groups), OWNER)
    if raised:
        with pytest.raises(RuntimeError):
            optimizer.step(fail)
    scale.detach()
    assert rates(optimizer) == [0.5, 0.5]
    for w in weights:
        w.data.zero_()
        w.grad = torch.ones(4)
    optimizer.step()
    assert -float(weights[0][0].detach()) == 0.5
    assert learning_rate_multiplier(optimizer) is not scale


def test_scale_of_an_optimizer_is_the_same_for_everybody():
    (_, one), (_, other) = make(), make()
    assert learning_rate_multiplier(one) is learning_rate_multiplier(one)
    assert learning_rate_multiplier(one) is not learning_rate_multiplier(other)
    assert isinstance(learning_rate_multiplier(one), LearningRateMultiplier)


def test_scale_does_not_keep_its_optimizer_alive():
    _, optimizer = make()
    learning_rate_multiplier(optimizer).set([0.5] * len(optimizer.param_groups), OWNER)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copy_of_a_scaled_optimizer_steps_at_its_nominal_rate(copied):
    weights, optimizer = make(lr=[0.5, 0.5])
    learning_rate_multiplier(optimizer).set([0.5] * len(optimizer.param_groups), OWNER)
    step(weights, optimizer, 0)
    twin = copied(optimizer)
    assert rates(twin) == [0.5, 0.5]
    (w,) = twin.param_groups[0]["params"]
    w.data.zero_()
    w.grad = torch.ones(4)
    twin.step()
    assert -float(w[0].detach()) == 0.5


def test_state_dict_of_a_scaled_optimizer_holds_the_nominal_rate():
    weights, optimizer = make(AdamW, lr=[0.5, 0.25])
    learning_rate_multiplier(optimizer).set([0.5] * len(optimizer.param_groups), OWNER)
    step(weights, optimizer, 0)
    assert [g["lr"] for g in optimizer.state_dict()["param_groups"]] == [0.5, 0.25]


def test_owners_hold_factors_at_once_and_neither_undoes_the_other():
    """K3, N2: factors multiply; who relaxes its own leaves the other's in force."""
    _, optimizer = make(lr=[1.0, 1.0])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5, 0.25], OWNER)
    scale.set([0.5, 1.0], "clipping")
    assert scale.effective() == [0.25, 0.25]
    scale.set([1.0, 1.0], OWNER)
    assert scale.effective() == [0.5, 1.0]
    scale.set([0.25, 0.25], OWNER)
    scale.set([1.0, 1.0], "clipping")
    assert scale.effective() == [0.25, 0.25]
    assert (scale.held_by("rollback"), scale.held_by("clipping")) == ((0.25, 0.25), (1.0, 1.0))
    assert scale.held_by("nobody") == ()


def test_factors_of_a_restart_and_a_rollback_multiply_and_neither_overwrites_the_other():
    _, optimizer = make(lr=[1.0, 0.5])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5, 0.5], "restart")
    scale.set([0.25, 1.0], "rollback")
    assert scale.factors == (0.125, 0.5)
    assert scale.effective() == [0.125, 0.25]
    scale.set([1.0, 1.0], "rollback")
    assert scale.factors == scale.held_by("restart") == (0.5, 0.5)
    scale.set([0.25, 0.25], "rollback")
    scale.set([1.0, 1.0], "restart")
    assert scale.factors == scale.held_by("rollback") == (0.25, 0.25)


def test_owner_is_a_required_argument():
    _, optimizer = make()
    with pytest.raises(TypeError, match="owner"):
        learning_rate_multiplier(optimizer).set([0.5, 0.5])


def test_group_added_since_is_scaled_by_those_owners_who_know_it():
    _, optimizer = make(lr=[1.0, 1.0])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5, 0.5], OWNER)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    assert scale.effective() == [0.5, 0.5, 1.0]
    scale.set([0.25] * 3, "clipping")
    assert scale.effective() == [0.125, 0.125, 0.25]


def test_owner_that_cuts_inside_a_step_scales_this_update_on_top_of_the_other():
    used, left = update([1.0, 1.0], lambda scale: scale.set([0.5, 0.5], OWNER))
    assert used == [0.5, 0.5]
    weights, optimizer = make(lr=[1.0, 1.0])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5, 0.5], OWNER)

    def closure():
        scale.set([0.5, 0.5], "clipping")
        for w in weights:
            w.data.zero_()
            w.grad = torch.ones(4)

    optimizer.step(closure)
    assert [-float(w[0].detach()) for w in weights] == [0.25, 0.25]
    assert rates(optimizer) == left


def test_limit_holds_under_a_schedule_that_rises_and_leaves_one_that_falls():
    _, optimizer = make(lr=[1.0, 1.0])
    scale = learning_rate_multiplier(optimizer)
    scale.set([0.5, 0.5], OWNER, [0.4, math.inf])
    scale.set([0.5, 0.5], "clipping")
    for nominal, effective in [(0.4, [0.1, 0.1]), (2.0, [0.4, 0.5]), (8.0, [0.4, 2.0])]:
        for group in optimizer.param_groups:
            group["lr"] = nominal
        assert scale.effective() == pytest.approx(effective)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 8.0})
    assert scale.effective() == pytest.approx([0.4, 2.0, 8.0])
    scale.set([1.0] * 3, OWNER)
    assert scale.effective() == [4.0, 4.0, 8.0]


@pytest.mark.parametrize("limits", [[0.4], [0.4, 0.0], [0.4, math.nan]])
def test_limits_out_of_range_are_refused_and_change_nothing(limits):
    _, optimizer = make(lr=[1.0, 1.0])
    scale = learning_rate_multiplier(optimizer)
    with pytest.raises(ValueError, match="limits"):
        scale.set([0.5, 0.5], OWNER, limits)
    assert scale.effective() == [1.0, 1.0]
