"""The code that the ranks run for tests of `RankWatchdog`: small fits, with trouble on one rank."""

import ctypes
import logging
import os
import signal
import threading
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_stability import RankWatchdog, stability_callbacks

LIMITS = {"timeout": 4.0, "silent_after": 3.0, "slow_factor": 2.0, "interval": 0.2}
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
    raise ValueError("no such token: 17")


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
    return Trainer(callbacks=callbacks, **(defaults | options))


def loud():
    logging.basicConfig()
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)


def loader(data):
    return DataLoader(data, batch_size=None)


def trouble(root, where, act, on=1, ranks=2, counts=None, suite=False, **limits):
    """A fit in which one rank does something in one phase, or has fewer batches."""
    loud()
    seed_everything(0, verbose=False)
    watchdog = RankWatchdog(**(LIMITS | limits))
    callbacks = [watchdog]
    if suite:
        callbacks = [watchdog if type(c) is RankWatchdog else c for c in stability_callbacks()]
    trainer = make(root, callbacks, ranks)
    mine = trainer.global_rank == on
    act = ACTS.get(act)
    before = act if mine and where == "data" else None
    count = (counts or {}).get(trainer.global_rank, 30)
    net = Net(where if mine else "", act)
    data = loader(Batches(trainer.global_rank, count, before))
    val = loader(Batches(9, 3)) if where == "validation" else None
    trainer.fit(net, data, val)
    if counts is not None:
        # The program goes on, as many do, with something that all ranks must come to.
        time.sleep(30)


def threads():
    return sorted(t.name for t in threading.enumerate() if "heart" in t.name or "dog" in t.name)


class Names(Callback):
    """Remembers the threads that were there in the fit."""

    def __init__(self):
        self.during = set()

    def on_train_batch_end(self, *args):
        self.during |= set(threads())
