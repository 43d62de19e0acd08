"""What a clipping rule is. Imports neither torch nor Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

_LARGEST = 1e100
"""Norms beyond it teach nothing: their squares would be Inf, and a mean of them for ever."""


@runtime_checkable
class ClipRule(Protocol):
    """What `AdaptiveGradientClipping` asks of a rule.

    ``threshold`` is apart from ``update``: asking for it changes nothing, and a step that is
    rejected is never learnt from. Neither may fail, or be spoilt, whatever the norm is.
    """

    def threshold(self, grad_norm: float) -> float:
        """Largest norm, greater than 0, that the coming step's gradients may keep.

        Args:
            grad_norm: their norm, not clipped yet.
        """

    def update(self, grad_norm: float) -> None:
        """Learn from a step that is taken.

        Args:
            grad_norm: its norm before clipping; one that is not finite teaches nothing.
        """

    def state_dict(self) -> dict[str, Any]:
        """What evolves, as plain floats, ints and lists; the options come from the constructor."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""


@runtime_checkable
class CutsLearningRate(Protocol):
    """A rule that lowers the learning rate as well."""

    def lr_factor(self, grad_norm: float = 0.0) -> float:
        """What to multiply the nominal learning rate of the coming step by, in (0, 1].

        Args:
            grad_norm: of the coming step; 0 for what is in force whatever it will be.
        """


def teaches(grad_norm: float) -> bool:
    """Whether a norm is a number that can be learnt from.

    >>> [teaches(norm) for norm in (0.0, 2.5, float("nan"), float("inf"), 1e200, -1.0)]
    [True, True, False, False, False, False]
    """
    return 0 <= grad_norm <= _LARGEST
