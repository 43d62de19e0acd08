# %% [markdown]
# # Your model in five lines
#
# The suite works with any LightningModule. This one classifies two spirals, and one of its batches
# is broken: it contains a NaN, as from a faulty sensor. Without the suite all weights become NaN.
# With five more lines the run survives.

# %%
import warnings

warnings.filterwarnings("ignore")

import logging
import os
import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.INFO)
FAST = os.environ.get("NOTEBOOKS", "fast") == "fast"  # NOTEBOOKS=full for the longer runs
STEPS = 200 if FAST else 2000


class Spirals(LightningModule):
    """Replace this with your own module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def spirals(n=4096):
    g = torch.Generator().manual_seed(0)
    t = 3 * torch.rand(n, generator=g) ** 0.5
    y = torch.arange(n) % 2
    angle = 2 * t + torch.pi * y
    x = torch.stack([t * angle.cos(), t * angle.sin()], 1)
    return x + 0.05 * torch.randn(n, 2, generator=g), y


x, y = spirals()
broken = x.clone()
broken[64 * 40 + 5] = torch.nan  # one sample, in batch 40


def report(model):
    with torch.no_grad():
        accuracy = (model.net(x).argmax(1) == y).float().mean()
    bad = sum(p.isnan().sum() for p in model.parameters())
    print(f"accuracy {accuracy:.3f}, {bad} weights are NaN")


def fit(callbacks):
    seed_everything(0, verbose=False)
    model = Spirals()
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=tempfile.mkdtemp(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(broken, y), 64))
    return model, trainer


# %% [markdown]
# ## Without the suite

# %%
model, _ = fit([])
report(model)

# %% [markdown]
# ## With the suite
#
# ```python
# from lightning.pytorch import Trainer
# from lit_stability import stability_callbacks
#
# trainer = Trainer(callbacks=stability_callbacks())
# trainer.fit(model, data)
# ```
#
# The batch recurs in every epoch, and the suite logs each time what it does: it retries the step,
# in case the error was transient; the error recurs, so it skips the batch. The log line names the
# operation that produced the NaN.

# %%
from lit_stability import read_incidents, stability_callbacks

model, trainer = fit(stability_callbacks())
report(model)

# %% [markdown]
# ## The record of an incident
#
# Every incident has a line in `incidents.jsonl` and a folder with a checkpoint, the batch and a
# report.

# %%
first = read_incidents(trainer.default_root_dir)[0]
for key in ("step", "kind", "message", "cause", "responses", "outcome"):
    print(f"{key:10}", first.get(key))

# %% [markdown]
# ## Before the first step
#
# `Preflight` checks the first batch, the loss and the optimizer before training starts. Here the
# learning rate should be 1e-1, but the minus sign is missing.

# %%
from lit_stability import Preflight


class Typo(Spirals):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e1)


seed_everything(0, verbose=False)
trainer = Trainer(
    max_steps=1,
    accelerator="cpu",
    callbacks=[Preflight()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Typo(), DataLoader(TensorDataset(x, y), 64))

# %% [markdown]
# Next: `a_death_and_a_rescue.ipynb` injects three faults into the training of a translation model;
# `help(lit_stability.GradientMonitor)` lists what is measured; `CONTRIBUTING.md` shows how to write
# your own detector, responder or cause in about twenty lines.
