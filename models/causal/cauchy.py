"""Cauchy distribution as functions that stay accurate over 40 orders of magnitude.

The classifier uses two identities. A sum of independent Cauchy variables is Cauchy; its location
and scale are the sums of theirs. A multiple a S has location a loc and scale abs(a) scale. So a
linear map of a Cauchy vector needs no sampling.

A tail probability is an angle: P(S > C) = atan2(scale, C - loc) / pi. The textbook form
1/2 + arctan((loc - C) / scale) / pi subtracts two nearly equal numbers: it is exactly 0 from
a ratio of 1e8 on in fp32, from 200 on in bf16, and its logarithm is -inf.

Arguments broadcast against each other; scales are greater than 0. Imports only torch.
"""

import math

import torch
from torch import Tensor


def log_density(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Returns the log density, log(scale / pi / (scale^2 + (value - loc)^2)).

    Does not square an argument, so it is valid for arguments from 1e-38 to 1e38 in fp32.
    """
    gap, scale = torch.broadcast_tensors(value - loc, scale)
    size = torch.maximum(gap.abs(), scale).detach()
    distance = size.log() + 0.5 * torch.log((gap / size).square() + (scale / size).square())
    return scale.log() - 2.0 * distance - math.log(math.pi)


def exceedance(threshold: Tensor | float, loc: Tensor, scale: Tensor) -> Tensor:
    """Returns P(S > threshold) for S ~ Cauchy(loc, scale), the survival function.

    Accurate up to rounding, in the upper tail too.

    >>> loc, scale = torch.tensor([0.0, 0.0, -1e9]), torch.tensor([1.0, 2.0, 1.0])
    >>> exceedance(torch.tensor([0.0, 2.0, 0.0]), loc, scale)
    tensor([5.0000e-01, 2.5000e-01, 3.1831e-10])
    """
    gap, scale = torch.broadcast_tensors(threshold - loc, scale)
    return _angle(scale, gap) / math.pi


def log_exceedance(threshold: Tensor | float, loc: Tensor, scale: Tensor) -> Tensor:
    """Returns log P(S > threshold); finite with finite gradients for all finite arguments.

    For log P(S < threshold) use `log_exceedance(-threshold, -loc, scale)`.
    """
    gap, scale = torch.broadcast_tensors(threshold - loc, scale)
    upper_half = gap >= 0
    # torch.where instead of abs(), whose gradient at 0 is 0.
    log_tail = _log_tail(scale, torch.where(upper_half, gap, -gap))
    return torch.where(upper_half, log_tail, torch.log1p(-log_tail.exp()))


def linear(
    weight: Tensor, bias: Tensor | None, loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns location and scale of W U + b for U with independent Cauchy elements.

    Args:
        weight: W, of shape (K, D).
        bias: b, of shape (K,); None for 0.
        loc: Location of U, of shape (..., D).
        scale: Scale of U, of shape (..., D).

    Returns:
        Location W loc + b and scale abs(W) scale, each of shape (..., K).
    """
    return torch.nn.functional.linear(loc, weight, bias), scale @ weight.abs().T


def sample(loc: Tensor, scale: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Samples Cauchy(loc, scale) as loc + scale * tan(pi (u - 1/2)), differentiable in both."""
    loc, scale = torch.broadcast_tensors(loc, scale)
    uniform = torch.rand(loc.shape, generator=generator, dtype=loc.dtype, device=loc.device)
    return quantile(uniform, loc, scale)


def quantile(probability: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Returns the quantile of a probability in (0, 1); at 1/2 it is the median, loc."""
    return loc + scale * torch.tan(math.pi * (probability - 0.5))


def naive_exceedance(threshold: Tensor | float, loc: Tensor, scale: Tensor) -> Tensor:
    """Returns P(S > threshold) by the textbook form, 1/2 + arctan((loc - threshold) / scale) / pi.

    Kept as a deliberate fault for experiments: it rounds to 0 and 1, and log(0) is -inf.
    """
    return 0.5 + torch.arctan((loc - threshold) / scale) / math.pi


def _angle(scale: Tensor, gap: Tensor) -> Tensor:
    """Returns atan2(scale, gap) of arguments scaled to about 1: torch's gradient squares both."""
    size = torch.maximum(gap.abs(), scale).detach()
    return torch.atan2(scale / size, gap / size)


def _log_tail(scale: Tensor, gap: Tensor) -> Tensor:
    """Returns log(atan2(scale, gap) / pi) for gap >= 0.

    Where scale / gap underflows, the arctangent equals the ratio, so its log is a difference.
    """
    underflows = scale < gap * torch.finfo(gap.dtype).tiny
    log_angle = _angle(scale, torch.where(underflows, scale, gap)).log()
    log_ratio = scale.log() - torch.where(underflows, gap, scale).log()
    return torch.where(underflows, log_ratio, log_angle) - math.log(math.pi)
