"""Which incidents are at the place of earlier ones, and what is said of them."""

from types import SimpleNamespace

import pytest
import torch

from lit_stability import read_incidents, stability_callbacks
from lit_stability.detectors import Anomaly
from lit_stability.incidents import Incident
from lit_stability.incidents.console_lines import closing_line
from lit_stability.incidents.recurrence import same_place
from lit_stability.incidents.report import markdown
from tests.conftest import Regression, fit, regression_data


def incident(number, kind="non-finite loss", *, line=0, batch=0, epoch=0, verdict="", cause=""):
    made = Incident(
        number,
        Anomaly(kind=kind, step=10 * number, value=1.0, message="m", signal="s"),
        epoch=epoch,
        batch_idx=batch,
        verdict=verdict,
    )
    if line:
        made.origin = SimpleNamespace(
            cause="operation",
            kind="domain error",
            overflow=False,
            **{"op": "log", "phase": "forward", "module": "", "file": "loss.py", "line": line},
            tensor="",
            **{"value": "nan", "module_type": "Net"},
            describe=lambda: "log made nan",
            advice="clamp",
        )
    if cause:
        made.note(cause, "seen")
    return made


SPIKE = "gradient spike"
PLACES = {
    "the same line": ([incident(1, line=7)], incident(2, line=7, batch=3), [1]),
    "another line": ([incident(1, line=7)], incident(2, line=8), []),
    "the same line, once transient": (
        [incident(1, line=7, verdict="transient")],
        incident(2, line=7),
        [],
    ),
    "the same batch of another epoch": ([incident(1, batch=4)], incident(2, batch=4, epoch=1), [1]),
    "another batch": ([incident(1, batch=4)], incident(2, batch=5, epoch=1), []),
    "another kind": ([incident(1, batch=4)], incident(2, SPIKE, batch=4, epoch=1), []),
    "the second of a cause": (
        [incident(1, SPIKE, batch=1, cause="x")],
        incident(2, SPIKE, batch=2, cause="x"),
        [],
    ),
    "the third of a cause": (
        [incident(1, SPIKE, batch=1, cause="x"), incident(2, SPIKE, batch=2, cause="x")],
        incident(3, SPIKE, batch=3, cause="x"),
        [1, 2],
    ),
    "the third without a cause": (
        [incident(1, "divergence", batch=1), incident(2, "divergence", batch=2)],
        incident(3, "divergence", batch=3),
        [1, 2],
    ),
    "the third, of another cause": (
        [incident(1, SPIKE, batch=1, cause="x"), incident(2, SPIKE, batch=2, cause="y")],
        incident(3, SPIKE, batch=3, cause="z"),
        [],
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_same_place_returns_the_incidents_that_are_repeated(name):
    earlier, latest, expected = PLACES[name]
    assert [each.id for each in same_place(latest, earlier)] == expected


def test_texts_of_a_recurring_incident_name_the_first():
    first, second = incident(1, line=7), incident(2, line=7)
    second.repeats = [first]
    second.close("recurring", 40)
    assert "recurring (2 times since incident 1)" in closing_line(second)
    assert "* **outcome**: recurring (2 times since incident 1) at step 40" in markdown(second)


class Rooted(Regression):
    """A root of a number that is negative in one sample."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        return super().training_step(batch, batch_idx) + (2.0 - x[:, 0]).sqrt().mean() * 1e-3


def one_large_sample(batches=25):
    loader = regression_data(batches)
    x = loader.dataset.tensors[0]
    x[:, 0].clamp_(max=1.5)
    x[16 * 12, 0] = 3.0
    return loader


def test_incident_of_each_epoch_is_recurring_in_record_and_reports(tmp_path):
    callbacks = stability_callbacks()
    fit(tmp_path, callbacks, Rooted, one_large_sample(), max_epochs=3, max_steps=-1)
    incidents = callbacks[0].incidents
    assert [each.outcome for each in incidents] == ["recurring"] * 3
    assert [record["outcome"] for record in read_incidents(tmp_path)] == ["recurring"] * 3
    for report in (tmp_path / "incidents").glob("*/report.md"):
        assert "* **outcome**: recurring" in report.read_text(encoding="utf8")


def test_incident_that_comes_once_has_recovered(tmp_path):
    loader = regression_data(60)
    loader.dataset.tensors[0][16 * 30, 2] = torch.nan
    callbacks = stability_callbacks()
    fit(tmp_path, callbacks, data=loader, max_steps=50)
    assert [record["outcome"] for record in read_incidents(tmp_path)] == ["recovered"]
