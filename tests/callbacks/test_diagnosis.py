"""`Diagnosis` in a Trainer: what it names, what follows, and that healthy runs do not see it."""

import csv
import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import (
    AnomalyCheckpoint,
    AutoRollback,
    Diagnosis,
    GradientMonitor,
    TrainingStopped,
    read_incidents,
    stability_callbacks,
)
from lit_stability.detectors import Anomaly, default_detectors
from lit_stability.faults import FaultInjector, NanLoss, ScaleGradients
from lit_stability.incidents.report import responses_text
from lit_stability.measurement.step_stats import ProbeReading
from tests.conftest import Regression, fit, flat, lines_of, regression_data


def suite(*before, **options):
    return [GradientMonitor(), AnomalyCheckpoint(), Diagnosis(**options), *before, AutoRollback()]


def poisoned(index, batches=60):
    """Data of which one sample of one batch is NaN."""
    loader = regression_data(batches)
    loader.dataset.tensors[0][16 * index + 3, 2] = torch.nan
    return loader


def test_poisoned_batch_is_named_in_incident_record_and_report(tmp_path):
    """N5, S15, S17, V5."""
    callbacks = suite()
    fit(tmp_path, callbacks, data=poisoned(30), max_steps=50)
    (incident,) = callbacks[0].incidents
    best = incident.likely_causes[0]
    assert (incident.cause, best.certainty) == ("bad batch", "certain")
    assert "1 of 128 values are NaN or infinite (batch[0])" in best.evidence[0]
    assert incident.verdict == "deterministic"
    (record,) = read_incidents(tmp_path)
    assert record["cause"] == "bad batch"
    assert record["hypotheses"][0]["leave"]
    assert record["checks"][0].startswith("within the first 1000 steps? yes")
    assert record["since"] == 30
    json.dumps(record["hypotheses"])
    report = next((tmp_path / "incidents").glob("*/report.md")).read_text(encoding="utf8")
    for part in ("1. **bad batch** (certain)", "to try: look at the batch", "when to ignore: if"):
        assert part in report


def test_poisoned_batch_is_named_where_others_of_its_step_follow_it(tmp_path):
    callbacks = stability_callbacks()
    options = {"max_steps": 20, "accumulate_grad_batches": 3}
    fit(tmp_path, callbacks, data=poisoned(30), **options)
    (incident,) = callbacks[0].incidents
    assert (incident.cause, incident.likely_causes[0].certainty) == ("bad batch", "certain")


def test_fault_that_does_not_return_is_a_glitch_and_data_are_not_blamed(tmp_path, caplog):
    callbacks = [FaultInjector([NanLoss(step=30)]), *suite()]
    fit(tmp_path, callbacks, max_steps=50)
    (incident,) = callbacks[1].incidents
    assert incident.cause == "glitch"
    assert incident.remedy.startswith("nothing in data or model")


def test_likely_cause_is_in_the_line_on_the_console(tmp_path, caplog):
    fit(tmp_path, suite(), data=poisoned(30), max_steps=50)
    opened = next(line for line in lines_of(caplog) if line.startswith("incident"))
    assert "; certain cause: bad batch\n" in opened
    assert "done: step retried. To do: look at the batch" in opened


class TooFast(Regression):
    """Plain descent with momentum whose learning rate doubles every 15 steps from step 40 on."""

    def __init__(self):
        super().__init__(optimizer="sgd")
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 2.0 ** max(0.0, (step - 40) / 15)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def endless():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64 * 16, 8, generator=g)
    y = x @ torch.arange(8.0) / 8
    return DataLoader(TensorDataset(x, y), 16)


def test_learning_rate_that_is_too_high_is_lowered_at_once_and_not_tried_again(tmp_path):
    """S2, S16: the batches are not to blame, and none is left out."""
    callbacks = suite()
    module, _ = fit(tmp_path, callbacks, TooFast, endless(), max_steps=250, max_epochs=-1)
    assert torch.isfinite(flat(module)).all()
    first = callbacks[0].incidents[0]
    assert first.cause == "learning rate too high", [h.text() for h in first.likely_causes]
    assert first.responses[0].startswith("rolled back and replayed, learning rate x")
    assert not any("skipped" in responses_text(i) for i in callbacks[0].incidents)


class Finds:
    """A detector that is certain of a kind at one step."""

    def __init__(self, kind, step, **options):
        self.kind, self.step, self.options = kind, step, options

    def check(self, stats):
        if stats.step != self.step:
            return None
        seen = {"value": 0.0, "message": "it has collapsed", "signal": "probe"}
        return Anomaly(kind=self.kind, step=stats.step, **(seen | self.options))

    def update(self, stats):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("warn_only", [False, True])
def test_certain_architectural_cause_ends_the_fit_with_its_diagnosis(warn_only, tmp_path):
    """The right response is a named diagnosis and an early stop, not a loop of rollbacks."""
    finds = Finds("attention collapse", 30, warn_only=warn_only)
    callbacks = [GradientMonitor(detectors=[*default_detectors(), finds]), *suite()[1:]]
    with pytest.raises(TrainingStopped, match=r"attention-logit growth.*normalise queries") as stop:
        fit(tmp_path, callbacks, max_steps=50)
    assert stop.value.incident.occurrences == 1
    assert stop.value.incident.outcome == "stopped"


def test_certain_architectural_cause_is_only_reported_where_no_stop_is_wanted(tmp_path):
    finds = Finds("attention collapse", 30, warn_only=True)
    callbacks = [GradientMonitor(detectors=[finds]), *suite(stop_on_certain_cause=False)[1:]]
    _, trainer = fit(tmp_path, callbacks, max_steps=50)
    assert trainer.global_step == 50
    (incident,) = callbacks[0].incidents
    assert (incident.cause, responses_text(incident)) == ("attention-logit growth", "")


def test_without_a_diagnosis_nothing_is_stopped_but_the_cause_is_named(tmp_path):
    finds = Finds("attention collapse", 30, warn_only=True)
    callbacks = [GradientMonitor(detectors=[finds]), AutoRollback()]
    _, trainer = fit(tmp_path, callbacks, max_steps=50)
    assert trainer.global_step == 50
    assert callbacks[0].incidents[0].cause == "attention-logit growth"


class Probe(GradientMonitor):
    """A monitor that is its own probe, every tenth step."""

    def probe_readings(self, trainer, pl_module):
        if trainer.global_step % 10:
            return None
        return [ProbeReading("attention_logit", "net", float(trainer.global_step))]

    def on_step_measured(self, trainer, pl_module, stats):
        self.readings = [*getattr(self, "readings", []), *stats.readings]


def test_readings_of_a_probe_are_part_of_what_is_measured(tmp_path):
    probe = Probe()
    fit(tmp_path, [probe], max_steps=35)
    assert [r.value for r in probe.readings] == [0.0, 10.0, 20.0, 30.0]


def test_readings_reach_the_loggers_whatever_steps_they_log(tmp_path):
    """V4: a probe measures on steps of its own, which other metrics need not be logged on."""
    logger = CSVLogger(tmp_path, "", "")
    fit(tmp_path, [Probe()], max_steps=35, logger=logger, log_every_n_steps=7)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    seen = [row["stability/attention_logit/net"] for row in rows]
    assert [float(x) for x in seen if x] == [0.0, 10.0, 20.0, 30.0]


def test_phase_and_its_range_are_reported(tmp_path):
    """V3."""
    callbacks = [FaultInjector([ScaleGradients(step=130, factor=1e4)]), *suite()]
    fit(tmp_path, callbacks, max_steps=150, max_epochs=-1)
    (incident,) = callbacks[1].incidents
    context = incident.current_context
    assert context.phase == "descent"
    assert context.phase_range.low < context.phase_range.high < incident.first.value
    assert context.restorable is True


def test_history_forgets_what_was_taken_back(tmp_path):
    """Invariant 3: replayed steps are not counted twice."""
    seen = {}

    class Look(Diagnosis):
        def on_train_end(self, trainer, pl_module):
            seen["steps"] = [s.step for s in self._history]

    faults = FaultInjector([ScaleGradients(step=30, steps=12, factor=1e4)])
    fit(tmp_path, [faults, GradientMonitor(), Look(), AutoRollback()], max_steps=50)
    assert seen["steps"] == sorted(set(seen["steps"]))


def test_closed_incident_keeps_its_causes_and_not_the_steps_they_come_from(tmp_path):
    """Memory: a run of many incidents holds the steps of the open one only."""
    callbacks = suite()
    fit(tmp_path, callbacks, data=poisoned(30), max_steps=50)
    (incident,) = callbacks[0].incidents
    assert incident.context.history == ()
    (record,) = read_incidents(tmp_path)
    assert [h.as_dict() for h in incident.likely_causes] == record["hypotheses"]
    assert (incident.since, incident.checks) == (record["since"], record["checks"])
    assert len(incident.checks) == 4


def test_healthy_run_is_the_same_with_a_diagnosis(tmp_path):
    """Invariant 1."""
    runs = []
    for callbacks in (stability_callbacks(), [GradientMonitor(), AutoRollback()], []):
        module, _ = fit(tmp_path, callbacks, max_steps=50)
        runs.append(flat(module))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_history_too_short_to_compare_with_is_refused():
    with pytest.raises(ValueError, match="history must be at least 20 steps, got 5"):
        Diagnosis(history=5)


class Weighted(Regression):
    """Weighs samples by a constant, of which one element is infinite."""

    def __init__(self):
        super().__init__()
        self.weights = torch.ones(16)
        self.weights[3] = torch.inf

    def training_step(self, batch, batch_idx):
        x, y = batch
        error = (self.net(x).squeeze(-1) - y.squeeze(-1)).square()
        return (error * self.weights).mean()


class Buffered(Weighted):
    """The same as a buffer."""

    def __init__(self):
        super().__init__()
        weights = self.weights
        del self.weights
        self.register_buffer("weights", weights)


@pytest.mark.parametrize("module", [Weighted, Buffered])
def test_constant_of_the_module_is_named_and_the_batch_is_ruled_out(module, tmp_path, caplog):
    callbacks = stability_callbacks()
    with pytest.raises(TrainingStopped):
        fit(tmp_path, callbacks, module, max_steps=20)
    (incident,) = callbacks[0].incidents
    assert incident.cause == "non-finite constant", incident.likely_causes
    assert "bad batch" in [each.cause for each in incident.ruled_out]
    (record,) = read_incidents(tmp_path)
    assert "bad batch" in [cause for cause, _ in record["ruled_out"]]
    report = next((tmp_path / "incidents").glob("*/report.md")).read_text(encoding="utf8")
    assert "### Ruled out\n\n* bad batch (" in report


def test_burst_of_large_gradients_under_an_ordinary_loss_blames_no_rate(tmp_path):
    callbacks = [FaultInjector([ScaleGradients(step=40, factor=1e3, steps=5)]), *suite()]
    fit(tmp_path, callbacks, max_steps=55)
    incident = callbacks[1].incidents[0]
    assert incident.cause in ("exploding gradient", "glitch", ""), incident.likely_causes
    assert not any("learning rate x" in response for response in incident.responses[:1])


def test_console_and_report_end_with_the_same_cause(tmp_path, caplog):
    callbacks = stability_callbacks()
    fit(tmp_path, callbacks, TooFast, endless(), max_steps=150, max_epochs=-1)
    closed = [line for line in lines_of(caplog) if " at step " in line.split(":")[0]]
    reports = [(i.id, i.cause or "unknown") for i in callbacks[0].incidents if i.closed_step]
    assert reports
    for number, cause in reports:
        *_, line = [each for each in closed if each.startswith(f"incident {number} ")]
        assert line.endswith((f"cause: {cause}", f"cause {cause}"))
        (path,) = (tmp_path / "incidents").glob(f"*-{number}/report.md")
        assert f"* **cause**: {cause}\n" in path.read_text(encoding="utf8")


def test_diagnosis_of_batches_that_cannot_be_examined_trains_on(tmp_path):
    def collate(samples):
        x, y = (torch.stack(each) for each in zip(*samples, strict=True))
        return [x.to_sparse(), y]

    class Sparse(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].to_dense(), batch[1]], batch_idx)

    data = DataLoader(regression_data(10).dataset, 16, collate_fn=collate)
    _, trainer = fit(tmp_path, suite(), Sparse, data, max_steps=8)
    assert trainer.global_step == 8
