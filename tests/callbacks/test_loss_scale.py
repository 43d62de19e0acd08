"""S9: the loss scale is watched and explained; a scaler that dies is answered."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    TrainingStopped,
)
from tests.conftest import by_hand, flat, lines_of
from tests.precision import Net, data, fp16, suite, train


def test_infinite_loss_with_finite_gradients_is_named_and_after_three_of_them_acted_upon(tmp_path):
    """S9: the steps are good, and taken: training in fp16 alone does as well, but blindly."""
    module = lambda: Net(own_loss=True)  # noqa: E731
    callbacks = suite()
    _, trainer = train(tmp_path, callbacks, data(targets=2000.0), module=module, **fp16(1.0))
    (incident,) = callbacks[0].incidents
    assert incident.first.kind == "infinite loss"
    assert incident.occurrences == 3
    assert trainer.precision == "bf16-mixed"
    assert "compute the loss in float32" in incident.remedy


class HugeGradient(torch.autograd.Function):
    """The identity, whose gradient is too large for float16 and not for float32."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1e9


class Collapsing(Net):
    """Gradients of 1e9 where activations are float16: no scale above 1e-5 lets them through."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = HugeGradient.apply(self.net[:4](x))
        return nn.functional.mse_loss(self.net[4](hidden).squeeze(-1).float(), y)


def test_scale_that_no_search_will_find_ends_in_a_stop_with_the_remedy(tmp_path):
    """S9: inputs out of range take a scaler to 0.0 in silence; here it ends at 2**-10."""
    callbacks = [GradientMonitor(), AutoRollback()]
    with pytest.raises(TrainingStopped, match=r"loss scale of 0.0009.*bf16 or 32-bit") as stop:
        train(tmp_path, callbacks, data(), module=Collapsing, **fp16())
    assert stop.value.incident.first.kind == "loss-scale collapse"
    assert stop.value.incident.first.step <= 30


def test_scale_that_no_search_will_find_is_answered_by_another_precision(tmp_path):
    callbacks = suite()
    module, trainer = train(tmp_path, callbacks, data(), module=Collapsing, **fp16())
    assert trainer.precision == "bf16-mixed"
    assert callbacks[0].incidents[0].first.kind in ("loss-scale fall", "loss-scale collapse")
    assert torch.isfinite(flat(module)).all()


def test_collapse_is_proof_enough_where_a_step_cannot_be_taken_again(tmp_path):
    callbacks = suite()
    module, trainer = train(tmp_path, callbacks, data(), module=by_hand(Collapsing), **fp16())
    assert callbacks[0].incidents[0].first.kind == "loss-scale collapse"
    assert trainer.precision == "bf16-mixed"
    assert torch.isfinite(flat(module)).all()


def test_search_of_the_scaler_is_told_of_once_and_counted(tmp_path, caplog):
    """S9: the loss scale is watched and explained."""
    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 10, **fp16(2.0**24)}
    train(tmp_path, [GradientMonitor()], data(), 60, **options)
    lines = [line for line in lines_of(caplog) if "loss scaler" in line]
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf8") as file:
        last = list(csv.DictReader(file))[-1]
    left_out = int(last["stability/overflows"])
    assert left_out > 5
    assert lines == [
        f"step {left_out}: the loss scaler skipped {left_out} steps, as is usual at the start, "
        f"and found its scale: {2.0 ** (24 - left_out):g}"
    ]
    assert float(last["stability/loss_scale"]) <= 2.0 ** (25 - left_out)
