"""S15: an incident says in which operation, module and line its NaN was born."""

import inspect
import json
from collections import deque

import pytest
import torch
from torch import nn

from lit_stability import (
    AnomalyCheckpoint,
    AutoRollback,
    GradientMonitor,
    NonFiniteLocator,
    read_incidents,
)
from lit_stability.faults import CorruptGradient, FaultInjector
from tests.conftest import Regression, by_hand, fit, flat, lines_of


def is_bad(module, batch, batch_idx):
    """Whether this is the batch that came at a given index first."""
    if batch_idx == module.bad:
        module.last.setdefault("bad", batch[0].sum().item())
    return batch[0].sum().item() == module.last.get("bad")


class Logarithm(Regression):
    """The batch of step 30 has the logarithm of 0; dropout and BatchNorm are at work."""

    bad = 30

    def __init__(self, **options):
        super().__init__(**options)
        self.calls, self.seen, self.last = 0, deque(), {}

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.seen.append(batch_idx)
        self.last["batch"] = batch_idx
        loss = super().training_step(batch, batch_idx)
        if is_bad(self, batch, batch_idx):
            loss = loss + torch.log(loss.detach() * 0.0) * self.net(batch[0]).mean()
        return loss


LINE = next(
    inspect.getsourcelines(Logarithm)[1] + i
    for i, line in enumerate(inspect.getsourcelines(Logarithm)[0])
    if "torch.log(" in line
)


def suite():
    return [GradientMonitor(), AnomalyCheckpoint(), NonFiniteLocator(), AutoRollback()]


def test_origin_is_named_on_the_console_in_the_record_and_in_the_report(tmp_path, caplog):
    callbacks = suite()
    fit(tmp_path, callbacks, Logarithm, max_steps=50)
    (incident,) = callbacks[0].incidents
    origin = incident.origin
    assert (origin.op, origin.module, origin.phase) == ("log", "", "forward")
    assert (origin.file, origin.line) == (__file__, LINE)
    opened = next(line for line in lines_of(caplog) if line.startswith("incident"))
    assert "non-finite loss: log made -inf; certain cause: operation outside its domain" in opened
    assert f"where: log in Logarithm, test_nonfinite_locator.py:{LINE}, forward pass; " in opened
    (record,) = read_incidents(tmp_path)
    assert record["origin"]["line"] == LINE
    assert json.loads(json.dumps(record["origin"])) == origin.as_dict()
    report = next((tmp_path / "incidents").glob("*/report.md")).read_text(encoding="utf8")
    assert f"test_nonfinite_locator.py:{LINE}" in report
    assert incident.remedy == origin.advice
    assert incident.cause == "operation outside its domain"
    assert incident.likely_causes[0].certainty == "certain"


def test_search_leaves_no_trace_in_training_nor_in_what_the_module_counts(tmp_path):
    """Invariants 1 and 7: with and without the search, the same run to the bit."""
    runs = []
    for callbacks in (suite(), [GradientMonitor(), AutoRollback()]):
        module, _ = fit(tmp_path, callbacks, Logarithm, max_steps=50)
        runs.append(module)
    searched, plain = runs
    assert torch.equal(flat(searched), flat(plain))
    assert searched.calls == plain.calls
    assert searched.losses == pytest.approx(plain.losses, nan_ok=True)
    assert searched.seen == plain.seen
    assert searched.last == plain.last


def test_nan_from_outside_is_not_found_again_and_that_is_evidence(tmp_path):
    callbacks = [FaultInjector([CorruptGradient(step=30)]), *suite()]
    fit(tmp_path, callbacks, max_steps=50)
    (incident,) = callbacks[1].incidents
    assert incident.origin is None
    assert "run again in isolation, the step is finite" in incident.evidence
    assert incident.verdict == "transient"


class Fragile(Logarithm):
    """Cannot run one batch twice."""

    def training_step(self, batch, batch_idx):
        if is_bad(self, batch, batch_idx) and self.last.get("batch") == 30:
            raise RuntimeError("seen already")
        return super().training_step(batch, batch_idx)


def test_step_that_cannot_be_run_twice_does_not_end_the_run(tmp_path, caplog):
    callbacks = [GradientMonitor(), NonFiniteLocator(), AutoRollback(after_rollback="skip")]
    _, trainer = fit(tmp_path, callbacks, Fragile, max_steps=50)
    assert trainer.global_step == 50
    assert "not found (RuntimeError: seen already); training continues" in caplog.text


def test_nothing_is_searched_for_in_manual_optimization(tmp_path):
    callbacks = suite()
    module, _ = fit(tmp_path, callbacks, by_hand(Logarithm), max_steps=50)
    (incident,) = callbacks[0].incidents
    assert incident.origin is None
    assert not any("run again in isolation" in line for line in incident.evidence)
    assert torch.isfinite(flat(module)).all()


class Window(Regression):
    """A root of 0 in the first batch of an accumulation window: its gradient is infinite."""

    bad = 20

    def __init__(self, **options):
        super().__init__(**options)
        self.last = {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if is_bad(self, batch, batch_idx):
            loss = loss + (self.net[0].weight * 0.0).sqrt().sum() * 0.0
        return loss


def test_first_batch_of_an_accumulation_window_is_searched_too(tmp_path):
    callbacks = suite()
    fit(tmp_path, callbacks, Window, max_steps=20, accumulate_grad_batches=2)
    origin = callbacks[0].incidents[0].origin
    assert (origin.op, origin.phase) == ("sqrt", "backward")
    assert (
        "sqrt()"
        in inspect.getsource(Window).splitlines()[origin.line - inspect.getsourcelines(Window)[1]]
    )


def test_locator_without_a_monitor_is_an_error_with_the_line_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"GradientMonitor\(\), ..., NonFiniteLocator\(\)"):
        fit(tmp_path, [NonFiniteLocator()], max_steps=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_module_is_searched_eagerly(tmp_path):
    class Compiled(Regression):
        def __init__(self):
            super().__init__()
            self.net[2] = torch.compile(nn.Sequential(nn.ReLU(), Root()), backend="eager")

    callbacks = [GradientMonitor(), NonFiniteLocator()]
    fit(tmp_path, callbacks, Compiled, max_steps=4)
    origin = callbacks[0].incidents[0].origin
    assert origin.op in ("log", "sub")
    assert "eagerly" in origin.note


class Root(nn.Module):
    def forward(self, x):
        return x + torch.log(x * 0.0) * 0.0
