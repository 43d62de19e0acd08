"""The second moment that follows from gradient norms is the one that Adam has."""

import math

import pytest
import torch
from torch import nn

from lit_stability.measurement.second_moment_ratio import SecondMomentRatio
from lit_stability.measurement.step_meter import StepMeter


def follow(norms, decay=0.9, taken=None):
    kept = SecondMomentRatio()
    flags = taken or [True] * len(norms)
    return [
        kept.measure({"w": n}, {"w": decay}, taken=f) for n, f in zip(norms, flags, strict=True)
    ]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_gradients_of_one_size_have_ratio_1_from_the_second_step_on(decay):
    """Warm-up is silent: the bias correction is exact."""
    first, *rest = follow([3.0] * 20, decay)
    assert first is None
    assert [ratio for ratio, _ in rest] == pytest.approx([1.0] * 19)


def test_ratio_is_bounded_by_what_the_decay_allows():
    ratio, _ = follow([1.0] * 500 + [1e9], 0.99)[-1]
    assert ratio == pytest.approx(math.sqrt((1 - 0.99**501) / (1 - 0.99)))


@pytest.mark.parametrize("bad", [1e9, math.nan, math.inf])
def test_step_that_was_not_taken_is_not_learnt(bad):
    flags = [True] * 6 + [False]
    assert follow([1.0] * 5 + [bad, 2.0], taken=flags)[-1] == follow([1.0] * 5 + [2.0])[-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_norm_has_no_ratio_and_is_never_learnt(bad):
    found = follow([1.0] * 5 + [bad, 1.0])
    assert found[5] is None
    assert found[6][0] == pytest.approx(1.0)


def test_parameter_furthest_off_is_named_and_those_without_second_moment_have_no_say():
    kept = SecondMomentRatio()
    for last in (1.0, 1.0, 5.0):
        norms = {"a": 1.0, "b": last, "free": 10 * last, "unused": 0.0}
        found = kept.measure(norms, {"a": 0.9, "b": 0.9, "unused": 0.9}, taken=True)
    assert found[1] == "b"


def test_what_was_kept_is_forgotten_after_a_rollback():
    kept = SecondMomentRatio()
    for norm in (1.0, 1.0):
        kept.measure({"w": norm}, {"w": 0.9}, taken=True)
    kept.forget()
    assert kept.measure({"w": 1.0}, {"w": 0.9}, taken=True) is None


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_meter_keeps_the_sum_of_the_second_moment_that_the_optimizer_has(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = make(net.parameters(), 1e-2, (0.9, 0.95))
    meter = StepMeter(net.named_parameters(), optimizer)
    for step in range(30):
        optimizer.zero_grad()
        (net(torch.randn(4, 7)).square().mean() * (1 + step % 3)).backward()
        stats = meter.measure(step, None)
        optimizer.step()
        if step == 0:
            assert stats.moment_rms is None
            continue
        wanted = {}
        for name, p in net.named_parameters():
            corrected = optimizer.state[p]["exp_avg_sq"].sum() / (1 - 0.95 ** (step + 1))
            wanted[name] = float(p.grad.norm() / corrected.sqrt())
        assert stats.moment_rms == pytest.approx(max(wanted.values()), rel=1e-4)
        assert stats.moment_rms == pytest.approx(wanted[stats.moment_rms_name], rel=1e-4)


def test_meter_learns_no_gradient_whose_update_was_skipped():
    net = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    meter = StepMeter(net.named_parameters(), optimizer)
    for step, size in enumerate([1.0] * 5 + [1e6, 1.0]):
        optimizer.zero_grad()
        (size * net(torch.ones(2, 3)).sum()).backward()
        stats = meter.measure(step, None)
        if size == 1.0:
            optimizer.step()
    assert stats.moment_rms == pytest.approx(1.0, rel=1e-4)


def test_meter_of_an_optimizer_without_second_moment_has_no_ratio():
    net = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9)
    meter = StepMeter(net.named_parameters(), optimizer)
    for step in range(5):
        net(torch.randn(2, 3)).sum().backward()
        assert meter.measure(step, None).moment_rms is None
        optimizer.step()
