"""Makes the logs in tests/data/metric_logs, by real fits with the real loggers; half a minute.

``python -m tests.checks.metric_log.make_logs FOLDER`` writes CSV and TensorBoard; the logs of W&B
and of Hugging Face's Trainer too where wandb, transformers and accelerate are installed.
"""

import csv
import gzip
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from lit_stability.checks.metric_log.readers import wandb as wandb_file

STEPS, EVERY, FAULT = 300, 4, 200
FAULTS = ("healthy", "nan", "exploding", "dead_lr", "fp16_collapse")


def rate_of(fault, step):
    """The learning rate as a share of its largest: a warm-up, then a cosine."""
    if fault == "dead_lr" and step >= 60:
        return 0.0
    if fault == "exploding":
        return ((step + 1) / STEPS) ** 3
    warm_up = min(1.0, (step + 1) / 40)
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )  # fmt: skip


def optimizer_for(fault, parameters):
    if fault == "exploding":
        return torch.optim.SGD(parameters, lr=20.0, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=3e-3)


def dataset(seed, size):
    teacher = torch.Generator().manual_seed(99)
    centres = torch.randn(10, 16, generator=teacher)
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (size,), generator=draws)
    return centres[labels] + 1.2 * torch.randn(size, 16, generator=draws), labels


def spoiled(fault, x, step):
    """The inputs of a step: one NaN at the fault, or values that overflow in 16 bits from it on."""
    if fault == "nan" and step == FAULT:
        return torch.full_like(x, math.nan)
    return x * 1e5 if fault == "fp16_collapse" and step >= FAULT // 2 else x


class Classifier(pl.LightningModule):
    def __init__(self, fault):
        super().__init__()
        self.fault, self.net = fault, network()

    def training_step(self, batch):
        x, labels = batch
        x = spoiled(self.fault, x, self.trainer.global_step)
        loss = torch.nn.functional.cross_entropy(self.net(x), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.log("loss_scale", scaler.get_scale())
        return loss

    def validation_step(self, batch):
        x, labels = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(x), labels))

    def on_before_optimizer_step(self, optimizer):
        norms = [p.grad.norm() for p in self.parameters()]
        self.log("grad_norm", torch.stack(norms).norm())

    def configure_optimizers(self):
        optimizer = optimizer_for(self.fault, self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate_of(self.fault, s))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(fault, folder, loggers):
    pl.seed_everything(0, verbose=False)
    precision = {}
    if fault == "fp16_collapse":
        scaler = torch.amp.GradScaler("cpu")
        precision["plugins"] = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=loggers, log_every_n_steps=EVERY,
        callbacks=[LearningRateMonitor()], default_root_dir=folder, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **precision,
    )  # fmt: skip
    train = DataLoader(TensorDataset(*dataset(1, 3200)), batch_size=32, shuffle=True)
    trainer.fit(
        Classifier(fault), train, DataLoader(TensorDataset(*dataset(2, 320)), batch_size=64)
    )


def write_lightning(fault, out):
    with tempfile.TemporaryDirectory() as work:
        loggers = [CSVLogger(work, "csv", ""), TensorBoardLogger(work, "tb", "", log_graph=False)]
        fit(fault, work, loggers)
        shutil.copy(Path(work, "csv", "metrics.csv"), out / f"{fault}.csv")
        (events,) = Path(work, "tb").glob("events*")
        shutil.copy(events, out / f"{fault}.tfevents")


def write_wandb(fault, out):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    os.environ.update(WANDB_SILENT="true", WANDB_MODE="offline")
    private = {f"x_disable_{part}": True for part in ("meta", "stats", "machine_info")}
    settings = wandb.Settings(
        **private, console="off", disable_git=True, disable_code=True, host="host",
        username="user", program="train.py", root_dir="."
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        logger = WandbLogger("run", project="p", save_dir=work, offline=True, settings=settings)
        fit(fault, work, [logger])
        wandb.finish()
        (file,) = Path(work).glob("wandb/offline-run-*/run-*.wandb")
        deadline = time.monotonic() + 30
        while not wandb_file.read([file]).complete and time.monotonic() < deadline:
            time.sleep(0.2)  # its last records are written by another process
        with gzip.open(out / f"{fault}.wandb.gz", "wb") as packed:
            packed.write(file.read_bytes())


def write_hugging_face(fault, out):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.steps = network(), 0

        def forward(self, x, labels):
            if self.training:
                x, self.steps = spoiled(fault, x, self.steps), self.steps + 1
            logits = self.net(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Rows(torch.utils.data.Dataset):
        def __init__(self, seed, size):
            self.x, self.labels = dataset(seed, size)

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return {"x": self.x[i], "labels": self.labels[i]}

    model = Net()
    optimizer = optimizer_for(fault, model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_of(fault, step))
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            work, max_steps=STEPS, logging_steps=EVERY, per_device_train_batch_size=32,
            eval_strategy="steps", eval_steps=100, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, seed=0,
            max_grad_norm=0.0 if fault == "exploding" else 1.0,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Rows(1, 3200), eval_dataset=Rows(2, 320),
            optimizers=(optimizer, schedule), callbacks=[TrainerCallback()],
        )  # fmt: skip
        trainer.train()
        trainer.save_state()
        shutil.copy(Path(work, "trainer_state.json"), out / f"{fault}.trainer_state.json")


def write_scale_as_hugging_face(csv_rows, out):
    """Its Trainer computes in fp16 on GPUs only: the rows of the fit above, in its own state."""
    from transformers import TrainerState

    names = {"train_loss_step": "loss", "lr-AdamW": "learning_rate"}
    history = []
    for row in csv_rows:
        own = {names.get(k, k): float(v) for k, v in row.items() if v and k != "train_loss_epoch"}
        history.append({**own, "step": int(own["step"])})
    TrainerState(
        log_history=history, global_step=STEPS, max_steps=STEPS, logging_steps=EVERY
    ).save_to_json(str(out / "fp16_collapse.trainer_state.json"))


def main(folder):
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for fault in FAULTS:
        write_lightning(fault, out)
        if importlib.util.find_spec("wandb"):
            write_wandb(fault, out)
    if importlib.util.find_spec("accelerate"):
        for fault in FAULTS[:-1]:
            write_hugging_face(fault, out)
        rows = csv.DictReader((out / "fp16_collapse.csv").open())
        write_scale_as_hugging_face([*rows], out)
    for file in sorted(out.iterdir()):
        if file.name.endswith(".json"):  # without indentation it is half as large
            file.write_text(json.dumps(json.loads(file.read_text())) + "\n")
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
