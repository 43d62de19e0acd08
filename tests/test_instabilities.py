"""Runs that go wrong by themselves, from the first step to what the default suite makes of them."""

from dataclasses import replace

import pytest

from benchmarks.instabilities.__main__ import train
from benchmarks.instabilities.cases import CASES
from lit_stability import stability_callbacks
from lit_stability.incidents.report import responses_text


@pytest.mark.parametrize(
    ("name", "steps", "done"),
    [
        ("learning rate diverges", 100, "rolled back and replayed, learning rate x"),
        ("final gain zeroed", 60, "stopped: zeroed gain"),
        ("post-norm without warm-up", 160, ""),
    ],
)
def test_instability_is_named_and_answered(name, steps, done):
    """S2, S17, T2: the cause that the case is known for, and the response that fits it."""
    case = replace(CASES[name], steps=steps)
    incident = train(case, 0, stability_callbacks()).incidents[0]
    assert incident.cause == case.cause
    assert done in responses_text(incident) if done else not responses_text(incident)
    assert bool(responses_text(incident)) == bool(done)


def test_descent_on_the_edge_of_stability_is_left_alone():
    """It swings by 60 times its median gradient norm, and trains: no incident, the same losses."""
    case = replace(CASES["edge of stability"], steps=300)
    guarded, bare = train(case, 0, stability_callbacks()), train(case, 0, [])
    assert guarded.incidents == []
    assert guarded.loss == bare.loss < 0.02
