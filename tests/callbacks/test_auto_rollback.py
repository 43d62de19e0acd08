from statistics import median

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    TrainingStopped,
    read_incidents,
    stability_callbacks,
)
from lit_stability.faults import (
    CorruptMoment,
    CorruptWeight,
    FaultInjector,
    JumpLearningRate,
    NanLoss,
)
from lit_stability.policies.actions import SkipStep
from lit_stability.policies.escalation import Budget
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from tests.callbacks.test_battery import TwoOptimizers
from tests.conftest import Regression, fit, flat, make_trainer, regression_data, skipping_suite
from tests.test_invariants import fp16_on_cpu, optimizer_state


class Tape(Callback):
    """Weights, moments and step after every batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.states.append((trainer.global_step, flat(pl_module), optimizer_state(trainer)))


@pytest.mark.parametrize(
    "fault",
    [
        CorruptWeight(step=40, parameter="net.0.weight"),
        CorruptWeight(step=40, parameter="net.4.weight", bit=30),
        CorruptMoment(step=40),
        CorruptMoment(step=40, value=float("nan")),
    ],
    ids=["nan weight", "flipped bit", "zeroed moment", "nan moment"],
)
def test_damaged_state_goes_back_to_a_confirmed_snapshot_bit_for_bit(fault, tmp_path):
    """K3, N3: no learning rate is cut for damage that came from outside."""
    fault.injected = 0
    recorded_step = Tape()
    callbacks = [FaultInjector([fault]), *skipping_suite(), recorded_step]
    _, trainer = fit(tmp_path, callbacks, max_steps=60)
    (incident,) = read_incidents(tmp_path)
    assert incident["responses"] == ["rolled back"]
    assert trainer.global_step == 60, "max_steps good steps are taken"

    index = next(
        i for i in range(1, 60) if recorded_step.states[i][0] <= recorded_step.states[i - 1][0]
    )
    back_at = recorded_step.states[index][0]
    assert 40 - 30 <= back_at <= 40 - 10, "newest snapshot with ten healthy steps after it"
    then = next(s for s in recorded_step.states[:index] if s[0] == back_at)
    assert torch.equal(then[1], recorded_step.states[index][1])
    assert all(map(torch.equal, then[2], recorded_step.states[index][2]))


def test_learning_rate_jump_is_held_at_what_the_run_has_borne(tmp_path):
    """K3: no step is lost, no rollback, and the clean run's weights come out bit for bit."""
    callbacks = [FaultInjector([JumpLearningRate(step=40)]), *stability_callbacks()]
    held, trainer = fit(tmp_path, callbacks, max_steps=100)
    (incident,) = read_incidents(tmp_path)
    assert (incident["kind"], incident["strikes"]) == ("learning-rate jump", 1)
    assert held.rates[-1] == pytest.approx(0.01)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 3.0, "the schedule is left alone"
    clean, _ = fit(tmp_path, [], max_steps=100)
    assert torch.equal(flat(held), flat(clean))


def test_veto_in_manual_optimization_leaves_a_schedule_whose_rate_is_scaled_alone(tmp_path):
    """K3: the rate that is gone back to is the scheduler's, not the one lowered for a step."""

    class Cut(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 20 and not rollback.backoff.active:
                rollback.backoff.cut(0.5, 1.0)
                rollback._executor.apply_learning_rates()

    rollback = AutoRollback(relax_after=1000)
    callbacks = [FaultInjector([NanLoss(step=40)]), Cut(), GradientMonitor(), rollback]
    _, trainer = fit(tmp_path, callbacks, TwoOptimizers, max_steps=80)
    _, bare = fit(tmp_path, [], TwoOptimizers, max_steps=80)
    rates = [[o.param_groups[0]["lr"] for o in t.optimizers] for t in (trainer, bare)]
    assert rates[0] == rates[1]


def test_held_learning_rate_is_let_go_when_the_schedule_comes_back(tmp_path, caplog):
    class Back(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx in (30, 50):
                trainer.optimizers[0].param_groups[0]["lr"] = 3.0 if batch_idx == 30 else 1e-2

    held, _ = fit(tmp_path, [Back(), *stability_callbacks()], max_steps=100)
    assert "the learning rate is no longer held" in caplog.text
    assert torch.isfinite(flat(held)).all()


class Ramp(Regression):
    """A linear model whose learning rate grows by 6 % in each step from step 50 on."""

    def __init__(self):
        super().__init__()
        self.net, self.values, self.used = nn.Linear(8, 1), [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.values.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.02)
        optimizer.register_step_post_hook(
            lambda o, *_: self.used.append(learning_rate_multiplier(o).effective()[0])
        )
        schedule = LambdaLR(optimizer, lambda step: 1.06 ** max(0, step - 50))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_schedule_that_rises_too_far_is_limited_below_where_it_failed(tmp_path):
    """A factor alone would follow the schedule to the next divergence, and to the one after."""
    callbacks = stability_callbacks()
    ramp, trainer = fit(tmp_path, callbacks, Ramp, max_steps=200)
    (incident,) = read_incidents(tmp_path)
    assert incident["cause"] == "learning rate too high"
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 1.06**150)
    assert ramp.used[-1] == pytest.approx(ramp.used[-20])
    assert ramp.used[-1] < max(ramp.used) / 2
    assert median(ramp.values[-20:]) < 2 * 0.1**2, "the noise of the data has a variance of 0.01"
    bare, _ = fit(tmp_path, [], Ramp, max_steps=200)
    assert not median(bare.values[-20:]) < 1e6


def test_settled_incident_is_left_to_whoever_settled_it(tmp_path):
    """The order of the callbacks is the order of the treatments."""

    class Pager(Callback):
        pages = 0

        def on_incident(self, trainer, pl_module, incident):
            self.pages += 1
            for p in pl_module.parameters():
                p.grad = None
            incident.resolve(SkipStep())

    pager, rollback = Pager(), AutoRollback()
    faults = FaultInjector([NanLoss(step=30, steps=2)])
    fit(tmp_path, [faults, GradientMonitor(), pager, rollback])
    assert pager.pages == 2
    assert rollback.escalation.left["skips"] == Budget().skips


def test_state_and_factors_survive_a_restart(tmp_path):
    """Monotone state: what was spent and what is in force comes back with the checkpoint."""
    first = skipping_suite()
    _, trainer = fit(tmp_path, [FaultInjector([NanLoss(step=30, steps=11)]), *first], max_steps=32)
    assert first[-1].backoff.lr_factor == 0.5
    trainer.save_checkpoint(tmp_path / "saved.ckpt")

    class Factor(Callback):
        seen = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen = self.seen or rollback.backoff.lr_factor

    second, factor = skipping_suite(), Factor()
    rollback = second[-1]
    resumed = make_trainer(tmp_path, [*second, factor], max_steps=34)
    resumed.fit(Regression(), regression_data(), ckpt_path=tmp_path / "saved.ckpt")
    assert factor.seen == 0.5
    assert rollback.escalation.left == first[-1].escalation.left


def test_bad_batch_does_not_make_the_loss_scaler_back_off(tmp_path):
    """S9: a NaN loss is none of the scaler's business."""
    scales = []
    for faults in ([], [FaultInjector([NanLoss(step=45)])]):
        _, trainer = fit(
            tmp_path, [*faults, *stability_callbacks()], plugins=fp16_on_cpu(), max_steps=55
        )
        scales.append(trainer.precision_plugin.scaler.get_scale())
    assert scales[0] == scales[1]


@pytest.mark.parametrize("option", ["snapshot_every", "confirm_after", "relax_after"])
def test_option_out_of_range_is_refused_with_its_value(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        AutoRollback(**{option: 0})


def test_infinite_learning_rate_ends_in_a_stop_with_finite_weights(tmp_path):
    """Nothing can be held, and no update is taken with it."""

    class Infinite(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step >= 30:
                trainer.optimizers[0].param_groups[0]["lr"] = float("inf")

    modules = []
    with pytest.raises(TrainingStopped, match="fix the scheduler"):
        fit(
            tmp_path,
            [Infinite(), *stability_callbacks()],
            lambda: modules.append(Regression()) or modules[0],
            max_epochs=50,
            max_steps=-1,
        )
    assert torch.isfinite(flat(modules[0])).all()
