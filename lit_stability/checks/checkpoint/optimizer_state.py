"""The optimizer's state of a checkpoint: which parameter each entry belongs to, and its health.

A checkpoint stores the state by the parameter's index over the optimizer's groups, without names.
May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_stability.checks.checkpoint.measure import kind_of, memory_of, pieces
from lit_stability.checks.checkpoint.report import MomentHealth
from lit_stability.measurement.float_formats import FORMATS

_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "exp_inf", "square_avg", "sum")
"""Keys of ``torch.optim`` whose tensors have the shape of their parameter."""
_Shape = tuple[int, ...]


def measure_moments(
    optimizers: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> tuple[MomentHealth, ...]:
    """Measure the state of every parameter that has one.

    Args:
        optimizers: state dicts, as ``optimizer_states`` of a checkpoint holds them.
        state: the model's state dict, for the names.
    """
    names = name_entries(optimizers, state)
    found: list[MomentHealth] = []
    for number, optimizer in enumerate(optimizers):
        options = _options(optimizer)
        for index, entry in optimizer.get("state", {}).items():
            if not isinstance(entry, Mapping):
                continue
            name = names.get((number, index), f"unnamed {index}")
            found.append(_measure(name, number, index, entry, options.get(index, {})))
    return tuple(found)


def name_entries(
    optimizers: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> dict[tuple[int, Any], str]:
    """Which parameter each entry belongs to, where no other order-keeping assignment fits.

    An optimizer that was given ``named_parameters()`` has stored the names itself. Otherwise each
    group is taken to hold its parameters in the order of the model, as those do that are made from
    ``parameters()`` by whatever filter. The shapes are laid along those of the model as early as
    they fit, and as late as they fit: where both agree, no third assignment exists, and that is
    the name. Where they do not agree the entry stays unnamed.

    Args:
        optimizers: state dicts.
        state: the model's state dict; its integers and the buffers of torch's layers are left out,
            and so is the second of two that share their memory.

    Returns:
        Names by the optimizer's number and the entry's index.
    """
    left = _candidates(state)
    named: dict[tuple[int, Any], str] = {}
    waiting = []
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.get("param_groups", ()):
            indices = list(group.get("params", ()))
            stored = group.get("param_names")
            if stored is not None and len(stored) == len(indices):
                named |= {(number, i): str(n) for i, n in zip(indices, stored, strict=True)}
            else:
                waiting.append((number, indices, optimizer.get("state", {})))
    progress = True
    while progress:
        progress = False
        taken = set(named.values())
        left = {name: shape for name, shape in left.items() if name not in taken}
        for number, indices, entries in waiting:
            open_ = [i for i in indices if (number, i) not in named]
            fits = _certain(left, [_shape(entries.get(i)) for i in open_])
            found = {(number, i): n for i, n in zip(open_, fits, strict=True) if n}
            if found:
                named |= found
                progress = True
                break
    return named


def _certain(left: Mapping[str, _Shape], shapes: Sequence[_Shape | None]) -> list[str | None]:
    """The only candidate of each shape, in order; None where there are several, or none fits."""
    candidates = list(left.items())
    early = _earliest([s for _, s in candidates], shapes)
    late = _earliest([s for _, s in reversed(candidates)], list(reversed(shapes)))
    if early is None or late is None:
        return [None] * len(shapes)
    last = [len(candidates) - 1 - i for i in reversed(late)]
    return [candidates[a][0] if a == b else None for a, b in zip(early, last, strict=True)]


def _earliest(there: Sequence[_Shape], wanted: Sequence[_Shape | None]) -> list[int] | None:
    """Positions of the shapes, in order, each as early as can be; None where they do not fit."""
    found: list[int] = []
    start = 0
    for shape in wanted:
        at = next((i for i in range(start, len(there)) if shape in (None, there[i])), None)
        if at is None:
            return None
        found.append(at)
        start = at + 1
    return found


def _candidates(state: Mapping[str, Any]) -> dict[str, _Shape]:
    found: dict[str, _Shape] = {}
    seen = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or kind_of(name, tensor) != "parameter":
            continue
        if memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            found[name] = tuple(tensor.shape)
    return found


def _shape(entry: Any) -> _Shape | None:
    """The parameter's shape, as its state tells it; None where it does not."""
    if not isinstance(entry, Mapping):
        return None
    like = (entry[key] for key in _LIKE_PARAMETER if isinstance(entry.get(key), Tensor))
    tensor = next(like, None)
    return None if tensor is None else tuple(tensor.shape)


def _options(optimizer: Mapping[str, Any]) -> dict[Any, Mapping[str, Any]]:
    groups = optimizer.get("param_groups", ())
    return {index: group for group in groups for index in group.get("params", ())}


@torch.no_grad()
def _measure(
    name: str, number: int, index: Any, entry: Mapping[str, Any], options: Mapping[str, Any]
) -> MomentHealth:
    tensors = {
        key: value.detach().cpu()
        for key, value in entry.items()
        if isinstance(value, Tensor) and value.is_floating_point() and key != "step"
    }
    first, second = tensors.get("exp_avg"), tensors.get("exp_avg_sq")
    counts = {key: _norm_and_bad(value) for key, value in tensors.items()}
    step = None if entry.get("step") is None else float(entry["step"])
    signal = ratio = bound = None
    if first is not None and second is not None and first.shape == second.shape:
        signal, ratio = _signal(first, second)
        bound = ratio_bound(options.get("betas"))
        signal = _corrected(signal, step, options.get("betas"))
    return MomentHealth(
        name=name,
        optimizer=number,
        index=index,
        step=step,
        norms={key: norm for key, (norm, _) in counts.items()},
        non_finite={key: bad for key, (_, bad) in counts.items() if bad},
        dtypes={key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()},
        negative=0 if second is None else int((second < 0).sum()),
        elements=max((value.numel() for value in tensors.values()), default=0),
        signal=signal,
        ratio=ratio,
        ratio_bound=bound,
    )


def _signal(first: Tensor, second: Tensor) -> tuple[float | None, float | None]:
    """``|m| / sqrt(v)`` of the whole, and the largest of an element.

    Where the square of a gradient is so small that the format loses bits of it, or all of it, the
    ratio says nothing: those elements are left out of the second number.
    """
    kept = FORMATS.get(str(second.dtype).removeprefix("torch."))
    # (1 - beta2) g^2 is to be a normal number, with room for beta2 of up to 0.999999.
    least = 1e3 * math.sqrt(0.0 if kept is None else kept.smallest_normal)
    squares = variances = 0.0
    ratio: float | None = None
    for m, v in zip(pieces(first), pieces(second), strict=True):
        squares += float(torch.dot(m, m))
        variances += float(v.clamp(min=0).sum())
        told = m.abs() > least
        if bool(told.any()):
            largest = float((m[told].abs() / v[told].clamp(min=0).sqrt()).max())
            ratio = largest if ratio is None else max(ratio, largest)
    return (math.sqrt(squares / variances) if variances > 0 else None), ratio


def _norm_and_bad(tensor: Tensor) -> tuple[float, int]:
    """Norm, and how many elements are NaN or Inf."""
    squares, bad = 0.0, 0
    for piece in pieces(tensor):
        squares += float(torch.dot(piece, piece))
        bad += int((~torch.isfinite(piece)).sum())
    return math.sqrt(squares), bad


def _corrected(signal: float | None, step: float | None, betas: Any) -> float | None:
    """The ratio of the moments without their bias towards 0 (Kingma & Ba 2015, section 3)."""
    if signal is None or not step or not isinstance(betas, (list, tuple)):
        return signal
    b1, b2 = float(betas[0]), float(betas[1])
    return signal * math.sqrt(1 - math.pow(b2, step)) / (1 - math.pow(b1, step))


def ratio_bound(betas: Any) -> float | None:
    """What ``|m| / sqrt(v)`` of Adam cannot exceed, or None where it has no bound.

    ``m = (1 - b1) sum b1^k g_k`` and ``v = (1 - b2) sum b2^k g_k^2`` (Kingma & Ba 2015, Algorithm
    1), so by the Cauchy-Schwarz inequality
    ``m^2 / v <= (1 - b1)^2 / (1 - b2) * sum (b1^2 / b2)^k``.

    >>> round(ratio_bound((0.9, 0.999)), 3)
    7.27
    >>> ratio_bound((0.9, 0.8)) is None
    True
    """
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        return None
    b1, b2 = float(betas[0]), float(betas[1])
    if not 0 <= b1 < 1 or not b1**2 < b2 < 1:
        return None
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))
