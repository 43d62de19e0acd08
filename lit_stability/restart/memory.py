"""Reads and reduces what a fit's memory depends on: activation storage and batch sizes.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.data import DataLoader

from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals import loaders


def checkpoint_activations(module: LightningModule) -> bool:
    """Enables activation checkpointing if the module supports it; returns whether it did.

    Support means a method ``enable_activation_checkpointing()`` of the module, or
    ``gradient_checkpointing_enable()`` of any submodule, as in transformers.
    """
    own = getattr(module, "enable_activation_checkpointing", None)
    if callable(own):
        own()
        return True
    return sum(_enable(submodule) for submodule in module.modules()) > 0


def _enable(module: nn.Module) -> bool:
    enable: Callable[[], None] | None = getattr(module, "gradient_checkpointing_enable", None)
    if not callable(enable):
        return False
    try:
        enable()
    except ValueError:
        # Every transformers model has the method; it raises if the model does not support it.
        return False
    return True


def batch_sizes(trainer: Trainer) -> list[int | None]:
    """Returns the batch size of each training loader, None where it is unknown."""
    found = []
    for loader in loaders(trainer):
        sampler = getattr(loader, "batch_sampler", None)
        size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
        found.append(size if isinstance(size, int) else None)
    return found


def drops_last(trainer: Trainer) -> bool:
    """Returns whether an epoch drops the samples that do not fill a batch."""
    dropped = any(isinstance(item, DataLoader) and item.drop_last for item in loaders(trainer))
    return dropped and trainer.num_training_batches != float("inf")
