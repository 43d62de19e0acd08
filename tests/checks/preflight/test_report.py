"""The report of all checks: readable, sorted, JSON."""

import json

from lit_stability.checks.preflight import Finding, Report


def finding(severity="warning", where=(), check="batch"):
    return Finding(
        check=check, severity=severity, what="it is", where=where, why="so", remedy="this"
    )


def test_report_puts_the_worst_first_and_counts_by_severity():
    report = Report([finding("note"), finding("error"), finding(), finding()], ran=["batch"])
    assert [f.severity for f in report.ordered()] == ["error", "warning", "warning", "note"]
    assert report.headline() == "preflight: 1 error, 2 warnings, 1 note in 1 check"
    assert [f.severity for f in report.errors] == ["error"]


def test_report_survives_json_with_every_name():
    names = tuple("abcdefgh")
    report = Report([finding(where=names)], ran=["a"], skipped={"b": "why"}, seconds=0.12345)
    loaded = json.loads(json.dumps(report.as_dict()))
    assert loaded["findings"] == [
        {
            **{"check": "batch", "severity": "warning", "what": "it is"},
            **{"where": list(names), "why": "so", "do": "this"},
        }
    ]
    assert list(loaded["findings"][0]) == ["check", "severity", "what", "where", "why", "do"]
    assert (loaded["ran"], loaded["skipped"], loaded["seconds"]) == (["a"], {"b": "why"}, 0.123)


def test_report_names_the_checks_that_did_not_run_and_why():
    assert "not run: masks (no probe)" in Report(skipped={"masks": "no probe"}).text()
