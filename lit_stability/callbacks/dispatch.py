"""Calling the hooks that this package adds to Lightning's."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.trainer_state import callbacks_of


def call_hook(name: str, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
    """Call ``name(trainer, pl_module, *args)`` where a callback, or the module, defines it."""
    for owner in [*callbacks_of(trainer), pl_module]:
        hook = getattr(owner, name, None)
        if callable(hook):
            hook(trainer, pl_module, *args)
