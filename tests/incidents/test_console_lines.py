"""What the console shows of incidents: few short lines, counts, one row for each cause."""

from types import SimpleNamespace

import pytest

from lit_stability.detectors import Anomaly
from lit_stability.incidents import Incident
from lit_stability.incidents.console_lines import (
    cause_line,
    cause_text,
    closing_line,
    continued_line,
    counted,
    opening_lines,
    place_of,
    short_path,
    summary,
)
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import HoldLearningRate, RetryStep, RollBack, SkipStep, Stop


def spike(number=1, step=12431, **options):
    defaults = {
        "kind": "gradient spike",
        "step": step,
        "value": 900.0,
        "message": "gradient norm 900 is 90 times its median 10",
        "signal": "grad_norm",
    }
    made = Incident(number, Anomaly(**(defaults | options)), epoch=3, batch_idx=17)
    made.stats = StepStats(step=step, loss=1.0, grad_norm=900.0, learning_rates=(0.0926, 0.01))
    return made


def logarithm(number=1, step=48, line=11, samples=(3,), digests=(7,)):
    """An incident of a log whose argument is 0 in some samples of a batch."""
    made = spike(number, step, kind="non-finite loss", message="loss is inf", signal="loss")
    where = {"op": "log", "module": "head", "module_type": "Head", "file": "/src/model.py"}
    made.origin = SimpleNamespace(
        **where,
        **{"line": line, "phase": "forward", "value": "-inf", "cause": "operation", "tensor": ""},
        **{"kind": "domain error", "overflow": False, "advice": "clamp the argument above 0"},
        **{"samples": samples, "batch_size": 16, "digests": digests},
        describe=lambda: "log made -inf",
        as_dict=lambda: {**where, "line": line, "cause": "operation"},
    )
    return made


def test_incident_opens_in_four_short_lines_what_where_done_and_details():
    trouble = logarithm()
    trouble.resolve(RetryStep())
    trouble.path = "logs/incidents/00000048-1"
    lines = opening_lines(trouble).split("\n")
    assert lines == [
        "incident 1 at step 48: non-finite loss: log made -inf; certain cause: operation outside "
        "its domain",
        "  where: log in head (Head), model.py:11, forward pass; epoch 3, batch 17, sample 3 of 16",
        "  done: step retried. To do: clamp the argument above 0",
        "  details: logs/incidents/00000048-1",
    ]
    assert max(map(len, lines)) <= 100


def test_exception_is_located_by_its_line():
    text = "RuntimeError: all elements of input should be between 0 and 1 at model.py:11 in loss"
    first, where, *_ = opening_lines(
        spike(kind="exception", message=text, signal="training_step")
    ).split("\n")
    assert "exception: RuntimeError: all elements of input should be between 0 and 1;" in first
    assert where == "  where: model.py:11 in loss; epoch 3, batch 17"


def test_incident_that_is_only_observed_says_that_nothing_was_changed():
    first, where, done = opening_lines(spike()).split("\n")
    assert first == (
        "incident 1 at step 12431: gradient spike: gradient norm 900 is 90 times its median 10; "
        "cause unknown"
    )
    assert where == "  where: epoch 3, batch 17"
    assert done.startswith("  done: nothing changed. To do: ")


def test_incident_with_the_cause_of_an_earlier_one_refers_to_it():
    trouble = logarithm(2, samples=(1, 2, 5, 8, 9))
    trouble.same_sample_as = 1
    trouble.resolve(RetryStep())
    first, where, done = opening_lines(trouble, logarithm()).split("\n")
    assert first.endswith("log made -inf; the same as incident 1")
    assert where.endswith(", samples 1, 2, 5 and 2 more of 16 (the same sample as #1)")
    assert done == "  done: step retried"


def test_foreign_text_is_cut_and_kept_on_its_line():
    message = "raised ValueError: " + "a\nb " * 100
    first = opening_lines(spike(message=message)).split("\n")[0]
    assert len(first) < 140
    assert first.endswith("...; cause unknown")


def test_path_below_the_working_directory_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "logs/incidents")) == "logs/incidents"
    assert short_path("/elsewhere/logs") == "/elsewhere/logs"


@pytest.mark.parametrize(
    ("responses", "text"),
    [
        ([], ""),
        (["step skipped"], "skip"),
        (["step retried", "step retried with new random numbers"], "retry x2"),
        (
            ["step retried", "step skipped"] * 58 + ["rolled back", "rolled back and replayed"],
            "retry x58, skip x58, rollback x2",
        ),
        (["precision 16-mixed -> 32-true", "stopped: over"], "precision 16-mixed -> 32-true"),
    ],
)
def test_equal_responses_are_counted(responses, text):
    assert counted(responses) == text


@pytest.mark.parametrize(
    ("response", "rates"),
    [
        (HoldLearningRate((0.0101, 1.0)), "0.0926 -> 0.000935"),
        (RollBack(0.5, 0.5), "learning rate 0.0926 -> 0.0463"),
        (RollBack(), "done: rolled back. "),
        (SkipStep(), "done: step skipped. "),
    ],
)
def test_lowered_learning_rate_is_given_before_and_after(response, rates):
    trouble = spike()
    trouble.resolve(response)
    trouble.close("recovered", 12450)
    assert rates in opening_lines(trouble)
    for text in (opening_lines(trouble), closing_line(trouble)):
        assert ("->" in text) == ("->" in rates)
        assert "x0." not in text


def test_kinds_of_response_that_come_later_have_a_line_of_their_own():
    trouble = spike()
    trouble.resolve(SkipStep())
    trouble.recur(trouble.first)
    trouble.resolve(RollBack(0.5, 0.5, replay=True))
    assert continued_line(trouble, trouble.responses[1:]) == (
        "incident 1 recurs at step 12431, 2 times now: rolled back and replayed, learning rate "
        "0.0926 -> 0.0463"
    )


def test_damage_is_named_rather_than_what_led_to_it():
    message = "gradient norm is nan; 26 parameters are non-finite, first net.0.weight"
    first = opening_lines(spike(message=message, state_corrupted=True)).split("\n")[0]
    assert ": gradient spike: 26 parameters are non-finite, first net.0.weight; " in first


def test_closing_line_counts_what_was_done_and_names_the_cause():
    trouble = logarithm()
    for response in (RetryStep(), SkipStep(), RetryStep(), SkipStep()):
        if trouble.resolved:
            trouble.recur(trouble.first)
        trouble.resolve(response)
    trouble.close("recovered", 58)
    assert closing_line(trouble) == (
        "incident 1 recovered at step 58: retry x2, skip x2; certain cause: operation outside its "
        "domain"
    )


@pytest.mark.parametrize(("now", "restored"), [(40, ", weights restored to step 40"), (48, "")])
def test_stop_names_the_step_to_which_the_weights_are_restored(now, restored):
    trouble = logarithm()
    trouble.resolve(Stop("20 batches in a row failed"))
    trouble.close("stopped", now)
    assert closing_line(trouble).startswith(
        f"incident 1 stopped the run at step 48{restored} (20 batches in a row failed): "
    )


def test_changed_cause_is_given_with_the_one_before():
    trouble = spike()
    before = cause_text(trouble)
    trouble.note("numeric precision", "finite in float32")
    assert cause_line(trouble, before) == (
        "incident 1: certain cause: numeric precision; before, cause unknown"
    )


def test_summary_has_one_row_for_each_cause():
    incidents = [logarithm(1, 48), spike(2, 60), logarithm(3, 84), logarithm(4, 99, line=30)]
    for each in incidents:
        each.resolve(SkipStep())
        each.close("recovered", each.first.step + 10)
    incidents[2].close("recurring", 94)
    headline, head, *rows, verdict = summary(incidents).split("\n")
    assert headline == "summary: 4 incidents, 3 causes; 4 batches skipped"
    assert head.split() == ["incident", "step", "cause", "done", "outcome"]
    assert [row.split("  ")[0] for row in rows] == ["1..3", "2", "4"]
    assert "log at model.py:11" in rows[0]
    assert "skip x2" in rows[0]
    assert rows[0].endswith("recovered, recurring")
    assert "gradient spike, cause unknown" in rows[1]
    assert verdict.startswith(
        "verdict: 2 times log at model.py:11, it comes back; log at model.py:30, recovered. To do: "
    )


def test_summary_of_one_cause_names_it_in_its_headline():
    incidents = [logarithm(number, 10 * number) for number in range(1, 13)]
    for each in incidents[1:]:
        each.resolve(SkipStep())
    headline, _, row, _ = summary(incidents).split("\n")
    assert headline == ("summary: 12 incidents, one cause: log at model.py:11; 11 batches skipped")
    assert row.split()[:2] == ["1..12", "10..120"]
    assert row.endswith("open")


def test_summary_of_long_texts_stays_narrow():
    trouble = spike(kind="a detector of the user " * 9)
    trouble.resolve(Stop("no budget is left: " + 30 * "tried this and that; "))
    *rows, verdict = summary([trouble]).split("\n")[1:]
    assert max(map(len, rows)) < 120
    assert len(verdict) <= 160


def test_place_of_a_bad_input_is_its_cause_and_not_the_operation_that_met_it():
    trouble = logarithm()
    trouble.origin.cause, trouble.origin.kind = "input", "non-finite input"
    trouble.note("bad batch", "it holds a NaN")
    assert place_of(trouble) == "bad batch"
