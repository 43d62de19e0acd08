# %% [markdown]
# # A killed rank
#
# Two processes train together with DDP. In the middle of the run one of them is killed, as by a
# machine that is out of memory. torchrun starts both again, `fit_with_recovery` resumes from the
# last good checkpoint, and the run ends with the weights of a run that nobody interrupted, to the
# bit.
#
# On a cluster only the numbers differ: see the guide on several ranks.

# %%
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The program
#
# `make_trainer` makes the Trainer of each attempt. The good checkpoints are far more frequent than
# usual here, because the run has only 120 steps. The environment variable `KILL_AT` rehearses the
# failure: rank 1 ends itself with SIGKILL, which no program can catch.

# %%
PROGRAM = """
import os, signal, sys
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lit_stability import fit_with_recovery, stability_callbacks

folder = sys.argv[1]
kill_at = int(os.environ.get("KILL_AT", "-1"))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x).squeeze(-1), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_rank == 1 and trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(**overrides):
    good = dict(every_n_steps=20, confirm_after=5)
    options = dict(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    callbacks = [Kill(), *stability_callbacks(good=good)]
    return Trainer(**{**options, **overrides}, callbacks=callbacks)


seed_everything(0, verbose=False)
x = torch.randn(640, 8)
data = DataLoader(TensorDataset(x, x.sum(1).tanh()), 8, shuffle=True)
model = Net()
trainer = fit_with_recovery(make_trainer, model, train_dataloaders=data).trainer
if trainer.is_global_zero:
    torch.save(model.state_dict(), folder + "/weights.pt")
    print("ended at step", trainer.global_step)
"""
(ROOT / "train.py").write_text(PROGRAM)


def torchrun(folder, **environment):
    """Trains on two ranks and returns what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=3", str(ROOT / "train.py"), str(folder)]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command,
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


# %% [markdown]
# ## Without a kill, and with one at step 70
#
# What was printed is long, as every process prints its traceback; shown are the lines of the suite
# and the end.


# %%
def show(text):
    """Prints the lines of the suite, and the last one of the program."""
    lines = [line for line in text.splitlines() if line.startswith(("[stability]", "ended"))]
    print("\n".join(line.replace(str(ROOT), "runs") for line in lines))


show(torchrun(ROOT / "straight"))

# %%
show(torchrun(ROOT / "killed", KILL_AT="70"))

# %% [markdown]
# ## The same weights

# %%
straight, killed = (torch.load(ROOT / name / "weights.pt") for name in ("straight", "killed"))
print("bit-identical:", all(torch.equal(straight[name], killed[name]) for name in straight))
(line,) = next((ROOT / "killed").rglob("recoveries.jsonl")).read_text().splitlines()
crash = json.loads(line)
print("crash at step", crash["step"], "- resumed from", Path(crash["checkpoint"]).parent.name)
