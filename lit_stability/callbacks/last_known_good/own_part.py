"""What each of several ranks saves for itself, and restores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals import adapter_of, callbacks_of, local_path
from lit_stability.training_state.checkpoint_file import ranks_in
from lit_stability.training_state.good_checkpoints import folder_of
from lit_stability.training_state.rank_checkpoint_writer import OF_RANK, load_own

log = suite_logger()

_REPLACED = "lit_stability: buffers of this rank"
"""Key of a loaded checkpoint of which a rank's own part was replaced."""


def of_rank(trainer: Trainer) -> dict[str, Any]:
    """Returns the checkpoint of this rank; its tensors are not copies. All ranks must call it.

    The states of callbacks of this package are saved by each rank; of others, as by Lightning, that
    of rank 0 is.
    """
    checkpoint = adapter_of(trainer).checkpoint()
    ours = (c for c in callbacks_of(trainer) if type(c).__module__.startswith("lit_stability."))
    states = checkpoint["callbacks"]
    checkpoint[OF_RANK] = {
        "callbacks": {c.state_key: states[c.state_key] for c in ours if c.state_key in states},
        "loops": checkpoint["loops"],
        "buffers": adapter_of(trainer).own_buffers(trainer.lightning_module),
    }
    return checkpoint


def replace_by_own(trainer: Trainer, checkpoint: dict[str, Any]) -> Mapping[str, Tensor]:
    """Replaces in a loaded checkpoint what rank 0 has saved for itself; a second time, nothing.

    Args:
        trainer: that has loaded it.
        checkpoint: changed in place, if as many ranks have saved it.

    Returns:
        The buffers that this rank has saved, by name.

    Raises:
        FileNotFoundError: if the file of this rank is not there.
    """
    if _REPLACED in checkpoint:
        replaced: Mapping[str, Tensor] = checkpoint[_REPLACED]
        return replaced
    saved = local_path(trainer.ckpt_path)
    # Lightning finds the checkpoint of a job that is requeued by a name of its own: it is a link.
    saved = None if saved is None else folder_of(saved.resolve())
    if saved is None or ranks_in(saved) != trainer.world_size:
        return {}
    own = load_own(saved, trainer.global_rank)
    checkpoint["callbacks"] |= own["callbacks"]
    checkpoint["loops"] = own["loops"]
    buffers: Mapping[str, Tensor] = own["buffers"]
    checkpoint[_REPLACED] = buffers
    return buffers


@torch.no_grad()
def restore_buffers(pl_module: LightningModule, buffers: Mapping[str, Tensor]) -> None:
    """Copies the buffers that this rank has saved into those of the module."""
    for name, buffer in pl_module.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])


def log_other_ranks(trainer: Trainer, ranks_then: int) -> None:
    """Logs, on one rank, what a checkpoint of other ranks does not restore."""
    alone = ranks_then == trainer.world_size
    if trainer.global_rank != int(alone):  # rank 0 has restored what it has saved alone
        return
    if alone:
        lost, saved = "random states and epoch metrics of the other ranks are", "by rank 0 alone"
    else:
        lost, saved = "random states and epoch metrics are", f"by {ranks_then} ranks"
    log.warning(
        "the checkpoint was saved %s: %s not restored, so this run is not the one that an "
        "uninterrupted one would have been",
        *(saved, lost),
    )
