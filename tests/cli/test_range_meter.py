"""Measuring inside a real fit: no update, the right gradients, an early end."""

from pathlib import Path

import pytest
import torch

from lit_stability.checks.precision_ranges import measure_ranges
from lit_stability.cli.checkpoint_weights import CheckpointWeights
from lit_stability.cli.range_meter import RangeMeter
from lit_stability.errors import ConfigError
from tests.callbacks.test_battery import TwoOptimizers
from tests.conftest import Regression, fit, make_trainer, regression_data


def squared_error(module, batch):
    return torch.nn.functional.mse_loss(module.net(batch[0]).squeeze(-1), batch[1])


def test_fit_is_measured_as_the_function_measures_and_updates_nothing(tmp_path):
    """S9: AdamW with decay and momentum would move the weights by a zero gradient too."""
    meter = RangeMeter(batches=3)
    torch.manual_seed(0)
    module = Regression(dropout=0.0)
    weights = {k: v.clone() for k, v in module.named_parameters()}
    batches = [batch for batch, _ in zip(regression_data(), range(3), strict=False)]
    expected = measure_ranges(module, squared_error, batches)
    module, trainer = fit(tmp_path, [meter], module=lambda: module)
    assert meter.report == expected
    assert trainer.global_step == 3
    assert all(torch.equal(weights[k], v) for k, v in module.named_parameters())
    assert not trainer.optimizers[0].state_dict()["state"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert list(tmp_path.iterdir()) == []


def test_epsilon_of_the_optimizer_is_taken_over(tmp_path):
    class Module(Regression):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3, eps=1e-6)

    meter = RangeMeter(batches=1)
    fit(tmp_path, [meter], module=Module)
    assert meter.report.adam_epsilon == 1e-6


def test_manual_optimization_measures_each_optimizer_s_own_gradients(tmp_path):
    """Two steps of a batch: each optimizer's parameters are counted once."""
    meter = RangeMeter(batches=2)
    fit(tmp_path, [meter], module=TwoOptimizers)
    assert meter.report.batches == 2
    elements = {row.layer: row.elements for row in meter.report.of("weight gradients")}
    assert elements == {"a": 2 * (64 + 8), "b": 2 * (8 + 1)}
    assert meter.report.row("activations", "(loss)").elements == 4


@pytest.mark.parametrize("options", [{"precision": "bf16-true"}, {"accumulate_grad_batches": 2}])
def test_fit_that_would_hide_the_gradients_is_refused(options, tmp_path):
    with pytest.raises(RuntimeError, match=f"RangeMeter needs {next(iter(options))}="):
        fit(tmp_path, [RangeMeter()], **options)
    with pytest.raises(ValueError, match="batches=0 must be at least 1"):
        RangeMeter(batches=0)


def test_hooks_come_off_after_an_exception(tmp_path):
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("step failed")

    module = Module()
    with pytest.raises(RuntimeError, match="step failed"):
        fit(tmp_path, [RangeMeter()], module=lambda: module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of Lightning, after three steps."""
    module, trainer = fit(tmp_path, max_steps=3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    return module, tmp_path / "three.ckpt"


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_checkpoint_are_those_measured(bare, dtype, checkpoint, tmp_path):
    """S9: of a checkpoint or a bare state dict; a 16-bit one is widened, and that is exact."""
    trained, path = checkpoint
    saved = torch.load(path, weights_only=True)
    state = saved["state_dict"]
    for key, value in state.items():
        state[key] = value.to(dtype) if value.is_floating_point() else value
    torch.save(state if bare else saved, path)
    meter = RangeMeter(batches=1)
    fit(tmp_path, [meter, CheckpointWeights(path)], seed=1)
    largest = max(trained.net[0].weight.abs().max(), trained.net[0].bias.abs().max()).to(dtype)
    assert meter.report.row("weights", "net.0").largest == largest.float().item()
    assert all(row.non_finite == 0 for row in meter.report.rows)


def test_module_in_16_bits_is_widened_before_its_weights_are_loaded(checkpoint, tmp_path):
    """S9: what a 16-bit module would have rounded is measured as it was saved."""
    trained, path = checkpoint
    meter = RangeMeter(batches=1)
    module = Regression().bfloat16()
    fit(tmp_path, [meter, CheckpointWeights(path)], module=lambda: module)
    assert torch.equal(module.net[0].weight, trained.net[0].weight)
    assert module.net[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "is no checkpoint, or is truncated"),
        ([1, 2], "contains the type list; expected the dict of a checkpoint"),
        ({"extra": Path("x")}, "contains more than tensors and plain values.*PosixPath"),
        ({"state_dict": {"net.0.weight": torch.ones(2, 2)}}, "does not match Regression.*Missing"),
    ],
)
def test_checkpoint_that_does_not_fit_is_reported_with_its_path(content, message, tmp_path):
    path = tmp_path / "bad.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=f"checkpoint={path}: {message}"):
        fit(tmp_path, [CheckpointWeights(path)])


def test_module_that_refuses_a_checkpoint_is_heard(checkpoint, tmp_path):
    class Module(Regression):
        def on_load_checkpoint(self, checkpoint):
            raise ValueError(f"trained for {checkpoint['global_step']} steps on other data")

    path = checkpoint[1]
    with pytest.raises(ConfigError, match=f"checkpoint={path}.*trained for 3 steps on other data"):
        fit(tmp_path, [CheckpointWeights(path)], module=Module)


def test_fewer_batches_than_asked_for_are_measured_and_counted(tmp_path):
    meter, data = RangeMeter(batches=10), regression_data(batches=2)
    make_trainer(tmp_path, [meter], max_epochs=1, max_steps=-1).fit(Regression(), data)
    assert meter.report.batches == 2
