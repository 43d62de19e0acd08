"""Measures how the suite handles intended changes: of the loss, the data or the trained layers.

    python -m benchmarks.changes [--seeds 0 1 2] [--quick]

Trains a small net on a regression for 300 steps; at step 60 something changes permanently. At
first such a change looks like a fault. Reports whether the run survives, how many steps the suite
rejected before it accepted the change, and the final loss: the mean of the last 40 steps, compared
with the run without the suite.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor, TrainingStopped, stability_callbacks

AT, STEPS, LAST = 60, 300, 40
CHANGES = (
    *("10 loss", "30 loss", "100 loss", "1000 loss"),
    *("100 second head", "10 inputs", "30 inputs", "1 unfrozen trunk"),
)
"""A factor and what it applies to from the change on."""


class Staged(LightningModule):
    """A regression in which something changes at step 60.

    Args:
        change: One of `CHANGES`.
        optimizer: "adamw" or "sgd".
    """

    def __init__(self, change: str, optimizer: str = "adamw") -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head, self.second = nn.Linear(64, 1), nn.Linear(64, 8)
        factor, _, self.what = change.partition(" ")
        self.factor, self.optimizer = float(factor), optimizer
        self.losses: list[float] = []
        if self.what == "unfrozen trunk":
            self.trunk.requires_grad_(False)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Returns the squared error, with the change from step 60 on."""
        x, y = batch
        what = self.what if self.global_step >= AT else ""
        if what == "unfrozen trunk":
            self.trunk.requires_grad_(True)
        h = self.trunk(x * self.factor if what == "inputs" else x)
        loss = nn.functional.mse_loss(self.head(h)[:, 0], y)
        if what == "loss":
            loss = loss * self.factor
        if what == "second head":
            loss = loss + self.factor * nn.functional.mse_loss(self.second(h), x)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, with a constant learning rate."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), 1e-3)
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


def batches(count: int = STEPS + 100, seed: int = 0) -> DataLoader[Any]:
    """Returns batches of 16: the tanh of a linear function of the inputs, with noise."""
    g = torch.Generator().manual_seed(seed)
    task = torch.randn(8, generator=g)
    xs = torch.randn(count, 16, 8, generator=g)
    ys = (xs @ task).tanh() + 0.1 * torch.randn(count, 16, generator=g)
    return DataLoader(list(zip(xs, ys, strict=True)), batch_size=None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """Result of a run."""

    ended: str
    """"ran", or why it stopped."""
    loss: float
    """Mean loss of the last 40 steps."""
    refused: int
    """Rejected steps, summed over all incidents."""
    outcomes: list[str]


def run(change: str, optimizer: str, seed: int, callbacks: list[Callback]) -> Run:
    """Trains with a change at step 60."""
    seed_everything(seed, verbose=False)
    module, ended = Staged(change, optimizer), "ran"
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(
            max_steps=STEPS,
            callbacks=callbacks,
            default_root_dir=root,
        )
        try:
            trainer.fit(module, batches(seed=seed))
        except TrainingStopped as stopped:
            ended = str(stopped).split(". What")[0]
    monitors = [c for c in callbacks if isinstance(c, GradientMonitor)]
    incidents = [incident for monitor in monitors for incident in monitor.incidents]
    return Run(
        ended,
        fmean(module.losses[-LAST:]),
        sum(incident.occurrences for incident in incidents),
        [f"{i.first.kind}: {i.cause}, {i.outcome}" for i in incidents],
    )


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Creates the table with a row per change and optimizer, and the seeds side by side."""
    columns = ["change", "optimizer", "surviving runs", "rejected steps"]
    columns += ["final loss without the suite", "final loss with the suite"]
    groups = {}
    for row in rows:
        groups.setdefault((row["change"], row["optimizer"]), []).append(row)
    cells = [
        [
            *(f"x{change}".removeprefix("x1 "), optimizer),
            f"{sum(row['suite'].ended == 'ran' for row in group)} of {len(group)}",
            ", ".join(str(row["suite"].refused) for row in group),
            *(", ".join(f"{row[k].loss:.3g}" for row in group) for k in ("bare", "suite")),
        ]
        for (change, optimizer), group in groups.items()
    ]
    return Table(f"intended changes at step {AT} of {STEPS}", columns, cells)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [
        {
            "change": change,
            "optimizer": optimizer,
            "seed": seed,
            "bare": run(change, optimizer, seed, []),
            "suite": run(change, optimizer, seed, stability_callbacks()),
        }
        for change in (CHANGES[2:3] if args.quick else CHANGES)
        for optimizer in ("adamw", "sgd")
        for seed in args.seeds[: 1 if args.quick else None]
    ]
    save("changes", folder_of(args), {"runs": rows}, [table_of(rows)])


if __name__ == "__main__":
    main()
