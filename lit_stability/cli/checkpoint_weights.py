"""Gives a module the weights of a checkpoint, and takes nothing else from it.

May import Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.errors import ConfigError


class CheckpointWeights(StabilityCallback):
    """Loads weights and buffers when the fit starts: optimizers and counters begin afresh.

    The module is whole by then, also one that `configure_model` builds. Every key has to fit,
    unless the module says ``strict_loading=False``. Values take the dtype of the module.

    Args:
        path: of a checkpoint of Lightning, or of a state dict alone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load them.

        Raises:
            ConfigError: if the file cannot be read or does not fit; with its path.
        """
        checkpoint = _read(self.path)
        try:
            if "state_dict" in checkpoint:
                pl_module.on_load_checkpoint(dict(checkpoint))
            state = checkpoint.get("state_dict", checkpoint)
            pl_module.load_state_dict(state, strict=pl_module.strict_loading)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            said = textwrap.shorten(str(error), 500, placeholder=" ...")
            raise ConfigError(
                f"checkpoint={self.path}: does not fit {type(pl_module).__name__}; give the "
                f"config that it was trained with: {said}"
            ) from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead it to
        said = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise ConfigError(f"checkpoint={path}: cannot be read: {said}") from error
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ConfigError(f"checkpoint={path}: expected a checkpoint or state dict, got a {kind}")
    return found
