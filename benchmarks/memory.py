"""Compares the memory that `estimate_memory` predicts with the memory that a fit takes.

    python -m benchmarks.memory [--quick] [--accelerator gpu]

Each cell is a process of its own that trains an embedding and a linear layer for 8 steps, bare or
with `GradientMonitor`, `LastKnownGood` and `AutoRollback`, which take a snapshot every second step.
The peak of the resident memory (`VmHWM`), and on a GPU the peak that torch has allocated there, is
read at the end. Measured is the peak with the suite less the peak without it. A row is left out,
with the reason, if it would take more than ``--most`` or 60 % of the memory that is available.

Not predicted is what `GradientMonitor` takes for a moment to measure gradients in half precision:
up to 4 bytes a parameter on a CPU. It shows where the optimizer's own step takes less than that.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import AutoRollback, GradientMonitor, LastKnownGood, estimate_memory
from lit_stability.training_state.byte_sizes import as_text
from lit_stability.training_state.free_memory import free_on_host

_WIDTH = 1024
_STEPS = 8
_SHARE = 0.6
"""Of the available memory that a cell may take."""
_LIVE = {"AdamW": 4, "SGD momentum": 3, "SGD": 2}
"""Copies of the weights in a bare run: weights, gradients and moments."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    millions: int
    """Parameters in millions."""
    optimizer: str = "AdamW"
    dtype: str = "float32"
    frozen: bool = False
    """Whether nine of ten parameters are frozen."""
    snapshot_device: str = "device"
    checkpoint: bool = True
    """Whether `LastKnownGood` keeps its copy."""


CASES = (
    Case(10),
    Case(30),
    Case(100),
    Case(100, frozen=True),
    Case(100, "SGD momentum"),
    Case(300, "AdamW", "bfloat16"),
    Case(500, "SGD", "bfloat16"),
    Case(1000, "SGD", "bfloat16", checkpoint=False),
    Case(1000),
)
ON_GPU = (*CASES, Case(100, snapshot_device="host"), Case(1000, snapshot_device="host"))
QUICK = (Case(10), Case(10, frozen=True))


class Embedded(LightningModule):
    """An embedding and a linear layer: many parameters, and little to compute."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        rows = case.millions * 10**6 // _WIDTH
        kept = rows * 9 // 10 if case.frozen else 0
        dtype = getattr(torch, case.dtype)
        self.case = case
        self.net = nn.Embedding(rows - kept, _WIDTH, dtype=dtype)
        self.frozen = nn.Embedding(max(kept, 1), _WIDTH, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(_WIDTH, 1, dtype=dtype)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the mean of squares of a few rows."""
        rows = self.net(batch % self.net.num_embeddings)
        rows = rows + self.frozen(batch % self.frozen.num_embeddings)
        return self.head(rows).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the case."""
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.case.optimizer == "AdamW":
            return torch.optim.AdamW(trained, 1e-4)
        momentum = 0.9 if self.case.optimizer == "SGD momentum" else 0.0
        return torch.optim.SGD(trained, 1e-4, momentum=momentum)


def run_cell(case: Case, suite: bool, accelerator: str) -> dict[str, int]:
    """Trains in this process and returns its peaks, with what was predicted, in bytes."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = torch.randint(10**9, (4 * _STEPS, 64))
    callbacks: list[Any] = []
    if suite:
        rollback = AutoRollback(
            snapshot_every=2, confirm_after=1, snapshot_device=case.snapshot_device
        )
        good = [LastKnownGood(every_n_steps=2, confirm_after=2)] if case.checkpoint else []
        callbacks = [GradientMonitor(), *good, rollback]
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(
            max_steps=_STEPS, accelerator=accelerator, default_root_dir=root, callbacks=callbacks
        )
        module = Embedded(case)
        trainer.fit(module, DataLoader(batches, 4))
    found = estimate_memory(
        module,
        trainer.optimizers,
        snapshot_device=case.snapshot_device,
        batch=batches[:4],
        snapshot_every=2,
    )
    device = torch.cuda.max_memory_allocated() if accelerator == "gpu" else 0
    host = found.host - (0 if case.checkpoint else found.checkpoint)
    predicted = {"device": found.device - found.incident, "host": host}
    return {"peak_host": _peak(), "peak_device": device, **predicted}


def _peak() -> int:
    rows = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    return next(int(r.split()[1]) * 1024 for r in rows if r.startswith("VmHWM:"))


def measure(case: Case, accelerator: str, most: float) -> dict[str, int] | str:
    """Runs both cells of a case, each in a process; returns bytes, or why it was left out."""
    expected = _expected(case)
    free = free_on_host() if accelerator == "cpu" else torch.cuda.mem_get_info()[0]
    bound = min(int(_SHARE * free), int(most * 2**30))
    if expected > bound:
        return f"not run: takes {as_text(expected)}, more than {as_text(bound)}"
    bare, suite = (_in_process(case, with_suite, accelerator) for with_suite in (False, True))
    return {
        "predicted_device": suite["device"],
        "predicted_host": suite["host"],
        "measured_device": suite["peak_device"] - bare["peak_device"],
        "measured_host": suite["peak_host"] - bare["peak_host"],
        "bare": bare["peak_host"] + bare["peak_device"],
    }


def _expected(case: Case) -> int:
    """Returns about what the run with the suite takes, in bytes: bare, snapshots, checkpoint."""
    weights = case.millions * 10**6 * getattr(torch, case.dtype).itemsize
    trained = weights // 10 if case.frozen else weights
    live, copies = _LIVE[case.optimizer], 3 if case.checkpoint else 2
    return weights - trained + live * trained + copies * (live - 1) * trained


def _in_process(case: Case, suite: bool, accelerator: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", "--cell", json.dumps(asdict(case))]
    command += ["--accelerator", accelerator, *(["--suite"] if suite else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(results: dict[Case, dict[str, int] | str], accelerator: str) -> Table:
    """Returns the table of what was predicted and measured."""
    rows = []
    for case, found in results.items():
        name = f"{case.millions}M {case.dtype} {case.optimizer}"
        name += ", 9 of 10 frozen" if case.frozen else ""
        name += "" if case.checkpoint else ", without LastKnownGood"
        name += ", snapshots on the host" if case.snapshot_device == "host" else ""
        if isinstance(found, str):
            rows.append([name, found, "", "", ""])
            continue
        predicted = found["predicted_device"] + found["predicted_host"]
        measured = found["measured_device"] + found["measured_host"]
        ratio = f"x{measured / predicted:.3f}"
        cells = (found["bare"], predicted, measured)
        rows.append([name, *(as_text(value) for value in cells), ratio])
    columns = ["training", "bare", "predicted", "measured", "measured / predicted"]
    return Table(f"Memory of the suite, {accelerator}", columns, rows)


def main() -> None:
    """Runs the benchmark and writes its files; with ``--cell`` one cell, which it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--most", type=float, default=64.0, help="GiB that a cell may take")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--suite", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(run_cell(Case(**json.loads(args.cell)), args.suite, args.accelerator)))
        return
    cases = QUICK if args.quick else ON_GPU if args.accelerator == "gpu" else CASES
    results = {case: measure(case, args.accelerator, args.most) for case in cases}
    figures = {json.dumps(asdict(case)): found for case, found in results.items()}
    name = "memory" if args.accelerator == "cpu" else "memory_gpu"
    save(name, folder_of(args), figures, [report(results, args.accelerator)])


if __name__ == "__main__":
    main()
