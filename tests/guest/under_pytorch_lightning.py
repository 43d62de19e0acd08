"""Fits of `pytorch_lightning`, in a process of their own: `test_packages.py` reads what they give.

Usage: python -m tests.guest.under_pytorch_lightning FOLDER
"""

import contextlib
import io
import json
import logging
import os
import pickle
import pkgutil
import sys
import traceback
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, Timer, WeightAveraging
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    PrecisionFallback,
    fit_with_recovery,
    read_incidents,
    stability_callbacks,
)
from lit_stability.callbacks.automatic_suite import AutomaticSuite
from lit_stability.cli.main import main as lit_stability_command
from lit_stability.cli.targets import COMPONENTS
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from lit_stability.incidents.report import responses_text
from lit_stability.trainer_internals import keep_records_in, sharing
from lit_stability.trainer_internals.callback_state import keeps_state


class Net(pl.LightningModule):
    """A regression with dropout, and a validation that callbacks may monitor."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def _loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]).squeeze(-1).float(), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Task(Dataset):
    """A linear task; the samples in ``broken`` cannot be read."""

    def __init__(self, scale=1.0, broken=()):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(480, 8, generator=g) * scale
        self.y = self.x @ torch.arange(8.0) / (8 * scale)
        self.broken = broken

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError(f"sample {index} is damaged")
        return self.x[index], self.y[index]


def trainer_of(folder, callbacks=(), **options):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    quiet |= {"accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": False}
    trainer = pl.Trainer(callbacks=list(callbacks), **(quiet | {"max_steps": 60} | options))
    keep_records_in(trainer, folder)
    return trainer


def fit(folder, callbacks=(), task=None, **options):
    pl.seed_everything(0, verbose=False)
    module, trainer = Net(), trainer_of(folder, callbacks, **options)
    loader = DataLoader(task or Task(), 16, shuffle=True)
    trainer.fit(module, loader, DataLoader(Task(), 96))
    return module, trainer


def watched(folder, callbacks=()):
    """A fit with callbacks of Lightning that keep a state, and all that it ends with."""
    options = {"monitor": "val/loss"}
    averaging = WeightAveraging()
    own = [EarlyStopping(**options), averaging, ModelCheckpoint(folder / "best", **options)]
    module, trainer = fit(folder, [*callbacks, *own], enable_checkpointing=True)
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "average": {k: v.clone() for k, v in averaging._average_model.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "callbacks": [c.state_dict() for c in own if not isinstance(c, ModelCheckpoint)],
        "best": float(own[2].best_model_score),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "random": torch.get_rng_state(),
        "step": trainer.global_step,
    }


def same(one, other):
    """Whether two results are equal, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def outcomes(monitor):
    return [[i.first.kind, responses_text(i), i.outcome] for i in monitor.incidents]


def healthy(folder):
    return {
        "same": same(watched(folder / "bare"), watched(folder / "suite", stability_callbacks()))
    }


def damaged_weight(folder):
    """Rolled back, with the states of the callbacks of Lightning."""
    suite = stability_callbacks()
    faults = FaultInjector([CorruptWeight(step=40, parameter="net.0.weight")])
    result = watched(folder / "fault", [faults, *suite])
    return {"same": same(watched(folder / "bare"), result), "incidents": outcomes(suite[0])}


def nan_loss(folder):
    suite = stability_callbacks()
    stopping = EarlyStopping("val/loss")
    fit(folder, [FaultInjector([NanLoss(step=20)]), *suite, stopping])
    records = [record["kind"] for record in read_incidents(folder)]
    checkpoint = next(folder.rglob("incidents/*/checkpoint.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)
    return {
        "incidents": outcomes(suite[0]),
        "records": records,
        "version": saved["pytorch-lightning_version"] == pl.__version__,
        "callbacks": sorted(key.split("{")[0] for key in saved["callbacks"]),
    }


def overflow(folder):
    """Inputs that overflow 16 bits, with a scaler of the CPU: a module is kept in float32."""
    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    suite = [GradientMonitor(), PrecisionFallback(max_fp32_modules=0), AutoRollback()]
    _, trainer = fit(folder, suite, Task(scale=1e5), plugins=plugin)
    lowered = trainer.precision_plugin
    return {
        "incidents": outcomes(suite[0]),
        "precision": lowered.precision,
        "package": type(lowered).__module__.split(".")[0],
    }


def strategies(folder):
    given = {
        "one device": {},
        "DDP": {"strategy": DDPStrategy(), "devices": 2},
        "FSDP2": {"strategy": ModelParallelStrategy(2, 1), "devices": 2},
    }
    return {name: sharing(trainer_of(folder, **options)) for name, options in given.items()}


def broken_sample(folder):
    """An exception of the data, which is told by the file of Lightning that fetches them."""

    def make_trainer(**overrides):
        return trainer_of(folder, stability_callbacks(), **overrides)

    pl.seed_everything(0, verbose=False)
    data = DataLoader(Task(broken=(100,)), 16)
    result = fit_with_recovery(make_trainer, Net(), train_dataloaders=data)
    crashes = [[crash.kind, crash.error] for crash in result.crashes]
    return {"crashes": crashes, "steps": result.trainer.global_step}


def copies(folder):
    suite = pickle.loads(pickle.dumps(stability_callbacks()))
    return {
        "pickled": [type(callback).__name__ for callback in suite],
        "of_the_package": all(isinstance(callback, pl.Callback) for callback in suite),
    }


class Counter(pl.Callback):
    """A callback of the user, which says what its state is."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def states(folder):
    """A rollback restores what callbacks of the user save; time that has passed is not undone."""
    return {each.__name__: keeps_state(each()) for each in (Counter, Timer)}


def components(folder):
    names = [name for name in COMPONENTS if name.startswith(("pytorch_l", "lightning_fabric"))]
    classes = {name: pkgutil.resolve_name(name) for name in names}
    wrong = [n for n, kind in classes.items() if f"{kind.__module__}.{kind.__qualname__}" != n]
    return {"found": len(names), "missing": wrong}


def automatic(folder):
    os.environ["LIT_STABILITY_AUTO"] = "1"
    _, trainer = fit(folder, max_steps=3)
    del os.environ["LIT_STABILITY_AUTO"]
    return [type(callback).__name__ for callback in trainer.callbacks]


def command(folder):
    """`lit-stability fit` with a model of either package."""
    codes, printed, config = [], io.StringIO(), folder / "mine.yaml"
    folder.mkdir()
    for package in ("pytorch_lightning", "lightning.pytorch"):
        model = {"_target_": f"{package}.demos.boring_classes.BoringModel"}
        config.write_text(
            json.dumps({"model": model, "trainer": {"max_steps": 2, "accelerator": "cpu"}})
        )
        with contextlib.redirect_stderr(printed):
            place = [f"run_dir={folder}/run", "--overwrite"]
            codes.append(lit_stability_command(["fit", "-c", str(config), *place]))
    return {
        "fit": codes[0],
        "events": len(list(folder.glob("run/events.*"))),
        "refused": codes[1],
        "message": printed.getvalue(),
    }


def other_package(folder):
    """A Trainer of `lightning`, in the process whose suite is of `pytorch_lightning`."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    quiet |= {"max_steps": 2, "accelerator": "cpu", "default_root_dir": folder}

    def refusal(run):
        try:
            run()
        except ValueError as error:
            return str(error)
        return ""

    explicit = Trainer(callbacks=[GradientMonitor()], **quiet)
    left_alone = Trainer(callbacks=[AutomaticSuite()], **quiet)
    left_alone.fit(BoringModel())
    return {
        "explicit": refusal(lambda: explicit.fit(BoringModel())),
        "recovery": refusal(lambda: fit_with_recovery(lambda **o: Trainer(**quiet), Net())),
        "automatic": [type(c).__name__ for c in left_alone.callbacks],
        "steps": left_alone.global_step,
    }


def attempt(scenario, folder):
    """What a scenario finds; an error fails its own test, and not those of the others."""
    try:
        return scenario(folder)
    except Exception as error:
        return {"error": "".join(traceback.format_exception(error)[-3:])}


def main(folder):
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
    torch.set_num_threads(1)
    scenarios = (healthy, damaged_weight, nan_loss, overflow, strategies, broken_sample, copies)
    scenarios += (states, components, automatic, command, other_package)
    found = {each.__name__: attempt(each, folder / each.__name__) for each in scenarios}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
