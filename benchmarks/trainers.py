"""Trainer of the benchmarks: on the CPU and without output."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(**options: Any) -> Trainer:
    """Creates a Trainer that prints and saves nothing and has no limit of epochs.

    Args:
        options: Options of the Trainer, which override these defaults.
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
