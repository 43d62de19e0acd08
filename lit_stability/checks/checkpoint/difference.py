"""Compares the weights of two checkpoints, tensor by tensor.

May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_stability.checks.checkpoint.comparison import Change, Comparison
from lit_stability.checks.checkpoint.examination import state_dict_of
from lit_stability.checks.checkpoint.measure import pieces


@torch.no_grad()
def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compares the weights and buffers of two checkpoints, without changing them.

    Args:
        before: A Lightning checkpoint or a bare state dict, loaded to the CPU.
        after: The same; its tensors are matched by name with those of `before`.

    Raises:
        ValueError: If one of them contains no tensor.
    """
    a, b = state_dict_of(before), state_dict_of(after)
    both = [name for name in a if name in b]
    comparable = [name for name in both if a[name].shape == b[name].shape]
    changes = [_change(name, a[name], b[name]) for name in comparable]
    changes.sort(key=lambda c: (c.non_finite_after + c.non_finite_before, c.relative), reverse=True)
    difference = math.hypot(*(change.difference for change in changes))
    return Comparison(
        changes=tuple(changes),
        relative=_over(difference, math.hypot(*(change.norm_before for change in changes))),
        only_before=tuple(name for name in a if name not in b),
        only_after=tuple(name for name in b if name not in a),
        reshaped=tuple(
            (name, str(tuple(a[name].shape)), str(tuple(b[name].shape)))
            for name in both
            if a[name].shape != b[name].shape
        ),
        retyped=tuple(
            (name, _type(a[name]), _type(b[name]))
            for name in comparable
            if a[name].dtype != b[name].dtype
        ),
        steps=(_step_of(before), _step_of(after)),
    )


def _step_of(checkpoint: Mapping[str, Any]) -> int | None:
    step = checkpoint.get("global_step")
    return step if isinstance(step, int) else None


def _change(name: str, before: Tensor, after: Tensor) -> Change:
    a, b = _flat(before), _flat(after)
    difference = product = first = second = largest = 0.0
    bad_before = bad_after = 0
    for x, y in zip(pieces(a), pieces(b), strict=True):
        good_x, good_y = torch.isfinite(x), torch.isfinite(y)
        bad_before += int((~good_x).sum())
        bad_after += int((~good_y).sum())
        if not bool((good_x & good_y).all()):
            x, y = x[good_x & good_y], y[good_x & good_y]
        if x.numel() == 0:
            continue
        d = y - x
        largest = max(largest, float(d.abs().max()))
        difference += float(torch.dot(d, d))
        product += float(torch.dot(x, y))
        first += float(torch.dot(x, x))
        second += float(torch.dot(y, y))
    return Change(
        name=name,
        elements=a.numel(),
        difference=math.sqrt(difference),
        relative=_over(math.sqrt(difference), math.sqrt(first)),
        cosine=_cosine(product, first, second),
        largest=largest,
        norm_before=math.sqrt(first),
        norm_after=math.sqrt(second),
        non_finite_before=bad_before,
        non_finite_after=bad_after,
    )


def _over(difference: float, norm: float) -> float:
    if norm:
        return difference / norm
    return math.inf if difference else 0.0


def _cosine(product: float, first: float, second: float) -> float | None:
    if not (first and second):
        return None
    return max(-1.0, min(1.0, product / math.sqrt(first) / math.sqrt(second)))


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return real.reshape(-1)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
