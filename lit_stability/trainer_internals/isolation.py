"""Runs the module in isolation: afterwards everything is as if the step had not been run."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals.metrics import LoggedMetrics
from lit_stability.training_state.isolated_model import IsolatedModel


@contextmanager
def isolated_step(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Restores the model, its generators and its metrics on exit; nothing is logged meanwhile.

    Restored are gradients, buffers, flags, generators, logged metrics, torchmetrics objects, and
    the module's own attributes with its lists, dicts, sets and deques. What a ``training_step``
    does to other objects is not undone.

    Args:
        trainer: in its fit.
        pl_module: the module in training.
    """
    attributes, state = ModuleAttributes(pl_module), IsolatedModel(pl_module)
    metrics = LoggedMetrics(pl_module)
    metrics.capture(trainer)
    silenced = {name: vars(pl_module).get(name) for name in ("log", "log_dict")}
    try:
        vars(pl_module).update(dict.fromkeys(silenced, lambda *args, **kwargs: None))
        yield
    finally:
        for name, before in silenced.items():
            vars(pl_module).pop(name)
            if before is not None:
                vars(pl_module)[name] = before
        attributes.restore()
        metrics.restore(trainer)
        state.restore()


class ModuleAttributes:
    """Attributes of a module other than parameters, buffers and submodules, as they are now.

    Args:
        module: whose attributes are kept, with the contents of its lists, dicts, sets and deques.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = dict(self._plain())
        containers = (v for v in self._values.values() if type(v) in (list, dict, set, deque))
        self._contents = [(container, copy.copy(container)) for container in containers]

    def restore(self) -> None:
        """Restores them; a container stays the same object."""
        for name in [name for name, _ in self._plain() if name not in self._values]:
            del vars(self._module)[name]
        vars(self._module).update(self._values)
        for container, content in self._contents:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(content)

    def _plain(self) -> Iterator[tuple[str, Any]]:
        """Attributes that are data: a method that was wrapped is not restored."""
        for name, value in vars(self._module).items():
            if not name.startswith("_") and not callable(value):
                yield name, value
