"""Suites that are measured: none, this package's callbacks, and other protections."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from benchmarks.alternatives import PROTECTIONS, Protection, missing
from benchmarks.alternatives.shipped import Nothing
from benchmarks.alternatives.shipped import Suite as Ours
from lit_stability import (
    AdaptiveGradientClipping,
    AnomalyCheckpoint,
    AttentionProbe,
    AutoRollback,
    CrashPrediction,
    CurvatureProbe,
    Diagnosis,
    GradientFlow,
    GradientMonitor,
    LastKnownGood,
    NonFiniteLocator,
    PrecisionFallback,
    stability_callbacks,
)
from lit_stability.measurement.norms import norms_and_peaks, norms_of
from lit_stability.training_state.snapshot import TensorBank


@dataclass(frozen=True)
class Suite:
    """Callbacks and options of a Trainer."""

    callbacks: Callable[[], list[Callback]] = list
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the Trainer."""
    tensorboard: bool = False
    baseline: str = "bare"
    """Name of the suite whose steps are the baseline."""


class Traffic(Callback):
    """Reads and copies the same tensors as the default suite, without evaluating them.

    Reads every gradient once per step and every weight once in ten steps, and copies weights and
    optimizer state alternately into two copies once in twenty steps: the lower bound of the cost of
    exact detection and recovery with these intervals.
    """

    def __init__(self) -> None:
        self._copies = [TensorBank(), TensorBank()]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Copies between two steps."""
        count, remainder = divmod(trainer.global_step, 20)
        if not remainder:
            states = [s.values() for o in trainer.optimizers for s in o.state.values()]
            tensors = [value for state in states for value in state]
            self._copies[count % 2].capture([*pl_module.parameters(), *tensors])

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Reads before the update."""
        weights = [*pl_module.parameters()]
        values = norms_of([p.grad for p in weights if p.grad is not None])
        if trainer.global_step % 10 == 9:
            norms, peaks = norms_and_peaks(weights)
            values += norms + peaks
        torch.cat(values).tolist()


def with_monitor(*others: Callable[[], Callback], **options: Any) -> Suite:
    """Creates a suite of a `GradientMonitor` and other callbacks."""
    return Suite(lambda: [GradientMonitor(**options), *(create() for create in others)])


OURS: dict[str, Suite] = {
    "bare": Suite(),
    "bare, again": Suite(),
    "default suite": Suite(stability_callbacks),
    "bare, clips": Suite(options={"gradient_clip_val": 1.0}),
    "default suite, clips": Suite(
        stability_callbacks, {"gradient_clip_val": 1.0}, baseline="bare, clips"
    ),
    "its reads and copies alone": Suite(lambda: [Traffic()]),
    "GradientMonitor": with_monitor(),
    "GradientMonitor, no details": with_monitor(details_every=0),
    "GradientMonitor, weights scanned every step": with_monitor(scan_weights_every=1),
    "GradientMonitor, AnomalyCheckpoint": with_monitor(AnomalyCheckpoint),
    "GradientMonitor, NonFiniteLocator": with_monitor(NonFiniteLocator),
    "GradientMonitor, Diagnosis": with_monitor(Diagnosis),
    "GradientMonitor, LastKnownGood": with_monitor(LastKnownGood),
    "GradientMonitor, PrecisionFallback": with_monitor(PrecisionFallback),
    "GradientMonitor, AutoRollback": with_monitor(AutoRollback),
    "GradientMonitor, AutoRollback(after_rollback='skip')": with_monitor(
        lambda: AutoRollback(after_rollback="skip")
    ),
    "GradientMonitor, AdaptiveGradientClipping": with_monitor(AdaptiveGradientClipping),
    "GradientMonitor, CrashPrediction": with_monitor(CrashPrediction),
    "GradientMonitor, AttentionProbe": with_monitor(AttentionProbe),
    "GradientMonitor, CurvatureProbe": with_monitor(CurvatureProbe),
    "GradientMonitor, GradientFlow": with_monitor(GradientFlow),
}
TENSORBOARD: dict[str, Suite] = {
    "bare, TensorBoard": Suite(tensorboard=True),
    "default suite, TensorBoard": Suite(
        stability_callbacks, tensorboard=True, baseline="bare, TensorBoard"
    ),
    "bare, TensorBoard every step": Suite(options={"log_every_n_steps": 1}, tensorboard=True),
    "default suite, TensorBoard every step": Suite(
        stability_callbacks,
        {"log_every_n_steps": 1},
        tensorboard=True,
        baseline="bare, TensorBoard every step",
    ),
}
HALF_PRECISION: dict[str, Suite] = {
    "PrecisionFallback, one Linear in float32": with_monitor(
        lambda: PrecisionFallback(fp32_modules=["*blocks.0.up"])
    ),
    "PrecisionFallback, all norms in float32": with_monitor(
        lambda: PrecisionFallback(fp32_modules=["LayerNorm"])
    ),
}
"""Suites for a 16-bit precision."""
SUITES: dict[str, Suite] = {**OURS, **TENSORBOARD, **HALF_PRECISION}
BASELINES = frozenset(suite.baseline for suite in SUITES.values())


def alternatives() -> tuple[dict[str, Suite], dict[str, str]]:
    """Returns the other protections that can run here, and the errors of those that cannot."""
    absent = missing()
    kinds = [k for k in PROTECTIONS.values() if k not in (Nothing, Ours) and k.name not in absent]
    return {kind.name: _suite_of(kind) for kind in kinds}, absent


def _suite_of(kind: type[Protection]) -> Suite:
    def callbacks() -> list[Callback]:
        return kind().callbacks(Path(tempfile.mkdtemp()))

    return Suite(callbacks, kind().trainer_options())
