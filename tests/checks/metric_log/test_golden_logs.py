"""Logs of real fits in the four formats: `make_logs` beside this file made them."""

import gzip
from pathlib import Path

import pytest

from lit_stability.checks.metric_log import examine_log
from lit_stability.checks.metric_log.readers import reader_of

FOLDER = Path(__file__).parents[2] / "data" / "metric_logs"
ENDINGS = (".csv", ".tfevents", ".trainer_state.json", ".wandb.gz")
# The Trainer of Hugging Face counts a step when it is done, and logs means over four steps.
EXPECTED = {
    "healthy": (None, (), None),
    "nan": ("non-finite loss", (203, 204), "bad batch"),
    "exploding": ("divergence", range(76, 89), "learning rate too high"),
    "dead_lr": ("dead learning rate", (63, 64), "schedule of the learning rate"),
    "fp16_collapse": ("non-finite loss", (103,), "numeric precision"),
}


def report_of(name, folder):
    file = FOLDER / name
    if file.suffix == ".gz":
        unpacked = folder / file.stem
        unpacked.write_bytes(gzip.decompress(file.read_bytes()))
        file = unpacked
    return examine_log(reader_of(file).read([file]))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fault", EXPECTED)
def test_log_of_a_fit_gives_what_went_wrong_when_and_why(fault, ending, tmp_path):
    report = report_of(fault + ending, tmp_path)
    what, steps, cause = EXPECTED[fault]
    assert report.problems == ()
    assert report.points == 75
    assert report.healthy == (fault in ("healthy", "dead_lr"))
    if what is None:
        assert report.findings == ()
        return
    first = report.findings[0]
    assert first.what.startswith(what)
    assert first.step in steps
    assert first.causes[0].cause == cause
    assert first.remedy.endswith(first.causes[0].remedy)


def test_collapse_of_the_loss_scale_is_found_beside_the_nan(tmp_path):
    report = report_of("fp16_collapse.csv", tmp_path)
    assert [f.what for f in report.findings] == [
        "non-finite loss at step 103",
        "loss-scale collapse at step 127",
    ]


def test_nan_that_hugging_face_writes_as_0_is_found(tmp_path):
    (finding,) = report_of("nan.trainer_state.json", tmp_path).findings
    assert finding.what == "non-finite loss at step 204, hidden by the logger"
    assert finding.certainty == "certain"
    assert "logging_nan_inf_filter=False" in finding.remedy


def test_growing_gradient_is_reported_with_its_lead(tmp_path):
    (finding,) = report_of("exploding.csv", tmp_path).findings
    evidence = " ".join(finding.causes[0].evidence)
    assert "the gradient norm had grown from 0.78 to 4.77 since step 55, 24 steps" in evidence


@pytest.mark.parametrize("fault", EXPECTED)
def test_all_formats_of_lightning_have_the_same_findings(fault, tmp_path):
    csv, events, wandb = (
        [f.what for f in report_of(fault + ending, tmp_path).findings]
        for ending in (".csv", ".tfevents", ".wandb.gz")
    )
    assert csv == events == wandb


def test_end_of_the_run_is_known_where_the_format_records_it(tmp_path):
    ends = [report_of("healthy" + ending, tmp_path).complete for ending in ENDINGS]
    assert ends == [None, None, True, True]
