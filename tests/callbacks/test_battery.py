"""Every public callback through the same mill: the forgotten case is always one of these."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import lit_stability
from lit_stability import GradientMonitor, stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit, flat, make_trainer, regression_data

PUBLIC = [
    cls
    for name in lit_stability.__all__
    if inspect.isclass(cls := getattr(lit_stability, name)) and issubclass(cls, Callback)
]


def suite_with(cls):
    """The callback with defaults, behind what it needs."""
    return [cls()] if cls is GradientMonitor else [GradientMonitor(), cls()]


class TwoOptimizers(LightningModule):
    """Manual optimization, two optimizers, one user-stepped scheduler."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            loss = nn.functional.mse_loss(self.b(self.a(x)).squeeze(-1), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        a = torch.optim.Adam(self.a.parameters(), 1e-2)
        b = torch.optim.SGD(self.b.parameters(), 1e-2)
        return [a, b], [torch.optim.lr_scheduler.StepLR(a, 10)]


@pytest.fixture(params=PUBLIC, ids=lambda c: c.__name__)
def cls(request):
    return request.param


@functools.cache
def bare_fit(module=None, **options):
    """The fit without any callback, which is the same for each of them."""
    return fit(None, (), module, **options)


def test_battery_finds_the_callbacks():
    beside_the_suite = {"AdaptiveGradientClipping", "CrashPrediction", "GradientFlow", "Preflight"}
    beside_the_suite |= {"Alerts", "CurvatureProbe", "IntegrityAudit", "QKClip"}
    beside_the_suite |= {"StabilityCallback"}
    suite = {type(c).__name__ for c in stability_callbacks()}
    assert {c.__name__ for c in PUBLIC} == suite | beside_the_suite, (
        "a public callback that the default suite lacks needs its own line here"
    )


def test_callback_with_defaults_trains_twice(cls, tmp_path):
    callbacks = suite_with(cls)
    for _ in range(2):
        module, trainer = fit(tmp_path, callbacks, max_steps=30)
        assert trainer.global_step == 30
        assert module.losses[-1] < module.losses[0]


def test_callback_state_survives_a_checkpoint_loaded_with_weights_only(cls, tmp_path):
    """Invariant 9: a user's resume loads the state with `weights_only=True`."""
    callbacks = [FaultInjector([NanLoss(step=15)]), *suite_with(cls)]
    _, trainer = fit(tmp_path, callbacks, max_steps=40)
    state = callbacks[-1].state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert repr(loaded) == repr(state)

    fresh = suite_with(cls)
    fresh[-1].load_state_dict(copy.deepcopy(loaded))
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    resumed = make_trainer(tmp_path, fresh, max_steps=50)
    resumed.fit(Regression(), regression_data(), ckpt_path=path)
    assert resumed.global_step == 50


def test_callback_pickles_before_and_after_a_fit(cls, tmp_path):
    callbacks = suite_with(cls)
    assert type(pickle.loads(pickle.dumps(callbacks[-1]))) is cls
    fit(tmp_path, callbacks, max_steps=25)
    assert type(pickle.loads(pickle.dumps(callbacks[-1]))) is cls


def test_callback_in_fast_dev_run_leaves_no_file(cls, tmp_path):
    fit(
        tmp_path,
        [FaultInjector([NanLoss(step=0)]), *suite_with(cls)],
        fast_dev_run=True,
        max_steps=-1,
    )
    assert not list(tmp_path.rglob("incident*"))
    assert not list(tmp_path.rglob("good*"))


@pytest.mark.each_value
@pytest.mark.parametrize("loggers", ["none", "tensorboard", "two"])
def test_callback_with_loggers_trains_through_an_incident(cls, loggers, tmp_path):
    logger = {
        "none": False,
        "tensorboard": TensorBoardLogger(tmp_path / "tb"),
        "two": [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")],
    }[loggers]
    callbacks = [FaultInjector([NanLoss(step=20)]), *suite_with(cls)]
    fit(tmp_path, callbacks, logger=logger, log_every_n_steps=5, max_steps=40)
    assert len(list(tmp_path.rglob("incidents.jsonl"))) == 1


CHANGES_A_HEALTHY_RUN = {"AdaptiveGradientClipping"}
"""Callbacks whose purpose is to change healthy steps; all others leave every bit as it is."""


@pytest.mark.each_value
@pytest.mark.parametrize("accumulate", [1, 4])
def test_callback_with_accumulation_trains_as_the_run_without_it(cls, accumulate, tmp_path):
    options = {"accumulate_grad_batches": accumulate, "max_steps": 15, "max_epochs": 1}
    callbacks = suite_with(cls)
    module, trainer = fit(tmp_path / "with", callbacks, **options)
    bare, _ = bare_fit(**options)
    assert trainer.global_step == 15
    assert len(module.losses) == 15 * accumulate
    assert callbacks[0].incidents == []
    if cls.__name__ not in CHANGES_A_HEALTHY_RUN:
        assert module.losses == bare.losses
        assert torch.equal(flat(module), flat(bare))
    assert module.losses[-1] < module.losses[0]


def test_callback_with_manual_optimization_and_two_optimizers_trains_as_without_it(cls, tmp_path):
    """The number of steps of each optimizer, its scheduler, and every weight."""
    callbacks = suite_with(cls)
    module, trainer = fit(tmp_path / "with", callbacks, TwoOptimizers, max_steps=60)
    bare, alone = bare_fit(TwoOptimizers, max_steps=60)
    assert trainer.global_step == 60
    assert callbacks[0].incidents == []
    steps = [int(s["step"]) for s in trainer.optimizers[0].state.values()]
    assert steps == [30, 30], "Adam's own count: every second step is that of the other optimizer"
    rates = [[g["lr"] for o in t.optimizers for g in o.param_groups] for t in (trainer, alone)]
    assert rates[0] == rates[1] == [pytest.approx(1e-5), 1e-2], "lowered tenfold every 10 of 30"
    if cls.__name__ not in CHANGES_A_HEALTHY_RUN:
        assert torch.equal(flat(module), flat(bare))


def test_suite_with_two_optimizers_skips_the_bad_one_only(tmp_path):
    """A veto leaves the other optimizer its step."""
    callbacks = [FaultInjector([NanLoss(step=40)]), *stability_callbacks()]
    module, trainer = fit(tmp_path, callbacks, TwoOptimizers, max_steps=80)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert trainer.global_step == 80


@pytest.mark.parametrize(
    "callback",
    [
        *("AdaptiveGradientClipping", "AnomalyCheckpoint", "AutoRollback"),
        *("CrashPrediction", "GradientFlow", "LastKnownGood", "NonFiniteLocator"),
        *("PrecisionFallback", "PreemptionCheckpoint"),
        *("AttentionProbe", "CurvatureProbe", "IntegrityAudit", "QKClip"),
    ],
)
@pytest.mark.parametrize("order", ["alone", "before"])
def test_responder_without_a_monitor_before_it_names_the_line_to_add(callback, order, tmp_path):
    lone = getattr(lit_stability, callback)()
    callbacks = [lone] if order == "alone" else [lone, GradientMonitor()]
    with pytest.raises(ValueError, match=r"callbacks=\[GradientMonitor\(\), ..., " + callback):
        fit(tmp_path, callbacks)
