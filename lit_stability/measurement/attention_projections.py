"""Finds the rows of a model's weights that make the queries and the keys of each attention head.

A head's query is a linear function of some outputs of a projection: of its own columns of a
``Linear``, whose weights may be fused with those of keys and values, split, transposed or
interleaved, and rotated afterwards. Which columns these are shows the gradient of the head; that
the query is proportional to them shows Euler's theorem: a function of degree 1 equals its
derivative times its argument. Queries that are normalised after the projection have degree 0.
May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local

_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.05}
_TOLERANCE_ELSE = 1e-3
"""Largest relative error of Euler's theorem, by dtype."""


class Untraceable(Exception):
    """The weights of an attention cannot be found, or not be rescaled; the message has the reason.

    Args:
        reason: as text, after "because".
        for_now: whether another batch may show them.
    """

    def __init__(self, reason: str, *, for_now: bool = False) -> None:
        super().__init__(reason)
        self.for_now = for_now


@dataclass(frozen=True)
class WeightView:
    """A parameter, or the part of it that a view shows, with the dimension of the outputs."""

    parameter: nn.Parameter
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    axis: int
    """Dimension whose index is that of an output of the projection."""

    @property
    def key(self) -> tuple[object, ...]:
        """Identifies the memory; equal for two views of the same part."""
        return id(self.parameter), self.size, self.stride, self.offset, self.axis

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiplies what belongs to each output by its factor, in place.

        Args:
            factors: shape ``(outputs,)``, float32; 1 leaves the bits as they are.
        """
        view = self.parameter.as_strided(self.size, self.stride, self.offset)
        shape = [1] * len(self.size)
        shape[self.axis] = -1
        view.mul_(factors.to(view.device, view.dtype).reshape(shape))


@dataclass(frozen=True)
class Projection:
    """The weights of a projection, and which of its outputs belong to which head."""

    weights: tuple[WeightView, ...]
    """The weight, and the bias if there is one."""
    rows: Tensor
    """Shape ``(heads, outputs)``, bool, on the host."""

    def groups(self) -> tuple[int, ...]:
        """Returns a number for each head; heads with the same rows have the same.

        Raises:
            Untraceable: if heads share some rows and not all.
        """
        kinds, groups = torch.unique(self.rows, dim=0, return_inverse=True)
        if (kinds.sum(0) > 1).any():
            raise Untraceable("its heads share a part of their projection")
        return tuple(groups.tolist())


@dataclass(frozen=True)
class Linear:
    """A linear operation that ran: its output, with the graph, and its weights."""

    output: Tensor
    weight: Tensor
    bias: Tensor | None
    axis: int
    """Dimension of the weight whose index is that of an output."""


def trace_projection(heads: Tensor, linears: Sequence[Linear], what: str) -> Projection:
    """Finds the projection of the queries, or of the keys, of an attention.

    Args:
        heads: shape ``(batch, heads, positions, width)``, as the attention gets them, with graph.
        linears: those that ran before, the last one last.
        what: name of the heads in messages, such as "queries".

    Raises:
        Untraceable: if there is none whose outputs they are proportional to.

    >>> layer, x = nn.Linear(4, 4, bias=False), torch.randn(1, 3, 4)
    >>> y = layer(x)
    >>> heads = y.view(1, 3, 2, 2).transpose(1, 2)
    >>> trace_projection(heads, [Linear(y, layer.weight, None, 0)], "queries").rows.int()
    tensor([[1, 1, 0, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    if not heads.requires_grad:
        raise Untraceable(
            f"its {what} have no gradient: they are frozen, or run in a checkpoint with "
            "use_reentrant=True"
        )
    linear = _last_that_matters(heads, linears)
    if linear is None:
        raise Untraceable(f"no linear layer was found that makes its {what}")
    _check_proportional(heads, linear, what)
    weights = tuple(_views(linear, what))
    rows = torch.stack([_rows(heads, head, linear.output) for head in range(heads.shape[1])])
    return Projection(weights, rows.cpu())


def weight_view(weight: Tensor, axis: int) -> WeightView:
    """Returns the part of a parameter that a tensor shows.

    Raises:
        Untraceable: if it is neither a parameter nor a view of one, or a shard.
    """
    owner = weight if isinstance(weight, nn.Parameter) else weight._base
    if not isinstance(owner, nn.Parameter):
        raise Untraceable("the weight of its projection is computed and not a parameter")
    if local(owner) is not owner:
        raise Untraceable("the weight of its projection is sharded")
    offset = int(weight.storage_offset())
    return WeightView(owner, tuple(weight.shape), tuple(weight.stride()), offset, axis)


def _views(linear: Linear, what: str) -> list[WeightView]:
    found = [weight_view(linear.weight, linear.axis)]
    if linear.bias is not None:
        found.append(weight_view(linear.bias, 0))
    return found


def _last_that_matters(heads: Tensor, linears: Sequence[Linear]) -> Linear | None:
    """Returns the last operation that the heads depend on: all others act through it."""
    ones = torch.ones_like(heads)
    for linear in reversed(linears):
        if linear.output.requires_grad and _gradient(heads, linear.output, ones) is not None:
            return linear
    return None


def _check_proportional(heads: Tensor, linear: Linear, what: str) -> None:
    direction = heads.detach()
    gradient = _gradient(heads, linear.output, direction)
    assert gradient is not None, "it was found by its gradient"
    square = float(direction.float().square().sum())
    if not 0 < square < math.inf:
        raise Untraceable(f"its {what} are all 0, or not finite", for_now=True)
    ratio = float((gradient.float() * linear.output.detach().float()).sum()) / square
    if abs(ratio - 1) > _TOLERANCE.get(heads.dtype, _TOLERANCE_ELSE):
        normalised = abs(ratio) < 0.1
        raise Untraceable(
            f"its {what} are normalised after their projection, which bounds the logits already"
            if normalised
            else f"its {what} are not proportional to the outputs of one linear layer"
        )


def _rows(heads: Tensor, head: int, output: Tensor) -> Tensor:
    """Returns which of a projection's outputs a head depends on, shape ``(outputs,)``."""
    direction = torch.zeros_like(heads)
    # Not constant, so that a mean that is subtracted does not hide the dependence.
    width = heads.shape[-1]
    direction[:, head] = torch.arange(1, width + 1, device=heads.device, dtype=heads.dtype) / width
    gradient = _gradient(heads, output, direction)
    assert gradient is not None, "it was found by its gradient"
    return (gradient != 0).flatten(0, -2).any(0)


def _gradient(of: Tensor, to: Tensor, direction: Tensor) -> Tensor | None:
    (gradient,) = torch.autograd.grad(of, to, direction, retain_graph=True, allow_unused=True)
    return gradient
