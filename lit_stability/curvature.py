"""The curvature of the loss along the update, against what the learning rate bears.

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
arXiv 2207.14484, appendix A). The largest curvature itself takes many Hessian-vector products. What
tells of a spike is the curvature along the gradient (arXiv 2506.04805), for which one will do:

    ratio = u^T H u / (2 g^T u),   u = D g, divided by the factor of momentum

It is 1 where a step ``-u`` leaves the loss, to second order, as it is. Weight decay is left out,
and so is clipping: where it is at work in SGD, steps are smaller than this says. May import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adam, Optimizer


def plain_updates(optimizer: Optimizer, rates: Sequence[float]) -> dict[Tensor, Tensor]:
    """The update of each parameter that has a gradient, as the table has it, without momentum.

    Adam's second moment has this gradient in it, as it will have in the update: an element that
    meets its first gradient would not be bounded otherwise.

    Args:
        optimizer: an SGD, Adam or AdamW, with its gradients unscaled.
        rates: effective learning rate of each group.

    Returns:
        Parameter to its update, float32, in the parameter's shape.

    Raises:
        ValueError: for another optimizer.
    """
    if not isinstance(optimizer, (SGD, Adam)):
        raise ValueError(
            f"the stable learning rate of {type(optimizer).__name__} is not known; it is that of "
            "SGD, Adam and AdamW"
        )
    found: dict[Tensor, Tensor] = {}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = optimizer.state.get(parameter) or {}
                found[parameter] = _update(group, state, parameter.grad, rate)
    return found


def directional_curvature(
    losses: Iterable[Tensor], parameters: Sequence[Tensor], updates: Sequence[Tensor]
) -> Tensor:
    """``u^T H u`` of the sum of the losses, by one product of the Hessian with a vector.

    Args:
        losses: scalars, each with its graph; one after the other, to hold one graph at a time.
        parameters: what the losses depend on.
        updates: u, one tensor per parameter, in its shape.

    Returns:
        A scalar, float32, on the device of the first parameter.

    Raises:
        RuntimeError: where an operation cannot be differentiated twice.
    """
    total = torch.zeros((), device=parameters[0].device)
    with ExitStack() as stack:
        # Of torch's attention kernels and recurrent ones these alone have a second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.enable_grad())
        for loss in losses:
            grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            slope = _dot(grads, updates)
            if slope.requires_grad:
                product = torch.autograd.grad(slope, parameters, allow_unused=True)
                total = total + _dot(product, updates).detach()
    return total


def slope_of(updates: Mapping[Tensor, Tensor]) -> Tensor:
    """``g^T u``, a scalar."""
    return _dot([p.grad for p in updates], list(updates.values()))


def _update(
    group: Mapping[str, Any], state: Mapping[str, Any], grad: Tensor, rate: float
) -> Tensor:
    grad = grad.detach().float()
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
    """Half of the largest curvature, in units of ``1 / lr``."""
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return (1 + momentum) / (1 + 2 * momentum)
    return (1 + momentum) / (1 - group["dampening"]) if momentum else 1.0


def _dot(tensors: Sequence[Tensor | None], others: Sequence[Tensor]) -> Tensor:
    """Sum over pairs; what is None counts as 0."""
    pairs = [(a, b) for a, b in zip(tensors, others, strict=True) if a is not None]
    products = [(a.float() * b.to(a.device)).sum().to(others[0].device) for a, b in pairs]
    return torch.stack(products).sum() if products else torch.zeros((), device=others[0].device)
