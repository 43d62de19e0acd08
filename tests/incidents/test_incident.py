"""An incident from its opening to its closing."""

from typing import get_args

import pytest

from lit_stability import detectors
from lit_stability.detectors import Anomaly
from lit_stability.diagnosis import CAUSES, Cause, DiagnosisContext, register_cause
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.incidents.report import markdown, responses_text
from lit_stability.policies.actions import HoldLearningRate, RollBack, SkipStep, Stop


def anomaly(**options):
    defaults = {
        "kind": "gradient spike",
        "step": 12431,
        "value": 900.0,
        "message": "gradient norm 900 is 90 times its median 10",
        "signal": "grad_norm",
    }
    return Anomaly(**(defaults | options))


def incident(number=1, **options):
    return Incident(number, anomaly(**options), epoch=3, batch_idx=17)


def test_resolve_twice_is_an_error_that_names_the_first_response():
    trouble = incident()
    assert not trouble.resolved
    trouble.resolve(RollBack(0.5, 0.5))
    assert trouble.resolved
    with pytest.raises(RuntimeError, match=r"incident 1 is already resolved \(rolled back"):
        trouble.resolve(SkipStep())
    assert trouble.responses == ["rolled back, learning rate x0.5, clip x0.5"]


def test_recurrence_needs_a_response_of_its_own_and_keeps_the_first_anomaly():
    trouble = incident()
    trouble.resolve(SkipStep())
    second = anomaly(kind="divergence", step=12433)
    trouble.recur(second)
    assert not trouble.resolved
    assert (trouble.occurrences, trouble.anomaly, trouble.first.step) == (2, second, 12431)
    trouble.resolve(RollBack())
    assert trouble.as_dict()["kind"] == "gradient spike"
    assert trouble.as_dict()["strikes"] == 2


SKIP, ROLL, HOLD = SkipStep(), RollBack(), HoldLearningRate((1e-3, 1e-4))


@pytest.mark.parametrize(
    ("responses", "done"),
    [
        ([], ""),
        ([SKIP], "step skipped"),
        ([SKIP, SKIP, SKIP], "step skipped (3x)"),
        ([SKIP, SKIP, ROLL, SKIP], "step skipped (2x), rolled back, step skipped"),
        ([HOLD, Stop("over")], "learning rate held, x0.0001, stopped: over"),
    ],
)
def test_done_counts_runs_of_equal_responses(responses, done):
    trouble = incident()
    for i, response in enumerate(responses):
        if i:
            trouble.recur(anomaly())
        trouble.resolve(response)
    assert responses_text(trouble) == done


def test_cause_that_was_shown_comes_before_all_that_speaks_for_another():
    """S15, S5."""
    trouble = incident()
    assert trouble.likely_causes[0].cause == "exploding gradient"
    assert trouble.cause == "", "what is only possible is not named"
    trouble.note("numeric precision", "it is finite in float32")
    trouble.note("numeric precision", "once more")
    assert trouble.cause == "numeric precision"
    assert trouble.likely_causes[0].evidence[0] == "it is finite in float32"
    assert trouble.evidence == ["it is finite in float32", "once more"]


def test_cause_that_was_shown_and_is_in_no_registry_is_reported_all_the_same():
    trouble = incident()
    assert trouble.likely_causes[0].cause == "exploding gradient"
    trouble.note("cosmic ray", "a neutron was seen")
    assert trouble.cause == "cosmic ray"
    assert trouble.remedy == "see how it was found: a neutron was seen", "not that of another cause"


@pytest.fixture
def weighed():
    """Contexts for which a registered cause was weighed."""
    seen = []
    rule = (1, lambda context: seen.append(context))
    register_cause(Cause(name="counts", rules=(rule,), remedy="none", ignore_when="always"))
    yield seen
    del CAUSES["counts"]


def test_causes_are_weighed_once_for_each_change(weighed):
    trouble = incident()
    for read in (trouble.as_dict, trouble.as_dict, lambda: trouble.recommended_action):
        read()
    assert len(weighed) == 1
    trouble.resolve(SkipStep())
    trouble.evidence.append("no cause depends on this")
    assert (trouble.cause, len(weighed)) == ("", 1)
    trouble.verdict = "transient"
    assert (trouble.cause, len(weighed)) == ("glitch", 2)
    trouble.note("numeric precision", "finite in float32")
    assert (trouble.cause, len(weighed)) == ("numeric precision", 3)
    trouble.recur(anomaly())
    trouble.context = DiagnosisContext(anomaly=trouble.first, precision="16-mixed")
    assert "mixed precision? yes" in trouble.checks[1]
    assert len(weighed) == 4
    trouble.verdict = ""
    assert trouble.likely_causes
    assert len(weighed) == 5


def test_diagnosis_is_final_once_sealed(weighed):
    trouble = incident()
    trouble.close("recovered", 12450)
    trouble.seal()
    trouble.verdict = "transient"
    assert (trouble.cause, trouble.as_dict()["verdict"]) == ("", "transient")
    assert len(weighed) == 1


def test_markdown_of_text_with_line_ends_keeps_one_item_per_fact():
    trouble = incident(message="a | b\n  * c", layers=(("x|y", 1.0),))
    known = markdown(trouble).partition("### Causes")[0].splitlines()
    items = [line.partition("**:")[0] for line in known if line.startswith("* **")]
    assert len(items) == len({*items}) == 12
    assert "* **what**: gradient spike: a | b; * c" in known


def test_markdown_of_a_closed_incident_has_outcome_and_remedy():
    """S17, V5."""
    trouble = incident(layers=(("head.weight", 880.0),))
    trouble.resolve(SkipStep())
    trouble.close("recovered", 12450)
    for part in ("`head.weight` 880", "step skipped", "recovered at step 12450", "not saved"):
        assert part in markdown(trouble)
    assert trouble.remedy in markdown(trouble)


@pytest.mark.parametrize("kind", get_args(detectors.Kind))
def test_remedy_of_what_did_not_recur_blames_neither_data_nor_model(kind):
    trouble = incident(kind=kind)
    trouble.verdict = "transient"
    damaged = kind in ("non-finite weight", "weight corruption")
    remedy = "continue from an earlier state" if damaged else "nothing in data or model"
    if kind == "silent data corruption":
        remedy = "continue from before the wrong numbers"
    assert trouble.remedy.startswith(remedy)


@pytest.mark.parametrize("kind", get_args(detectors.Kind))
def test_remedy_of_every_kind_is_something_to_do(kind):
    """V5."""
    assert len(incident(kind=kind).remedy) > 20


def test_training_stopped_carries_its_incident():
    trouble = incident()
    error = TrainingStopped("over", trouble)
    assert (str(error), error.incident) == ("over", trouble)


def test_report_of_an_unknown_cause_says_so_and_what_was_ruled_out():
    trouble = incident()
    trouble.context = DiagnosisContext(
        anomaly=trouble.first, verdict="deterministic", optimizer_type="sgd", momentum=0.0
    )
    trouble.close("recovered", 12450)
    assert trouble.cause == ""
    text = markdown(trouble)
    assert "* **cause**: unknown" in text
    assert "The cause is unknown." in text
    assert "the cause is unknown" in trouble.remedy
