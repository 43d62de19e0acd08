"""The probe in real fits: what it reads, when, and that nothing is changed by it."""

import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.instabilities.cases import CASES
from lit_stability import CurvatureProbe, GradientMonitor, stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit
from tests.exact import Batches, differences, loader, run
from tests.probe_models import Attending


class StepRecorder(Callback):
    """The ratio by step."""

    def __init__(self):
        self.ratios = {}

    def on_step_measured(self, trainer, pl_module, stats):
        self.ratios.update((stats.step, r.value) for r in stats.readings_of("curvature_ratio"))


class Quadratic(LightningModule):
    """Loss ``c w^2 / 2`` of one weight, whose curvature is c at any place."""

    def __init__(self, rate=0.5, **options):
        super().__init__()
        self.w, self.rate, self.options = nn.Parameter(torch.ones(1)), rate, options

    def training_step(self, batch, batch_idx):
        return (0.5 * batch[0] * self.w**2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate, **self.options)


class Other(Quadratic):
    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), 1e-3)


class Manual(Quadratic):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class OnlyOnce(Quadratic):
    """Its training_step has a memory of its own."""

    def training_step(self, batch, batch_idx):
        counter = self.__dict__.setdefault("_counter", [0])
        counter[0] += 1
        if counter[0] > 1 and self.trainer.global_step == 0:
            raise RuntimeError("this batch was seen before")
        return super().training_step(batch, batch_idx)


def curvatures(*values):
    return DataLoader(TensorDataset(torch.tensor(values)[:, None]), 1)


def probed(root, module, data, every=1, **options):
    recorded_step, monitor = StepRecorder(), GradientMonitor()
    callbacks = [monitor, CurvatureProbe(every=every), recorded_step]
    fit(root, callbacks, module, data=data, **{"max_steps": 12, **options})
    return recorded_step.ratios, monitor


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}],
    ids=str,
)
def test_run_with_the_probe_is_bit_identical(kind, options, tmp_path):
    """Invariant 1: weights, optimizer, generators, buffers, losses and metrics."""
    runs = [
        run(tmp_path / str(i), lambda: Attending(kind=kind), loader(Batches()), callbacks, **each)
        for i, callbacks in enumerate(([], [GradientMonitor(), CurvatureProbe(every=2)]))
        for each in [{"max_epochs": 1, **options}]
    ]
    assert differences(*runs) == {}


@pytest.mark.parametrize(
    ("make", "ratio"),
    [
        (lambda: Quadratic(0.5), 0.25),
        (lambda: Quadratic(0.5, momentum=0.9), 0.25 / 1.9),
        (lambda: Quadratic(2.2), 1.1),
    ],
)
def test_ratio_in_a_fit_is_that_of_the_quadratic(make, ratio, tmp_path):
    ratios, _ = probed(tmp_path, make, curvatures(*[1.0] * 4), max_steps=4)
    # fp32 rounds weights that are a thousandth apart: 2^-24 / 1e-3.
    assert ratios == pytest.approx(dict.fromkeys(range(4), ratio), rel=1e-4)


def test_ratio_of_an_accumulated_step_is_that_of_the_mean_loss(tmp_path):
    data = curvatures(1.0, 2.0, 3.0, 6.0)
    ratios, _ = probed(tmp_path, Quadratic, data, accumulate_grad_batches=4, max_steps=1)
    assert ratios == pytest.approx({0: 0.5 * 3.0 / 2}, rel=1e-4)


def test_ratio_follows_the_effective_learning_rate(tmp_path):
    class Halved(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[0]["lr"] = 0.25

    recorded_step = StepRecorder()
    callbacks = [Halved(), GradientMonitor(), CurvatureProbe(every=1), recorded_step]
    fit(tmp_path, callbacks, Quadratic, data=curvatures(1.0), max_steps=1)
    assert recorded_step.ratios == pytest.approx({0: 0.125}, rel=1e-4)


def test_ratio_above_1_has_the_next_steps_measured_and_is_reported(tmp_path):
    data = curvatures(*[1.0] * 10, *[5.0] * 30)
    ratios, monitor = probed(tmp_path, lambda: Quadratic(0.41), data, every=10, max_steps=40)
    turns = [range(10, 15), range(20, 25), range(30, 35)]
    assert list(ratios) == [0, *(step for turn in turns for step in turn)]
    assert [(i.first.step, i.first.kind) for i in monitor.incidents] == [
        (14, "curvature beyond the edge")
    ]


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Other, "the stable learning rate of RMSprop is not known"),
        (Manual, "in manual optimization"),
        (OnlyOnce, "RuntimeError: this batch was seen before"),
    ],
)
def test_what_cannot_be_measured_is_reported_once_and_ends_no_run(module, why, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lightning.pytorch.lit_stability"):
        ratios, _ = probed(tmp_path, module, curvatures(*[1.0] * 12))
    assert ratios == {}
    (message,) = [m for m in caplog.messages if "CurvatureProbe is off for this fit" in m]
    assert why in message


def test_probe_beside_the_suite_goes_through_an_incident(tmp_path):
    callbacks = [FaultInjector([NanLoss(step=10)]), *stability_callbacks(), CurvatureProbe(every=5)]
    recorded_step = StepRecorder()
    _, trainer = fit(tmp_path, [*callbacks, recorded_step], Regression, max_steps=30)
    assert trainer.global_step == 30
    assert list(recorded_step.ratios)[:2] == [0, 5]


@pytest.mark.parametrize("twin", [False, True])
def test_case_of_adams_spikes_is_reported_before_the_first_and_its_twin_is_not(twin, tmp_path):
    """S16: the loss has not spiked yet when the curvature is reported."""
    case = CASES["Adam's beta2 makes spikes"]
    case = case.healthy() if twin else case
    monitor = GradientMonitor()
    options = {"max_steps": 280, "max_epochs": -1}
    probe = CurvatureProbe(every=1)
    module, _ = fit(tmp_path, [monitor, probe], case.module, data=case.data(0), **options)
    kinds = {i.first.kind for i in monitor.incidents}
    assert kinds == (set() if twin else {"curvature beyond the edge"})
    windows = [sorted(module.losses[t - 50 : t])[25] for t in range(60, 280)]
    assert all(loss < 3 * usual for loss, usual in zip(module.losses[60:], windows, strict=True))


@pytest.mark.parametrize("options", [{"every": 0}, {"follow": 0}])
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        CurvatureProbe(**options)
