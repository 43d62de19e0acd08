"""Distribution of the elements of each gradient: exact at an incident, else from a sample.

May import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lit_stability.measurement.norms import dense, norms_of, to_host
from lit_stability.measurement.step_stats import GradientDetail
from lit_stability.measurement.weight_sampling import blocks_of

_DETAIL_BLOCKS, _DETAIL_BLOCK = 32, 128
"""Number and size of the blocks sampled from a gradient while a run is healthy."""


@torch.no_grad()
def gradient_details(named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Returns the exact distribution of every gradient as a dict of plain values; for incidents."""
    named = [(n, p.grad) for n, p in named_parameters if p.grad is not None]
    grads = [dense(g) for _, g in named]
    host = to_host({"norms": norms_of(grads), "rows": [distribution(g) for g in grads]})
    return [asdict(d) for d in details_of([n for n, _ in named], host["norms"], host["rows"])]


def distribution(grad: Tensor) -> Tensor:
    """Returns mean, standard deviation, minimum, maximum and share of zeros, shape ``(5,)``."""
    if grad.numel() == 0:
        return grad.new_zeros(5, dtype=torch.float32)
    g = grad.detach().float()
    low, high = torch.aminmax(g)
    std, mean = torch.std_mean(g, correction=0)
    zeros = 1.0 - torch.count_nonzero(g) / g.numel()
    return torch.stack([mean, std, low, high, zeros])


def sampled_distribution(grad: Tensor) -> Tensor:
    """Returns what `distribution` does, from at most 4096 evenly spread elements."""
    return distribution(_sample(grad))


def _sample(grad: Tensor) -> Tensor:
    if grad.numel() <= _DETAIL_BLOCKS * _DETAIL_BLOCK:
        return grad
    return blocks_of(grad, _DETAIL_BLOCKS, _DETAIL_BLOCK)


def details_of(
    names: Sequence[str], norms: Sequence[float], flat: Sequence[float]
) -> tuple[GradientDetail, ...]:
    """Builds the details from distributions that were copied to the host, five numbers each."""
    if not flat:
        return ()
    rows = [flat[5 * i : 5 * i + 5] for i in range(len(names))]
    return tuple(
        GradientDetail(
            name=n, norm=norm, mean=r[0], std=r[1], minimum=r[2], maximum=r[3], zero_share=r[4]
        )
        for n, norm, r in zip(names, norms, rows, strict=True)
    )
