"""The statistics and the anomaly of a step whose ``training_step`` raised an exception."""

from __future__ import annotations

import math
from dataclasses import replace

from lit_stability.detectors import Anomaly
from lit_stability.measurement.step_stats import StepStats
from lit_stability.trainer_internals import StepFailure


def without_gradients(stats: StepStats) -> StepStats:
    """Returns the statistics of a step that has neither loss nor gradients.

    Args:
        stats: as measured, with what the other micro-batches of the step have left.
    """
    return replace(
        stats,
        loss=math.nan,
        has_loss=False,
        grad_norm=0.0,
        names=(),
        grad_norms=(),
        details=(),
    )


def failure_anomaly(stats: StepStats, failure: StepFailure, damage: Anomaly | None) -> Anomaly:
    """Returns the anomaly of a failed step: damaged state if there is some, else the batch.

    Args:
        stats: of the step.
        failure: what happened, and what was found in batch, weights and buffers.
        damage: what the detectors found in the weights.
    """
    message = failure.error + (f" at {failure.place}" if failure.place else "")
    if failure.ranks:
        word = "rank" if len(failure.ranks) == 1 else "ranks"
        message = f"{word} {', '.join(map(str, failure.ranks))}: {message}"
    message = "; ".join([message, *failure.findings])
    if damage is not None:
        return replace(damage, message=f"{message}; {damage.message}")
    if failure.bad_weights:
        name = failure.bad_weights[0]
        return _damaged(stats, "non-finite weight", f"{message}; weight {name} is non-finite", name)
    if failure.bad_buffers:
        name = failure.bad_buffers[0]
        return _damaged(stats, "exception", f"{message}; buffer {name} is non-finite", name)
    return Anomaly(
        kind="exception",
        step=stats.step,
        value=math.nan,
        message=message,
        signal="training_step",
        optimizer=stats.optimizer,
    )


def _damaged(stats: StepStats, kind: str, message: str, name: str) -> Anomaly:
    return Anomaly(
        kind=kind,
        step=stats.step,
        value=math.nan,
        message=message,
        signal="training_step",
        optimizer=stats.optimizer,
        state_corrupted=True,
        since=max(0, stats.step - 1),
        layers=((name, math.nan),),
    )
