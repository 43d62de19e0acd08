"""What a notebook shows of an incident: one card."""

import pytest

from lit_stability.incidents.card import IncidentCard
from lit_stability.policies.actions import RetryStep, SkipStep
from tests.incidents.test_console_lines import logarithm, spike


def test_card_shows_what_where_cause_done_and_what_is_to_do():
    trouble = logarithm()
    trouble.resolve(RetryStep())
    html = IncidentCard(trouble)._repr_html_()
    for part in (
        "Incident 1 at step 48: non-finite loss: log made -inf",
        ">open<",
        "log in head (Head), model.py:11, forward pass; epoch 3, batch 17, sample 3 of 16",
        "certain cause: operation outside its domain",
        "step retried",
        "clamp the argument above 0",
    ):
        assert part in html


def test_card_of_a_closed_incident_has_its_outcome_and_counts():
    trouble = logarithm()
    trouble.resolve(RetryStep())
    trouble.recur(trouble.first)
    trouble.resolve(SkipStep())
    trouble.close("contained", 58)
    card = IncidentCard(trouble)
    assert "contained, not learning at step 58" in card._repr_html_()
    assert "retry, skip" in card._repr_html_()
    assert repr(card).split("\n")[-1].startswith("incident 1 contained, not learning at step 58: ")


@pytest.mark.parametrize("message", ["<script>alert(1)</script>", 'a "b" & <i>c'])
def test_text_of_others_is_escaped(message):
    html = IncidentCard(spike(message=message))._repr_html_()
    assert "<script" not in html
    assert "<i>" not in html
