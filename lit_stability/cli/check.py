"""The command `lit-stability check`: runs the preflight checks on a config, without training.

Uses the same model, data, optimizer and first batch as a `fit` of the config, on one device. May
import Lightning.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lit_stability.callbacks.preflight import Preflight
from lit_stability.checks.preflight import Report
from lit_stability.cli.config import resolve
from lit_stability.cli.fit import check_options, make_model_and_data, make_trainer
from lit_stability.cli.instantiate import Build
from lit_stability.errors import ConfigError
from lit_stability.lightning_package import (
    Callback,
    Checkpoint,
    DummyLogger,
    LightningModule,
    Trainer,
)
from lit_stability.training_state.atomic_write import write_and_keep


def check(
    config: Mapping[str, Any] | DictConfig, *, out: Path | None = None, allow: Sequence[str] = ()
) -> int:
    """Prints the findings of the checks on a config; returns exit code 1 for errors, else 0.

    Args:
        config: The composed config. A `Preflight` among its callbacks gives the options.
        out: File for the report as JSON; an existing file is renamed and kept.
        allow: Patterns of targets that are allowed in addition.

    Raises:
        ConfigError: If the config cannot be run, or gives no training batch.
    """
    report = examine(check_options(resolve(config), allow))
    print(report.text())
    if out is not None:
        try:
            write_and_keep(out, json.dumps(report.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written ({error})") from error
    return 1 if report.errors else 0


def examine(options: dict[str, Any]) -> Report:
    """Starts a fit, runs the checks on its first batch, and ends the fit there.

    Callbacks of the config run until then, because they may freeze parts of the model, except for
    those that write checkpoints and those of this package.

    Args:
        options: Of `lit_stability.cli.fit.Run`, validated.

    Raises:
        ConfigError: If there is no training batch.
    """
    named = {name: plan for name, plan in (options.get("callbacks") or {}).items() if plan}
    own = [plan for plan in named.values() if _class_of(plan) is Preflight]
    runner = _CheckFirstBatch(Preflight(**own[0].options) if own else Preflight())
    kept = {name: plan for name, plan in named.items() if _is_kept(plan)}
    model, data = make_model_and_data(options)
    trainer = make_trainer(
        options | {"callbacks": kept, "logger": None},
        logger=DummyLogger(),
        devices=1,
        num_nodes=1,
        strategy="auto",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.callbacks.append(runner)  # type: ignore[attr-defined]
    with contextlib.suppress(_CheckedError):
        trainer.fit(model, datamodule=data)
    if runner.report is None:
        raise ConfigError("data: the training loader gives no batch; there is nothing to check")
    return runner.report


def _class_of(plan: Any) -> Any:
    return plan.target if isinstance(plan, Build) else type(plan)


def _is_kept(plan: Any) -> bool:
    """Returns whether a callback runs during the check."""
    kind = _class_of(plan)
    own = str(getattr(kind, "__module__", "")).split(".")[0] == "lit_stability"
    return not own and not (isinstance(kind, type) and issubclass(kind, Checkpoint))


class _CheckedError(Exception):
    """Ends the fit before its first step."""


class _CheckFirstBatch(Callback):
    """Runs the checks on the first batch, then ends the fit."""

    def __init__(self, preflight: Preflight) -> None:
        self._preflight = preflight
        self.report: Report | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.report = self._preflight.look(trainer, pl_module, batch)
        raise _CheckedError
