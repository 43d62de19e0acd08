"""Going on from a checkpoint: which one, and what of it the config overrules.

May import torch and Lightning.
"""

import warnings
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_stability.errors import ConfigError
from lit_stability.training_state.good_checkpoints import find_last_good


def find_checkpoint(wanted: str | Path | None, run_dir: Path, option: str = "resume") -> str | None:
    """Return the checkpoint to resume from.

    `last` means the newest file by time, as Lightning numbers `last-v1.ckpt` beside a stale
    `last.ckpt`. Only folders named `checkpoints` count: evidence of an anomaly lies elsewhere.
    A file cut short by the end of its job is passed over. `good` means the newest one that a
    `LastKnownGood` has confirmed. `option` is what a message calls it.
    """
    if wanted is None:
        return None
    if str(wanted) == "good":
        good = find_last_good(run_dir)
        if good is None:
            raise ConfigError(
                f"{option}=good: no good checkpoint under {run_dir}; "
                "`lit_stability.LastKnownGood` among the callbacks writes one after some healthy "
                "steps; `last` finds any"
            )
        return str(good)
    if str(wanted) != "last":
        if not Path(wanted).exists():
            raise ConfigError(f"{option}={wanted}: no such checkpoint; `last` and `good` find one")
        if not (Path(wanted).is_dir() or zipfile.is_zipfile(wanted)):
            raise ConfigError(
                f"{option}={wanted}: is no checkpoint, or was cut short; `last` and `good` find a "
                "whole one"
            )
        return str(wanted)
    found = list(run_dir.glob("**/checkpoints/*.ckpt"))
    whole = [each for each in found if each.is_dir() or zipfile.is_zipfile(each)]
    if not whole:
        cut = f" ({len(found)} cut short)" if found else ""
        raise ConfigError(f"{option}=last: no checkpoint under {run_dir}{cut}; start without it")
    return str(max(whole, key=lambda each: (each.stat().st_mtime_ns, each.name)))


class ConfiguredOptions(Callback):
    """Gives effect to optimizer options that the config has changed since the checkpoint.

    Restoring an optimizer puts back the learning rate of the checkpoint, so that one changed in
    the config would be ignored without a word. Each checkpoint therefore notes what the config
    made of optimizers and schedulers before the restore. Where that note equals what it makes
    of them now, the restored state is left alone. Where it differs, the changed options are set
    and the schedulers are brought afresh to their position: the rate is the one that a run with
    this config would have at this step. A metric-driven scheduler has no such rate, and goes on
    from the configured one; a changed function of a `LambdaLR`, which leaves no trace in a
    checkpoint, is in effect from the second step.
    """

    def __init__(self) -> None:
        self._then: list[Any] | None = None
        self._now: list[Any] = []
        self._groups: list[list[dict[str, Any]]] = []
        self._schedules: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what the config made of optimizers and schedulers."""
        return {"configured": self._now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what the config of the checkpoint made of them."""
        self._then = state_dict["configured"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note them as configured; Lightning restores their state after this hook."""
        self._groups = [
            [{key: deepcopy(group[key]) for key in group if key != "params"} for group in groups]
            for groups in (each.param_groups for each in trainer.optimizers)
        ]
        self._schedules = [deepcopy(_state(each)) for each in trainer.lr_scheduler_configs]
        self._now = [_plain(self._groups), _plain(self._schedules)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set what has changed."""
        then, self._then = self._then, None
        if then is None or then == self._now:
            return
        for optimizer, *groups in zip(trainer.optimizers, self._groups, then[0], strict=True):
            for group, new, old in zip(optimizer.param_groups, *groups, strict=True):
                _set(group, {key: new[key] for key in new if _plain(new[key]) != old.get(key)})
        for config, fresh in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            groups = self._groups[trainer.optimizers.index(config.scheduler.optimizer)]
            _reschedule(config.scheduler, fresh, groups)
        rates = [group["lr"] for each in trainer.optimizers for group in each.param_groups]
        rank_zero_info(f"The config has changed the optimizer since the checkpoint: lr={rates}")


def _state(config: Any) -> dict[str, Any]:
    state: dict[str, Any] = config.scheduler.state_dict()
    return state


def _set(group: dict[str, Any], options: dict[str, Any]) -> None:
    for key, value in options.items():
        if isinstance(group.get(key), torch.Tensor):  # a captured graph reads this very tensor
            group[key].fill_(value)
        else:
            group[key] = value


def _position(state: dict[str, Any]) -> int | None:
    """Return how often a scheduler has stepped; one that chains others leaves that to them."""
    nested = state.get("_schedulers")
    return state.get("last_epoch", _position(nested[0]) if nested else None)


def _reschedule(scheduler: Any, fresh: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Bring a scheduler from its configured start to the position of the checkpoint."""
    start, end = _position(fresh), _position(scheduler.state_dict())
    if isinstance(scheduler, ReduceLROnPlateau) or start is None or end is None:
        return
    for group, options in zip(scheduler.optimizer.param_groups, groups, strict=True):
        _set(group, options)
    scheduler.load_state_dict(deepcopy(fresh))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "before optimizer.step()": those were before the restore
        for _ in range(end - start):
            scheduler.step()


def _plain(value: Any) -> Any:
    """Keep what two configs can be compared by and `torch.load(weights_only=True)` accepts."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, float):
        return float(value)
    return value if isinstance(value, bool | int | str) else None
