import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_stability import Anomaly, GradientMonitor, read_incidents, stability_callbacks
from lit_stability.detectors import default_detectors
from lit_stability.faults import CorruptGradient, CorruptWeight, FaultInjector, NanLoss
from tests.conftest import Regression, fit, flat, skipping_suite


class Steps(Callback):
    def __init__(self):
        self.stats = []

    def on_healthy_step(self, trainer, pl_module, stats):
        self.stats.append(stats)


def test_norms_and_loss_are_those_of_the_accumulated_unclipped_gradient(tmp_path):
    """S6, S10: over a window of 3, before clipping to 1e-3, the loss is the window's mean."""

    class Truth(Callback):
        norms, losses, window = (), (), ()

        def on_after_backward(self, trainer, pl_module):
            grads = [p.grad for p in pl_module.parameters()]
            self.now = float(torch.cat([g.flatten() for g in grads]).norm())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.window = (*self.window, pl_module.losses[-1])
            if (batch_idx + 1) % 3 == 0:
                self.norms = (*self.norms, self.now)
                self.losses = (*self.losses, sum(self.window) / 3)
                self.window = ()

    steps, truth = Steps(), Truth()
    fit(
        tmp_path,
        [GradientMonitor(), steps, truth],
        accumulate_grad_batches=3,
        gradient_clip_val=1e-3,
        max_steps=10,
    )
    assert [s.grad_norm for s in steps.stats] == pytest.approx(truth.norms, rel=1e-5)
    assert [s.loss for s in steps.stats] == pytest.approx(truth.losses, rel=1e-5)
    assert [s.step for s in steps.stats] == list(range(10))


def test_loss_under_a_scaler_is_reported_unscaled(tmp_path):
    """S9, S10: what is compared with the window is the loss the user knows."""
    from tests.test_invariants import fp16_on_cpu

    steps = Steps()
    module, _ = fit(tmp_path, [GradientMonitor(), steps], plugins=fp16_on_cpu(), max_steps=40)
    taken = {round(s.loss, 4) for s in steps.stats}
    assert taken <= {round(x, 4) for x in module.losses}
    assert steps.stats[-1].loss_scale < 2.0**24


def test_scaler_searching_from_a_high_scale_is_no_incident(tmp_path):
    """S9: overflows that the loss scaler handles are its business."""
    from tests.test_invariants import fp16_on_cpu

    _, trainer = fit(tmp_path, stability_callbacks(), plugins=fp16_on_cpu(), max_steps=50)
    assert trainer.precision_plugin.scaler.get_scale() < 2.0**24, "it did overflow"
    assert not (tmp_path / "incidents.jsonl").exists()


def test_weights_are_scanned_though_no_gradient_shows_the_damage(tmp_path):
    """N3, S3: a NaN in a weight that the loss does not use is found by the scan, by name."""

    class Unused(Regression):
        def __init__(self):
            super().__init__()
            self.spare = torch.nn.Parameter(torch.zeros(3))

    callbacks = [FaultInjector([CorruptWeight(step=33, parameter="spare")]), *stability_callbacks()]
    module, _ = fit(tmp_path, callbacks, Unused)
    (incident,) = read_incidents(tmp_path)
    assert (incident["kind"], incident["layers"][0][0]) == ("non-finite weight", "spare")
    assert 33 <= incident["step"] <= 43
    assert torch.isfinite(flat(module)).all()


def test_layer_bound_is_kept_for_the_layers_it_names(tmp_path):
    """S18: different bounds for different layers."""
    monitor = GradientMonitor(layer_bounds={"net.0.weight": 1e-6, "*": 1e6})
    fit(tmp_path, [monitor], max_steps=5)
    (incident,) = monitor.incidents
    assert incident.first.kind == "layer bound"
    assert [name for name, _ in incident.first.layers] == ["net.0.weight"]


def test_own_detector_is_asked_after_the_default_ones(tmp_path):
    class EverySeventh:
        def check(self, stats):
            if stats.step == 0 or stats.step % 7:
                return None
            return Anomaly(
                kind="layer bound", step=stats.step, value=7.0, signal="step", message="a seventh"
            )

        def update(self, stats):
            pass

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    monitor = GradientMonitor(detectors=[*default_detectors(), EverySeventh()], close_after=3)
    fit(tmp_path, [monitor], max_steps=20)
    assert [i.first.step for i in monitor.incidents] == [7, 14]
    assert {i.outcome for i in monitor.incidents} == {"observed"}


def test_record_has_a_line_per_opening_and_closing(tmp_path):
    """S17: what happened, what was done, whether it helped."""
    faults = [NanLoss(step=20), CorruptGradient(step=45, steps=3)]
    fit(tmp_path, [FaultInjector(faults), *skipping_suite()])
    lines = [json.loads(x) for x in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [(x["event"], x["id"], x["strikes"]) for x in lines] == [
        ("open", 1, 1), ("close", 1, 1), ("open", 2, 1), ("close", 2, 3)
    ]  # fmt: skip
    assert {x["schema"] for x in lines} == {1}
    assert lines[3]["responses"] == ["step skipped"] * 3
    assert lines[3]["outcome"] == "recovered"
    assert lines[3]["remedy"]


def test_incident_open_at_the_end_is_closed_in_the_record(tmp_path, caplog):
    callbacks = [FaultInjector([NanLoss(step=58)]), *stability_callbacks()]
    fit(tmp_path, callbacks, max_steps=60)
    assert [i["outcome"] for i in read_incidents(tmp_path)] == ["handled"]
    assert "summary: 1 incident, one cause: " in caplog.text


def test_exception_in_the_fit_closes_the_record(tmp_path):
    class Dies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 32:
                raise KeyError("disk")

    callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks(), Dies()]
    with pytest.raises(KeyError):
        fit(tmp_path, callbacks)
    assert [i["outcome"] for i in read_incidents(tmp_path)] == ["handled"]


def test_lightning_module_is_offered_the_incident_last(tmp_path):
    class Told(Regression):
        told = ()

        def on_incident(self, trainer, pl_module, incident):
            self.told = (*self.told, (incident.first.kind, incident.resolved))

        def on_incident_closed(self, trainer, pl_module, incident):
            self.told = (*self.told, incident.outcome)

    module, _ = fit(tmp_path, [FaultInjector([NanLoss(step=30)]), *stability_callbacks()], Told)
    assert module.told == (("non-finite loss", True), "recovered")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("close_after", 0, "close_after must be at least 1, got 0"),
        ("scan_weights_every", -1, "scan_weights_every must be at least 1, got -1"),
        ("details_every", -1, "details_every must be 0 .never. or more, got -1"),
        ("layer_bounds", {"*": 0.0}, r"bound of '\*' must be greater than 0, got 0.0"),
    ],
)
def test_option_out_of_range_is_refused_with_its_value(option, value, message):
    with pytest.raises(ValueError, match=message):
        GradientMonitor(**{option: value})


def test_parameters_given_to_the_optimizer_later_are_watched_too(tmp_path):
    """As when a backbone is unfrozen: a NaN there is seen, and a rollback still works."""

    class Thaws(Regression):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.net[4].parameters(), 1e-2)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 20 and self.current_epoch == 0:
                self.optimizers().optimizer.add_param_group({"params": self.net[0].parameters()})

    callbacks = [FaultInjector([CorruptWeight(step=40, parameter="net.0.weight")])]
    module, _ = fit(tmp_path, [*callbacks, *stability_callbacks()], Thaws)
    (incident,) = read_incidents(tmp_path)
    assert incident["layers"][0][0] == "net.0.weight"
    assert torch.isfinite(flat(module)).all()


def test_checkpoint_of_non_finite_weights_is_spoken_of(tmp_path, caplog):
    """Nobody saves a NaN in silence, even where no step has shown it yet."""

    class Spoils(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                pl_module.net[0].weight.data.view(-1)[0] = float("nan")
                trainer.save_checkpoint(tmp_path / "bad.ckpt")

    fit(tmp_path, [GradientMonitor(), Spoils()], max_steps=5)
    assert "saved at step 5 has non-finite weights, first net.0.weight" in caplog.text


def test_damage_done_by_the_very_last_step_is_spoken_of(tmp_path, caplog):
    """No step follows that could show it."""

    class Spoils(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                pl_module.net[0].weight.data.view(-1)[0] = float("nan")

    fit(tmp_path, [GradientMonitor(), Spoils()], max_steps=5)
    assert "the fit ends with non-finite weights, first net.0.weight" in caplog.text


def test_gradient_below_its_lower_bound_is_told_once_and_the_steps_are_taken(tmp_path):
    """S6, V1: not at the first small value, and never by skipping."""
    monitor = GradientMonitor(layer_bounds={"net.0.weight": (1e6, 1e9)})
    module, _ = fit(tmp_path, [monitor, *stability_callbacks()[1:]], max_steps=120)
    (incident,) = monitor.incidents
    assert (incident.first.kind, incident.first.step) == ("layer bound", 49)
    assert "for 50 steps below its bound" in incident.first.message
    assert (incident.responses, incident.outcome) == ([], "observed")
    clean, _ = fit(tmp_path, [], max_steps=120)
    assert torch.equal(flat(module), flat(clean))
