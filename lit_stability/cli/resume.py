"""Finds the checkpoint to resume from, and applies changed optimizer options of the config.

May import torch and Lightning.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_stability.cli.run_folders import newest_run
from lit_stability.errors import ConfigError
from lit_stability.lightning_package import Callback, LightningModule, Trainer, rank_zero_info
from lit_stability.training_state.checkpoint_file import damage_of, first_whole
from lit_stability.training_state.good_checkpoints import find_last_good

_OF_A_TRAINER = {"state_dict", "epoch", "global_step"}
"""Keys that the Trainer needs to resume from a checkpoint."""


def find_checkpoint(wanted: str | Path | None, run_dir: Path, option: str = "resume") -> str | None:
    """Returns the checkpoint to resume from.

    Args:
        wanted: A path, `last`, `good`, or None. `last` is the newest file by time, because
            Lightning writes `last-v1.ckpt` next to an old `last.ckpt`; only folders named
            `checkpoints` are searched, which excludes incident folders. `good` is the newest
            checkpoint that a `LastKnownGood` has confirmed. Both log and ignore files that are
            truncated or damaged.
        run_dir: Folder of the run.
        option: Name of the option in messages. Only to `resume` a file must be one of a Trainer;
            other options use its weights.

    Raises:
        ConfigError: There is no such checkpoint, or it is damaged or not one of a Trainer.
    """
    if wanted is None:
        return None
    if str(wanted) == "good":
        good = find_last_good(newest_run(run_dir))
        if good is None:
            raise ConfigError(
                f"{option}=good: no good checkpoint under {run_dir}; add "
                "`lit_stability.LastKnownGood` to the callbacks, which writes one after some "
                "healthy steps, or use `last` for any checkpoint"
            )
        return str(good)
    if str(wanted) != "last":
        if not Path(wanted).exists():
            raise ConfigError(
                f"{option}={wanted}: no such checkpoint; give a path, `last` or `good`"
            )
        check = _problem_of if option == "resume" else damage_of
        problem = None if Path(wanted).is_dir() else check(Path(wanted))
        if problem is not None:
            raise ConfigError(f"{option}={wanted}: {problem}; try `last` or `good`")
        return str(wanted)
    found = list(run_dir.glob("**/checkpoints/*.ckpt"))
    found.sort(key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)
    newest = first_whole(found)
    if newest is None:
        damaged = f" ({len(found)} truncated or damaged)" if found else ""
        raise ConfigError(
            f"{option}=last: no checkpoint under {run_dir}{damaged}; start without {option}"
        )
    return str(newest)


def _problem_of(file: Path) -> str | None:
    """Returns why the Trainer cannot resume from a file; None if it can, as far as is known."""
    damage = damage_of(file)
    if damage is not None:
        return damage
    try:
        content = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception:
        # It may contain classes that the model allows when it is built: Lightning reports others.
        return None
    if not isinstance(content, Mapping) or not content.keys() >= _OF_A_TRAINER:
        return f"it is no checkpoint of a Trainer, which has {', '.join(sorted(_OF_A_TRAINER))}"
    return None


class ConfiguredOptions(Callback):
    """Applies optimizer options that the config has changed since the checkpoint.

    Restoring an optimizer also restores the learning rate of the checkpoint, so a rate changed in
    the config would be silently ignored. Each checkpoint therefore records the options of
    optimizers and schedulers as configured, before any restore. If the record equals the current
    configuration, the restored state is unchanged. If it differs, the changed options are set, and
    the schedulers are reset and stepped to their position: the learning rate is then that of a run
    with this config at this step. A metric-driven scheduler has no such rate and continues from
    the configured one. A changed function of a `LambdaLR`, which a checkpoint does not contain,
    takes effect from the second step.
    """

    def __init__(self) -> None:
        self._then: list[Any] | None = None
        self._now: list[Any] = []
        self._groups: list[list[dict[str, Any]]] = []
        self._schedules: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the configured options of optimizers and schedulers."""
        return {"configured": self._now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the options that were configured when the checkpoint was written."""
        self._then = state_dict["configured"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the configured options; Lightning restores optimizer state after this hook."""
        self._groups = [
            [{key: deepcopy(group[key]) for key in group if key != "params"} for group in groups]
            for groups in (optimizer.param_groups for optimizer in trainer.optimizers)
        ]
        self._schedules = [deepcopy(_state(config)) for config in trainer.lr_scheduler_configs]
        self._now = [_plain(self._groups), _plain(self._schedules)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the options that have changed, and logs the learning rates."""
        then, self._then = self._then, None
        if then is None or then == self._now:
            return
        for optimizer, *groups in zip(trainer.optimizers, self._groups, then[0], strict=True):
            for group, new, old in zip(optimizer.param_groups, *groups, strict=True):
                _set(group, {key: new[key] for key in new if _plain(new[key]) != old.get(key)})
        for config, fresh in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            groups = self._groups[trainer.optimizers.index(config.scheduler.optimizer)]
            _reschedule(config.scheduler, fresh, groups)
        rates = [group["lr"] for opt in trainer.optimizers for group in opt.param_groups]
        rank_zero_info(f"Optimizer options changed in the config since the checkpoint: lr={rates}")


def _state(config: Any) -> dict[str, Any]:
    state: dict[str, Any] = config.scheduler.state_dict()
    return state


def _set(group: dict[str, Any], options: dict[str, Any]) -> None:
    for key, value in options.items():
        if isinstance(group.get(key), torch.Tensor):  # in place: a captured graph reads it
            group[key].fill_(value)
        else:
            group[key] = value


def _position(state: dict[str, Any]) -> int | None:
    """Returns how often a scheduler has stepped; a chained one has the count of its first."""
    nested = state.get("_schedulers")
    return state.get("last_epoch", _position(nested[0]) if nested else None)


def _reschedule(scheduler: Any, fresh: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Resets a scheduler to its configured start and steps it to the checkpoint's position."""
    start, end = _position(fresh), _position(scheduler.state_dict())
    if isinstance(scheduler, ReduceLROnPlateau) or start is None or end is None:
        return
    for group, options in zip(scheduler.optimizer.param_groups, groups, strict=True):
        _set(group, options)
    scheduler.load_state_dict(deepcopy(fresh))
    with warnings.catch_warnings():
        # optimizer.step() was called before the restore; a deprecation is not hidden.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(end - start):
            scheduler.step()


def _plain(value: Any) -> Any:
    """Converts options to comparable values that `torch.load(weights_only=True)` accepts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, float):
        return float(value)
    return value if isinstance(value, bool | int | str) else None
