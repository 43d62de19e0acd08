"""Detects NaN and Inf in weights, buffers, loss and gradients."""

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, Kind
from lit_stability.measurement.step_stats import StepStats


class NonFinite:
    """Flags a NaN or Inf in the weights, the buffers, the loss or the gradients.

    With a loss scaler two cases are healthy: gradients that overflow while the loss is finite (the
    scaler searches for its scale), and an infinite loss with finite gradients (the step is good).

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> NonFinite().check(StepStats(step=7, loss=float("nan"), grad_norm=1.0)).kind
    'non-finite loss'
    """

    shared_by_ranks = "in part"
    """Weights and loss are the same on all ranks, gradients may not be."""

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly for the first of weights, loss and gradients that is not finite."""
        if stats.bad_weights:
            layers = tuple((name, math.nan) for name in stats.bad_weights[:5])
            message = f"{_count(stats.bad_weights)} non-finite, first {stats.bad_weights[0]}"
            return _anomaly(stats, "non-finite weight", math.nan, message, layers)
        bad_loss = stats.has_loss and not math.isfinite(stats.loss)
        bad_gradients = not stats.finite_gradients
        if stats.loss_scale is not None and bad_loss != bad_gradients:
            return None
        if bad_loss:
            layers = tuple(stats.worst_layers())
            return _anomaly(stats, "non-finite loss", stats.loss, f"loss is {stats.loss}", layers)
        if bad_gradients:
            layers = tuple(p for p in stats.worst_layers() if not math.isfinite(p[1]))
            first = f", first in {layers[0][0]}" if layers else ""
            message = f"gradient norm is {stats.grad_norm}{first}"
            return _anomaly(stats, "non-finite gradient", stats.grad_norm, message, layers)
        # A batch with a non-finite loss damages buffers too, and both are undone together.
        if stats.bad_buffers:
            layers = tuple((name, math.nan) for name in stats.bad_buffers[:5])
            message = f"{_count(stats.bad_buffers, 'buffer')} non-finite, first {layers[0][0]}"
            return _anomaly(stats, "non-finite buffer", math.nan, message, layers)
        return None

    def update(self, stats: StepStats) -> None:
        """Does nothing: there is nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: the detector has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state to restore."""


def _anomaly(
    stats: StepStats, kind: Kind, value: float, message: str, layers: tuple[tuple[str, float], ...]
) -> Anomaly:
    since = _since(stats, kind)
    return Anomaly(
        kind=kind,
        step=stats.step,
        value=value,
        signal=kind.removeprefix("non-finite "),
        message=message,
        optimizer=stats.optimizer,
        # A buffer that the present batch has damaged is undone together with its step.
        state_corrupted=kind == "non-finite weight"
        or (kind == "non-finite buffer" and since != stats.step),
        since=since,
        layers=layers,
    )


def _since(stats: StepStats, kind: Kind) -> int | None:
    """Returns the step of the batch that is suspected, None for the present one."""
    if kind == "non-finite buffer":
        # Buffers change in the forward pass, so the batch of a step damages what it is measured on.
        return stats.step if stats.last_scan is None else min(stats.step, stats.last_scan + 1)
    return max(0, stats.step - 1) if kind == "non-finite weight" else None


def _count(names: tuple[str, ...], what: str = "parameter") -> str:
    return f"1 {what} is" if len(names) == 1 else f"{len(names)} {what}s are"
