"""Measures how the suite's cost grows with the size of a model and the number of its tensors.

    python -m benchmarks.scale [--largest 3e8] [--quick]

Runs the default suite on a model with a trivial forward pass, whose gradients are as large as its
weights, with AdamW and one torch thread. A clock around every hook measures the thread's processor
time per step after both snapshots have been allocated: the median step, and the mean of 40 steps,
which contain two snapshots, four scans of the weights and one measurement of distributions. Fits
``floor + factor * size ** exponent`` to both. Varies the elements in 50 tensors, and the tensors
with a million elements. Skips and lists sizes that need more than 70 % of the free memory.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.overhead.clock import HookClock
from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import stability_callbacks

ELEMENTS = (100_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000)
TENSORS = (10, 30, 100, 300, 1_000, 3_000, 10_000)
COPIES = 12
"""Maximum number of copies of the model's size: weights, gradients and two moments; weights and
moments in two snapshots and one copy for the disk, minus one while it is taken."""
COSTS = ("plain_ms", "all_ms")
SKIPPED, STEPS = 41, 81


class Wide(LightningModule):
    """Tensors of equal size with a loss whose gradient is 1 for every element.

    Args:
        elements: Total number of elements.
        tensors: Number of tensors.
    """

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        size = max(1, elements // tensors)
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(size)) for _ in range(tensors))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the sum of all weights, a cheap loss with a gradient for every element."""
        return torch.stack([w.sum() for w in self.weights]).sum()

    def configure_optimizers(self) -> Any:
        """Returns AdamW with a learning rate too small to change the weights noticeably."""
        return torch.optim.AdamW(self.parameters(), 1e-6)


@dataclass(frozen=True)
class Point:
    """Cost of a step at one size."""

    elements: int
    tensors: int
    plain_ms: float
    """Median time in hooks."""
    all_ms: float
    """Mean time in hooks."""
    step_ms: float
    """Median time of the whole step, hooks included."""


class _Clock(Callback):
    def __init__(self, clock: HookClock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.watch_fetches(trainer)
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.clock.next_step()
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now


def measure(elements: int, tensors: int) -> Point:
    """Trains a model of this size and measures its steps."""
    seed_everything(0, verbose=False)
    suite = stability_callbacks()
    clock = _Clock(HookClock(suite, time.thread_time))
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(
            max_steps=STEPS,
            callbacks=[*suite, clock],
            default_root_dir=root,
        )
        trainer.fit(Wide(elements, tensors), DataLoader([torch.zeros(1)] * STEPS, batch_size=None))
    hooks = [1e3 * s for s in clock.clock.steps[SKIPPED:]]
    steps = [1e3 * s for s in clock.times[SKIPPED:]]
    plain, step = statistics.median(hooks), statistics.median(steps)
    return Point(elements, tensors, plain, statistics.fmean(hooks), step)


@dataclass(frozen=True)
class Fit:
    """``floor + factor * size ** exponent``."""

    floor: float
    factor: float
    exponent: float
    error: float
    """Largest relative error of a point."""

    def __call__(self, size: float) -> float:
        """Returns the fitted cost of a size."""
        return self.floor + self.factor * size**self.exponent


def fit_power(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Fits by least squares of the relative error, with exponents from 0.1 to 2 in steps of 0.01.

    For each exponent, floor (at least 0) and factor have a closed form.

    >>> found = fit_power([1, 10, 100, 1000], [3.0, 12.0, 102.0, 1002.0])
    >>> round(found.floor, 6), round(found.factor, 6), found.exponent
    (2.0, 1.0, 1.0)

    Raises:
        ValueError: There are fewer than three points.
    """
    if len(sizes) < 3:
        raise ValueError(f"at least three points are needed for three parameters, got {len(sizes)}")
    fits = [_with_exponent(sizes, costs, k / 100) for k in range(10, 201)]
    return min(fits, key=lambda fit: _squares(fit, sizes, costs))


def _with_exponent(sizes: Sequence[float], costs: Sequence[float], exponent: float) -> Fit:
    """Solves ``1 = floor / y + factor * x**k / y`` by least squares, with a floor of 0 or more."""
    rows = [(1 / y, x**exponent / y) for x, y in zip(sizes, costs, strict=True)]
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    floor = (a * bb - b * ab) / determinant if determinant > 1e-12 * aa * bb else 0.0
    floor = max(0.0, floor)
    fit = Fit(floor, (b - floor * ab) / bb, exponent, 0.0)
    worst = max(abs(fit(x) / y - 1) for x, y in zip(sizes, costs, strict=True))
    return Fit(fit.floor, fit.factor, exponent, worst)


def _squares(fit: Fit, sizes: Sequence[float], costs: Sequence[float]) -> float:
    return math.fsum((fit(x) / y - 1) ** 2 for x, y in zip(sizes, costs, strict=True))


def free_memory() -> int:
    """Returns the memory in bytes that is available without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="utf8").splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


def sweep(sizes: Sequence[tuple[int, int]]) -> tuple[list[Point], list[str]]:
    """Measures each ``(elements, tensors)``; returns the points and the skipped sizes."""
    points, skipped = [], []
    for elements, tensors in sizes:
        gc.collect()  # reference cycles of the previous Trainer and its model hold their memory
        needed, free = COPIES * 4 * elements, free_memory()
        if needed > 0.7 * free:
            skipped.append(
                f"{elements:.0e} elements need {needed / 2**30:.1f} GiB of {free / 2**30:.1f} free"
            )
            continue
        points.append(measure(elements, tensors))
    return points, skipped


def draw(by_elements: Sequence[Point], by_tensors: Sequence[Point], path: Path) -> None:
    """Plots both sweeps with their fits on logarithmic axes, in colour-blind safe colours."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, points, key, xlabel in (
        (axes[0], by_elements, "elements", "elements, in 50 tensors"),
        (axes[1], by_tensors, "tensors", "tensors, with 1 M elements in total"),
    ):
        sizes = [getattr(p, key) for p in points]
        for part, colour, marker in (("plain_ms", "#0072B2", "o"), ("all_ms", "#D55E00", "s")):
            costs = [getattr(p, part) for p in points]
            fit = fit_power(sizes, costs)
            title = "median step" if part == "plain_ms" else "mean, with snapshots and scans"
            label = f"{title}: {fit.floor:.2g} ms + size$^{{{fit.exponent:.2f}}}$"
            grid = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 60) for i in range(61)]
            axis.plot(sizes, costs, marker, color=colour, label=label)
            axis.plot(grid, [fit(x) for x in grid], color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=xlabel)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("time in hooks, ms per step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table_of(title: str, points: Sequence[Point]) -> Table:
    """Formats the points as a table."""
    columns = ["elements", "tensors", "median step's hooks, ms", "mean, ms", "whole step, ms"]
    rows = [
        [f"{p.elements:.0e}", str(p.tensors)]
        + [f"{x:.2f}" for x in (p.plain_ms, p.all_ms, p.step_ms)]
        for p in points
    ]
    return Table(title, columns, rows)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--largest", type=float, default=3e8, help="elements of the largest model")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    largest, most = (1e7, 300) if args.quick else (args.largest, 10_000)
    by_elements, skipped = sweep([(n, 50) for n in ELEMENTS if n <= largest])
    by_tensors, _ = sweep([(1_000_000, n) for n in TENSORS if n <= most])
    figures: dict[str, Any] = {"left out": skipped, "fits": {}}
    tables = []
    for key, points in (("elements", by_elements), ("tensors", by_tensors)):
        sizes = [getattr(p, key) for p in points]
        fits = {
            c: fit_power(sizes, [getattr(p, c) for p in points]) for c in ("plain_ms", "all_ms")
        }
        figures |= {f"by {key}": points}
        figures["fits"][key] = fits
        formulas = ", ".join(f"{c}: {f.floor:.2f} + n^{f.exponent:.2f}" for c, f in fits.items())
        tables.append(table_of(f"by {key} ({formulas})", points))
    if skipped:
        tables.append(Table("skipped", ["size"], [[size] for size in skipped]))
    folder = folder_of(args)
    save("scale", folder, figures, tables)
    draw(by_elements, by_tensors, folder / "scale.png")


if __name__ == "__main__":
    main()
