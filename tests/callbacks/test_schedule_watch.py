"""Warnings of schedules that end the training unnoticed, once, with the name of the scheduler."""

import logging
import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lit_stability import stability_callbacks
from lit_stability.console import PREFIX
from tests.conftest import Regression, fit, flat, regression_data


class Scheduled(Regression):
    """With a scheduler and a metric to monitor, which may be NaN from an epoch on."""

    def __init__(self, make=None, nan_from=None, monitor="val/loss", **config):
        super().__init__()
        self.make, self.nan_from, self.config = make, nan_from, {"monitor": monitor, **config}

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])
        bad = self.nan_from is not None and self.trainer.current_epoch >= self.nan_from
        self.log("val/loss", loss * math.nan if bad else loss)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        if self.make is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make(optimizer), **self.config},
        }


def plateau(optimizer, **options):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)


def warnings_of(caplog):
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [line.removeprefix(f"{PREFIX} ") for line in warned]


def run(root, caplog, make, *callbacks, epochs=10, train=10, **options):
    """Compares with a bare twin; returns what was warned of. An epoch has ``train`` batches."""
    fits = []
    for suite in ([], stability_callbacks()):
        trainer_options = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True}
        fits.append(
            fit(
                root / str(len(fits)),
                [*suite, *(each() for each in callbacks)],
                make,
                regression_data(train),
                regression_data(2),
                **(trainer_options | options),
            )
        )
    (bare, _), (module, trainer) = fits
    assert torch.equal(flat(module), flat(bare))
    assert trainer.callbacks[0].incidents == []
    return warnings_of(caplog)


def test_rate_that_a_scheduler_makes_0_is_warned_of_once_with_its_name(tmp_path, caplog):
    def make():
        return Scheduled(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.0))

    (line,) = run(tmp_path, caplog, make)
    assert line.startswith("step 29: the learning rate is 0 since step 10, after 0.01")
    assert line.endswith("check ExponentialLR (gamma=0.0)")


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_warm_up_from_0_that_is_stepped_by_epochs_is_warned_of(interval, tmp_path, caplog):
    def make():
        def warm_up(optimizer):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 40))

        return Scheduled(warm_up, interval=interval)

    lines = run(tmp_path, caplog, make, epochs=2, train=25)
    if interval == "step":
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(
        "step 19: the learning rate is 0 since the start, and LambdaLR changes it once per epoch"
    )


def test_rate_of_schedulers_in_sequence_names_each_of_them(tmp_path, caplog):
    def make():
        def sequence(optimizer):
            first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
            second = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.3)
            return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [20])

        return Scheduled(sequence, interval="step")

    (line,) = run(tmp_path, caplog, make)
    assert line.endswith(
        "check SequentialLR (LinearLR (total_iters=20), ExponentialLR (gamma=0.3))"
    )


def test_metric_that_is_nan_is_warned_of_once_with_all_that_monitor_it(tmp_path, caplog):
    def make():
        return Scheduled(lambda o: plateau(o, patience=0, factor=0.01), nan_from=2)

    metric, rate = run(
        tmp_path,
        caplog,
        make,
        lambda: EarlyStopping("val/loss", check_finite=False, patience=99),
        lambda: ModelCheckpoint(monitor="val/loss"),
        epochs=20,
    )
    assert metric.startswith("step 30: val/loss is NaN, and ReduceLROnPlateau and EarlyStopping")
    assert "ModelCheckpoint monitors it" in metric
    assert "ReduceLROnPlateau (factor=0.01)" in rate


@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_metric_of_a_callback_alone_is_warned_of(kind, tmp_path, caplog):
    callback = {
        "EarlyStopping": lambda: EarlyStopping("val/loss"),
        "ModelCheckpoint": lambda: ModelCheckpoint(monitor="val/loss"),
    }[kind]
    (line,) = run(tmp_path, caplog, lambda: Scheduled(nan_from=3), callback)
    assert line.startswith(f"step 40: val/loss is NaN, and {kind} monitors it")


def test_metric_of_the_training_that_is_nan_is_warned_of(tmp_path, caplog):
    class Mean(Scheduled):
        def on_train_epoch_end(self):
            self.log("train/score", math.nan)

    def make():
        return Mean(lambda o: plateau(o, patience=99), monitor="train/score")

    (line,) = run(tmp_path, caplog, make, epochs=3)
    assert line.startswith("step 10: train/score is NaN, and ReduceLROnPlateau monitors it")


def test_metric_that_nobody_monitors_may_be_nan(tmp_path, caplog):
    assert run(tmp_path, caplog, lambda: Scheduled(nan_from=0), epochs=3) == []


HEALTHY = {
    "plateau to its end": (lambda o: plateau(o, patience=0, factor=0.1), "epoch"),
    "cosine": (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200), "step"),
    "one cycle": (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=200), "step"),
}


@pytest.mark.parametrize(("make", "interval"), HEALTHY.values(), ids=HEALTHY)
def test_schedule_that_ends_as_planned_is_not_warned_of(make, interval, tmp_path, caplog):
    def module():
        return Scheduled(make, interval=interval)

    assert run(tmp_path, caplog, module, epochs=20) == []
