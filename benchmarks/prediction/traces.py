"""Records runs step by step into a folder, and loads recorded runs from it."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from benchmarks.prediction.families import make_run
from benchmarks.prediction.runs import Run
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor, StepStats

PERSIST = 20
"""Steps for which a high loss must persist to be a divergence, unless the run ends before."""


@dataclass
class Trace:
    """A recorded run, with one value per optimizer step."""

    family: str
    seed: int
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    update_ratio: list[float | None] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    """Whether the suite's default detectors accepted the step."""

    def stats(self) -> list[StepStats]:
        """Returns the statistics of each step, rejected steps included."""
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
        """Returns the first step of the divergence, or None; see `onset`."""
        return onset(self.loss)


def onset(losses: Sequence[float]) -> int | None:
    """Returns the first step of a divergence, or None.

    It is the first step with a non-finite loss, or the first with a loss above a bound that at
    least 75 % of the losses exceed, both in the next 20 steps and to the end of the run. The
    bound is the larger of three times the best level and the mean of best and initial level.
    The best level is the lowest median of ten consecutive losses so far, the initial level the
    median of the first ten.

    >>> onset([1.0] * 30 + [100.0] * 30), onset([1.0] * 60), onset([1.0, float("nan")])
    (30, None, 1)
    """
    best = math.inf
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            return step
        if step < 10:
            continue
        best = min(best, median(losses[step - 10 : step]))
        bound = max(3 * best, (best + median(losses[:10])) / 2)
        if loss > bound and _stay_above(bound, losses[step:]):
            return step
    return None


def _stay_above(bound: float, losses: Sequence[float]) -> bool:
    high = [not x <= bound for x in losses]
    next_steps = high[:PERSIST]
    return (
        sum(next_steps) >= 0.75 * len(next_steps)
        and sum(high) >= 0.75 * len(high)
        and len(high) > 1
    )


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


def trainer_options(run: Run) -> dict[str, Any]:
    """Returns the options of the Trainer for the precision of a run."""
    if not run.fp16:
        return {}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}


def loader_of(run: Run) -> DataLoader[Any]:
    """Returns the training data of a run."""
    return DataLoader(run.data, None) if isinstance(run.data, list) else run.data


def record(family: str, seed: int) -> Trace:
    """Trains a run with a monitor and without responders, and records it."""
    trace, run = Trace(family, seed), make_run(family, seed)
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(
            max_steps=run.steps,
            callbacks=[GradientMonitor(details_every=0), _Recorder(trace)],
            default_root_dir=root,
            **trainer_options(run),
        )
        trainer.fit(run.module, loader_of(run))
    return trace


def load_or_record(family: str, seed: int, folder: Path) -> Trace:
    """Loads a trace from a folder; records it first if it is missing."""
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', family.lower())}-{seed}.json"
    if path.exists():
        return Trace(**json.loads(path.read_text(encoding="utf8")))
    trace = record(family, seed)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(trace)), encoding="utf8")
    return trace
