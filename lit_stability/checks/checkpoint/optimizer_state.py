"""Measures the optimizer state of a checkpoint, and assigns each entry to its parameter.

A checkpoint stores the state by the index of the parameter in the optimizer's groups, without
names. May import torch.
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
    """Measures the optimizer state of every parameter that has one.

    Args:
        optimizers: State dicts, as in ``optimizer_states`` of a checkpoint.
        state: State dict of the model, for the names.
    """
    names = name_entries(optimizers, state)
    measured: list[MomentHealth] = []
    for number, optimizer in enumerate(optimizers):
        options = _options(optimizer)
        for index, entry in optimizer.get("state", {}).items():
            if not isinstance(entry, Mapping):
                continue
            name = names.get((number, index), f"unnamed {index}")
            measured.append(_measure(name, number, index, entry, options.get(index, {})))
    return tuple(measured)


def name_entries(
    optimizers: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> dict[tuple[int, Any], str]:
    """Assigns parameter names to the entries of optimizer states, if the assignment is unique.

    An optimizer that was created from ``named_parameters()`` has saved the names. Otherwise each
    group is assumed to contain its parameters in the order of the model, as filters over
    ``parameters()`` do. The shapes are matched with those of the model as early as possible, and
    as late as possible. If both matches agree on an entry, no other match exists, and the entry is
    named; otherwise it stays unnamed.

    Args:
        optimizers: State dicts.
        state: State dict of the model. Integer tensors, buffers of torch's layers, and further
            tensors with the same memory are ignored.

    Returns:
        Names by the optimizer's number and the entry's index.
    """
    candidates = _candidates(state)
    named: dict[tuple[int, Any], str] = {}
    unnamed = []
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.get("param_groups", ()):
            indices = list(group.get("params", ()))
            stored = group.get("param_names")
            if stored is not None and len(stored) == len(indices):
                named |= {(number, i): str(n) for i, n in zip(indices, stored, strict=True)}
            else:
                unnamed.append((number, indices, optimizer.get("state", {})))
    progress = True
    while progress:
        progress = False
        taken = set(named.values())
        candidates = {name: shape for name, shape in candidates.items() if name not in taken}
        for number, indices, entries in unnamed:
            missing = [i for i in indices if (number, i) not in named]
            names = _unique_names(candidates, [_shape(entries.get(i)) for i in missing])
            new = {(number, i): n for i, n in zip(missing, names, strict=True) if n}
            if new:
                named |= new
                progress = True
                break
    return named


def _unique_names(
    candidates: Mapping[str, _Shape], shapes: Sequence[_Shape | None]
) -> list[str | None]:
    """Returns the only candidate for each shape, in order; None if there are several or none."""
    items = list(candidates.items())
    early = _earliest([s for _, s in items], shapes)
    late = _earliest([s for _, s in reversed(items)], list(reversed(shapes)))
    if early is None or late is None:
        return [None] * len(shapes)
    last = [len(items) - 1 - i for i in reversed(late)]
    return [items[a][0] if a == b else None for a, b in zip(early, last, strict=True)]


def _earliest(available: Sequence[_Shape], wanted: Sequence[_Shape | None]) -> list[int] | None:
    """Returns the earliest position of each shape, in order; None if they do not fit."""
    positions: list[int] = []
    start = 0
    for shape in wanted:
        at = next((i for i in range(start, len(available)) if shape in (None, available[i])), None)
        if at is None:
            return None
        positions.append(at)
        start = at + 1
    return positions


def _candidates(state: Mapping[str, Any]) -> dict[str, _Shape]:
    """Returns the shapes of the tensors that may be parameters, by name; tied ones once."""
    shapes: dict[str, _Shape] = {}
    seen = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or kind_of(name, tensor) != "parameter":
            continue
        if memory_of(tensor) not in seen:
            seen.add(memory_of(tensor))
            shapes[name] = tuple(tensor.shape)
    return shapes


def _shape(entry: Any) -> _Shape | None:
    """Returns the shape of the parameter, taken from its state, or None if it is unknown."""
    if not isinstance(entry, Mapping):
        return None
    tensors = (entry[key] for key in _LIKE_PARAMETER if isinstance(entry.get(key), Tensor))
    tensor = next(tensors, None)
    return None if tensor is None else tuple(tensor.shape)


def _options(optimizer: Mapping[str, Any]) -> dict[Any, Mapping[str, Any]]:
    """Returns the options of the group of each parameter, by the parameter's index."""
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
    """Returns ``|m| / sqrt(v)`` of the whole tensor, and the largest ratio of an element.

    The second number ignores elements whose squared gradient is too small for the format, because
    their second moment has lost bits, or is zero.
    """
    number_format = FORMATS.get(str(second.dtype).removeprefix("torch."))
    # (1 - beta2) g^2 must be a normal number, for beta2 up to 0.999999.
    least = 1e3 * math.sqrt(0.0 if number_format is None else number_format.smallest_normal)
    squares = variances = 0.0
    ratio: float | None = None
    for m, v in zip(pieces(first), pieces(second), strict=True):
        squares += float(torch.dot(m, m))
        variances += float(v.clamp(min=0).sum())
        exact = m.abs() > least
        if bool(exact.any()):
            largest = float((m[exact].abs() / v[exact].clamp(min=0).sqrt()).max())
            ratio = largest if ratio is None else max(ratio, largest)
    return (math.sqrt(squares / variances) if variances > 0 else None), ratio


def _norm_and_bad(tensor: Tensor) -> tuple[float, int]:
    """Returns the norm, and how many elements are NaN or Inf."""
    squares, bad = 0.0, 0
    for piece in pieces(tensor):
        squares += float(torch.dot(piece, piece))
        bad += int((~torch.isfinite(piece)).sum())
    return math.sqrt(squares), bad


def _corrected(signal: float | None, step: float | None, betas: Any) -> float | None:
    """Returns the ratio of the moments after bias correction (Kingma & Ba 2015, section 3)."""
    if signal is None or not step or not isinstance(betas, (list, tuple)) or len(betas) != 2:
        return signal
    b1, b2 = float(betas[0]), float(betas[1])
    if step < 0 or not (0 <= b1 < 1 and 0 <= b2 < 1):
        return signal
    return signal * math.sqrt(1 - math.pow(b2, step)) / (1 - math.pow(b1, step))


def ratio_bound(betas: Any) -> float | None:
    """Returns the upper bound of Adam's ``|m| / sqrt(v)``, or None if there is no bound.

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
