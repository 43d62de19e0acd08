# %% [markdown]
# # A death and a rescue
#
# A Transformer learns to translate classical into modern Chinese. Three faults strike it: a
# poisoned batch, a weight that is damaged in memory, a learning rate that a schedule multiplies by
# a hundred. The same run is shown undisturbed, without protection, and with the default suite.

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
# The experiments are configs: `translation_clean`, `translation_unprotected`,
# `translation_rescue`. The fast mode trains a smaller model for 160 steps, and lets the faults
# strike at 50, 80 and 110.

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
FAULTS = "lit_stability.faults"
STRIKES = (
    f"callbacks.faults.faults=[{{_target_: {FAULTS}.NanLoss, step: 50}}, "
    f"{{_target_: {FAULTS}.CorruptWeight, step: 80, parameter: network.decoder.layers.0.*}}, "
    f"{{_target_: {FAULTS}.JumpLearningRate, step: 110, factor: 100.0}}]"
)


losses = {}


class Losses(Callback):
    """The loss of each optimizer step; of one that is taken again, the latest."""

    def on_fit_start(self, trainer, pl_module):
        losses.clear()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        losses[self.step] = float(outputs["loss"])


def train(name):
    """Run an experiment; returns its losses by step, and its folder."""
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
    struck = [STRIKES] if name != "translation_clean" else []
    config = compose([name], options + (SMALL + struck if FAST else []))
    with contextlib.redirect_stdout(io.StringIO()):
        fit(config)
    return sorted(losses.items()), folder


# %% [markdown]
# ## The run as it should be

# %%
clean, _ = train("translation_clean")

# %% [markdown]
# ## The death
#
# One batch, and every weight is NaN. Nothing is raised: the run goes on, and learns nothing, until
# somebody looks.

# %%
dead, _ = train("translation_unprotected")

# %% [markdown]
# ## The rescue
#
# Each fault is noticed, named and answered with the least that is enough: a step retried, a
# rollback of a few steps, a learning rate held down until the schedule comes back.

# %%
rescued, folder = train("translation_rescue")

# %% [markdown]
# ## Side by side

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
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
# Not merely alive: where the run would have been.

# %%
for name, curve in (("undisturbed", clean), ("unprotected", dead), ("with the suite", rescued)):
    print(f"{name:15}", round(sum(loss for _, loss in curve[-20:]) / 20, 3))
