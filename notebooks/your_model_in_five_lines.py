# %% [markdown]
# # Your model in five lines
#
# The suite works with any LightningModule. This one classifies two spirals, and one of its batches
# has a NaN, as from a faulty sensor. The run is trained twice: as it is, and with these lines:
#
# ```python
# from lightning.pytorch import Trainer
# from lit_stability import stability_callbacks
#
# trainer = Trainer(callbacks=stability_callbacks())
# trainer.fit(model, data)
# ```

# %%
import logging
import tempfile
import warnings

warnings.filterwarnings("ignore")

# %matplotlib inline
import matplotlib.pyplot as plt
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import Preflight, read_incidents, stability_callbacks

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips of Lightning here
logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.INFO)


class Spirals(LightningModule):
    """Replace this with your own module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


g = torch.Generator().manual_seed(0)
t = 3 * torch.rand(4096, generator=g) ** 0.5
y = torch.arange(4096) % 2
angle = 2 * t + torch.pi * y
x = torch.stack([t * angle.cos(), t * angle.sin()], 1)
x = x + 0.05 * torch.randn(4096, 2, generator=g)
broken = x.clone()
broken[64 * 40 + 5] = torch.nan  # one sample, in batch 40

# %% [markdown]
# ## Without the suite, and with it
#
# The batch recurs in every epoch. The suite retries the step, in case the error was transient; the
# error recurs, so it skips the batch, and names the operation that first saw the NaN and the
# sample.


# %%
def fit(model, data, callbacks):
    """Trains 200 steps without further output."""
    trainer = Trainer(
        max_steps=200,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=tempfile.mkdtemp(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(data, y), 64))
    return trainer


models = {}
for name, callbacks in (("without", []), ("with the suite", stability_callbacks())):
    seed_everything(0, verbose=False)
    models[name] = Spirals()
    trainer = fit(models[name], broken, callbacks)

# %%
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.plot(models["without"].losses, color="tab:red", lw=4, alpha=0.5, label="without")
axes.plot(models["with the suite"].losses, color="tab:blue", lw=1, label="with the suite")
axes.plot(39, models["without"].losses[39], "x", color="tab:red", ms=10)
axes.annotate("without: NaN from batch 40 on", (39, 0.1), (46, 0.3), color="tab:red")
axes.set(xlabel="batch", ylabel="loss")
axes.legend()
plt.show()
for name, model in models.items():
    with torch.no_grad():
        accuracy = (model.net(x).argmax(1) == y).float().mean()
    bad = sum(int(p.isnan().sum()) for p in model.parameters())
    print(f"{name:14} accuracy {accuracy:.3f}, {bad} weights are NaN")

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
class Typo(Spirals):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e1)


seed_everything(0, verbose=False)
_ = fit(Typo(), x, [Preflight()])

# %% [markdown]
# Next: `a_death_and_a_rescue.ipynb` injects three faults into the training of a translation model;
# `a_killed_rank.ipynb` kills one of two processes; `help(lit_stability.GradientMonitor)` lists what
# is measured.
