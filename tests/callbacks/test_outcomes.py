"""The outcome of an incident is what became of the run."""

import logging

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    StabilityCallback,
    read_incidents,
    stability_callbacks,
)
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import Regression, fit, lines_of, regression_data


def unlearnable(batches=60):
    """Targets that have nothing to do with the inputs, and many samples: the loss stays."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(batches * 64, 8, generator=g), torch.randn(batches * 64, generator=g)
    return DataLoader(TensorDataset(x, 3 * y), 64)


class Slow(Regression):
    """Plain descent whose learning rate is almost 0 until a step, and 1e-2 from then on."""

    wakes_at = 10**6

    def __init__(self):
        super().__init__(optimizer="sgd", dropout=0.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if step >= self.wakes_at else 1e-4
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Later(Slow):
    wakes_at = 70


def run(tmp_path, *callbacks, **options):
    suite = [GradientMonitor(), AutoRollback(after_rollback="skip")]
    fit(tmp_path, [*suite, *callbacks], **options)
    return suite[0].incidents


def damages():
    """The second damage falls into the probation of the first: the learning rate is halved."""
    return FaultInjector([CorruptWeight(step=20), CorruptWeight(step=38)])


def test_run_that_learns_again_has_recovered(tmp_path):
    assert [i.outcome for i in run(tmp_path, damages())] == ["recovered", "recovered"]


def test_run_that_is_kept_at_chance_level_is_contained(tmp_path, caplog):
    incidents = run(tmp_path, damages(), module=Slow, data=unlearnable(), max_steps=60)
    assert incidents[-1].lowered
    assert incidents[-1].outcome == "contained"
    last = read_incidents(tmp_path)[-1]
    assert last["outcome"] == "contained"
    assert last["loss_after"] == pytest.approx(last["loss_before"], rel=0.2)
    assert " contained, not learning at step " in "\n".join(lines_of(caplog))


def test_contained_incident_has_recovered_when_the_run_learns_later(tmp_path, caplog):
    class Follows(StabilityCallback):
        seen = ()

        def on_incident_closed(self, trainer, pl_module, incident):
            self.seen = (*self.seen, incident.outcome)

        def on_outcome_changed(self, trainer, pl_module, incident):
            self.seen = (*self.seen, f"then {incident.outcome}")

    follows = Follows()
    incidents = run(
        tmp_path, damages(), follows, module=Later, data=regression_data(250), max_steps=240
    )
    assert follows.seen[-2:] == ("contained", "then recovered")
    assert incidents[-1].closed_step > 70
    assert read_incidents(tmp_path)[-1]["outcome"] == "recovered"
    text = "\n".join(lines_of(caplog))
    assert text.index("contained, not learning") < text.rindex(" recovered at step ")


@pytest.mark.parametrize(
    ("step", "outcome", "words"),
    [(57, "handled", "handled, the run ended before it was confirmed"), (59, "unresolved", "")],
)
def test_run_that_ends_soon_after_an_incident_says_so(step, outcome, words, tmp_path, caplog):
    suite = stability_callbacks()
    # Nothing follows the last step, which is not run again.
    fault = NanLoss(step=step, steps=10**6 if outcome == "unresolved" else 1)
    fit(
        tmp_path,
        [FaultInjector([fault]), *suite[:-1], AutoRollback(after_rollback="skip")],
        max_epochs=1,
    )
    (incident,) = suite[0].incidents
    assert incident.outcome == outcome
    assert words in caplog.text


def test_learning_rate_that_is_cut_to_nothing_is_an_alarm_in_itself(tmp_path, caplog):
    class Cuts(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx in (30, 40):
                rollback = next(c for c in trainer.callbacks if isinstance(c, AutoRollback))
                rollback.lower_learning_rate(1e-6)

    incidents = run(tmp_path, Cuts())
    assert incidents == []
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith(
        "[stability] step 30: the learning rate is cut to 1e-06 of its schedule (0.01 -> 1e-08)"
    )


def test_learning_rate_that_is_held_against_a_jump_is_no_alarm(tmp_path, caplog):
    class Jumps(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 1e7 if step >= 30 else 1.0
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    incidents = run(tmp_path, module=Jumps)
    assert [i.responses[0].split(",")[0] for i in incidents] == ["learning rate held"]
    assert [i.outcome for i in incidents] == ["recovered"]
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
