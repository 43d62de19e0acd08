"""On a GPU too: a healthy run is left as it is, and a run that recovered equals a clean one."""

import functools

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lit_stability import AutoRollback, GradientMonitor, stability_callbacks
from lit_stability.faults import CorruptMoment, CorruptWeight, FaultInjector, NanLoss
from tests.exact import Batches, differences, loader, run
from tests.exact_net import OPTIMIZERS, Net
from tests.gpu.conftest import ACCELERATOR

OPTIMIZERS_ON_GPU = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "capturable AdamW": lambda p: torch.optim.AdamW(p, 1e-2, capturable=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False),
    "SGD": OPTIMIZERS["SGD"],
}
PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "bf16-true"]


class OnGPU(Net):
    """The net of the exactness matrix with an optimizer for GPUs."""

    def __init__(self, optimizer="fused AdamW", compiled=None):
        super().__init__()
        self.optimizer = OPTIMIZERS_ON_GPU[optimizer]
        if compiled is not None:
            self.first.compile(**compiled)


class Images(LightningModule):
    """Convolutions in channels_last, with dropout of channels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(8, 1, 3, padding=1),
        ).to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        x, y = batch
        images = x.repeat(1, 24).reshape(-1, 3, 8, 8).to(memory_format=torch.channels_last)
        return nn.functional.mse_loss(self.net(images).mean((1, 2, 3)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, fused=True)


def precise(options, precision):
    if precision == "16-mixed" and ACCELERATOR != "cuda":
        pytest.skip("fp16 needs a GPU")
    return {**options, "precision": precision}


NETS = {
    **{name: functools.partial(OnGPU, name) for name in OPTIMIZERS_ON_GPU},
    "channels_last": Images,
}
ALL = [pytest.param(name, marks=pytest.mark.cuda if "capturable" in name else ()) for name in NETS]


@pytest.mark.parametrize("net", ALL)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_healthy_run_is_bit_identical(net, precision, options, tmp_path):
    options = precise(options, precision)
    bare = run(tmp_path / "bare", NETS[net], loader(Batches()), **options)
    suite = run(tmp_path / "suite", NETS[net], loader(Batches()), stability_callbacks(), **options)
    assert differences(bare, suite) == {}


@pytest.mark.parametrize("net", ALL)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bad_batch_is_left_out_bit_by_bit(net, precision, options, tmp_path):
    options = precise(options, precision)
    clean = run(tmp_path / "clean", NETS[net], loader(Batches(left_out=[9])), **options)
    suite = stability_callbacks()
    saved = run(tmp_path / "saved", NETS[net], loader(Batches(nan=[9])), suite, **options)
    assert suite[0].incidents, "the NaN was seen"
    assert differences(clean, saved) == {}


FAULTS = {
    "NaN loss": NanLoss,
    "damaged weight": CorruptWeight,
    "damaged moment": CorruptMoment,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("net", ALL[:3])
def test_run_after_rollback_and_replay_equals_the_clean_run(net, fault, options, tmp_path):
    clean = run(tmp_path / "clean", NETS[net], loader(Batches()), **options)
    injector = FaultInjector([FAULTS[fault](step=40)])
    callbacks = [injector, *stability_callbacks()]
    saved = run(tmp_path / "saved", NETS[net], loader(Batches()), callbacks, **options)
    assert callbacks[1].incidents, "the fault was seen"
    assert differences(clean, saved) == {}


def test_batches_from_pinned_memory_are_replayed_as_they_were(options, tmp_path):
    data = functools.partial(
        loader, num_workers=2, pin_memory=ACCELERATOR == "cuda", persistent_workers=True
    )
    clean = run(tmp_path / "clean", OnGPU, data(Batches(augment=True)), **options)
    callbacks = [FaultInjector([CorruptWeight(step=40)]), GradientMonitor(), AutoRollback()]
    saved = run(tmp_path / "saved", OnGPU, data(Batches(augment=True)), callbacks, **options)
    assert callbacks[1].incidents
    assert differences(clean, saved) == {}


MODES = {"inductor": {}, "CUDA graphs": {"mode": "reduce-overhead"}}


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_compiled_module_recovers_bit_by_bit(mode, options, tmp_path):
    net = functools.partial(OnGPU, compiled=MODES[mode])
    bare = run(tmp_path / "bare", net, loader(Batches()), **options)
    suite = run(tmp_path / "suite", net, loader(Batches()), stability_callbacks(), **options)
    assert differences(bare, suite) == {}
    callbacks = [FaultInjector([CorruptWeight(step=40)]), *stability_callbacks()]
    saved = run(tmp_path / "saved", net, loader(Batches()), callbacks, **options)
    assert callbacks[1].incidents
    assert differences(bare, saved) == {}


@pytest.mark.cuda
def test_overflow_of_the_loss_scale_is_no_incident(options, tmp_path):
    """The scale starts at 2**20 and grows every 10 steps until a gradient overflows."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20, growth_interval=10)
    plugin = MixedPrecision("16-mixed", "cuda", scaler)
    suite = stability_callbacks()
    result = run(
        tmp_path, OnGPU, loader(Batches()), suite, plugins=[plugin], **{**options, "max_epochs": 8}
    )
    grown = 2.0 ** (20 + 8 * 24 // 10)
    assert result["scaler"]["scale"] < grown, "steps have overflowed"
    assert not suite[0].incidents


@pytest.mark.parametrize("place", ["device", "host"])
def test_run_whose_snapshots_are_measured_and_become_rare_recovers_bit_by_bit(
    place, options, tmp_path
):
    clean = run(tmp_path / "clean", OnGPU, loader(Batches()), **options)
    rollback = AutoRollback(
        snapshot_every=1, confirm_after=1, snapshot_cost=1e-6, snapshot_device=place
    )
    callbacks = [FaultInjector([CorruptWeight(step=60)]), GradientMonitor(), rollback]
    saved = run(tmp_path / "saved", OnGPU, loader(Batches()), callbacks, **options)
    (incident,) = callbacks[1].incidents
    assert incident.cadence["snapshot_every"] > 1
    assert differences(clean, saved) == {}
