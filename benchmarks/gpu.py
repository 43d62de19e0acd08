"""Measures what the default suite costs on a GPU.

    python -m benchmarks.gpu [--sizes 10M 125M 1B] [--steps 200] [--accelerator cuda] [--quick]

A byte-level Transformer in bf16-mixed with fused AdamW. A bare Trainer and one with
``stability_callbacks()`` alternate step by step on equal models and batches; a step is timed by
events on the stream, and the device is idle when it begins. Reports

* the ratio of a step to the bare step, and the difference in milliseconds;
* kernels and launches per step, by the profiler, over 20 steps with one snapshot;
* the largest memory allocated on the device, of fits of their own;
* the time of a snapshot and of a restore, next to a plain copy of as many bytes.

``--accelerator cpu --quick`` runs all of it on a CPU, where it shows only that the script works.
"""

from __future__ import annotations

import argparse
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.profiler import ProfilerActivity, profile

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule
from benchmarks.overhead.suites import SUITES, Suite
from benchmarks.overhead.turns import BLOCK, WARMUP_BLOCKS, Setting, ratio, take_turns
from benchmarks.results import Estimate, Spread, Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability.trainer_internals import TrainingSnapshot
from lit_stability.training_state.frozen_weights import FrozenWeights

SUITE = "default suite"
SIZES = {
    "10M": (ByteGPTConfig(width=400, layers=5, heads=8, length=512), 16),
    "125M": (ByteGPTConfig(width=896, layers=13, heads=14, length=512), 16),
    "1B": (ByteGPTConfig(width=2048, layers=20, heads=16, length=512), 8),
}
"""Model and batch size, in sequences of 512 bytes."""
QUICK = {"0.1M": (ByteGPTConfig(width=32, layers=2, heads=2, length=32), 2)}


class FusedByteGPT(ByteGPTModule):
    """The model with fused AdamW, and without reads of its own in a step."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Returns the cross-entropy of the next byte, in nats."""
        logits_BTV = self.model(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns fused AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


@dataclass(frozen=True)
class Row:
    """Figures of one size."""

    size: str
    parameters: int
    step_ms: float
    """Median bare step."""
    ratio: Estimate
    extra_ms: float
    """Difference of the medians."""
    kernels: tuple[float, float]
    """Per step, bare and with the suite."""
    launches: tuple[float, float]
    memory_gib: tuple[float, float]
    snapshot: Spread
    """Ratios to a plain copy."""
    restore: Spread
    snapshot_ms: float
    snapshot_gib: float


class Profiled(Callback):
    """Profiles the last block of steps: kernels on the device, and launches."""

    def __init__(self, last: int) -> None:
        self.last, self.kernels, self.launches = last, 0.0, 0.0
        self._profile: Any = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Starts with a block of steps left."""
        if trainer.global_step == self.last - BLOCK:
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            self._profile = profile(activities=activities)
            self._profile.__enter__()

    def on_train_end(self, *_: Any) -> None:
        """Counts."""
        self._profile.__exit__(None, None, None)
        events = self._profile.events()
        on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
        self.kernels = len(on_device) / BLOCK
        self.launches = sum("LaunchKernel" in e.name for e in events) / BLOCK


class Copies(Callback):
    """Times snapshots at the end of a fit, when the optimizer has its state."""

    def __init__(self, rounds: int, timer: Callable[[Callable[[], Any]], float]) -> None:
        self.rounds, self.timer = rounds, timer
        self.times: dict[str, list[float]] = {}
        self.nbytes = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Measures after the last step."""
        if trainer.global_step != trainer.max_steps:
            return
        snapshot = TrainingSnapshot(pl_module, FrozenWeights())
        snapshot.capture(trainer, pl_module, position=0, mark=0)
        self.nbytes = snapshot.nbytes
        source = torch.zeros(self.nbytes // 4, device=pl_module.device)
        target = torch.empty_like(source)
        operations: dict[str, Callable[[], Any]] = {
            "plain copy": lambda: target.copy_(source),
            "snapshot": lambda: snapshot.capture(trainer, pl_module, position=0, mark=0),
            "restore": lambda: snapshot.restore(trainer, replay=True),
        }
        self.times = {name: [] for name in operations}
        for i in range(self.rounds + 3):
            for name, operation in operations.items():
                seconds = self.timer(operation)
                if i >= 3:  # the first three rounds are a warm-up
                    self.times[name].append(seconds)


def fit(suite: Suite, setting: Setting, *callbacks: Callback) -> Trainer:
    """Trains once, alone in the process's memory of the device."""
    gc.collect()
    if setting.accelerator == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(
        accelerator=setting.accelerator,
        devices=1,
        precision=setting.precision,
        max_steps=setting.steps,
        callbacks=[*suite.callbacks(), *callbacks],
    )
    trainer.fit(setting.module(setting.config), setting.batches())
    return trainer


def peak_gib(suite: Suite, setting: Setting) -> float:
    """Returns the largest memory that a fit has allocated on the device."""
    fit(suite, setting)
    return torch.cuda.max_memory_allocated() / 2**30 if setting.accelerator == "cuda" else 0.0


def measure(size: str, setting: Setting, rounds: int) -> Row:
    """Measures one size."""
    times = take_turns(["bare", SUITE], setting)
    bare, ours = times["bare"].steps, times[SUITE].steps
    if times[SUITE].incidents:
        raise RuntimeError(f"{size}: the run had an incident, so it is not a healthy one")
    short = Setting(**{**vars(setting), "steps": (WARMUP_BLOCKS + 1) * BLOCK})
    profiles = [Profiled(short.steps) for _ in range(2)]
    for name, profiled in zip(("bare", SUITE), profiles, strict=True):
        fit(SUITES[name], short, profiled)
    memory = [peak_gib(SUITES[name], short) for name in ("bare", SUITE)]
    copies = Copies(rounds, setting.seconds_of)
    trainer = fit(SUITES["bare"], Setting(**{**vars(setting), "steps": 3}), copies)
    plain = copies.times["plain copy"]
    spreads = {
        name: Spread.of(a / b for a, b in zip(copies.times[name], plain, strict=True))
        for name in ("snapshot", "restore")
    }
    middle = Spread.of(bare[WARMUP_BLOCKS * BLOCK :]).median
    return Row(
        size=size,
        parameters=sum(p.numel() for p in trainer.lightning_module.parameters()),
        step_ms=1e3 * middle,
        ratio=ratio(ours, bare),
        extra_ms=1e3 * (Spread.of(ours[WARMUP_BLOCKS * BLOCK :]).median - middle),
        kernels=(profiles[0].kernels, profiles[1].kernels),
        launches=(profiles[0].launches, profiles[1].launches),
        memory_gib=(memory[0], memory[1]),
        **spreads,
        snapshot_ms=1e3 * Spread.of(copies.times["snapshot"]).median,
        snapshot_gib=copies.nbytes / 2**30,
    )


def table_of(rows: list[Row], device: str) -> Table:
    """Formats the figures."""
    columns = ["model", "bare step, ms", "ratio with the suite", "more, ms", "kernels a step"]
    columns += ["launches a step", "peak, GiB", "snapshot, GiB", "snapshot, ms"]
    columns += ["snapshot, plain copies", "restore, plain copies"]
    cells = [
        [
            f"{row.size} ({row.parameters / 1e6:.1f} M)",
            f"{row.step_ms:.2f}",
            f"{row.ratio:.4f}",
            f"{row.extra_ms:.2f}",
            "{:.0f} -> {:.0f}".format(*row.kernels),
            "{:.0f} -> {:.0f}".format(*row.launches),
            "{:.2f} -> {:.2f}".format(*row.memory_gib),
            f"{row.snapshot_gib:.2f}",
            f"{row.snapshot_ms:.2f}",
            f"{row.snapshot:.2f}",
            f"{row.restore:.2f}",
        ]
        for row in rows
    ]
    return Table(f"cost on {device}", columns, cells)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.accelerator == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --accelerator cpu --quick shows only that the script works")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sizes = QUICK if args.quick else {name: SIZES[name] for name in args.sizes}
    rows = []
    for size, (config, batch) in sizes.items():
        setting = Setting(
            config=config,
            batch=batch,
            steps=4 * BLOCK if args.quick else args.steps,
            precision="bf16-mixed",
            accelerator=args.accelerator,
            module=FusedByteGPT,
        )
        rows.append(measure(size, setting, rounds=3 if args.quick else 20))
        print(rows[-1], flush=True)
    device = torch.cuda.get_device_name() if args.accelerator == "cuda" else "a CPU"
    save("gpu", folder_of(args), {"device": device, "rows": rows}, [table_of(rows, device)])


if __name__ == "__main__":
    main()
