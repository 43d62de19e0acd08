"""The code that the ranks run for tests of `RankWatchdog`: small fits, with trouble on one rank."""

import contextlib
import copy
import ctypes
import logging
import os
import signal
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_stability import RankWatchdog, stability_callbacks
from lit_stability.trainer_internals import keep_records_in

LIMITS = {"timeout": 2.0, "silent_after": 1.0, "slow_factor": 2.0, "interval": 0.2}
AT = 6
"""Batch, counted from 1, in which the trouble begins."""


class Batches(IterableDataset):
    """A rank's batches, and something done before one of them."""

    def __init__(self, rank, count=30, before=None):
        self.rank, self.count, self.before = rank, count, before

    def __iter__(self):
        g = torch.Generator().manual_seed(self.rank)
        for index in range(1, self.count + 1):
            if self.before is not None and index == AT:
                self.before()
            yield torch.randn(8, 9, generator=g)


class Acts(torch.autograd.Function):
    """The identity, and something done in its backward pass."""

    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.act()
        return gradient, None


class Net(LightningModule):
    """Trains on noise; does something in its forward or backward pass of one batch."""

    def __init__(self, where="", act=None):
        super().__init__()
        self.net = nn.Linear(9, 1)
        self.where, self.act, self.seen = where, act, 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        now = self.seen == AT
        if now and self.where == "forward":
            self.act()
        loss = self.net(batch).square().mean()
        return Acts.apply(loss, self.act) if now and self.where == "backward" else loss

    def validation_step(self, batch, batch_idx):
        if self.where == "validation" and self.act is not None:
            self.act()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def die():
    print("DEATH", time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_for_ever():
    while True:
        time.sleep(1)


def hold_the_interpreter():
    """What a call of C does that keeps the interpreter's lock; a minute of it."""
    ctypes.PyDLL(None).sleep(60)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise LookupError("no such token: 17")


ACTS = {
    "die": die,
    "sleep": sleep_for_ever,
    "hold": hold_the_interpreter,
    "stop": stop,
    "raise": fail,
}


def make(root, callbacks, ranks=2, **options):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": "ddp",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": root,
    }
    trainer = Trainer(callbacks=callbacks, **(defaults | options))
    keep_records_in(trainer, root)
    return trainer


def loader(data):
    return DataLoader(data, batch_size=None)


def trouble(root, acts, *, ranks=2, counts=None, suite=False, goes_on=0.0, **limits):
    """A fit in which ranks do something in one phase, or have fewer batches than others.

    Args:
        root: folder of the run.
        acts: rank -> phase, and the name of what it does there.
        ranks: how many there are.
        counts: rank -> batches, where these are not 30.
        suite: whether the whole suite is there.
        goes_on: seconds for which the program goes on after the fit, and after its exception.
        limits: arguments of the watchdog.
    """
    watchdog = RankWatchdog(**(LIMITS | limits))
    callbacks = [watchdog]
    if suite:
        callbacks = [watchdog if type(c) is RankWatchdog else c for c in stability_callbacks()]
    trainer = start(root, callbacks, ranks)
    rank = trainer.global_rank
    where, name = acts.get(rank, ("", ""))
    act = ACTS.get(name)
    data = Batches(rank, (counts or {}).get(rank, 30), act if where == "data" else None)
    val = loader(Batches(9, 3)) if any("validation" in each for each in acts.values()) else None
    try:
        trainer.fit(Net(where, act), loader(data), val)
    finally:
        time.sleep(goes_on)


def start(root, callbacks, ranks=2, **options):
    """A Trainer whose process logs to the console, and a seed."""
    logging.basicConfig()
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").propagate = False
    seed_everything(0, verbose=False)
    return make(root, callbacks, ranks, **options)


class Logging(Net):
    """Logs its loss over all ranks, and can be tuned."""

    def __init__(self):
        super().__init__()
        self.lr = 0.01

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class SlowValidation(Net):
    """Validates for longer than a rank may stand still, but not in one batch."""

    def validation_step(self, batch, batch_idx):
        time.sleep(0.9)


class SlowStart(Net):
    """Its first step takes longer than any other may."""

    def training_step(self, batch, batch_idx):
        time.sleep(1.8 * (self.seen == 0))
        return super().training_step(batch, batch_idx)


class FailsEverywhere(Callback):
    """Raises the same on all ranks; the exception of rank 0 takes long to get out."""

    def __init__(self, slow=0.0):
        self.slow = slow

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 4:
            raise KeyError("on all ranks")

    def on_exception(self, trainer, pl_module, exception):
        time.sleep(self.slow * trainer.is_global_zero)


class SlowEnd(Callback):
    """One rank has something to do after the training."""

    def __init__(self, rank=0, seconds=2.0):
        self.rank, self.seconds = rank, seconds

    def on_train_end(self, trainer, pl_module):
        time.sleep(self.seconds * (trainer.global_rank == self.rank))


class SlowSave(Callback):
    """Saves a checkpoint on a slow disk."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 4:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        time.sleep(1.3 * trainer.is_global_zero)


STRICT = {"timeout": 1.0, "silent_after": 1.0, "slow_factor": 3.0, "interval": 0.2}
HEALTHY = {
    "plain": (Net, [], {}),
    "two epochs": (Net, [], {"max_epochs": 2}),
    "EarlyStopping": (Logging, [EarlyStopping("loss", patience=0, mode="max")], {"max_epochs": 4}),
    "max_time": (Net, [], {"max_time": {"seconds": 0}, "max_epochs": 9}),
    "exception on all ranks": (Net, [FailsEverywhere()], {}),
    "learning rate finder": (Logging, [LearningRateFinder(num_training_steps=20)], {}),
    "slow validation": (SlowValidation, [], {}),
    "late rank": (Net, [SlowEnd(rank=1, seconds=0.6)], {}),
    "slow first step": (SlowStart, [], {}),
    "slow exception": (Net, [FailsEverywhere(slow=2.0)], {}),
    "slow end": (Net, [SlowEnd()], {}),
    "slow checkpoint": (Net, [SlowSave()], {}),
}
"""Fits that nothing is wrong with, under limits that are shorter than what some of them do."""


def healthy(root, names, ranks=2, **limits):
    """Fits after each other in one process; name -> threads left behind, and weights as bare."""
    return {name: fit_twice(root, name, ranks, STRICT | limits) for name in names}


def fit_twice(root, name, ranks, limits):
    """Whether the watchdog changes a bit, and the threads that are there in and after the fit."""
    weights, seen = [], Names()
    for watchdog in ([], [RankWatchdog(**limits), seen]):
        module, others, options = HEALTHY[name]
        # Before the watchdog: it sees the exception only after these have done with it.
        trainer = start(root, [*copy.deepcopy(others), *watchdog], ranks, **options)
        net = module()
        net.train_dataloader = lambda trainer=trainer: loader(Batches(trainer.global_rank))
        val = loader(Batches(9, 3)) if isinstance(net, SlowValidation) else None
        with contextlib.suppress(KeyError):
            trainer.fit(net, val_dataloaders=val)
        trainer.validate(net, loader(Batches(9, 2)), verbose=False)
        weights.append(net.net.weight.detach().clone())
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    return torch.equal(*weights), sorted(seen.during), threads()


class Slow(Net):
    """One rank takes longer in its forward pass."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


class SlowBatches(Batches):
    """A rank whose data take longer."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.03)
            yield batch


def straggle(root, phase):
    """A fit in which rank 1 is slow in one phase; phase "" for an even run."""
    watchdog = RankWatchdog(straggler_steps=20, interval=0.05, silent_after=10.0)
    trainer = start(root, [watchdog])
    slow = trainer.global_rank == 1
    batches = SlowBatches if slow and phase == "data" else Batches
    net = Slow(0.04 if slow and phase == "forward" else 0.01)
    trainer.fit(net, loader(batches(trainer.global_rank, 60)))


def threads():
    return sorted(t.name for t in threading.enumerate() if "heart" in t.name or "dog" in t.name)


class Names(Callback):
    """Remembers the threads that were there in the fit."""

    def __init__(self):
        self.during = set()

    def on_train_batch_end(self, *args):
        self.during |= set(threads())
