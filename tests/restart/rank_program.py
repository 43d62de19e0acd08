"""A program for torchrun: `fit_with_recovery` on every rank, and something that goes wrong.

``python -m tests.restart.rank_program FOLDER FAULT STRATEGY``; rank 0 writes
``FOLDER/result.pt`` at the end, rank 1 ``FOLDER/result1.pt``.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from lit_stability import LastKnownGood, fit_with_recovery, stability_callbacks
from tests.good_rank_cases import LoggingNet, Noisy
from tests.rank_cases import whole

RANK = int(os.environ.get("RANK", "0"))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Fault(Callback):
    """Happens on rank 1 at step 21, in the first attempt only, or always."""

    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        always = self.kind.endswith("always")
        if trainer.global_step != 21 or RANK != 1 or not (ATTEMPT == 0 or always):
            return
        match self.kind.split()[0]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
            case "nan":
                raise ValueError("the loss is nan")
            case "error":
                raise KeyError("an error of the user's")


class Halved(LoggingNet):
    """Has the batch size that the remedy for memory changes."""

    def __init__(self, sharded, data):
        super().__init__(sharded)
        self.batch_size, self.samples = 4, data

    def train_dataloader(self):
        return DataLoader(self.samples, self.batch_size, shuffle=True)


class Unreadable(Noisy):
    """Has a sample that cannot be read, in batch 9 of the second epoch of rank 1."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if ATTEMPT == 0 and RANK == 1 and self.reads == 4 * 21 + 2:
            raise OSError("sample cannot be read")
        return super().__getitem__(index)


def main(folder, kind, strategy):
    seed_everything(7, workers=True, verbose=False)
    torch.manual_seed(7 + RANK)
    sharded = strategy == "fsdp2"
    module = Halved(sharded, Unreadable() if kind == "sample" else Noisy())
    options = {
        "default_root_dir": folder,
        "strategy": ModelParallelStrategy(2, 1) if sharded else "ddp",
        "devices": 2,
        "accelerator": "cpu",
        "max_steps": 40,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }

    def make_trainer(**overrides):
        callbacks = [Fault(kind), *stability_callbacks()]
        place = next(i for i, c in enumerate(callbacks) if isinstance(c, LastKnownGood))
        callbacks[place] = LastKnownGood(every_n_steps=8, confirm_after=3)
        return Trainer(**{**options, **overrides}, callbacks=callbacks)

    result = fit_with_recovery(make_trainer, module)
    found = {
        "weights": whole(module.parameters()),
        "remedies": list(result.remedies),
        "attempt": ATTEMPT,
        "batch_size": module.batch_size,
        "accumulation": result.trainer.accumulate_grad_batches,
        "steps": len(module.order),
        "rate": result.trainer.optimizers[0].param_groups[0]["lr"],
    }
    found["order"] = module.order
    torch.save(found, folder / f"result{RANK or ''}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
