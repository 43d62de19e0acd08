"""What a run leaves in its folder, and the same read back."""

import json
import math

import pytest

from lit_stability.cli.experiments import Ending, Expectation, Outcome, judge
from lit_stability.cli.experiments.outcome import incidents_since, write_outcome
from lit_stability.incidents.log import append_lines

REPORT = {"findings": [{"check": "masks", "severity": "error", "what": "inverted"}]}


def test_outcome_read_from_a_folder_is_judged_like_the_one_written(tmp_path):
    ending = Ending(ends="finished", started=100.0, seconds=2.0, why="no")
    row = {"id": 1, "time": 101.0, "kind": "loss spike", "cause": "x", "origin": None}
    append_lines(tmp_path / "version_0" / "incidents.jsonl", [row])
    append_lines(tmp_path / "version_0" / "incidents.jsonl", [{**row, "id": 2, "time": 99.0}])
    written = Outcome(
        ending=ending,
        metrics={"a": 1.5, "b": math.inf},
        incidents=incidents_since(tmp_path, 100.0),
        preflight=REPORT,
    )
    write_outcome(tmp_path, written)
    read = Outcome.read(tmp_path)
    assert (read.ending, read.preflight) == (ending, REPORT)
    assert [each["id"] for each in read.incidents] == [1], "those of an earlier run do not count"
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1.5, "b": None}
    expect = Expectation(
        metrics={"a": "== 1.5", "b": "not finite"},
        incidents=["loss spike"],
        preflight={"masks": "inverted"},
    )
    for outcome in (written, read):
        assert all(each.met for each in judge(expect, outcome))


def test_outcome_of_a_second_run_keeps_the_first_and_forgets_its_report(tmp_path):
    for started, report in ((1.0, REPORT), (2.0, None)):
        ending = Ending(ends="finished", started=started, seconds=1.0)
        outcome = Outcome(ending=ending, metrics={"a": started}, preflight=report)
        write_outcome(tmp_path, outcome)
    assert Outcome.read(tmp_path).preflight is None
    assert Outcome.read(tmp_path).metrics == {"a": 2.0}
    kept = {each.name for each in tmp_path.glob("*.1.json")}
    assert kept == {"metrics.1.json", "preflight.1.json", "outcome.1.json"}


def test_outcome_of_a_run_that_failed_has_its_metrics_and_metrics_json_is_not_written(tmp_path):
    ending = Ending(ends="failed", started=1.0, seconds=1.0)
    write_outcome(tmp_path, Outcome(ending=ending, metrics={"a": 1.5}))
    assert Outcome.read(tmp_path).metrics == {"a": 1.5}
    assert {each.name for each in tmp_path.iterdir()} == {"outcome.json"}


def test_outcome_of_a_killed_run_is_none(tmp_path):
    assert Outcome.read(tmp_path) is None


ENDING = '"version": 1, "ends": "finished", "started": 1, "seconds": 2, "why": ""'


@pytest.mark.parametrize(
    "text",
    [
        *("{", '{"version": 2}', "[]", '{"version": 1}', "[" * 3000 + "]" * 3000),
        f'{{{ENDING}, "metrics": 5}}',
        f'{{{ENDING}, "metrics": {{"loss": "low"}}}}',
        f'{{{ENDING.replace("finished", "vanished")}, "metrics": {{}}}}',
    ],
)
def test_damaged_outcome_is_refused_by_name(text, tmp_path):
    (tmp_path / "outcome.json").write_text(text)
    with pytest.raises(ValueError, match=r"outcome\.json: .*run the experiment again"):
        Outcome.read(tmp_path)


@pytest.mark.parametrize("report", ["[]", "{}", '{"findings": [{"check": "x"}]}'])
def test_damaged_preflight_report_is_refused_by_name(report, tmp_path):
    (tmp_path / "outcome.json").write_text(f'{{{ENDING}, "metrics": {{}}}}')
    (tmp_path / "preflight.json").write_text(report)
    with pytest.raises(ValueError, match=r"preflight\.json: .*run the experiment again"):
        Outcome.read(tmp_path)


def test_damaged_incident_record_is_logged_and_the_other_records_are_read(tmp_path, caplog):
    (tmp_path / "outcome.json").write_text(f'{{{ENDING}, "metrics": {{}}}}')
    for name, line in (("old", "[1]"), ("new", '{"id": 1, "time": 2.0, "kind": "spike"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "incidents.jsonl").write_text(f"{line}\n")
    assert [each["kind"] for each in Outcome.read(tmp_path).incidents] == ["spike"]
    assert "incidents.jsonl:1 is damaged" in caplog.text
