"""The code that the ranks run for tests/callbacks/test_last_known_good_ranks.py."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    LastKnownGood,
    PreemptionCheckpoint,
    find_last_good,
    find_resume_checkpoint,
)
from lit_stability.distributed.dtensor import local
from lit_stability.trainer_internals import keep_records_in
from lit_stability.training_state import rank_checkpoint_writer
from tests.rank_cases import STRATEGIES, Lines, Net, weights_of


class Noisy(Dataset):
    """Samples with noise from the generator of the process that reads them."""

    def __init__(self, count=96):
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 9, generator=g)
        self.y = self.x @ torch.arange(9.0) / 9

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return index, self.x[index] + 0.1 * torch.randn(9), self.y[index]


class LoggingNet(Net):
    """Has dropout, BatchNorm or a buffer of each rank, and two kinds of epoch metrics."""

    def __init__(self, sharded, dropout=0.3):
        name = "fsdp2" if sharded is True else sharded or "ddp"
        super().__init__(name, dropout)
        self.register_buffer("seen", torch.zeros(()))
        self.mean, self.epochs, self.order = MeanMetric(), [], []

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        self.order.append(index.tolist())
        self.seen += x.sum()
        loss = nn.functional.mse_loss(self.net(x).squeeze(-1), y)
        self.mean.update(loss.detach())
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        metrics = self.trainer.callback_metrics
        self.epochs.append({k: float(v) for k, v in metrics.items()})


class Ends(Callback):
    """Ends the process, or the fit, after a step; on some ranks or all."""

    def __init__(self, step, how, ranks=(0, 1)):
        self.step, self.how, self.ranks = step, how, ranks

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step != self.step or trainer.global_rank not in self.ranks:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("ended by the test")


def strategy_of(sharded, ranks, broadcast_buffers):
    if isinstance(sharded, str):
        return STRATEGIES[sharded]()
    if sharded:
        return ModelParallelStrategy(ranks, 1)
    return DDPStrategy() if broadcast_buffers else DDPStrategy(broadcast_buffers=False)


def fit_good(
    root,
    sharded,
    *extra,
    steps=40,
    ckpt=None,
    batch_size=4,
    options=None,
    good=None,
    broadcast_buffers=True,
    preemption=False,
):
    """Returns what a rank has at the end of a fit with `LastKnownGood`."""
    seed_everything(7, workers=True, verbose=False)
    torch.manual_seed(7 + int(os.environ["LOCAL_RANK"]))
    module, lines, ranks = LoggingNet(sharded), Lines(), int(os.environ["WORLD_SIZE"])
    good = {"every_n_steps": 8, "confirm_after": 3, "lr_factor_after_crash": 1.0} | (good or {})
    ends = [PreemptionCheckpoint()] if preemption else []
    trainer = Trainer(
        default_root_dir=root,
        strategy=strategy_of(sharded, ranks, broadcast_buffers),
        devices=ranks,
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*extra, GradientMonitor(), LastKnownGood(**good), *ends, AutoRollback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(options or {}),
    )
    keep_records_in(trainer, root)
    data = DataLoader(Noisy(), batch_size, shuffle=True)
    error = None
    try:
        trainer.fit(module, data, ckpt_path=ckpt)
    except (RuntimeError, ValueError) as problem:
        error = str(problem)
    except SystemExit as problem:
        error = f"exit {problem.code}"
    return {
        "error": error,
        "weights": None if error else weights_of(module, trainer),
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "rng": torch.get_rng_state(),
        "epochs": module.epochs,
        "order": module.order,
        "log": lines.stop(),
        "step": trainer.global_step,
    }


def fitted(root, sharded, options):
    return fit_good(root, sharded, **options)


def ended(root, sharded, step, how, ranks, options):
    return fit_good(root, sharded, Ends(step, how, ranks), **options)


def resumed(root, sharded, options):
    return fit_good(root, sharded, ckpt=find_last_good(root), **options)


def resumed_from(root, sharded, name, options):
    return fit_good(root, sharded, ckpt=root / name, **options)


class Signals(Callback):
    """Sends SIGTERM to the process of rank 1 in the middle of a step."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 20 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def preempted(root, sharded, options):
    return fit_good(root, sharded, Signals(), preemption=True, **options)


def after_preemption(root, sharded, options):
    source = find_resume_checkpoint(root)
    return fit_good(root, sharded, ckpt=source, preemption=True, **options)


class SavesOnce(Callback):
    """Saves a checkpoint of Lightning's between two batches, and ends the fit."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def saved_by_lightning(root, sharded, step):
    return fit_good(root, sharded, SavesOnce(root / "saved.ckpt", step), steps=step)


FAULTS = {
    "disk of rank 1": "File too large",
    "weight of rank 1": "net.0.bias",
    "hook of rank 1": "a hook of the user's",
}
"""What rank 1 cannot do once, and what the log has of it."""


class DamagesCopy(Callback):
    """Puts a NaN into what rank 1 holds, for the check before the first copy is written."""

    done = False

    def on_train_batch_end(self, trainer, pl_module, *args):
        manager = next(c for c in trainer.callbacks if isinstance(c, LastKnownGood))._fit.manager
        confirmed = manager._healthy_steps == 3 and not self.done
        if confirmed and trainer.global_rank == 1:
            self.done = True
            self._spoil(manager, pl_module)

    @staticmethod
    def _spoil(manager, pl_module):
        copied = manager._copy.state["state_dict"]
        if copied:
            local(copied["net.0.bias"])[0] = float("nan")
            return
        damage = manager._damage
        bias = pl_module.net[0].bias

        def damaged():
            before = bias.detach().clone()
            bias.data[0] = float("nan")
            try:
                return damage()
            finally:
                bias.data.copy_(before)
                del manager._damage

        manager._damage = damaged


class FullDisk(Callback):
    """Lets rank 1 write no file of more than 300 bytes until the 15th step."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_rank == 1 and trainer.global_step == 15:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


class RaisesOnce(Callback):
    """A callback that cannot be saved on rank 1, the first time."""

    raised = False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_rank == 1 and not self.raised:
            self.raised = True
            raise ValueError("a hook of the user's")


def faulty(root, sharded, fault, options):
    """Returns a fit in which rank 1 cannot do its part of the first copy."""
    extra = {
        "disk of rank 1": [FullDisk()],
        "weight of rank 1": [DamagesCopy()],
        "hook of rank 1": [RaisesOnce()],
    }
    return fit_good(root, sharded, *extra[fault], **options)


KILLS_AT = ("any time", "any time", "mkdir", "write_whole", "list_files", "flush", "prune")
"""Moments at which a rank is killed: any, or when its writer comes to this function."""


class Killed(Callback):
    """Ends this process without warning, and slows the steps so that there is something to kill."""

    def __init__(self, plan, progress):
        self.plan, self.progress = plan, Path(progress)

    def on_train_start(self, trainer, pl_module):
        if self.plan["at"] is None or trainer.global_rank != self.plan["rank"]:
            return
        if self.plan["at"] == "any time":
            threading.Thread(target=self._later, daemon=True).start()
            return
        owner = Path if self.plan["at"] == "mkdir" else rank_checkpoint_writer
        setattr(owner, self.plan["at"], lambda *args, **kwargs: os.kill(os.getpid(), 9))

    def _later(self):
        time.sleep(self.plan["seconds"])
        os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, *args):
        time.sleep(0.03)
        if trainer.global_rank == 0:
            part = self.progress.with_suffix(".part")
            part.write_text(str(trainer.global_step))
            part.replace(self.progress)


def killed(root, sharded, plan, progress, options):
    return fit_good(root, sharded, Killed(plan, progress), ckpt=find_last_good(root), **options)
