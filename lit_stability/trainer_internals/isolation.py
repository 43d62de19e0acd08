"""Running the module beside training: afterwards all is as if it had not been."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_stability.trainer_internals.metrics import LoggedMetrics
from lit_stability.training_state.rng import capture_rng, restore_rng
from lit_stability.training_state.snapshot import BufferGuard


@contextmanager
def isolated_step(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Put generators, buffers and metrics back afterwards, and log nothing meanwhile.

    So are the module's own attributes, and its lists, dicts and the like; what a ``training_step``
    does to further objects is not undone.
    """
    attributes = _Attributes(pl_module)
    rng, guard, metrics = capture_rng(), BufferGuard(pl_module), LoggedMetrics(pl_module)
    guard.capture()
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
        guard.restore()
        metrics.restore(trainer)
        restore_rng(rng)


class _Attributes:
    """What a module holds beside parameters, buffers and submodules."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = dict(self._plain())
        containers = (v for v in self._values.values() if type(v) in (list, dict, set, deque))
        self._contents = [(each, copy.copy(each)) for each in containers]

    def restore(self) -> None:
        """Put them back; a container remains the object that it is."""
        for name in [name for name, _ in self._plain() if name not in self._values]:
            del vars(self._module)[name]
        vars(self._module).update(self._values)
        for container, content in self._contents:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(content)

    def _plain(self) -> Iterator[tuple[str, Any]]:
        """Those that are data: a method that somebody has wrapped is that somebody's affair."""
        for name, value in vars(self._module).items():
            if not name.startswith("_") and not callable(value):
                yield name, value
