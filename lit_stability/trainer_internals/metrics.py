"""Metrics of an epoch: values accumulated by ``self.log``, and torchmetrics objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_stability.lightning_package import LightningModule, Trainer


class LoggedMetrics:
    """Captures the epoch aggregates and restores them, to remove a skipped batch from them.

    Args:
        pl_module: owner of the torchmetrics objects that belong to the state.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._metrics = [m for m in pl_module.modules() if isinstance(m, Metric)]
        self._logged: dict[str, dict[str, Any]] = {}
        self._states: list[dict[str, Any]] = []

    def capture(self, trainer: Trainer) -> None:
        """Captures them; Lightning's values need no copy, as it never changes them in place."""
        results = trainer.fit_loop.epoch_loop._results
        self._logged = {key: dict(vars(metric)) for key, metric in results.items()}
        self._states = [_metric_state(metric) for metric in self._metrics]

    def restore(self, trainer: Trainer) -> None:
        """Restores them; values that were first logged after the capture are reset."""
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            if key in self._logged:
                vars(metric).update(self._logged[key])
            else:
                metric.reset()
        for metric, state in zip(self._metrics, self._states, strict=True):
            vars(metric).update({k: _copy(v) for k, v in state.items()})


class EpochMetrics:
    """Saves an epoch's aggregates and restores them on resume, which Lightning does not.

    Values logged with ``self.log`` are added to those that the first batch after the resume logs.
    torchmetrics objects and ``trainer.callback_metrics`` are restored at once.
    """

    def __init__(self) -> None:
        self._logged: dict[str, dict[str, Tensor]] = {}

    @staticmethod
    def state_dict(trainer: Trainer, *, epoch_over: bool) -> dict[str, Any]:
        """Returns the aggregates as ``torch.load(weights_only=True)`` accepts them."""
        callback = {k: _copy(v) for k, v in trainer.callback_metrics.items()}
        if epoch_over:
            return {"logged": {}, "metrics": {}, "callback": callback}
        results = trainer.fit_loop.epoch_loop._results
        return {
            "callback": callback,
            "logged": {
                key: {name: _copy(getattr(metric, name)) for name in metric._defaults}
                for key, metric in results.items()
                if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset
            },
            "metrics": {
                name: _metric_state(module) | {"_computed": None}
                for name, module in trainer.lightning_module.named_modules()
                if isinstance(module, Metric)
            },
        }

    def resume(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """Restores all but logged values, which `add` restores; called at the start of the fit."""
        device = trainer.strategy.root_device
        modules = dict(trainer.lightning_module.named_modules())
        for name, saved in state["metrics"].items():
            metric = modules.get(name)
            if isinstance(metric, Metric) and saved.keys() <= vars(metric).keys():
                vars(metric).update({k: _copy(v, device) for k, v in saved.items()})
        trainer.callback_metrics.update({k: _copy(v, device) for k, v in state["callback"].items()})
        self._logged = dict(state["logged"])

    def add(self, trainer: Trainer) -> None:
        """Adds the saved aggregates to the new ones; called at the end of a batch."""
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            saved = self._logged.pop(key, None)
            if saved is None or saved.keys() != metric._defaults.keys():
                continue
            for name, value in saved.items():
                current = getattr(metric, name)
                reduced = _reduce(metric.meta, value.to(current.device), current)
                setattr(metric, name, reduced)
            metric._computed = None

    def forget(self) -> None:
        """Drops the saved aggregates, at the end of the epoch."""
        self._logged = {}


def _reduce(meta: Any, a: Tensor, b: Tensor) -> Tensor:
    if meta.is_max_reduction or meta.is_min_reduction:
        return torch.maximum(a, b) if meta.is_max_reduction else torch.minimum(a, b)
    return a + b


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed"]
    return {name: _copy(getattr(metric, name)) for name in names}


def _copy(value: Any, device: torch.device | None = None) -> Any:
    """Copies a value: metrics change tensors and lists in place."""
    if isinstance(value, Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    if not isinstance(value, list):
        return value
    return list(value) if device is None else [_copy(item, device) for item in value]


def known_metrics(trainer: Trainer, names: Collection[str]) -> dict[str, float]:
    """Returns logged metrics as they are known now; computes none, which may need all ranks.

    Args:
        trainer: in its fit.
        names: of the metrics; those that are not known yet are left out.
    """
    known = trainer._logger_connector._callback_metrics
    return {name: float(known[name]) for name in names if name in known}
