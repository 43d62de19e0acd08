"""Metrics gathered over an epoch: what ``self.log`` accumulates, and torchmetrics objects."""

from __future__ import annotations

from typing import Any

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


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed"]
    return {name: _copy(getattr(metric, name)) for name in names}


def _copy(value: Any) -> Any:
    """Metrics add to tensors in place and append to lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
