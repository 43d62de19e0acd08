"""What the suite costs per optimizer step, as a ratio to the bare step in the same run.

    python -m benchmarks.overhead [--steps 120] [--quick] [--precision bf16-mixed] [--suites ...]

One process, one torch thread. A bare and a protected Trainer take turns, step by step, on equal
models and batches, so that both meet the same noise of the machine. Steps are added up in blocks of
15, so that each block of the suite holds one snapshot; reported is the median ratio of a block to
the bare block beside it, and its quartiles.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import threading
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from lit_stability import (
    AnomalyCheckpoint,
    AutoRollback,
    GradientMonitor,
    LastKnownGood,
    PrecisionFallback,
    stability_callbacks,
)

SUITES: dict[str, Any] = {
    "bare": list,
    "GradientMonitor": lambda: [GradientMonitor()],
    "GradientMonitor, AutoRollback": lambda: [GradientMonitor(), AutoRollback()],
    "default suite": stability_callbacks,
    "GradientMonitor, LastKnownGood": lambda: [
        GradientMonitor(),
        LastKnownGood(every_n_steps=15),
    ],
    "GradientMonitor, PrecisionFallback": lambda: [GradientMonitor(), PrecisionFallback()],
    "PrecisionFallback, one Linear in float32": lambda: [
        GradientMonitor(),
        PrecisionFallback(fp32_modules=["*blocks.0.up"]),
    ],
    "PrecisionFallback, all norms in float32": lambda: [
        GradientMonitor(),
        PrecisionFallback(fp32_modules=["LayerNorm"]),
    ],
    "GradientMonitor, AnomalyCheckpoint": lambda: [GradientMonitor(), AnomalyCheckpoint()],
}


class Baton(Callback):
    """Lets one Trainer at a time take a step, and times it."""

    def __init__(self, turn: list[threading.Semaphore], index: int) -> None:
        self.turn, self.index = turn, index
        self.times: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the first turn."""
        self.turn[self.index].acquire()
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Pass the baton."""
        self.times.append(time.perf_counter() - self.last)
        self.turn[(self.index + 1) % len(self.turn)].release()
        self.turn[self.index].acquire()
        self.last = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        """Let the others finish."""
        self.turn[(self.index + 1) % len(self.turn)].release()


def measure(
    names: list[str], *, steps: int, batch: int, config: ByteGPTConfig, precision: Any
) -> dict[str, list[float]]:
    """Seconds of each step, by suite."""
    turn = [threading.Semaphore(0) for _ in names]
    batons = [Baton(turn, i) for i in range(len(names))]
    threads = []
    for name, baton in zip(names, batons, strict=True):
        seed_everything(0, verbose=False)
        module = ByteGPTModule(config)
        trainer = Trainer(
            max_steps=steps,
            precision=precision,
            accelerator="cpu",
            callbacks=[*SUITES[name](), baton],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tempfile.mkdtemp(),
        )
        data = loader(batch, config.length)
        threads.append(threading.Thread(target=trainer.fit, args=(module, data)))
    for thread in threads:
        thread.start()
        time.sleep(1.0)
    turn[0].release()
    for thread in threads:
        thread.join()
    return {name: baton.times for name, baton in zip(names, batons, strict=True)}


def report(times: dict[str, list[float]], block: int = 15) -> None:
    """Print the median ratio of every suite to the bare step; the first block warms up."""

    def blocks(steps: list[float]) -> list[float]:
        return [sum(steps[i : i + block]) for i in range(block, len(steps) - block + 1, block)]

    bare = blocks(times["bare"])
    step = 1e3 * statistics.median(times["bare"])
    print(f"bare step {step:.1f} ms, {len(bare)} blocks of {block} steps")
    for name, measured in times.items():
        ratios = [m / b for m, b in zip(blocks(measured), bare, strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:42s} x{middle:.4f}  (quartiles {low:.4f} .. {high:.4f})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--suites", nargs="*", default=["default suite"], choices=list(SUITES))
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--quick", action="store_true", help="a small model")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    shape = ByteGPTConfig(width=128, layers=4) if args.quick else ByteGPTConfig(width=400, layers=5)
    names = ["bare", *args.suites]
    how = {"steps": args.steps, "batch": args.batch, "precision": args.precision}
    report(measure(names, config=shape, **how))


if __name__ == "__main__":
    main()
