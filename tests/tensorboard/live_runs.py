"""Real runs, short ones, for the tests of the page in TensorBoard itself."""

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn, optim

from lit_stability import GradientMonitor, stability_callbacks
from lit_stability.cli.main import main
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit, regression_data

STEPS = 300
"""Of the run that is zoomed into, and of its twin."""
FAULT_AT = 200
"""The step of the NaN loss that it meets; attempts are counted from 1."""
MARKUP = '<img src=x onerror="faulty=1">'
SHORT = ["data.n_train=64", "data.n_val=8", "data.n_test=8", "data.batch_size=8", "evaluate=null"]
SHORT += ["model.network.d_model=32", "model.warmup_steps=20", "trainer.max_steps=90"]
SHORT += ["trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false"]
FAULTS = "callbacks.faults.faults=[{_target_: lit_stability.faults.NanLoss, step: 60}]"


class Hostile(Regression):
    """A module in which a layer's name is markup."""

    def __init__(self):
        super().__init__()
        self.net.add_module(MARKUP, nn.Linear(1, 1))


class Gan(LightningModule):
    """Two networks and two optimizers, each stepped once a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(8, 8), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            loss = nn.functional.mse_loss(self.critic(self.generator(x)).squeeze(-1), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [optim.SGD(part.parameters(), 1e-2) for part in (self.generator, self.critic)]


def train(root, name, callbacks, module=None, steps=60, **options):
    """A fit that logs every step to a run of this name."""
    logger = TensorBoardLogger(root, name, "")
    options |= {"logger": logger, "log_every_n_steps": 1, "max_steps": steps}
    return fit(root, callbacks, module, regression_data(steps), **options)


def write_runs(root):
    """The main job, cut short; a long run and its twin; two networks; a hostile name."""
    job = ["fit", "-c", "translation_rescue", f"run_dir={root / 'main'}", *SHORT, FAULTS]
    assert main(job) == 0
    for name, faults in (("faulty", [FaultInjector([NanLoss(step=FAULT_AT)])]), ("twin", [])):
        train(root, name, [*faults, *stability_callbacks()], steps=STEPS)
    train(root, "gan", [GradientMonitor()], Gan, steps=80)
    faults = FaultInjector([NanLoss(step=30)])
    train(root, "hostile", [faults, *stability_callbacks()], Hostile)
