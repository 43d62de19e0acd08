"""`lit-stability check`: the checks before the first step of a config, without a run.

The same model, data, optimizer and first batch as a `fit` of the config would have, on one device.
May import Lightning.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import DictConfig

from lit_stability.callbacks.preflight import Preflight
from lit_stability.checks.preflight import Report
from lit_stability.cli.config import resolve
from lit_stability.cli.fit import check_options, make_model_and_data, make_trainer
from lit_stability.cli.instantiate import Build
from lit_stability.errors import ConfigError
from lit_stability.training_state.atomic_write import write_and_keep


def check(config: Mapping[str, Any] | DictConfig, *, out: Path | None = None) -> int:
    """Print what the checks find in a config; the exit code is 1 if it has errors, else 0.

    Args:
        config: The composed config. A `Preflight` among its callbacks gives the options.
        out: Where to write the report as JSON; another one that is there is kept, renamed.

    Raises:
        ConfigError: The config cannot be run, or gives no batch to train on.
    """
    report = examine(check_options(resolve(config)))
    print(report.text())
    if out is not None:
        try:
            write_and_keep(out, json.dumps(report.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written ({error})") from error
    return 1 if report.errors else 0


def examine(options: dict[str, Any]) -> Report:
    """Build what a fit would, go to its first batch and check there.

    Callbacks are called up to there, as they may freeze parts of the model; those that write
    checkpoints are left out, and so are this package's own.

    Args:
        options: Of `lit_stability.cli.fit.Run`, checked.

    Raises:
        ConfigError: There is no batch to train on.
    """
    named = {name: each for name, each in (options.get("callbacks") or {}).items() if each}
    own = [each for each in named.values() if _kind(each) is Preflight]
    look = _Look(Preflight(**own[0].options) if own else Preflight())
    kept = {name: each for name, each in named.items() if _stays(each)}
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
    trainer.callbacks.append(look)  # type: ignore[attr-defined]
    with contextlib.suppress(_EnoughError):
        trainer.fit(model, datamodule=data)
    if look.report is None:
        raise ConfigError("data: the training loader gives no batch; there is nothing to check")
    return look.report


def _kind(plan: Any) -> Any:
    return plan.target if isinstance(plan, Build) else type(plan)


def _stays(plan: Any) -> bool:
    kind = _kind(plan)
    own = str(getattr(kind, "__module__", "")).split(".")[0] == "lit_stability"
    return not own and not (isinstance(kind, type) and issubclass(kind, Checkpoint))


class _EnoughError(Exception):
    """Ends the fit before its first step."""


class _Look(Callback):
    """Checks the first batch, and ends the fit there."""

    def __init__(self, preflight: Preflight) -> None:
        self._preflight = preflight
        self.report: Report | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.report = self._preflight.look(trainer, pl_module, batch)
        raise _EnoughError
