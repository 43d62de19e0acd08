"""Runs the experiment of a config: checks, builds, fits, evaluates, and writes the results.

Nothing is built before every option was checked. All arguments come from the config:
hyper-parameters stored in a checkpoint never replace them. May import Lightning.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from lit_stability.callbacks.automatic_suite import AutomaticSuite
from lit_stability.cli.config import as_written, compose, resolve
from lit_stability.cli.experiments import Expectation
from lit_stability.cli.experiments.closing import Closing, is_interrupt
from lit_stability.cli.instantiate import Build, bind
from lit_stability.cli.resume import ConfiguredOptions, find_checkpoint
from lit_stability.cli.run_folders import delete_run
from lit_stability.cli.signature import sign
from lit_stability.cli.targets import Rules, refusals
from lit_stability.errors import ConfigError
from lit_stability.lightning_choice import trainer_module
from lit_stability.lightning_package import (
    PACKAGE,
    Callback,
    LightningDataModule,
    LightningModule,
    Logger,
    MisconfigurationException,
    Trainer,
    seed_everything,
)
from lit_stability.redaction import keep_out
from lit_stability.restart import Recover, fit_with_recovery
from lit_stability.restart.torchrun import attempt, from_rank_0, use_new_store
from lit_stability.trainer_internals import (
    callbacks_of,
    hide_environment,
    keep_records_in,
    leave_out_unlimited_epochs,
)
from lit_stability.training_state.atomic_write import write_and_keep

__all__ = ["FitResult", "Run", "compose", "fit"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The top level of a config; an unknown key is an error."""

    experiment: str
    """Name of the run; by default the name of the first config file."""
    about: str | None = None
    """Description of the experiment, in one line."""
    expect: Expectation | None = None
    """Expected result, compared with the outcome at the end. It is not inherited by a config that
    composes this one."""
    run_dir: Path
    """Folder for everything the run writes; by default `runs/<experiment>`, and with the command
    `fit` a folder of its own in there."""
    model: LightningModule
    data: LightningDataModule | None = None
    """Null if the model has its own data loaders."""
    trainer: Trainer
    """Options of Lightning's `Trainer`, except `callbacks` and `logger`."""
    callbacks: dict[str, Callback | None] | None = None
    """Callbacks by name, called in this order; null removes an inherited one."""
    logger: Logger | list[Logger] | Literal[False] | None = None
    """By default a `TensorBoardLogger` in `run_dir`; null for none."""
    seed: int | None = None
    evaluate: Literal["test", "validate", "none"] | None = None
    """Evaluation that runs on the final weights after the fit."""
    ckpt_path: str | None = None
    """Checkpoint to resume from: a path, `last` for the newest one in `run_dir`, or `good`."""
    recover: Recover | None = None
    """`{}` or limits such as `{max_crashes: 3}`: restart from the last good checkpoint after an
    exception, as `fit_with_recovery` does. By default the first exception ends the run."""


@dataclass(frozen=True)
class FitResult:
    """Objects and metrics of a finished run."""

    trainer: Trainer
    model: LightningModule
    datamodule: LightningDataModule | None
    metrics: dict[str, float]
    """Metrics of the fit, overridden by those of the evaluation."""


def fit(
    config: Mapping[str, Any] | DictConfig,
    *,
    resume: str | Path | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
) -> FitResult:
    """Runs the experiment that a config describes.

    Writes to `run_dir`: `config.yaml` before the first step, `metrics.json` after the last (null
    for non-finite values), `outcome.json` in every case, and `preflight.json` if that check ran.
    An existing file with other content is renamed and kept. `${oc.env:...}` of a config, which may
    be a secret, is written as it is, not as its value.

    A resumed run takes every argument from the config. The optimizer continues from the
    checkpoint, but options that the config has changed since then take effect.

    Args:
        config: The composed config.
        resume: Overrides `ckpt_path`.
        allow: Patterns of targets that are allowed in addition, see `lit_stability.cli.targets`.
        overwrite: Whether an earlier run in `run_dir` is deleted, once all options were checked.

    Raises:
        ConfigError: The config cannot be run; nothing was written.
    """
    written, secrets = as_written(config)
    keep_out(secrets)
    options = check_options(resolve(config), allow)
    run_dir: Path = options["run_dir"]
    wanted = resume or options.get("ckpt_path")
    checkpoint = from_rank_0(lambda: find_checkpoint(wanted, run_dir) or "") or None
    recover = make(options.get("recover"))
    model, data = make_model_and_data(options)
    hide_environment(model, data)
    evaluate = options.get("evaluate") or "none"
    _check_step(model, evaluate)
    trainers = _Trainers(options)
    closing = Closing(run_dir, make(options.get("expect")), lambda: trainers.latest())
    if trainers.is_global_zero:
        if overwrite and attempt() == 0:
            delete_run(run_dir)
        _write_config(run_dir, written)
        print(_header(options["experiment"], run_dir, trainers, model, checkpoint))
    try:
        trainer = _fit(trainers, recover, model, data, checkpoint)
        metrics = _evaluate(trainer, model, data, evaluate)
    except Exception as error:
        closing.failed(error)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        if is_interrupt(error):
            closing.failed(error)
        raise
    closing.finished(metrics)
    return FitResult(trainer, model, data, metrics)


def _write_config(run_dir: Path, written: dict[str, Any]) -> None:
    try:
        write_and_keep(run_dir / "config.yaml", OmegaConf.to_yaml(written), private=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot be written to ({error}); choose another folder"
        ) from error
    sign(run_dir / "config.yaml")


def check_options(plain: dict[str, Any], allow: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the options of `Run` with every target checked and none built.

    Args:
        plain: A resolved config.
        allow: Patterns of targets that are allowed in addition, see `lit_stability.cli.targets`.

    Raises:
        ConfigError: If there are problems; lists all of them.
    """
    problems = refusals(plain, allow)
    if problems:
        raise ConfigError(*problems)
    trainer = plain.get("trainer") or {}
    if isinstance(trainer, dict):
        problems += [
            f"trainer.{key}: belongs at the top level of a config, as {key}"
            for key in ("callbacks", "logger")
            if key in trainer
        ]
        trainer = {"_target_": f"{trainer_module(PACKAGE)}.Trainer"} | trainer
    options = bind(Run, plain | {"trainer": trainer}, "", problems, Rules(tuple(allow))).options
    if problems:
        raise ConfigError(*problems)
    make(options.get("expect"))  # raises for an invalid expectation before the run starts
    return options


def make(plan: Any) -> Any:
    """Builds checked options, innermost first.

    Raises:
        ConfigError: A target rejected its options.
    """
    if isinstance(plan, list | tuple | set | frozenset):
        return type(plan)(make(item) for item in plan)
    if isinstance(plan, dict):
        return {key: make(value) for key, value in plan.items()}
    if not isinstance(plan, Build):
        return plan
    options = make(plan.options)
    try:
        return plan.target(**options)
    except (ValueError, OSError, MisconfigurationException) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{plan.path}: {plan.target.__qualname__} cannot be built: {error}"
        ) from error


class _Trainers:
    """Builds the trainers of a run one after another, and holds only weak references to them.

    Args:
        options: The checked options of `Run`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._first: Trainer | None = make_trainer(options)
        self.latest = weakref.ref(self._first)
        self.is_global_zero = self._first.is_global_zero

    def __call__(self, **overrides: Any) -> Trainer:
        """Returns the first trainer, then new ones with `overrides` of `Trainer` options."""
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
    """Fits, with recovery if configured; returns the trainer of the fit that finished."""
    if recover is None:
        use_new_store()
        trainer = trainers()
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        return trainer
    limits = asdict(recover)
    return fit_with_recovery(trainers, model, data, ckpt_path=checkpoint, **limits).trainer


def make_model_and_data(
    options: dict[str, Any],
) -> tuple[LightningModule, LightningDataModule | None]:
    """Sets the seed of `Run`, then builds the model and its data, the model first."""
    if options.get("seed") is not None:
        seed_everything(options["seed"], workers=True, verbose=False)
    return make(options["model"]), make(options.get("data"))


def make_trainer(options: dict[str, Any], **overrides: Any) -> Trainer:
    """Builds the trainer of `Run` with its callbacks and logger.

    Args:
        options: The checked options of `Run`.
        overrides: Options of `Trainer` that replace those of the config.
    """
    named = options.get("callbacks") or {}
    callbacks = [make(callback) for callback in named.values() if callback is not None]
    plan: Build = options["trainer"]
    own = {
        "callbacks": [ConfiguredOptions(), *callbacks],
        "logger": make(options.get("logger")) or False,
        "default_root_dir": options["run_dir"],
    }
    trainer = make(Build(plan.target, own | plan.options | overrides, plan.path))
    assert isinstance(trainer, Trainer)
    # A config defines all callbacks: the suite that an environment variable adds is removed.
    named_here = [c for c in callbacks_of(trainer) if not isinstance(c, AutomaticSuite)]
    trainer.callbacks = named_here  # type: ignore[attr-defined]
    keep_records_in(trainer, options["run_dir"])
    leave_out_unlimited_epochs(trainer)
    return trainer


def _check_step(model: LightningModule, evaluate: str) -> None:
    """Checks before the fit that the evaluation has its step method."""
    name = {"test": "test_step", "validate": "validation_step"}.get(evaluate)
    if name and getattr(type(model), name) is getattr(LightningModule, name):
        raise ConfigError(f"evaluate={evaluate}: {type(model).__name__} defines no {name}")


def _evaluate(
    trainer: Trainer, model: LightningModule, data: LightningDataModule | None, evaluate: str
) -> dict[str, float]:
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if evaluate != "none":
        run = trainer.test if evaluate == "test" else trainer.validate
        for results in run(model, datamodule=data, verbose=False):
            metrics.update(results)
    return metrics


def _header(
    experiment: str,
    run_dir: Path,
    trainers: _Trainers,
    model: LightningModule,
    checkpoint: str | None,
) -> str:
    trainer = trainers.latest()
    assert trainer is not None, "the first trainer still exists"
    lazy = torch.nn.parameter.is_lazy
    count = sum(weight.numel() for weight in model.parameters() if not lazy(weight))
    size = f", {count:,} parameters" if count else ", built when its data are known"
    lines = [
        f"{experiment} -> {run_dir}",
        f"{trainer.num_devices} x {trainer.strategy.root_device}, precision {trainer.precision}",
        f"{type(model).__name__}{size}",
    ]
    return "\n".join(lines + ([f"resumed from {checkpoint}"] if checkpoint else []))
