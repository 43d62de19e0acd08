"""The callback in real fits: what it does to a run in danger, and nothing to one that is not."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lit_stability import (
    CrashPrediction,
    GradientMonitor,
    PrecisionFallback,
    TrainingStopped,
    stability_callbacks,
)
from lit_stability.faults import FaultInjector, NanLoss, ScaleGradients
from lit_stability.policies.crash_risk import RiskLevels
from tests.conftest import Regression, fit, flat, make_trainer, regression_data
from tests.distributed import run_ranks
from tests.rank_cases import fit_rank, whole

OFF = {"save": None, "slow": None, "precision": None}


def only(**levels):
    """Levels of which those given are reached by any risk at all."""
    return RiskLevels(**(OFF | dict.fromkeys(levels, 1e-6)))


class Ramp(LightningModule):
    """A ReLU net with momentum SGD, whose learning rate may climb without end from step 60 on."""

    def __init__(self, per_step):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        )
        self.per_step, self.losses = per_step, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)
        ramp = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.per_step ** max(0, step - 60)
        )
        return [optimizer], [{"scheduler": ramp, "interval": "step"}]

    def final(self):
        return sum(self.losses[-50:]) / 50


def noisy_data(steps=280):
    g = torch.Generator().manual_seed(1)
    inner, outer = torch.randn(16, 8, generator=g) / 4, torch.randn(8, 1, generator=g) / 2
    made = []
    for _ in range(steps):
        x = torch.randn(64, 16, generator=g)
        noise = 0.3 * torch.randn(64, 1, generator=g)
        made.append((x, torch.tanh(x @ inner) @ outer + noise))
    return DataLoader(made, None)


def ramp(root, per_step, callbacks):
    module, _ = fit(root, callbacks, lambda: Ramp(per_step), noisy_data(), seed=1, max_steps=280)
    return module


def test_prediction_keeps_a_run_alive_whose_rate_climbs_without_end(tmp_path):
    """S16: without it the loss is NaN; with it the run trains on, near its twin."""
    lost = ramp(tmp_path, 1.025, [GradientMonitor()])
    twin = ramp(tmp_path, 1.0, [GradientMonitor()])
    kept = ramp(tmp_path, 1.025, [GradientMonitor(), CrashPrediction()])
    assert not math.isfinite(lost.losses[-1])
    assert torch.isfinite(flat(kept)).all()
    assert kept.final() < 4 * twin.final()


def test_prediction_in_a_calm_run_changes_no_bit(tmp_path):
    """Invariant 1."""
    callback = CrashPrediction()
    bare, bare_trainer = fit(tmp_path)
    with_it, trainer = fit(tmp_path, [GradientMonitor(), callback])
    assert 0 < callback.risk < 0.3
    assert torch.equal(flat(with_it), flat(bare))
    assert with_it.losses == bare.losses
    assert trainer.logged_metrics == bare_trainer.logged_metrics


def test_prediction_saves_a_checkpoint_once_an_episode_that_a_fit_goes_on_from(tmp_path, caplog):
    """S16."""
    callback = CrashPrediction(levels=only(save=True))
    fit(tmp_path, [GradientMonitor(), callback])
    [file] = (tmp_path / "risk").iterdir()
    # Twenty steps make a recent window and a baseline; the risk is known after the twentieth.
    assert file.name == "step=00000020.ckpt"
    assert [m for m in caplog.messages if "risk" in m] == [
        m for m in caplog.messages if f"saved {file}" in m
    ]
    resumed = make_trainer(tmp_path, [GradientMonitor(), CrashPrediction()], max_steps=40)
    resumed.fit(Regression(), regression_data(), ckpt_path=file)
    assert resumed.global_step == 40


def test_prediction_halves_the_rate_and_says_why_once(tmp_path, caplog):
    """S16: the rate is halved for the next step, and the clip is in force."""
    callback = CrashPrediction(levels=only(slow=True))
    monitor = GradientMonitor()
    fit(
        tmp_path, [monitor, callback], log_every_n_steps=1, logger=CSVLogger(tmp_path), max_steps=30
    )
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    head, *rows = [line.split(",") for line in text.splitlines()]
    column = head.index("stability/learning_rate_factor")
    factors = [float(row[column]) for row in rows if row[column]]
    assert factors == [1.0] * 20 + [0.5] * 10
    (line,) = [m for m in caplog.messages if "learning rate x" in m]
    assert "of a divergence within 20 steps (" in line
    assert line.endswith("learning rate x0.5, clip x0.5")
    risks = [float(row[head.index("stability/risk")] or -1) for row in rows]
    assert sum(0 <= risk <= 1 for risk in risks) == 30


@pytest.mark.parametrize(
    ("precision", "more", "during", "message"),
    [
        ("bf16-mixed", [], "32-true", "precision bf16-mixed -> 32-true"),
        ("bf16-mixed", [PrecisionFallback], "bf16-mixed", "PrecisionFallback changes it"),
        ("bf16-true", [], "bf16-true", "would be permanent"),
        ("32-true", [], "32-true", None),
    ],
)
def test_prediction_widens_mixed_precision_and_gives_it_back(
    tmp_path, caplog, precision, more, during, message
):
    """S16: where it cannot, the reason is logged once."""
    seen = []

    class Spy(CrashPrediction):
        def on_train_batch_start(self, trainer, *args):
            seen.append(str(trainer.precision))

    callbacks = [GradientMonitor(), *(cls() for cls in more), Spy(levels=only(precision=True))]
    _, trainer = fit(tmp_path, callbacks, precision=precision, max_steps=40)
    assert seen[:20] == [precision] * 20
    assert seen[20:] == [during] * 20
    assert str(trainer.precision) == precision
    assert sum("precision" in m for m in caplog.messages) == (message is not None)
    assert message is None or any(message in m for m in caplog.messages)


def test_prediction_gives_the_precision_back_when_the_episode_is_over(tmp_path):
    seen = []

    class Calming(CrashPrediction):
        def on_train_batch_start(self, trainer, *args):
            seen.append(str(trainer.precision))
            if len(seen) == 26:
                self.prevention.levels = RiskLevels(**OFF)

    callbacks = [GradientMonitor(), Calming(levels=only(precision=True))]
    fit(tmp_path, callbacks, precision="bf16-mixed", max_steps=50)
    # From the step after the twentieth, to the end of 20 calm steps.
    assert seen == ["bf16-mixed"] * 20 + ["32-true"] * 25 + ["bf16-mixed"] * 5


def test_prediction_stops_only_where_asked_to_with_the_reason(tmp_path):
    """S16."""
    levels = RiskLevels(**(OFF | {"save": 1e-6, "stop": 1e-6}))
    with pytest.raises(TrainingStopped, match=r"risk 0\.\d+ of a divergence .*saved .*risk/step"):
        fit(tmp_path, [GradientMonitor(), CrashPrediction(levels=levels)])


def test_prediction_goes_on_from_a_checkpoint_with_what_is_bound(tmp_path):
    """The rate stays halved, and the risk is that of a run that was not interrupted."""
    levels = only(slow=True)
    through = CrashPrediction(levels=levels)
    fit(tmp_path, [GradientMonitor(), through], max_steps=50)

    first = CrashPrediction(levels=levels)
    _, trainer = fit(tmp_path, [GradientMonitor(), first], max_steps=30)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = CrashPrediction(levels=levels)
    resumed = make_trainer(tmp_path, [GradientMonitor(), second], max_steps=50)
    resumed.fit(Regression(), regression_data(), ckpt_path=tmp_path / "half.ckpt")
    assert second.prevention.state_dict()["ceiling"] == through.prevention.state_dict()["ceiling"]
    assert (
        second.prevention.state_dict()["since_cut"] == through.prevention.state_dict()["since_cut"]
    )


@pytest.mark.parametrize("order", ["before the suite's responders", "after"])
def test_prediction_beside_the_suite_takes_a_bad_batch_as_if_it_never_came(tmp_path, order):
    """Invariants 3 and 7: what a rejected step showed is neither learnt nor acted upon."""

    def run(faults):
        prediction, suite = CrashPrediction(), stability_callbacks()
        both = [*suite, prediction] if order == "after" else [suite[0], prediction, *suite[1:]]
        callbacks = [FaultInjector(faults), *both] if faults else both
        module, _ = fit(tmp_path / str(len(faults)), callbacks)
        return flat(module), prediction.state_dict()

    (weights, state), (clean, expected) = run([NanLoss(step=35)]), run([])
    assert torch.equal(weights, clean)
    assert state["prevention"] == expected["prevention"]
    assert learnt(state) == learnt(expected)


def learnt(state):
    """But for the update's signal: of a step that is retried it has not been measured."""
    signals = state["learnt"]["0"]["risk"]["trends"]["signals"]
    return {name: signals[name] for name in ("loss", "gradient", "rate")}


def ranks_case(root):
    callback = CrashPrediction(levels=only(save=True, slow=True))
    # Only rank 1 sees that this step is bad; rank 0 has called it healthy by then.
    faults, suite = FaultInjector([ScaleGradients(step=30, rank=1)]), stability_callbacks()
    callbacks = [faults, suite[0], callback, *suite[1:]]
    net, _ = fit_rank(root, "ddp", callbacks)
    return whole(net.parameters()), callback.state_dict(), sorted(root.rglob("risk/*.ckpt"))


@pytest.mark.slow
def test_prediction_on_two_ranks_decides_alike(tmp_path):
    """Invariant 5."""
    first, second = run_ranks(ranks_case, tmp_path, folder=tmp_path)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[1]["prevention"]["given"] == ["save", "slow"]
    assert [file.name for file in first[2]] == ["step=00000020.ckpt"]


@pytest.mark.parametrize("option", ["keep", "relax_after"])
def test_prediction_with_an_option_out_of_range_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        CrashPrediction(**{option: 0})
