"""The curvature ratio, against quadratic losses where the edge is known and can be walked over."""

import contextlib

import pytest
import torch
from torch import nn

from lit_stability.measurement.curvature import directional_curvature, plain_updates, slope_of

CURVATURES = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)


def quadratic(w):
    return 0.5 * (CURVATURES.to(w.dtype) * w**2).sum()


def ratio(loss, parameters, optimizer, rates):
    updates = plain_updates(optimizer, rates)
    bent = directional_curvature(lambda: [loss()], parameters, [updates[p] for p in parameters])
    return float(bent / (2 * slope_of(updates)))


def walk(make, rate, start, steps):
    """The weight after some steps on ``w^2 / 2``, and the ratio at the last of them."""
    w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = make([w], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * w**2).sum().backward()
        found = ratio(lambda: (0.5 * w**2).sum(), [w], optimizer, [rate])
        optimizer.step()
    return float(w.detach().abs()), found


SGD = torch.optim.SGD
MAKERS = {
    "plain": (lambda p, lr: SGD(p, lr), 2.0),
    "momentum": (lambda p, lr: SGD(p, lr, momentum=0.9), 3.8),
    "dampened": (lambda p, lr: SGD(p, lr, momentum=0.9, dampening=0.5), 7.6),
    "nesterov": (lambda p, lr: SGD(p, lr, momentum=0.9, nesterov=True), 3.8 / 2.8),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("beyond", [0.98, 1.02])
def test_ratio_of_sgd_is_exact_on_a_quadratic_and_1_is_where_it_diverges(kind, beyond):
    make, edge = MAKERS[kind]
    size, found = walk(make, beyond * edge, 1.0, 60)
    assert found == pytest.approx(beyond, rel=1e-5)
    assert (size > 1) is (beyond > 1)


@pytest.mark.parametrize("beyond", [0.97, 1.03])
def test_ratio_of_adam_is_exact_where_its_second_moment_stands_still(beyond):
    """Its edge is ``2 (1 + b1) / (1 - b1)`` in the metric of the second moment, here 1/4."""

    def make(parameters, rate):
        optimizer = torch.optim.Adam(parameters, rate, (0.9, 1 - 1e-6), eps=0.0)
        moments = {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.full((1,), 0.25)}
        moments = {name: moment.double() for name, moment in moments.items()}
        optimizer.state[parameters[0]] = {"step": torch.tensor(1e9), **moments}
        return optimizer

    size, found = walk(make, beyond * 38.0 * 0.5, 1e-12, 60)
    # The second moment has decayed by 1e-6 in each of 60 steps.
    assert found == pytest.approx(beyond * (1 - 1e-6) ** -30, rel=1e-6)
    assert (size > 1e-12) is (beyond > 1)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_updates_of_adam_without_momentum_are_those_of_its_next_step(amsgrad):
    net = nn.Linear(5, 3)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, (0.0, 0.99), amsgrad=amsgrad)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(8, 5)).square().mean().backward()
        updates = plain_updates(optimizer, [1e-2])
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        for p, old in zip(net.parameters(), before, strict=True):
            assert torch.allclose(old - p, updates[p], atol=1e-7)


def test_ratio_follows_the_gradient_over_several_parameters_and_groups():
    a, b = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (2.0, 1.0))
    loss = lambda: (0.5 * 3.0 * a**2 + 0.5 * 5.0 * b**2).sum()  # noqa: E731
    optimizer = SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}], 0.1)
    loss().backward()
    (ga, gb), (ua, ub) = (6.0, 5.0), (0.6, 1.0)
    wanted = (3 * ua**2 + 5 * ub**2) / (2 * (ga * ua + gb * ub))
    assert ratio(loss, [a, b], optimizer, [0.1, 0.2]) == pytest.approx(wanted)


def test_curvature_of_several_losses_is_that_of_their_sum():
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    u = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    both = directional_curvature(lambda: [quadratic(w), 2 * quadratic(w)], [w], [u])
    assert float(both) == pytest.approx(3 * (1 + 9))


def test_curvature_of_a_linear_loss_is_zero():
    w = nn.Parameter(torch.ones(3))
    assert directional_curvature(lambda: [(2 * w).sum()], [w], [torch.ones(3)]) == 0.0


def test_curvature_through_fused_attention_equals_a_second_derivative():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(1, 2, 6, 4, dtype=torch.float64))
    u = torch.randn_like(w)

    def loss():
        return nn.functional.scaled_dot_product_attention(w, 2 * w, w).square().sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (grad,) = torch.autograd.grad(loss(), w, create_graph=True)
        (product,) = torch.autograd.grad((grad * u).sum(), w)
    found = directional_curvature(lambda: [loss()], [w], [u])
    assert float(found) == pytest.approx(float((product * u).sum()), rel=1e-4)


def test_curvature_leaves_the_weights_that_were_there_also_if_the_loss_fails():
    w = nn.Parameter(torch.ones(3))
    address, gives = w.data_ptr(), [quadratic]
    for loss in (quadratic, None):
        gives[0] = loss
        with contextlib.suppress(TypeError):
            directional_curvature(lambda: [gives[0](w)], [w], [torch.ones(3)])
        assert w.data_ptr() == address
        assert torch.equal(w.detach(), torch.ones(3))


def test_unknown_optimizer_is_refused_by_name():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="stable learning rate of RMSprop is not known"):
        plain_updates(torch.optim.RMSprop([w]), [0.01])
