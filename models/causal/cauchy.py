"""The Cauchy distribution as pure functions that keep their digits over 40 orders of magnitude.

Two identities carry the classifier. A sum of independent Cauchy variables is Cauchy, with the
sums of their locations and of their scales; a multiple has the multiple of the location and the
absolute multiple of the scale. So a linear map of a Cauchy vector needs no sampling.

A tail is an angle: P(S > C) = atan2(scale, C - loc) / pi. The textbook form
1/2 + arctan((loc - C) / scale) / pi subtracts two numbers that are nearly equal: in fp32 it is
exactly 0 from a ratio of 1e8 on, in bf16 from 200 on, and its logarithm is -inf.

Arguments broadcast against each other; scales are greater than 0. May import torch alone.
"""

import math

import torch
from torch import Tensor


def log_density(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Logarithm of the density, log(scale / pi / (scale^2 + (value - loc)^2)).

    No square of an argument is formed, so it holds for arguments from 1e-38 to 1e38 in fp32.
    """
    gap, scale = torch.broadcast_tensors(value - loc, scale)
    size = torch.maximum(gap.abs(), scale).detach()
    distance = size.log() + 0.5 * torch.log((gap / size).square() + (scale / size).square())
    return scale.log() - 2.0 * distance - math.log(math.pi)


def exceedance(threshold: Tensor | float, loc: Tensor, scale: Tensor) -> Tensor:
    """P(S > threshold) of S ~ Cauchy(loc, scale), exact to rounding in the upper tail too.

    >>> loc, scale = torch.tensor([0.0, 0.0, -1e9]), torch.tensor([1.0, 2.0, 1.0])
    >>> exceedance(torch.tensor([0.0, 2.0, 0.0]), loc, scale)
    tensor([5.0000e-01, 2.5000e-01, 3.1831e-10])
    """
    gap, scale = torch.broadcast_tensors(threshold - loc, scale)
    return _angle(scale, gap) / math.pi


def log_exceedance(threshold: Tensor | float, loc: Tensor, scale: Tensor) -> Tensor:
    """Logarithm of P(S > threshold); finite, with finite gradients, wherever the arguments are.

    That of P(S < threshold) is `log_exceedance(-threshold, -loc, scale)`.
    """
    gap, scale = torch.broadcast_tensors(threshold - loc, scale)
    rare = gap >= 0
    # By a choice and not by abs(), whose slope at 0 is 0.
    log_tail = _log_tail(scale, torch.where(rare, gap, -gap))
    return torch.where(rare, log_tail, torch.log1p(-log_tail.exp()))


def linear(
    weight: Tensor, bias: Tensor | None, loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Location and scale of W U + b, for U of independent Cauchy elements.

    Args:
        weight: (K, D).
        bias: (K,), or None for 0.
        loc: (..., D), of U.
        scale: (..., D), of U.

    Returns:
        Location W loc + b and scale abs(W) scale, each (..., K).
    """
    return torch.nn.functional.linear(loc, weight, bias), scale @ weight.abs().T


def sample(loc: Tensor, scale: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw from Cauchy(loc, scale), differentiable in both: loc + scale * tan(pi (u - 1/2))."""
    loc, scale = torch.broadcast_tensors(loc, scale)
    uniform = torch.rand(loc.shape, generator=generator, dtype=loc.dtype, device=loc.device)
    return quantile(uniform, loc, scale)


def quantile(probability: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The value that S stays below with a probability in (0, 1); at 1/2 it is the median, loc."""
    return loc + scale * torch.tan(math.pi * (probability - 0.5))


def naive_exceedance(threshold: Tensor | float, loc: Tensor, scale: Tensor) -> Tensor:
    """P(S > threshold) as in textbooks, 1/2 + arctan((loc - threshold) / scale) / pi.

    Kept because it is what breaks: 0 and 1 are reached, and log of 0 is -inf.
    """
    return 0.5 + torch.arctan((loc - threshold) / scale) / math.pi


def _angle(scale: Tensor, gap: Tensor) -> Tensor:
    """Angle between the gap and the scale, of numbers near 1: torch squares both for the slope."""
    size = torch.maximum(gap.abs(), scale).detach()
    return torch.atan2(scale / size, gap / size)


def _log_tail(scale: Tensor, gap: Tensor) -> Tensor:
    """Logarithm of atan2(scale, gap) / pi, for a gap >= 0.

    Where their ratio underflows it is its own arctangent, and its logarithm a difference.
    """
    far = scale < gap * torch.finfo(gap.dtype).tiny
    near = _angle(scale, torch.where(far, scale, gap)).log()
    away = scale.log() - torch.where(far, gap, scale).log()
    return torch.where(far, away, near) - math.log(math.pi)
