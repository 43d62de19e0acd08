"""Expectations against outcomes, in plain values."""

import math

import pytest

from lit_stability.cli.experiments import Ending, Expectation, Outcome, judge
from lit_stability.cli.experiments.judgement import summary

FINISHED = Ending(ends="finished", started=0.0, seconds=1.0)
STOPPED = Ending(ends="stopped", started=0.0, seconds=1.0, why="TrainingStopped: no\nmore")
ORIGIN = {
    "op": "linear",
    "module": "head.scale",
    "module_type": "Linear",
    "tensor": "",
    "file": "/a/net.py",
    "line": 7,
}


def incident(kind="loss spike", cause="", origin=None):
    return {"kind": kind, "cause": cause, "origin": origin}


def report(**found):
    """A preflight report: by check, the severity and the words of a finding."""
    rows = [{"check": k.replace("_", " "), "severity": s, "what": w} for k, (s, w) in found.items()]
    return {"findings": rows}


def outcome(ending=FINISHED, *, metrics=None, incidents=(), preflight=None):
    return Outcome(
        ending=ending, metrics=metrics or {}, incidents=list(incidents), preflight=preflight
    )


@pytest.mark.parametrize(
    ("expect", "seen", "missed"),
    [
        ({}, outcome(), []),
        ({}, outcome(STOPPED), ["stopped: TrainingStopped: no"]),
        ({"ends": "stopped"}, outcome(STOPPED), []),
        ({"ends": "stopped"}, outcome(), ["finished"]),
        ({"metrics": {"a": "< 2"}}, outcome(metrics={"a": 1.0}), []),
        ({"metrics": {"a": "< 2"}}, outcome(metrics={"a": math.nan}), ["nan"]),
        ({"metrics": {"a": "< 2", "b": "> 0"}}, outcome(metrics={"a": 1.0}), ["not logged"]),
        ({"incidents": []}, outcome(), []),
        ({"incidents": []}, outcome(incidents=[incident()]), ["loss spike"]),
        ({"incidents": ["x", "y"]}, outcome(incidents=map(incident, "yxx")), []),
        ({"incidents": ["x", "y"]}, outcome(incidents=[incident("x")]), ["x"]),
        ({"incidents": ["x"]}, outcome(incidents=map(incident, "xy")), ["x, y"]),
        ({"causes": ["gain"]}, outcome(incidents=[incident(cause="zeroed gain")]), []),
        ({"causes": ["gain", "rate"]}, outcome(incidents=[incident(cause="gain")]), ["gain"]),
        ({"causes": ["gain"]}, outcome(), ["none"]),
        ({"locates": "head.scale"}, outcome(incidents=[incident(origin=ORIGIN)]), []),
        ({"locates": "net.py:7"}, outcome(incidents=[incident(origin=ORIGIN)]), []),
        ({"locates": "tail"}, outcome(incidents=[incident()]), ["none"]),
        ({"preflight": {}}, outcome(), ["preflight did not run"]),
        ({"preflight": {}}, outcome(preflight=report(a=("note", "so so"))), []),
        ({"preflight": {}}, outcome(preflight=report(a=("warning", "bad"))), ["a"]),
        ({"preflight": {"a b": ""}}, outcome(preflight=report(a_b=("error", "bad"))), []),
        ({"preflight": {"a": "bad"}}, outcome(preflight=report(a=("error", "a bad one"))), []),
        ({"preflight": {"a": "worse"}}, outcome(preflight=report(a=("error", "bad"))), ["a"]),
        ({"preflight": {"a": ""}}, outcome(preflight=report(a=("note", "bad"))), ["none"]),
        (
            {"preflight": {"a": ""}},
            outcome(preflight=report(a=("error", "bad"), b=("warning", "odd"))),
            ["b"],
        ),
    ],
)
def test_judge_names_what_was_seen_instead_of_what_was_expected(expect, seen, missed):
    verdicts = judge(Expectation(**expect), seen)
    assert [each.observed for each in verdicts if not each.met] == missed
    line = summary(verdicts)
    assert line.startswith("expectation NOT met: " if missed else "expectation met: finished"[:15])
    assert all(f"observed {each}" in line for each in missed)
