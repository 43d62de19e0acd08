"""What a fit's memory depends on: how it stores activations, how large its batches are.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lit_stability.trainer_internals import loaders


def checkpoint_activations(module: LightningModule) -> bool:
    """Have a module trade time for memory, where it offers that; whether it did.

    The offer is a method ``enable_activation_checkpointing()`` of the module, or
    ``gradient_checkpointing_enable()`` of any of its submodules, as those of transformers have.
    """
    own = getattr(module, "enable_activation_checkpointing", None)
    if callable(own):
        own()
        return True
    return sum(_enable(each) for each in module.modules()) > 0


def _enable(module: nn.Module) -> bool:
    enable: Callable[[], None] | None = getattr(module, "gradient_checkpointing_enable", None)
    if not callable(enable):
        return False
    try:
        enable()
    except ValueError:
        # Transformers has the method on every model, and refuses in those that cannot.
        return False
    return True


def batch_sizes(trainer: Trainer) -> list[int | None]:
    """Batch size of each training loader, None where it is not known."""
    found = []
    for loader in loaders(trainer):
        sampler = getattr(loader, "batch_sampler", None)
        size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
        found.append(size if isinstance(size, int) else None)
    return found


def drops_last(trainer: Trainer) -> bool:
    """Whether an epoch leaves over the samples that do not fill a batch."""
    dropped = any(isinstance(each, DataLoader) and each.drop_last for each in loaders(trainer))
    return dropped and trainer.num_training_batches != float("inf")
