"""What every test shares: one torch thread, a quiet Lightning, small modules to train."""

import gc
import logging
import os
import sys
from collections import Counter, defaultdict
from importlib import metadata

import pytest
import torch
from lightning.fabric.utilities import registry
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import AutoRollback, stability_callbacks
from lit_stability.callbacks.auto_rollback import snapshot_timer
from lit_stability.callbacks.gradient_flow import callback as gradient_flow
from lit_stability.console import PREFIX
from lit_stability.figures import new_figure
from lit_stability.trainer_internals import keep_records_in

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.INFO)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects those that are long
def pytest_collection_modifyitems(items):
    """Marks the cases of an ``each_value`` test as long that add no value of a parameter."""
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("each_value") and not item.get_closest_marker("long"):
            tests[item.path, item.originalname].append(item)
    for cases in tests.values():
        used = Counter()
        for _ in range(len(cases)):
            values = [[(k, id(v)) for k, v in case.callspec.params.items()] for case in cases]
            rank = [
                (sum(not used[v] for v in each), -sum(used[v] for v in each)) for each in values
            ]
            best = rank.index(max(rank))
            if rank[best][0] == 0:
                break
            used.update(values[best])
            cases.pop(best)
        for case in cases:
            case.add_marker(pytest.mark.long)


def pytest_collection_finish():
    """Keeps the modules and tests out of the garbage collections of the fits: 0.3 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    # Of processes that tests start; beside other tests a second thread only gets in the way.
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _own_key(tmp_path_factory):
    """Fits of the tests sign their configs with a key of their own, not with that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_STABILITY_KEY_FILE", str(tmp_path_factory.mktemp("key") / "key"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _snapshots_take_no_time():
    """Else a busy machine would make snapshots rarer; tests of that have clocks of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_timer, "clock", lambda: 0.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def _entry_points_are_read_once():
    """Lightning reads those of all installed packages for each Trainer, in some 30 ms."""
    found = {}

    def entry_points(group):
        key = group, *sys.path
        if key not in found:
            found[key] = metadata.entry_points(group=group)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", entry_points)
        yield


@pytest.fixture
def empty_pictures(monkeypatch):
    """`GradientFlow` draws nothing, for tests of where its pictures go: one takes half a second."""
    monkeypatch.setattr(gradient_flow, "draw_gradient_flow", lambda *_, **options: new_figure())


def every_other(names):
    """Parameters of a test, every other of them long."""
    return [
        pytest.param(name, marks=[pytest.mark.long] if i % 2 else [])
        for i, name in enumerate(names)
    ]


class Regression(LightningModule):
    """A small net with dropout and BatchNorm on a fixed regression task."""

    def __init__(self, optimizer="adamw", scheduler=None, dropout=0.1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1)
        )
        self.optimizer, self.scheduler = optimizer, scheduler
        self.losses, self.rates = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).squeeze(-1), y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.losses.append(float(loss.detach()))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self.net(x).squeeze(-1), y))

    def configure_optimizers(self):
        kinds = {
            "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
            "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
            "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        }
        optimizer = kinds[self.optimizer](self.parameters())
        if self.scheduler == "onecycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=200)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]
        return optimizer


def by_hand(module):
    """The class of a module, made to step its one optimizer itself: manual optimization."""

    class ByHand(module):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    return ByHand


def regression_data(batches=60, batch=16, seed=0):
    """Batches of a noisy linear task; no shuffling, so that an index means the same batch."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * batch, 8, generator=g)
    y = x @ torch.arange(8.0) / 8 + 0.1 * torch.randn(batches * batch, generator=g)
    return DataLoader(TensorDataset(x, y), batch)


def make_trainer(root, callbacks=(), **options):
    """A Trainer that writes below `root` and prints nothing."""
    defaults = {
        "max_steps": 60,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    trainer = Trainer(callbacks=list(callbacks), **(defaults | options))
    if root is not None and "://" not in str(root):
        keep_records_in(trainer, root)  # so that a test knows the folder without looking for it
    return trainer


def fit(root, callbacks=(), module=None, data=None, val=None, seed=0, **options):
    """Train from a seed and return the module and its trainer."""
    seed_everything(seed, verbose=False)
    module = Regression() if module is None else module()
    trainer = make_trainer(root, callbacks, **options)
    trainer.fit(module, regression_data() if data is None else data, val)
    return module, trainer


def skipping_suite():
    """The default suite, but for data that are not replayed."""
    suite = stability_callbacks()
    return [*suite[:-1], AutoRollback(after_rollback="skip")]


def lines_of(caplog):
    """What the suite has logged; Lightning talks more where its other package is imported too."""
    ours = [r.getMessage() for r in caplog.records if r.name.endswith("lit_stability")]
    assert all(line.startswith(PREFIX) for line in ours)
    return [line.removeprefix(PREFIX).lstrip() for line in ours]


def flat(module):
    """All weights and buffers in one tensor."""
    tensors = [*module.parameters(), *module.buffers()]
    return torch.cat([t.detach().double().flatten() for t in tensors])
