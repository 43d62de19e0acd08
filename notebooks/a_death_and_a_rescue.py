# %% [markdown]
# # A death and a rescue
#
# A Transformer learns to translate Classical into modern Chinese. Three faults are injected: a NaN
# loss, a weight that is damaged in memory, and a learning rate that a schedule multiplies by 100.
# The notebook compares the run without faults, with faults and without protection, and with faults
# and the default suite.

# %%
import warnings

warnings.filterwarnings("ignore")

import contextlib
import io
import logging
import os
import sys
import tempfile
from pathlib import Path

# %matplotlib inline
import matplotlib.pyplot as plt
from lightning.pytorch import Callback

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "configs").is_dir())
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

from lit_stability import read_incidents
from lit_stability.cli.config import compose
from lit_stability.cli.fit import fit

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.INFO)
FAST = (
    os.environ.get("NOTEBOOKS", "fast") == "fast"
)  # NOTEBOOKS=full for the experiments as shipped
RUNS = Path(tempfile.mkdtemp())

# %% [markdown]
# The experiments are the configs `translation_clean`, `translation_unprotected` and
# `translation_rescue`. The fast mode trains a smaller model for 160 steps and injects the faults at
# steps 50, 80 and 110.

# %%
SMALL = [
    "trainer.max_steps=160",
    "data.batch_size=16",
    "data.n_train=3000",
    "data.n_test=16",
    "model.network.d_model=48",
    "model.network.d_feedforward=96",
    "model.network.n_encoder_layers=1",
    "model.network.n_decoder_layers=1",
    "model.warmup_steps=20",
]
MODULE = "lit_stability.faults"
SHORT_FAULTS = (
    f"callbacks.faults.faults=[{{_target_: {MODULE}.NanLoss, step: 50}}, "
    f"{{_target_: {MODULE}.CorruptWeight, step: 80, parameter: network.decoder.layers.0.*}}, "
    f"{{_target_: {MODULE}.JumpLearningRate, step: 110, factor: 100.0}}]"
)


losses = {}


class Losses(Callback):
    """Records the loss of each optimizer step; a retried step overwrites its loss."""

    def on_fit_start(self, trainer, pl_module):
        losses.clear()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        losses[self.step] = float(outputs["loss"])


def train(name):
    """Runs an experiment; returns its losses by step and its folder."""
    folder = RUNS / name
    options = [
        f"run_dir={folder}",
        "evaluate=none",
        "expect=null",
        "logger=null",
        "trainer.enable_progress_bar=false",
        "trainer.enable_checkpointing=false",
        "callbacks.losses._target_=__main__.Losses",
    ]
    faults = [SHORT_FAULTS] if name != "translation_clean" else []
    config = compose([name], options + (SMALL + faults if FAST else []))
    with contextlib.redirect_stdout(io.StringIO()):
        fit(config)
    return sorted(losses.items()), folder


# %% [markdown]
# ## The run without faults

# %%
clean, _ = train("translation_clean")

# %% [markdown]
# ## The faults without protection
#
# After a single bad batch every weight is NaN. No exception is raised: the run continues and learns
# nothing until somebody notices.

# %%
dead, _ = train("translation_unprotected")

# %% [markdown]
# ## The faults with the suite
#
# The suite detects and names each fault and chooses the smallest sufficient response: it retries
# the step, rolls back a few steps, or caps the learning rate until the schedule returns to normal.

# %%
rescued, folder = train("translation_rescue")

# %% [markdown]
# ## Comparison

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
for axis, curve, title in ((axes[0], dead, "unprotected"), (axes[1], rescued, "with the suite")):
    axis.plot(*zip(*clean), color="0.75", lw=3, label="undisturbed")
    axis.plot(*zip(*curve), color="tab:blue", lw=1, label=title)
    axis.set(title=title, xlabel="optimizer step")
alive = [loss for _, loss in dead if loss == loss]
axes[0].plot(len(alive), alive[-1], "x", color="tab:red", ms=9)
axes[0].annotate("NaN from here on", (len(alive), alive[-1]), (8, 40), textcoords="offset points")
for incident in read_incidents(folder):
    axes[1].axvline(incident["step"], color="tab:red", lw=0.8, ls=":")
    axes[1].annotate(
        incident["kind"],
        (incident["step"], 0.97),
        xycoords=("data", "axes fraction"),
        rotation=90,
        va="top",
        ha="right",
        fontsize=7,
    )
axes[0].set_ylabel("loss")
axes[1].legend(loc="upper right", fontsize=8)
plt.show()

# %% [markdown]
# ## The last losses
#
# The rescued run ends where the run without faults ends.

# %%
for name, curve in (("undisturbed", clean), ("unprotected", dead), ("with the suite", rescued)):
    print(f"{name:15}", round(sum(loss for _, loss in curve[-20:]) / 20, 3))
