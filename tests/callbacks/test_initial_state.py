"""A state that is damaged before the first step: found once, named, and not trained on."""

import math

import pytest
import torch

from lit_stability import (
    GradientMonitor,
    StabilityCallback,
    fit_with_recovery,
    read_incidents,
    stability_callbacks,
)
from lit_stability.incidents import TrainingStopped
from tests.conftest import Regression, fit, flat, make_trainer, regression_data


def weight(saved):
    saved["state_dict"]["net.0.weight"][3, 3] = math.nan


def moment(saved):
    saved["optimizer_states"][0]["state"][0]["exp_avg_sq"][3, 3] = math.inf


def buffer(saved):
    saved["state_dict"]["net.1.running_var"][3] = math.nan


NAMES = {
    weight: "net.0.weight is non-finite",
    moment: "optimizer state of net.0.weight is non-finite",
    buffer: "net.1.running_var is non-finite",
}


def damaged_checkpoint(folder, spoil):
    """The file of a healthy run, with one damaged tensor."""
    _, trainer = fit(folder / "first", max_steps=30)
    path = folder / "saved.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    spoil(saved)
    torch.save(saved, path)
    return path


def resume(folder, callbacks, path, module=Regression):
    trainer = make_trainer(folder, callbacks, max_steps=60)
    trainer.fit(module(), regression_data(), ckpt_path=path)
    return trainer


@pytest.mark.parametrize("spoil", NAMES)
def test_resume_from_a_damaged_checkpoint_stops_before_the_first_step(spoil, tmp_path):
    path, suite = damaged_checkpoint(tmp_path, spoil), stability_callbacks()
    with pytest.raises(TrainingStopped) as stopped:
        resume(tmp_path, suite, path)
    assert NAMES[spoil] in str(stopped.value)
    assert str(path) in str(stopped.value)
    assert "older checkpoint" in str(stopped.value)
    assert "memory" not in str(stopped.value)
    (incident,) = read_incidents(tmp_path)
    assert (incident["outcome"], incident["cause"]) == ("stopped", "damaged checkpoint")
    assert incident["strikes"] == 1
    assert not list(tmp_path.rglob("good/*.ckpt"))


def test_resume_with_a_monitor_alone_names_the_tensor_and_goes_on(tmp_path, caplog):
    path, monitor = damaged_checkpoint(tmp_path, buffer), GradientMonitor()
    assert resume(tmp_path, [monitor], path).global_step == 60
    assert caplog.text.count("net.1.running_var is non-finite in the checkpoint") == 1
    assert [i.outcome for i in monitor.incidents] == ["observed"]


def test_model_that_is_given_with_a_bad_weight_stops_before_the_first_step(tmp_path):
    class Damaged(Regression):
        def __init__(self):
            super().__init__()
            self.net[4].bias.data[0] = math.inf

    seen = []

    class Pager(StabilityCallback):
        def on_incident(self, trainer, pl_module, incident):
            seen.append(incident.first.kind)

    with pytest.raises(TrainingStopped, match=r"net\.4\.bias is non-finite before the first step"):
        fit(tmp_path, [*stability_callbacks(), Pager()], Damaged)
    assert seen == ["damaged state at the start"]


class Constants(Regression):
    """Buffers and a frozen parameter that are non-finite on purpose, some of them saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("causal", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("lowest", torch.tensor(math.inf))
        self.register_buffer("unknown", torch.tensor(math.nan))
        self.register_buffer("filled_later", torch.zeros(4))
        self.table = torch.nn.Parameter(torch.full((2,), -math.inf), requires_grad=False)

    def training_step(self, batch, batch_idx):
        self.filled_later.fill_(-math.inf)
        loss = super().training_step(batch, batch_idx)
        self.lowest.copy_(torch.minimum(self.lowest, loss.detach()))
        return loss


def test_model_with_constants_that_are_not_finite_is_started_and_resumed(tmp_path):
    suite = stability_callbacks()
    module, trainer = fit(tmp_path / "suite", suite, Constants, max_steps=30)
    bare, _ = fit(tmp_path / "bare", (), Constants, max_steps=30)
    assert suite[0].incidents == []
    assert torch.equal(flat(module).nan_to_num(), flat(bare).nan_to_num())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = stability_callbacks()
    assert resume(tmp_path, again, tmp_path / "saved.ckpt", Constants).global_step == 60
    assert again[0].incidents == []


def test_recovery_does_not_start_again_from_a_damaged_checkpoint(tmp_path):
    path, made = damaged_checkpoint(tmp_path, weight), []

    def trainer(**overrides):
        options = {"max_steps": 60, **overrides}
        made.append(make_trainer(tmp_path / "again", stability_callbacks(), **options))
        return made[-1]

    with pytest.raises(TrainingStopped, match=r"net\.0\.weight"):
        fit_with_recovery(
            trainer, Regression(), train_dataloaders=regression_data(), ckpt_path=path
        )
    assert len(made) <= 2
