"""The interface of clipping rules. Imports neither torch nor Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

_LARGEST = 1e100
"""Largest norm that is learned: the square of a huge one is Inf, and so is every later mean."""


@runtime_checkable
class ClipRule(Protocol):
    """Interface that `AdaptiveGradientClipping` requires of a rule.

    ``threshold`` changes no state, and ``update`` is called for accepted steps only, so a rule
    never learns from a rejected step. Both must handle any norm, NaN and Inf included.
    """

    def threshold(self, grad_norm: float) -> float:
        """Returns the largest norm, greater than 0, of the gradients of the coming step.

        Args:
            grad_norm: their norm before clipping.
        """

    def update(self, grad_norm: float) -> None:
        """Learns from an accepted step.

        Args:
            grad_norm: its norm before clipping; a non-finite norm must be ignored.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what was learned as plain floats, ints and lists, without the options."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


@runtime_checkable
class CutsLearningRate(Protocol):
    """A rule that also lowers the learning rate."""

    def lr_factor(self, grad_norm: float = 0.0) -> float:
        """Returns the factor in (0, 1] on the nominal learning rate of the coming step.

        Args:
            grad_norm: norm of the coming step; 0 for the factor that holds for any norm.
        """


@runtime_checkable
class ClipsTensors(Protocol):
    """A rule that also limits each tensor by itself, after the whole gradient was clipped."""

    def tensor_thresholds(self, names: Sequence[str]) -> Sequence[float]:
        """Returns the largest norm of each tensor's gradient, Inf for no limit.

        Args:
            names: the parameters that have a gradient.
        """

    def update_tensors(self, names: Sequence[str], norms: Sequence[float]) -> None:
        """Learns from an accepted step.

        Args:
            names: the parameters that have a gradient.
            norms: norm of each one's gradient after all clipping; finite.
        """


def teaches(grad_norm: float) -> bool:
    """Returns whether a norm can be learned: it is finite, not negative and not huge.

    >>> [teaches(norm) for norm in (0.0, 2.5, float("nan"), float("inf"), 1e200, -1.0)]
    [True, True, False, False, False, False]
    """
    return 0 <= grad_norm <= _LARGEST
