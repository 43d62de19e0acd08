"""What is put into a Trainer to be measured: nothing, our callbacks, the protections of others."""

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
    """A Trainer's protection."""

    callbacks: Callable[[], list[Callback]] = list
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the Trainer."""
    tensorboard: bool = False
    baseline: str = "bare"
    """Name of the suite that the steps are compared with."""


class Traffic(Callback):
    """Reads and copies what the default suite does of whole tensors, and judges nothing.

    Every gradient once a step, every weight once in ten, weights and optimizer state in turn into
    two copies once in twenty: what no exact detection and recovery of this rhythm goes below.
    """

    def __init__(self) -> None:
        self._copies = [TensorBank(), TensorBank()]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Copy, between two steps."""
        turn, rest = divmod(trainer.global_step, 20)
        if not rest:
            states = [s.values() for o in trainer.optimizers for s in o.state.values()]
            tensors = [value for state in states for value in state]
            self._copies[turn % 2].capture([*pl_module.parameters(), *tensors])

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read, before the update."""
        weights = [*pl_module.parameters()]
        found = norms_of([p.grad for p in weights if p.grad is not None])
        if trainer.global_step % 10 == 9:
            norms, peaks = norms_and_peaks(weights)
            found += norms + peaks
        torch.cat(found).tolist()


def with_monitor(*others: Callable[[], Callback], **options: Any) -> Suite:
    """A monitor and what works on it."""
    return Suite(lambda: [GradientMonitor(**options), *(make() for make in others)])


OURS: dict[str, Suite] = {
    "bare": Suite(),
    "bare, again": Suite(),
    "default suite": Suite(stability_callbacks),
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
    "GradientMonitor, AutoRollback(data='skip')": with_monitor(lambda: AutoRollback(data="skip")),
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
HALF: dict[str, Suite] = {
    "PrecisionFallback, one Linear in float32": with_monitor(
        lambda: PrecisionFallback(fp32_modules=["*blocks.0.up"])
    ),
    "PrecisionFallback, all norms in float32": with_monitor(
        lambda: PrecisionFallback(fp32_modules=["LayerNorm"])
    ),
}
"""For a 16-bit precision."""
SUITES: dict[str, Suite] = {**OURS, **TENSORBOARD, **HALF}
BASELINES = frozenset(suite.baseline for suite in SUITES.values())


def alternatives() -> tuple[dict[str, Suite], dict[str, str]]:
    """What else may protect a fit and can be imported here, and why each of the rest cannot."""
    absent = missing()
    kinds = [k for k in PROTECTIONS.values() if k not in (Nothing, Ours) and k.name not in absent]
    return {kind.name: _foreign(kind) for kind in kinds}, absent


def _foreign(kind: type[Protection]) -> Suite:
    def callbacks() -> list[Callback]:
        return kind().callbacks(Path(tempfile.mkdtemp()))

    return Suite(callbacks, kind().trainer_options())
