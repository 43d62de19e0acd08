"""Measures the cost of snapshots and of the replay ring relative to a plain copy.

    python -m benchmarks.snapshot [--rounds 40] [--quick]

One process, one torch thread, a byte-level Transformer with 9.9M parameters and AdamW. Every round
times a plain copy (one `Tensor.copy_` of the same number of bytes), a snapshot, a restore, the copy
for a good checkpoint, and the capture at the start of a step one after the other, so that all have
the same noise. Reports the medians of the rounds' ratios and their quartiles.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from benchmarks.results import Spread, Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability.measurement.tensor_tree import size_of
from lit_stability.trainer_internals import (
    RecordedBatch,
    ReplayRing,
    StepStart,
    TrainingSnapshot,
    full_checkpoint,
)
from lit_stability.training_state.frozen_weights import FrozenWeights
from lit_stability.training_state.host_copy import HostCopy


class Rounds(Callback):
    """Times the copies at the end of the fit's last step.

    Args:
        rounds: Number of rounds.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.times: dict[str, list[float]] = {}
        self.step: list[float] = []
        self._last = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        """Starts the clock of the step."""
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Measures after the last step, when the optimizer has its state."""
        self.step.append(time.perf_counter() - self._last)
        if trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: Any) -> None:
        snapshot = TrainingSnapshot(pl_module, FrozenWeights())
        start, good = StepStart(trainer, pl_module), HostCopy()
        snapshot.capture(trainer, pl_module, position=0, mark=0)
        source = torch.zeros(snapshot.nbytes // 4)
        target = torch.empty_like(source)
        self.nbytes = snapshot.nbytes
        operations: dict[str, Callable[[], Any]] = {
            "plain copy": lambda: target.copy_(source),
            "snapshot": lambda: snapshot.capture(trainer, pl_module, position=0, mark=0),
            "restore": lambda: snapshot.restore(trainer, replay=True),
            "good checkpoint": lambda: good.capture(full_checkpoint(trainer)),
            "start of a step": lambda: start.capture(trainer, position=0),
        }
        self.times = {name: [] for name in operations}
        for i in range(self.rounds + 3):
            for name, operation in operations.items():
                before = time.perf_counter()
                operation()
                if i >= 3:  # the first three rounds are a warm-up
                    self.times[name].append(time.perf_counter() - before)


def report(rounds: Rounds, ring: ReplayRing, every: int = 20) -> tuple[dict[str, Any], Table]:
    """Returns the ratios as figures and as a table."""
    copy, step = rounds.times["plain copy"], statistics.median(rounds.step)
    spreads = {
        name: Spread.of(a / b for a, b in zip(rounds.times[name], copy, strict=True))
        for name in ("snapshot", "restore", "good checkpoint")
    }
    taken = statistics.median(rounds.times["snapshot"])
    figures = {
        **spreads,
        "snapshot_bytes": rounds.nbytes,
        "step_ms": 1e3 * step,
        "copy_ms": 1e3 * statistics.median(copy),
        "amortised_share": taken / every / step,
        "step_start_share": statistics.median(rounds.times["start of a step"]) / step,
        "ring_bytes": ring.nbytes,
    }
    rows = [[name, f"x{spread:.3f} of a plain copy"] for name, spread in spreads.items()]
    rows += [
        [f"snapshot, every {every} steps", f"{figures['amortised_share']:.3%} of a step"],
        ["start of a step", f"{figures['step_start_share']:.3%} of a step"],
        ["memory", f"{2 * rounds.nbytes / 2**20:.1f} MiB for two snapshots"],
        ["replay ring", f"{ring.nbytes / 2**20:.3f} MiB for {ring.position} batches"],
    ]
    title = f"{rounds.nbytes / 2**20:.1f} MiB, step {1e3 * step:.1f} ms, {len(copy)} rounds"
    return figures, Table(title, ["operation", "cost"], rows)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    shape = ByteGPTConfig(width=128, layers=4) if args.quick else ByteGPTConfig(width=400, layers=5)
    seed_everything(0, verbose=False)
    rounds = Rounds(args.rounds)
    trainer = quiet_trainer(
        max_steps=5,
        callbacks=[rounds],
    )
    trainer.fit(ByteGPTModule(shape), loader(8, shape.length))
    figures, table = report(rounds, _ring(shape))
    save("snapshot", folder_of(args), figures, [table])


def _ring(shape: ByteGPTConfig) -> ReplayRing:
    """Fills the ring as far as possible: two intervals of 20 steps plus ten of probation."""
    ring = ReplayRing(2**30, clone=False)
    for index, batch in zip(range(50), loader(8, shape.length), strict=False):
        ring.add(RecordedBatch(batch, 0, index, None, size_of(batch), ()))
    return ring


if __name__ == "__main__":
    main()
