"""What the incidents of a run mean for its user: one line, and groups of equal ones."""

import pytest

from lit_stability.incidents.verdict import groups_of, ignore_in, verdict_of

LOG = {"op": "log", "file": "/src/model.py", "line": 11, "cause": "operation"}
LASTING = [{"cause": "log", "leave": "never: the next batch fails as well"}]
RARE = [{"cause": "bad batch", "leave": "if it is one of thousands: it was skipped"}]


def record(number, outcome="recovered", **known):
    common = {"kind": "loss spike", "cause": "bad batch", "verdict": "", "origin": None}
    common |= {"remedy": "look at the batch", "step": 10 * number, "responses": []}
    return {"id": number, "outcome": outcome, **common, **known}


def bad_sample(number, batch=12):
    seen = {"samples": [8], "batch_size": 16, "batch_idx": batch, "epoch": number - 1}
    same = {"same_sample_as": 1 if number > 1 else None, "origin": LOG}
    return record(number, "recurring", **seen, **same)


STOP = record(4, "stopped", responses=["step skipped", "stopped: no budget\nis left"])


@pytest.mark.parametrize(
    ("records", "level", "line"),
    [
        ([], "ok", "no incidents in 2,000 steps"),
        ([record(1)], "ok", "1 incident, handled; nothing to do"),
        (
            [record(1), record(2, "handled"), record(3)],
            "ok",
            "3 incidents, all handled; nothing to do",
        ),
        (
            [bad_sample(n) for n in range(1, 31)],
            "act",
            "30 times the same bad sample. To do: fix or remove sample 8 of 16 in batch 12 of "
            "every epoch (index 200 of the data, if it is not shuffled)",
        ),
        (
            [bad_sample(1, batch=3), bad_sample(2)],
            "act",
            "2 times the same bad sample. To do: fix or remove sample 8 of 16 in batch 3 of epoch "
            "0",
        ),
        (
            [record(1), STOP],
            "act",
            "stopped at step 40: no budget is left. To do: look at the batch",
        ),
        ([STOP, record(5, cause="bad seed")], "ok", "2 incidents, all handled; nothing to do"),
        (
            [record(1, "contained", loss_after=2.5, loss_before=0.125)],
            "act",
            "bad batch, and the run does not learn: loss 2.5, 0.125 before. To do: look at the "
            "batch",
        ),
        (
            [record(1, cause="log", remedy="clamp it", hypotheses=LASTING)],
            "watch",
            "log, recovered. To do: clamp it",
        ),
        (
            [record(n, "observed", cause=cause) for n, cause in enumerate("aabcd", 1)],
            "watch",
            "2 times a, and nothing was changed; b, and nothing was changed; and 2 more causes. "
            "To do: look at the batch",
        ),
    ],
)
def test_verdict_says_what_the_incidents_mean_and_what_is_to_do(records, level, line):
    found = verdict_of(records, 2000)
    assert (found.level, found.line()) == (level, line)


def test_incidents_are_grouped_by_sample_and_else_by_cause():
    records = [bad_sample(1), record(2), record(3, origin=LOG), bad_sample(4), record(5)]
    groups = [group.as_dict() for group in groups_of(records)]
    assert [group["incidents"] for group in groups] == [["1/0", "4/0"], ["2/0", "5/0"], ["3/0"]]
    assert [group["place"] for group in groups] == [
        "log at model.py:11",
        "bad batch",
        "log at model.py:11",
    ]


def test_operation_that_fails_with_several_samples_is_to_blame_and_not_the_samples():
    """Each of two samples has failed twice at the same line."""
    seen = [bad_sample(1), bad_sample(2), bad_sample(3), bad_sample(4)]
    roots = (None, None, 1, 2)
    records = [each | {"same_sample_as": root} for each, root in zip(seen, roots, strict=True)]
    found = verdict_of([each | {"remedy": "clamp it"} for each in records])
    assert found.line() == "4 times log at model.py:11, it comes back. To do: clamp it"


def test_verdict_is_on_the_latest_fit_of_a_folder():
    found = verdict_of([record(1, "contained", run="a"), record(1, run="b")])
    assert (found.text, len(found.groups)) == ("1 incident, handled; nothing to do", 1)


def test_records_of_the_first_version_have_a_verdict():
    """They lack samples, outcomes of later versions, and much else."""
    assert verdict_of([{"id": 1, "time": 2.0, "kind": "loss spike"}]).level == "watch"


@pytest.mark.parametrize(
    ("known", "ignored"),
    [
        ({}, True),
        ({"cause": ""}, False),
        ({"outcome": "recurring"}, False),
        ({"outcome": "stopped"}, False),
        ({"hypotheses": [{"cause": "bad batch", "leave": "never, if it recurs"}]}, False),
        ({"hypotheses": []}, False),
    ],
)
def test_incident_is_safe_to_ignore_only_where_that_is_known(known, ignored):
    assert bool(ignore_in(record(1, hypotheses=RARE) | known)) is ignored
