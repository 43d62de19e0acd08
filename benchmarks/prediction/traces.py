"""Records runs step by step, once; from then on they are read from a folder."""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from benchmarks.prediction.families import make
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor, StepStats

PERSIST = 20
"""Steps that a high loss must last, unless the run ends first, to be a divergence."""


@dataclass
class Trace:
    """One run, a value per optimizer step."""

    family: str
    seed: int
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    update_ratio: list[float | None] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    """Whether the suite's default detectors let the step pass."""

    def stats(self) -> list[StepStats]:
        """What a callback would be given, steps that were not accepted included."""
        rates = self.learning_rate
        rows = zip(self.loss, self.grad_norm, self.update_ratio, [0.0, *rates], rates, strict=False)
        return [
            StepStats(
                step=i,
                loss=loss,
                grad_norm=norm,
                update_ratio=ratio,
                update_learning_rate=before,
                learning_rates=(rate,),
            )
            for i, (loss, norm, ratio, before, rate) in enumerate(rows)
        ]

    def onset(self) -> int | None:
        """The first step of the divergence, or None.

        That is the first whose loss is not finite; or is, and of those that follow at least three
        in four, within 20 steps and to the end of the run, above three times the best level and
        above half the way back to where the run began. The best level is the lowest median of ten
        losses in a row so far; the run began at the median of the first ten.
        """
        best = math.inf
        for step, loss in enumerate(self.loss):
            if not math.isfinite(loss):
                return step
            if step < 10:
                continue
            best = min(best, median(self.loss[step - 10 : step]))
            bound = max(3 * best, (best + median(self.loss[:10])) / 2)
            if loss > bound and self._stays_above(bound, step):
                return step
        return None

    def _stays_above(self, bound: float, step: int) -> bool:
        high = [not x <= bound for x in self.loss[step:]]
        soon = high[:PERSIST]
        return sum(soon) >= 0.75 * len(soon) and sum(high) >= 0.75 * len(high) and len(high) > 1


class _Recorder(Callback):
    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        t = self.trace
        t.loss.append(stats.loss)
        t.grad_norm.append(stats.grad_norm)
        t.update_ratio.append(stats.update_ratio)
        t.learning_rate.append(max(stats.learning_rates))
        t.accepted.append(False)

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        self.trace.accepted[-1] = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = not math.isfinite(self.trace.loss[-1])


def record(family: str, seed: int) -> Trace:
    """Train a run under a monitor that only observes."""
    trace, run = Trace(family, seed), make(family, seed)
    plugins: list[Any] = []
    if run.fp16:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(
            max_steps=run.steps,
            plugins=plugins,
            callbacks=[GradientMonitor(details_every=0), _Recorder(trace)],
            default_root_dir=root,
        )
        data = DataLoader(run.data, None) if isinstance(run.data, list) else run.data
        trainer.fit(run.module, data)
    return trace


def load_or_record(family: str, seed: int, folder: Path) -> Trace:
    """Read a trace from a folder; record it first where it is not there."""
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', family.lower())}-{seed}.json"
    if path.exists():
        return Trace(**json.loads(path.read_text(encoding="utf8")))
    trace = record(family, seed)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(trace)), encoding="utf8")
    return trace
