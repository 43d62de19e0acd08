"""From a config to a finished run: check, build, fit, evaluate, write down.

Nothing is built before every option has been checked, and what is built comes from the config
alone: hyper-parameters stored in a checkpoint never replace an argument. May import Lightning.
"""

import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from lit_stability.callbacks.automatic_suite import AutomaticSuite
from lit_stability.cli.config import compose, resolve
from lit_stability.cli.experiments import Expectation
from lit_stability.cli.experiments.closing import Closing
from lit_stability.cli.instantiate import Build, bind
from lit_stability.cli.resume import ConfiguredOptions, find_checkpoint
from lit_stability.errors import ConfigError
from lit_stability.restart import Recover, fit_with_recovery
from lit_stability.trainer_internals import callbacks_of
from lit_stability.training_state.atomic_write import write_and_keep

__all__ = ["FitResult", "Run", "compose", "fit"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The top level of a config; an unknown key is an error."""

    experiment: str
    """Name of the run; by default that of the first config file."""
    about: str | None = None
    """What it shows, in one line."""
    expect: Expectation | None = None
    """What comes of it, to be judged at its end; what fits a config does not fit another that
    composes it, and is not handed on."""
    run_dir: Path
    """Folder of everything the run writes; by default `runs/<experiment>`."""
    model: LightningModule
    data: LightningDataModule | None = None
    """Null where the model brings its own data loaders."""
    trainer: Trainer
    """Options of `lightning.pytorch.Trainer`, but for `callbacks` and `logger`."""
    callbacks: dict[str, Callback | None] | None = None
    """By name, called in this order; null removes an inherited one."""
    logger: Logger | list[Logger] | Literal[False] | None = None
    """By default a `TensorBoardLogger` in `run_dir`; null for none."""
    seed: int | None = None
    evaluate: Literal["test", "validate", "none"] | None = None
    """What runs on the final weights after the fit."""
    ckpt_path: str | None = None
    """Checkpoint to resume from: a path, `last` for the newest one in `run_dir`, or `good`."""
    recover: Recover | None = None
    """With `{}` or limits such as `{max_crashes: 3}`: go on from the last good checkpoint after an
    exception, as `fit_with_recovery` does; by default the first exception ends the run."""


@dataclass(frozen=True)
class FitResult:
    """What a finished run leaves in memory."""

    trainer: Trainer
    model: LightningModule
    datamodule: LightningDataModule | None
    metrics: dict[str, float]
    """Those of the fit and, over them, those of the evaluation."""


def fit(config: Mapping[str, Any] | DictConfig, *, resume: str | Path | None = None) -> FitResult:
    """Run the experiment that a config describes.

    Writes into `run_dir` `config.yaml` before the first step, `metrics.json` (null for what is not
    finite) after the last, and however it ends `outcome.json`, and `preflight.json` if that ran; a
    file already there that differs is kept, renamed.

    A resumed run takes every argument from the config. The optimizer goes on from the
    checkpoint, except that options which the config has changed since then take effect.

    Args:
        config: The composed config.
        resume: Overrides `ckpt_path`.

    Raises:
        ConfigError: The config cannot be run; nothing was written.
    """
    plain = resolve(config)
    options = check_options(plain)
    run_dir: Path = options["run_dir"]
    checkpoint = find_checkpoint(resume or options.get("ckpt_path"), run_dir)
    recover = make(options.get("recover"))
    model, data = make_model_and_data(options)
    evaluate = options.get("evaluate") or "none"
    _check_step(model, evaluate)
    trainers = _Trainers(options)
    closing = Closing(run_dir, make(options.get("expect")), lambda: trainers.latest())
    if trainers.is_global_zero:
        _write_config(run_dir, plain)
        print(_header(options["experiment"], run_dir, trainers, model, checkpoint))
    try:
        trainer = _fit(trainers, recover, model, data, checkpoint)
        metrics = _evaluate(trainer, model, data, evaluate)
    except Exception as error:
        closing.by(error)
        raise
    closing.finished(metrics)
    return FitResult(trainer, model, data, metrics)


def _write_config(run_dir: Path, plain: dict[str, Any]) -> None:
    try:
        write_and_keep(run_dir / "config.yaml", OmegaConf.to_yaml(plain))
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot be written ({error}); choose another"
        ) from error


def check_options(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `Run` with every target checked and none built.

    Args:
        plain: A resolved config.

    Raises:
        ConfigError: With every problem found.
    """
    problems: list[str] = []
    trainer = plain.get("trainer") or {}
    if isinstance(trainer, dict):
        problems += [
            f"trainer.{key}: stands at the top level of a config, as {key}"
            for key in ("callbacks", "logger")
            if key in trainer
        ]
        trainer = {"_target_": "lightning.pytorch.Trainer"} | trainer
    options = bind(Run, plain | {"trainer": trainer}, "", problems).options
    if problems:
        raise ConfigError(*problems)
    make(options.get("expect"))  # refuses what it cannot read before a run is spent on it
    return options


def make(plan: Any) -> Any:
    """Build what was checked, innermost first."""
    if isinstance(plan, list | tuple | set | frozenset):
        return type(plan)(make(each) for each in plan)
    if isinstance(plan, dict):
        return {key: make(each) for key, each in plan.items()}
    if not isinstance(plan, Build):
        return plan
    options = make(plan.options)
    try:
        return plan.target(**options)
    except (ValueError, OSError, MisconfigurationException) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{plan.path}: {plan.target.__qualname__} refused: {error}") from error


class _Trainers:
    """Makes the trainers of a run, one after another, and keeps alive none that was handed out.

    Args:
        options: Of `Run`, checked.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._first: Trainer | None = make_trainer(options)
        self.latest = weakref.ref(self._first)
        self.is_global_zero = self._first.is_global_zero

    def __call__(self, **overrides: Any) -> Trainer:
        """Hand out the first one, then others; `overrides` replace options of `Trainer`."""
        trainer = self._first or make_trainer(self._options, **overrides)
        self._first, self.latest = None, weakref.ref(trainer)
        return trainer


def _fit(
    trainers: _Trainers,
    recover: Recover | None,
    model: LightningModule,
    data: LightningDataModule | None,
    checkpoint: str | None,
) -> Trainer:
    """Fit, with recovery if it is asked for; returns the trainer of the fit that came through."""
    if recover is None:
        trainer = trainers()
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        return trainer
    limits = asdict(recover)
    return fit_with_recovery(trainers, model, data, ckpt_path=checkpoint, **limits).trainer


def make_model_and_data(
    options: dict[str, Any],
) -> tuple[LightningModule, LightningDataModule | None]:
    """Build the model and its data from the seed of `Run`, the model first."""
    if options.get("seed") is not None:
        seed_everything(options["seed"], workers=True, verbose=False)
    return make(options["model"]), make(options.get("data"))


def make_trainer(options: dict[str, Any], **overrides: Any) -> Trainer:
    """Build the trainer of `Run` with its callbacks and logger.

    Args:
        options: Of `Run`, checked.
        overrides: Options of `Trainer` that replace the config's.
    """
    named = options.get("callbacks") or {}
    callbacks = [make(each) for each in named.values() if each is not None]
    plan: Build = options["trainer"]
    own = {
        "callbacks": [ConfiguredOptions(), *callbacks],
        "logger": make(options.get("logger")) or False,
        "default_root_dir": options["run_dir"],
    }
    trainer = make(Build(plan.target, own | plan.options | overrides, plan.path))
    assert isinstance(trainer, Trainer)
    # A config says all that runs: what an environment variable adds is none of it.
    named_here = [c for c in callbacks_of(trainer) if not isinstance(c, AutomaticSuite)]
    trainer.callbacks = named_here  # type: ignore[attr-defined]
    return trainer


def _check_step(model: LightningModule, evaluate: str) -> None:
    """Refuse before the fit what would fail after it."""
    name = {"test": "test_step", "validate": "validation_step"}.get(evaluate)
    if name and getattr(type(model), name) is getattr(LightningModule, name):
        raise ConfigError(f"evaluate={evaluate}: {type(model).__name__} defines no {name}")


def _evaluate(
    trainer: Trainer, model: LightningModule, data: LightningDataModule | None, evaluate: str
) -> dict[str, float]:
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if evaluate != "none":
        run = trainer.test if evaluate == "test" else trainer.validate
        for each in run(model, datamodule=data, verbose=False):
            metrics.update(each)
    return metrics


def _header(
    experiment: str,
    run_dir: Path,
    trainers: _Trainers,
    model: LightningModule,
    checkpoint: str | None,
) -> str:
    trainer = trainers.latest()
    assert trainer is not None, "none has been handed out yet"
    lazy = torch.nn.parameter.is_lazy
    count = sum(each.numel() for each in model.parameters() if not lazy(each))
    size = f", {count:,} parameters" if count else ", built when its data are known"
    lines = [
        f"{experiment} -> {run_dir}",
        f"{trainer.num_devices} x {trainer.strategy.root_device}, precision {trainer.precision}",
        f"{type(model).__name__}{size}",
    ]
    return "\n".join(lines + ([f"resumed from {checkpoint}"] if checkpoint else []))
