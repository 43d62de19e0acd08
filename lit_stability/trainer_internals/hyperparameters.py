"""Keeps values of environment variables out of the hyperparameters that are written."""

from __future__ import annotations

from typing import Any

from lit_stability.lightning_package import LightningDataModule, LightningModule
from lit_stability.redaction import keep_out, kept_out, redacted_tree


def hide_environment(module: LightningModule, data: LightningDataModule | None) -> None:
    """Replaces values of the environment in checkpoints and in what loggers are given.

    The module and its data keep the values, with which they were built; only what is written
    changes. Nothing is done where no value came from the environment.

    Args:
        module: as built, before the fit.
        data: its data, if any.
    """
    if not kept_out():
        return
    module.on_save_checkpoint = _Redacting(module.on_save_checkpoint)  # type: ignore[method-assign]
    for each in (module, data):
        if hasattr(each, "_hparams_initial"):
            # Loggers get this copy, which nothing else reads.
            each._hparams_initial = redacted_tree(each._hparams_initial, options=True)  # type: ignore[union-attr]


class _Redacting:
    """The module's ``on_save_checkpoint``, which Lightning calls for every checkpoint it writes.

    Args:
        hook: the module's own.
    """

    def __init__(self, hook: Any) -> None:
        self._hook, self._values = hook, kept_out()

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Calls the own hook, then replaces the values in the hyperparameters."""
        self._hook(checkpoint)
        for key in _KEYS:
            if key in checkpoint:
                checkpoint[key] = redacted_tree(checkpoint[key], options=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the hook in a process that was spawned, and has no values yet."""
        self.__dict__.update(state)
        keep_out(self._values)


_KEYS = (
    LightningModule.CHECKPOINT_HYPER_PARAMS_KEY,
    LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY,
)
