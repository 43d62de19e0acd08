"""The curvature of the loss along the update, relative to the largest that the optimizer tolerates.

Near its minimum a loss is a quadratic form of Hessian H, and gradient descent diverges along a
direction in which its curvature is above ``2 / lr``. Momentum and Adam move that edge: each is
gradient descent in another metric, ``w <- w - D g`` with a positive diagonal D, up to a factor that
momentum gives:

=================================  ===========================  ==========================
optimizer                          D                            largest curvature of D H
=================================  ===========================  ==========================
SGD                                ``lr``                       2
SGD, momentum b, dampening d       ``lr (1 - d)``               ``2 (1 + b)``
SGD, Nesterov momentum b           ``lr``                       ``2 (1 + b) / (1 + 2 b)``
Adam, AdamW                        ``lr / (sqrt(v) + eps)``     ``2 (1 + b1) / (1 - b1)``
=================================  ===========================  ==========================

(the roots of the two-term recursion on a quadratic leave the unit circle there; Cohen et al. 2022,
arXiv 2207.14484). The largest curvature itself takes many Hessian-vector products. A spike is
announced by the curvature along the gradient (arXiv 2506.04805), for which one is enough:

    ratio = u^T H u / (2 g^T u),   u = D g, divided by the factor of momentum

The ratio is 1 if a step ``-u`` does not change the loss, to second order. Weight decay is ignored,
and so is clipping: in SGD with clipping, the steps are smaller than assumed here. May import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lit_stability.measurement.half_precision import HALF

_REACH = 1e-3
"""Distance from the weights at which gradients are computed, as a share of their norm."""


def plain_updates(optimizer: Optimizer, rates: Sequence[float]) -> dict[Tensor, Tensor]:
    """Returns the update ``u`` of each parameter that has a gradient, without momentum.

    Adam's second moment includes the current gradient, as it does in the real update. Otherwise the
    update of an element with its first gradient would be unbounded.

    Args:
        optimizer: an SGD, Adam or AdamW, with unscaled gradients.
        rates: effective learning rate of each group.

    Returns:
        Parameter -> update, in the parameter's shape; float32 for 16-bit parameters.

    Raises:
        ValueError: if the optimizer is of another class.
    """
    if not isinstance(optimizer, (SGD, Adam)):
        raise ValueError(
            f"the stable learning rate of {type(optimizer).__name__} is not known, only those of "
            "SGD, Adam and AdamW"
        )
    updates: dict[Tensor, Tensor] = {}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = optimizer.state.get(parameter) or {}
                updates[parameter] = _update(group, state, parameter.grad, rate)
    return updates


def directional_curvature(
    losses: Callable[[], Iterable[Tensor]],
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
) -> Tensor:
    """Returns ``u^T H u`` of the sum of the losses, from the difference of two gradients.

    The gradients are computed at ``w + h u`` and ``w - h u``, where the norm of ``h u`` is a
    thousandth of that of the weights. The result is exact for a quadratic loss and, unlike a second
    derivative, works with every kernel that has a first derivative. It costs two forward and
    backward passes, and no extra memory.

    Args:
        losses: yields scalars with their graphs, one after the other; apart from the weights, every
            call must compute the same.
        parameters: leaves that the losses depend on; their ``data`` is replaced temporarily and
            never written to.
        updates: u, one tensor per parameter, in its shape.

    Returns:
        A scalar on the device of the first parameter.
    """
    originals = [p.data for p in parameters]
    weights, size = _norm(originals), _norm(updates)
    h = _REACH * torch.maximum(weights, size) / size
    slopes = []
    try:
        for sign in (1, -1):
            for p, data, u in zip(parameters, originals, updates, strict=True):
                p.data = data + (sign * h).to(u.device, u.dtype) * u
            slopes.append(_slope(losses(), parameters, updates))
    finally:
        for p, data in zip(parameters, originals, strict=True):
            p.data = data
    return (slopes[0] - slopes[1]) / (2 * h)


def slope_of(updates: Mapping[Tensor, Tensor]) -> Tensor:
    """Returns ``g^T u``, a scalar."""
    return _dot([p.grad for p in updates], list(updates.values()))


def _slope(
    losses: Iterable[Tensor], parameters: Sequence[Tensor], updates: Sequence[Tensor]
) -> Tensor:
    with torch.enable_grad():
        grads = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
        return torch.stack([_dot(grad, updates) for grad in grads]).sum()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return _dot(tensors, tensors).sqrt()


def _update(
    group: Mapping[str, Any], state: Mapping[str, Any], grad: Tensor, rate: float
) -> Tensor:
    grad = _wide(grad.detach())
    if "betas" not in group:
        return grad * (rate / _sgd_edge(group))
    beta1, beta2 = map(float, group["betas"])
    second, steps = (1 - beta2) * grad.square(), torch.ones((), device=grad.device)
    if "exp_avg_sq" in state:
        second = second + beta2 * state["exp_avg_sq"]
        steps = steps + state["step"].to(grad.device)
    if "max_exp_avg_sq" in state:
        second = torch.maximum(second, state["max_exp_avg_sq"])
    denominator = (second / (1 - beta2**steps)).sqrt() + group["eps"]
    update: Tensor = grad / denominator * (rate * (1 - beta1) / (1 + beta1))
    return update


def _sgd_edge(group: Mapping[str, Any]) -> float:
    """Returns half of the largest stable curvature, in units of ``1 / lr``."""
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return (1 + momentum) / (1 + 2 * momentum)
    return (1 + momentum) / (1 - group["dampening"]) if momentum else 1.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _dot(tensors: Sequence[Tensor | None], others: Sequence[Tensor]) -> Tensor:
    """Returns the sum over pairs, on the first device; None counts as 0."""
    pairs = [(a, b) for a, b in zip(tensors, others, strict=True) if a is not None]
    products = [(_wide(a) * _wide(b)).sum().to(others[0].device) for a, b in pairs]
    return torch.stack(products).sum() if products else torch.zeros((), device=others[0].device)
