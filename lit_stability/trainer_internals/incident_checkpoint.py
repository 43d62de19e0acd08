"""The checkpoint that one rank saves of its own when an incident opens."""

from __future__ import annotations

from typing import Any

from lit_stability.lightning_choice import LIGHTNING_ROOTS
from lit_stability.lightning_package import LIGHTNING_VERSION, Trainer
from lit_stability.redaction import redacted_tree
from lit_stability.trainer_internals.trainer_view import callbacks_of


def own_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Returns a Lightning checkpoint of this rank's state, without synchronising the ranks.

    The other ranks may have seen no anomaly. Therefore no hook of the user is called, which might
    synchronise, and of callbacks it has the states of those from Lightning and this package.
    """
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
