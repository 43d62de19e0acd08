"""Runs the next ``training_step`` of a fit, and only that one, inside a context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lit_stability.lightning_package import Trainer
from lit_stability.trainer_internals.patch import Patch


class AroundNextStep:
    """Runs the next ``training_step`` inside a context, then removes itself.

    It patches ``training_step`` of the strategy and not of the module. Thus it does not affect
    steps that a callback runs through the module, nor copies of it.

    Args:
        trainer: in its fit, between two steps.
        context: returns the context to enter.
    """

    def __init__(
        self, trainer: Trainer, context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._strategy, self._context = trainer.strategy, context
        self._original: Callable[..., Any] = self._strategy.training_step
        self._patch = Patch(self._strategy, "training_step", self._run)
        self._patch.apply()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        with self._context():
            return self._original(*args, **kwargs)

    def remove(self) -> None:
        """Removes the patch; also needed if no step was run."""
        self._patch.remove()
