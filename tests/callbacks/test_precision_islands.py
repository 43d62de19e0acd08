"""S9: one module in float32 amid 16-bit ones."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import (
    GradientMonitor,
    PrecisionFallback,
)
from lit_stability.incidents.report import responses_text
from lit_stability.training_state.fp32_modules import fp32_modules_of
from tests.conftest import flat
from tests.precision import Net, data, fp16, suite, train


def test_module_that_overflows_is_kept_in_fp32_and_the_rest_stays_fast(tmp_path):
    """S9: found by running the step again, with the line that overflowed as evidence."""
    callbacks = suite()
    module, trainer = train(tmp_path, callbacks, data(inputs=1e5), **fp16())
    (incident,) = callbacks[0].incidents
    assert responses_text(incident) == "net.0 kept in fp32, step retried"
    assert "linear made" in incident.evidence[1]
    assert "overflow of float16, finite in float32" in incident.evidence[1]
    assert trainer.precision == "16-mixed"
    assert fp32_modules_of(module) == ["net.0"]
    assert torch.isfinite(flat(module)).all()


def test_modules_are_not_kept_in_fp32_where_that_is_not_enough(tmp_path):
    """The loss overflows in the module's own code."""
    module, trainer = train(
        tmp_path, suite(), data(targets=2000.0), module=lambda: Net(own_loss=True), **fp16()
    )
    assert trainer.precision == "bf16-mixed"
    assert fp32_modules_of(module) == []


def test_named_modules_compute_in_float32_while_the_rest_does_not(tmp_path):
    """S9: chosen layers are kept in fp32; the state dict is what it was."""
    formats = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with trainer.precision_plugin.train_step_context(), torch.no_grad():
                hidden = pl_module.net[0](batch[0])
                formats["linear"] = hidden.dtype
                formats["norm"] = pl_module.net[1](hidden).dtype

    callbacks = [GradientMonitor(), PrecisionFallback(fp32_modules=["LayerNorm"]), Look()]
    module, _ = train(tmp_path, callbacks, data(), 5, **fp16())
    assert formats == {"linear": torch.float16, "norm": torch.float32}
    assert set(module.state_dict()) == set(Net().state_dict())


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_precision_with_nothing_below_is_left_alone(precision, tmp_path):
    callbacks = suite(fp32_modules=["LayerNorm"])
    module, trainer = train(tmp_path, callbacks, _as(precision), 20, precision=precision)
    assert trainer.precision == precision
    assert "forward" not in vars(module.net[1])


def _as(precision):
    loader = data()
    if precision == "64-true":
        x, y = (t.double() for t in loader.dataset.tensors)
        loader = DataLoader(TensorDataset(x, y), 16)
    return loader


def test_pattern_that_matches_nothing_is_refused_before_training(tmp_path):
    callbacks = suite(fp32_modules=["encoder.*norm"])
    with pytest.raises(ValueError, match=r"'encoder.\*norm' matches no module of Net"):
        train(tmp_path, callbacks, data(), 5, **fp16())
