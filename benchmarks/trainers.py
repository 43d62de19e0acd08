"""The Trainer of a benchmark: on the CPU, silent, and leaving nothing behind but its folder."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer that counts its steps, prints nothing and saves nothing.

    Args:
        options: of the Trainer, in place of these or beside them.
    """
    quiet: dict[str, Any] = {
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(quiet | options))
