"""Loads only the weights of a checkpoint into a module.

May import Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.checks.checkpoint.load import load
from lit_stability.errors import ConfigError
from lit_stability.lightning_package import LightningModule, Trainer


class CheckpointWeights(StabilityCallback):
    """Loads weights and buffers when the fit starts; optimizers and counters start from scratch.

    At that time all layers exist, including those that `configure_model` builds. Every key must
    match, unless the module has ``strict_loading=False``. Values are converted to the module's
    dtype.

    Args:
        path: path of a Lightning checkpoint or of a state dict.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the weights.

        Raises:
            ConfigError: if the file cannot be read or does not match the module.
        """
        checkpoint = _read(self.path)
        try:
            if "state_dict" in checkpoint:
                pl_module.on_load_checkpoint(dict(checkpoint))
            state = checkpoint.get("state_dict", checkpoint)
            pl_module.load_state_dict(state, strict=pl_module.strict_loading)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = textwrap.shorten(str(error), 500, placeholder=" ...")
            raise ConfigError(
                f"checkpoint={self.path}: does not match {type(pl_module).__name__}; use the "
                f"config that it was trained with: {reason}"
            ) from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return load(path)
    except ConfigError as error:
        raise ConfigError(f"checkpoint={error}") from error
