"""Measures how often `lit-stability doctor` finds something in the metric logs of healthy runs.

    python -m benchmarks.log_doctor [--every 1] [--first 0] [--seeds 0] [--quick] [--out FOLDER]

Trains each kind of `benchmarks.healthy` without the suite and with Lightning's ``CSVLogger``, which
logs loss, gradient norm and learning rates of every step, and examines ``metrics.csv``: as it is,
and with one point in five. ``--every 2 --first 1`` trains every second kind, from the second on.
Eight minutes for all of them, one thread.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.optim import Optimizer

from benchmarks.healthy.kind import Kind
from benchmarks.healthy.table import KINDS, QUICK
from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability.checks.metric_log import LogReport, MetricLog, Series, examine_log, find_logs

INTERVALS = (1, 5)
"""One point in so many is examined."""


class GradientNorm(Callback):
    """Logs the norm of all gradients of every step."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Logs the norm before clipping."""
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        if norms:
            trainer.logger.log_metrics(
                {"grad_norm": float(torch.stack(norms).norm())}, trainer.global_step
            )


def log_of(kind: Kind, seed: int) -> MetricLog:
    """Trains a kind, and returns the log that Lightning has written."""
    seed_everything(seed, verbose=False)
    module = kind.module()
    with tempfile.TemporaryDirectory() as folder:
        for fold in range(kind.fits):
            trainer = _trainer(kind, folder)
            held_out = None if kind.held_out is None else kind.held_out(seed + fold)
            trainer.fit(module, kind.data(seed + fold), held_out)
        logs = [reader.read(files) for reader, files in find_logs(Path(folder))]
    return max(logs, key=lambda log: len(log.series["train_loss_step"]))


def _trainer(kind: Kind, folder: str) -> Trainer:
    callbacks = [*kind.callbacks(), GradientNorm(), LearningRateMonitor(logging_interval="step")]
    own = kind.trainer()
    options: dict[str, Any] = {
        "max_steps": kind.steps,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        **({"limit_val_batches": 0} if kind.held_out is None else {}),
    }
    logged = {"logger": CSVLogger(folder), "log_every_n_steps": 1, "callbacks": callbacks}
    return quiet_trainer(**(options | own | logged))


def thinned(log: MetricLog, interval: int) -> MetricLog:
    """Returns a log with one point in so many, the first of each."""
    thin = MetricLog(log.format, log.path, ())
    for name, series in log.series.items():
        kept = Series(name)
        for i in range(0, len(series), interval):
            kept.add(series.steps[i], series.values[i], series.times[i])
        thin.series[name] = kept
    return thin


def reports(kinds: list[Kind], seeds: list[int]) -> Iterator[tuple[str, int, LogReport]]:
    """Trains each kind with each seed; returns name, interval and report of each log."""
    for kind in kinds:
        for seed in seeds:
            log = log_of(kind, seed)
            for interval in INTERVALS:
                report = examine_log(thinned(log, interval))
                found = [f"{f.severity}: {f.what}" for f in report.findings]
                print(f"{kind.name}, seed {seed}, 1 in {interval}: {found}", flush=True)
                yield kind.name, interval, report


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds = [KINDS[name] for name in (QUICK if args.quick else [*KINDS][args.first :: args.every])]
    found = [*reports(kinds, args.seeds)]
    rows, listed = [], []
    for interval in INTERVALS:
        own = [(name, report) for name, i, report in found if i == interval]
        counts = Counter(f.severity for _, report in own for f in report.findings)
        rows.append(
            [
                f"1 point in {interval}",
                str(len(own)),
                *(str(counts[severity]) for severity in ("error", "warning", "note")),
            ]
        )
        listed += [
            [name, f"1 in {interval}", finding.severity, finding.what, finding.why]
            for name, report in own
            for finding in report.findings
            if finding.severity != "note"
        ]
    tables = [
        Table(
            "Findings in the logs of healthy runs",
            ["points", "logs", "errors", "warnings", "notes"],
            rows,
        ),
        Table("Each that is no note", ["kind", "log", "severity", "what", "why"], listed),
    ]
    save("log_doctor", folder_of(args), {"rows": rows, "listed": listed}, tables)


if __name__ == "__main__":
    main()
