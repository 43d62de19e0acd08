"""What the processes of tests/test_kill.py train: each goes on from the last known good checkpoint
in its folder, if there is one, and saves what it ended with."""

import logging
import os
import threading
import time

import torch
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader

from lit_stability import AutoRollback, GradientMonitor, LastKnownGood, find_last_good
from tests.conftest import Regression, make_trainer, regression_data

EVERY, CONFIRM, STEPS = 10, 3, 500


class Diary(Callback):
    """Notes the step at each batch, and for how many steps a write has been going on."""

    def __init__(self, path):
        self.path, self.busy = path, 0

    def on_train_start(self, trainer, pl_module):
        self.file = self.path.open("a", buffering=1)
        self.file.write(f"start {trainer.global_step}\n")

    def on_train_batch_end(self, trainer, pl_module, *args):
        writing = any(t.name == "last known good" for t in threading.enumerate())
        self.busy = self.busy + 1 if writing else 0
        self.file.write(f"step {trainer.global_step} {self.busy}\n")
        time.sleep(0.003)


def train(folder, result):
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logging.disable()
    torch.set_num_threads(1)
    checkpoint = find_last_good(folder)
    seed_everything(0 if checkpoint is None else 1, verbose=False)
    good = LastKnownGood(every_n_steps=EVERY, confirm_after=CONFIRM)
    callbacks = [GradientMonitor(), good, AutoRollback(), Diary(folder / "diary")]
    module = Regression(scheduler="onecycle")
    module.configure_optimizers = lambda: schedule(module)
    trainer = make_trainer(folder, callbacks, max_steps=STEPS)
    data = DataLoader(regression_data(37).dataset, 16, shuffle=True)
    trainer.fit(module, data, ckpt_path=checkpoint)
    end = {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "loss_epoch": float(trainer.callback_metrics["train/loss_epoch"]),
    }
    torch.save(end, result)


def schedule(module):
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=STEPS)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
