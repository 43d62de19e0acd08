"""Records how outputs are compared with labels: shapes, sizes, and probabilities taken for logits.

May import torch; does not import Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_DISTANCES = {
    F.mse_loss: "mse_loss",
    F.l1_loss: "l1_loss",
    F.smooth_l1_loss: "smooth_l1_loss",
    F.huber_loss: "huber_loss",
}
_DIFFERENCES = {torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__, Tensor.__rsub__}
_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div}
_OF_LOGITS = {
    F.cross_entropy: "cross entropy",
    F.binary_cross_entropy_with_logits: "binary cross entropy with logits",
}
_OF_LOGARITHMS = {F.nll_loss: "nll_loss", F.kl_div: "kl_div"}
_SIGMOIDS = {torch.sigmoid, F.sigmoid, Tensor.sigmoid, torch.special.expit}
_ROUNDING = 1e-2
"""Largest deviation of a sum of probabilities from 1, in 16 bits."""


@dataclass(frozen=True)
class Comparison:
    """An output that is compared with a label, element by element."""

    operation: str
    head: str
    """Module with weights that ran last before it."""
    output: tuple[int, ...]
    """Shape of the output."""
    label: tuple[int, ...]
    """Shape of the label."""
    is_spread: bool
    """Whether each output is compared with each label, instead of with its own."""
    error_rms: float
    """Root mean square of the difference; 0 if it is none, or spread."""
    label_rms: float


@dataclass(frozen=True)
class Probabilities:
    """A loss of logits, or of their logarithms, that is given probabilities."""

    loss: str
    head: str


class Comparisons:
    """Records `Comparison` and `Probabilities` of the functions that it is shown.

    Args:
        current: Returns the name of the module that is running; "" in the step itself.
        head: Returns the name of the module with weights that ran last.
    """

    def __init__(self, current: Callable[[], str], head: Callable[[], str]) -> None:
        self._current, self._head = current, head
        self._squashed: Tensor | None = None
        self.compared: list[Comparison] = []
        self.probabilities: list[Probabilities] = []

    def inspect(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Looks at the arguments of a function before it runs."""
        first, second = _two_tensors(args, kwargs)
        if first is None:
            return
        if func in _OF_LOGITS and (_are_probabilities(first) or self._is_squashed(first)):
            self.probabilities.append(Probabilities(_OF_LOGITS[func], self._head()))
        elif func in _OF_LOGARITHMS and _are_probabilities(first):
            self.probabilities.append(Probabilities(_OF_LOGARITHMS[func], self._head()))
        elif second is not None:
            self._compare(func, first, second)

    def finished(self, func: Any, result: Any) -> None:
        """Remembers the result of the latest sigmoid."""
        if func in _SIGMOIDS:
            self._squashed = result.detach()

    def _compare(self, func: Any, first: Tensor, second: Tensor) -> None:
        if func in _DISTANCES:
            self._record(_DISTANCES[func], first, second)
        # In a model, differences and products of all with all are common: pairs, outer products.
        elif self._current() == "" and first.requires_grad != second.requires_grad:
            output, label = (first, second) if first.requires_grad else (second, first)
            if func in _DIFFERENCES:
                self._record("a difference", output, label)
            elif func in _PRODUCTS and _is_spread(output, label):
                self._record("a product", output, label)

    def _record(self, operation: str, output: Tensor, label: Tensor) -> None:
        spread = _is_spread(output, label)
        if not spread and (output.shape != label.shape or output.numel() < 2):
            return
        error = 0.0 if spread else _rms(output.detach() - label.detach())
        shapes = (tuple(output.shape), tuple(label.shape))
        self.compared.append(
            Comparison(operation, self._head(), *shapes, spread, error, _rms(label.detach()))
        )

    def _is_squashed(self, tensor: Tensor) -> bool:
        if self._squashed is None:
            return False
        memory = self._squashed.untyped_storage().data_ptr()
        return bool(tensor.untyped_storage().data_ptr() == memory)


def _two_tensors(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns input and target, or the two operands; None for what is no plain tensor."""
    first = args[0] if args else kwargs.get("input")
    second = args[1] if len(args) > 1 else kwargs.get("target", kwargs.get("other"))
    return _plain(first), _plain(second)


def _plain(value: Any) -> Tensor | None:
    usable = isinstance(value, Tensor) and value.layout == torch.strided
    return value if usable and value.is_floating_point() else None


def _is_spread(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors of equally many elements make a larger one.

    Tensors of different dimensions only: whoever gives both as many has asked for all pairs.
    """
    if one.ndim == other.ndim or one.numel() != other.numel() or one.numel() < 2:
        return False
    sizes = list(zip_longest(reversed(one.shape), reversed(other.shape), fillvalue=1))
    fits = all(a == b or 1 in (a, b) for a, b in sizes)
    return fits and math.prod(max(pair) for pair in sizes) > one.numel()


def _are_probabilities(values: Tensor) -> bool:
    """Returns whether classes have values of at least 0 that sum to 1, for each target.

    >>> _are_probabilities(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))
    True
    >>> _are_probabilities(torch.tensor([[0.2, 0.9], [0.5, 0.5]]))
    False
    """
    if values.ndim < 2 or values.shape[1] < 2 or not values.numel():
        return False
    sums = values.detach().float().sum(1)
    return bool((values >= 0).all()) and bool(((sums - 1).abs() < _ROUNDING).all())


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())
