"""Saves the complete state of a Trainer when an incident opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_stability.lightning_choice import LIGHTNING_ROOTS
from lit_stability.lightning_package import LIGHTNING_VERSION, Trainer
from lit_stability.redaction import redacted_tree
from lit_stability.trainer_internals.strategies import sharing
from lit_stability.trainer_internals.trainer_view import callbacks_of


def save_incident_checkpoint(trainer: Trainer, path: Path) -> None:
    """Saves a Lightning checkpoint of the state at an incident, for later analysis.

    Under DDP, call it on rank 0 only. It does not synchronise, because the other ranks may have
    seen no anomaly. Therefore it calls no user hook, which might synchronise, and includes only
    the states of callbacks from Lightning and this package. Under FSDP2, call it on all ranks.
    """
    if sharing(trainer) != "replicas":
        trainer.save_checkpoint(path, weights_only=False)
        return
    trainer.strategy.save_checkpoint(_dump(trainer), path)


def _dump(trainer: Trainer) -> dict[str, Any]:
    module, precision = trainer.lightning_module, trainer.precision_plugin
    checkpoint = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": module.state_dict(),
        "loops": trainer._checkpoint_connector._get_loops_state_dict(),
        "callbacks": {
            c.state_key: state
            for c in callbacks_of(trainer)
            if type(c).__module__.split(".")[0] in _KNOWN and (state := c.state_dict())
        },
        "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        module.CHECKPOINT_HYPER_PARAMS_KEY: redacted_tree(dict(module.hparams), options=True),
    }
    if state := precision.state_dict():
        checkpoint[type(precision).__qualname__] = state
    return checkpoint


_KNOWN = (*LIGHTNING_ROOTS, "lit_stability")
