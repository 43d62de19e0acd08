"""Soak test: a long run with an incident every thousand steps, checked for leaks and losses.

    python -m benchmarks.soak [--steps 100000] [--every 1000] [--quick]

Trains a tiny model with the default suite and a TensorBoard logger on one torch thread. The faults
alternate: a NaN loss, a loss spike, a damaged weight, a damaged moment. Resident memory is read
every thousand steps; its growth is the slope after the first third, when all caches are full.
`tracemalloc` follows Python's allocations in a separate shorter run, because it halves the speed.
At the end the record is read: every incident must be opened and closed, and be in the event file.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import read_incidents, stability_callbacks
from lit_stability.faults import (
    CorruptMoment,
    CorruptWeight,
    Fault,
    FaultInjector,
    NanLoss,
    ScaleLoss,
)
from lit_stability.tensorboard.tags import INCIDENTS

EVERY_SAMPLE = 1000
"""Steps between two readings of the memory."""
FAULT_TYPES = (NanLoss, ScaleLoss, CorruptWeight, CorruptMoment)


class Tiny(LightningModule):
    """A net with 81 weights on a fixed linear task with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean squared error."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x).squeeze(-1), y)

    def configure_optimizers(self) -> Any:
        """Returns AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def data() -> DataLoader[Any]:
    """Returns precomputed batches."""
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(500):
        x = torch.randn(16, 8, generator=g)
        batches.append((x, x.sum(-1) + 0.3 * torch.randn(16, generator=g)))
    return DataLoader(batches, batch_size=None)


def faults(steps: int, every: int) -> list[Fault]:
    """Returns one fault every `every` steps, of alternating types."""
    options: dict[type[Fault], dict[str, Any]] = {CorruptWeight: {"parameter": "net.0.weight"}}
    fault_steps = range(every, steps, every)
    kinds = (FAULT_TYPES[i % len(FAULT_TYPES)] for i in range(len(fault_steps)))
    return [k(step=s, **options.get(k, {})) for k, s in zip(kinds, fault_steps, strict=True)]


def resident_bytes() -> int:
    """Returns the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf8").split()[1])
    return pages * 4096


class MemoryRecorder(Callback):
    """Records resident memory and time every `EVERY_SAMPLE` steps.

    Args:
        traced_from: Step at which to take a `tracemalloc` snapshot; None for no snapshot.
    """

    def __init__(self, traced_from: int | None = None) -> None:
        self.traced_from = traced_from
        self.bytes: list[int] = []
        self.seconds: list[float] = []
        self.before: tracemalloc.Snapshot | None = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Records a sample."""
        step = trainer.global_step
        if step % EVERY_SAMPLE == 0:
            self.bytes.append(resident_bytes())
            self.seconds.append(time.perf_counter())
        if step == self.traced_from and self.before is None:
            gc.collect()
            self.before = tracemalloc.take_snapshot()


def run(
    root: Path, steps: int, every: int, recorder: MemoryRecorder, *, protected: bool = True
) -> float:
    """Trains the model and returns the milliseconds per step."""
    seed_everything(0, verbose=False)
    suite = [FaultInjector(faults(steps, every)), *stability_callbacks()] if protected else []
    trainer = quiet_trainer(
        max_steps=steps,
        callbacks=[*suite, recorder],
        logger=TensorBoardLogger(root, "run", ""),
        default_root_dir=root,
    )
    start = time.perf_counter()
    trainer.fit(Tiny(), data())
    return 1e3 * (time.perf_counter() - start) / steps


def slope(values: list[int]) -> float:
    """Returns the growth per sample after the first third, by least squares.

    >>> slope([9, 9, 0, 2, 4, 6])
    2.0
    """
    later = [float(v) for v in values[len(values) // 3 :]] if len(values) > 2 else [0.0, 0.0]
    return statistics.linear_regression(range(len(later)), later).slope


def record_of(root: Path) -> dict[str, Any]:
    """Counts the incidents in `incidents.jsonl` and in the event file."""
    folder = root / "run"
    incidents = read_incidents(folder)
    lines = [json.loads(x) for x in (folder / "incidents.jsonl").read_text("utf8").splitlines()]
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    return {
        "incidents": len(incidents),
        "lines": len(lines),
        "outcomes": dict(Counter(i["outcome"] for i in incidents)),
        "kinds": dict(Counter(i["kind"] for i in incidents)),
        "event_file_bytes": sum(f.stat().st_size for f in folder.glob("events.*")),
        "incidents_in_event_file": sum(t.startswith(INCIDENTS) for t in tags["tensors"]),
        "last_scalar_step": events.Scalars("stability/grad_norm")[-1].step,
    }


def growth(steps: int, every: int) -> dict[str, Any]:
    """Measures the memory that Python allocates and keeps in the last four fifths of a run."""
    recorder = MemoryRecorder(traced_from=steps // 5)
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as root:
        ms = run(Path(root), steps, every, recorder)
        gc.collect()
        after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    assert recorder.before is not None
    grown = after.compare_to(recorder.before, "lineno")
    top = [
        {"where": _place(s.traceback[0]), "bytes": s.size_diff, "objects": s.count_diff}
        for s in grown
    ]
    return {
        "steps": steps - steps // 5,
        "bytes": sum(s.size_diff for s in grown),
        "ms_per_step": ms,
        "top": top[:8],
    }


def _place(frame: tracemalloc.Frame) -> str:
    """Formats file and line with the last three parts of the path, which do not vary by machine."""
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int)
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps = args.steps or (6_000 if args.quick else 100_500)
    every = args.every or (300 if args.quick else 1_000)
    save("soak", folder_of(args), *soak(steps, every))


def soak(steps: int, every: int) -> tuple[dict[str, Any], list[Table]]:
    """Runs the long run, a run without the suite and the traced run."""
    recorder = MemoryRecorder()
    with tempfile.TemporaryDirectory() as root:
        ms = run(Path(root), steps, every, recorder)
        record = record_of(Path(root))
    with tempfile.TemporaryDirectory() as root:
        bare_ms = run(Path(root), min(steps, 3000), every, MemoryRecorder(), protected=False)
    figures = {
        "steps": steps,
        "faults": len(faults(steps, every)),
        "ms_per_step": ms,
        "bare_ms_per_step": bare_ms,
        "resident_bytes": recorder.bytes,
        "growth_per_1000_steps": slope(recorder.bytes),
        "record": record,
        "traced": growth(max(2_000, steps // 10), every),
    }
    return figures, [table_of(figures)]


def table_of(figures: dict[str, Any]) -> Table:
    """Formats the figures as a table."""
    record, traced, resident = (figures[k] for k in ("record", "traced", "resident_bytes"))
    rows = {
        "steps, with faults": f"{figures['steps']}, {figures['faults']}",
        "incidents opened and closed": f"{record['incidents']}, {record['outcomes']}",
        "incidents in the event file": str(record["incidents_in_event_file"]),
        "resident memory at the start and end, MiB": " and ".join(
            f"{resident[i] / 2**20:.1f}" for i in (0, -1)
        ),
        "growth of resident memory, KiB per 1,000 steps": (
            f"{figures['growth_per_1000_steps'] / 2**10:.1f}"
        ),
        "growth of Python's objects, KiB per 1,000 steps": (
            f"{1000 * traced['bytes'] / traced['steps'] / 2**10:.1f}"
        ),
        "a step without and with the suite, ms": (
            f"{figures['bare_ms_per_step']:.2f} and {figures['ms_per_step']:.2f}"
        ),
    }
    return Table("soak", ["quantity", "value"], [list(row) for row in rows.items()])


if __name__ == "__main__":
    main()
