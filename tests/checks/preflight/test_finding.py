"""Findings and their report: readable, sorted, JSON."""

import json

import pytest

from lit_stability.checks.preflight import Finding, Report


def finding(severity="warning", where=(), check="batch"):
    return Finding(check=check, severity=severity, what="it is", where=where, why="so", do="this")


def test_finding_of_unknown_severity_is_refused():
    with pytest.raises(ValueError, match="severity='fatal' is unknown"):
        finding("fatal")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("a", "b"), "  where: a, b"),
        (tuple("abcd"), "  where: a, b, c, d"),
        (tuple("abcdef"), "  where: a, b, c, d and 2 more"),
    ],
)
def test_finding_of_many_places_names_the_first(names, line):
    assert line in finding(where=names).text().splitlines()


def test_report_puts_the_worst_first_and_counts_by_severity():
    report = Report([finding("note"), finding("error"), finding(), finding()], ran=["batch"])
    assert [f.severity for f in report.ordered()] == ["error", "warning", "warning", "note"]
    assert report.headline() == "preflight: 1 error, 2 warnings, 1 note in 1 check"
    assert [f.severity for f in report.errors] == ["error"]


def test_report_survives_json_with_every_name():
    names = tuple("abcdefgh")
    report = Report([finding(where=names)], ran=["a"], skipped={"b": "why"}, seconds=0.12345)
    loaded = json.loads(json.dumps(report.as_dict()))
    assert loaded["findings"][0]["where"] == list(names)
    assert (loaded["ran"], loaded["skipped"], loaded["seconds"]) == (["a"], {"b": "why"}, 0.123)


def test_report_tells_what_did_not_run_and_why():
    assert "not run: masks (no probe)" in Report(skipped={"masks": "no probe"}).text()
