"""Doing something around the next ``training_step`` of a fit, and around no other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Trainer


class AroundNextStep:
    """Runs the next ``training_step`` inside a context; then all is as if it had not been there.

    It is the strategy that runs it: a step that a callback takes beside training goes another way,
    and copies that somebody makes of the module know nothing of it.

    Args:
        trainer: in its fit, between two steps.
        context: makes what to enter.
    """

    def __init__(
        self, trainer: Trainer, context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._strategy, self._context = trainer.strategy, context
        self._original: Callable[..., Any] = self._strategy.training_step
        self._before = vars(self._strategy).get("training_step")
        vars(self._strategy)["training_step"] = self._run

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        with self._context():
            return self._original(*args, **kwargs)

    def remove(self) -> None:
        """Take it away, if the step did not come."""
        own = vars(self._strategy)
        if own.get("training_step") != self._run:
            return
        del own["training_step"]
        if self._before is not None:
            own["training_step"] = self._before
