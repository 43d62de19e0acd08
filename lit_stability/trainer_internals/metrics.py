"""Metrics gathered over an epoch: what ``self.log`` accumulates, and torchmetrics objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric


class LoggedMetrics:
    """Epoch aggregates as they were, so that a batch that was left out leaves no trace in them.

    Args:
        pl_module: whose torchmetrics objects belong to the state.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._metrics = [m for m in pl_module.modules() if isinstance(m, Metric)]
        self._logged: dict[str, dict[str, Any]] = {}
        self._states: list[dict[str, Any]] = []

    def capture(self, trainer: Trainer) -> None:
        """Remember them. Lightning replaces its values rather than writing into them: no copies."""
        results = trainer.fit_loop.epoch_loop._results
        self._logged = {key: dict(vars(metric)) for key, metric in results.items()}
        self._states = [_metric_state(metric) for metric in self._metrics]

    def restore(self, trainer: Trainer) -> None:
        """Put them back; what was first logged since is reset."""
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            if key in self._logged:
                vars(metric).update(self._logged[key])
            else:
                metric.reset()
        for metric, state in zip(self._metrics, self._states, strict=True):
            vars(metric).update({k: _copy(v) for k, v in state.items()})


class EpochMetrics:
    """Carries an epoch's aggregates from one process to the next, which Lightning does not.

    Values logged with ``self.log`` are added to what the first batch after the resume logs;
    torchmetrics objects and ``trainer.callback_metrics`` are put back at once.
    """

    def __init__(self) -> None:
        self._logged: dict[str, dict[str, Tensor]] = {}

    @staticmethod
    def state_dict(trainer: Trainer, *, epoch_over: bool) -> dict[str, Any]:
        """The aggregates now, in what ``torch.load(weights_only=True)`` accepts."""
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
        """Put back what can be now; `add` does the rest. At the start of the fit."""
        device = trainer.strategy.root_device
        modules = dict(trainer.lightning_module.named_modules())
        for name, saved in state["metrics"].items():
            metric = modules.get(name)
            if isinstance(metric, Metric) and saved.keys() <= vars(metric).keys():
                vars(metric).update({k: _copy(v, device) for k, v in saved.items()})
        trainer.callback_metrics.update({k: _copy(v, device) for k, v in state["callback"].items()})
        self._logged = dict(state["logged"])

    def add(self, trainer: Trainer) -> None:
        """Add the saved aggregates to those that have begun anew; at the end of a batch."""
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            saved = self._logged.pop(key, None)
            if saved is None or saved.keys() != metric._defaults.keys():
                continue
            for name, value in saved.items():
                now = getattr(metric, name)
                setattr(metric, name, _reduce(metric.meta, value.to(now.device), now))
            metric._computed = None

    def forget(self) -> None:
        """The epoch is over."""
        self._logged = {}


def _reduce(meta: Any, a: Tensor, b: Tensor) -> Tensor:
    if meta.is_max_reduction or meta.is_min_reduction:
        return torch.maximum(a, b) if meta.is_max_reduction else torch.minimum(a, b)
    return a + b


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed"]
    return {name: _copy(getattr(metric, name)) for name in names}


def _copy(value: Any, device: torch.device | None = None) -> Any:
    """Metrics add to tensors in place and append to lists."""
    if isinstance(value, Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    if not isinstance(value, list):
        return value
    return list(value) if device is None else [_copy(each, device) for each in value]
