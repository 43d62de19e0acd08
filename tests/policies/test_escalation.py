"""Streams of anomalies in, responses out."""

import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_stability.detectors import Anomaly
from lit_stability.policies.actions import (
    AcceptNewRegime,
    ClipStep,
    HoldLearningRate,
    RetryStep,
    RollBack,
    SkipStep,
    Stop,
    describe,
)
from lit_stability.policies.escalation import Budget, EscalationPolicy


def anomaly(kind="loss spike", state_corrupted=False, step=0, value=9.0):
    hold = (0.1, 0.2) if kind == "learning-rate jump" else ()
    return Anomaly(
        kind=kind,
        step=step,
        value=value,
        message="9 against 1",
        signal="x",
        state_corrupted=state_corrupted,
        hold=hold,
    )


BAD_BATCH, JUMP = anomaly(), anomaly("learning-rate jump")
DAMAGE = anomaly("non-finite weight", state_corrupted=True)
DIVERGENCE = anomaly("divergence", state_corrupted=True)
SKIP, HOLD = SkipStep(), HoldLearningRate((0.1, 0.2))
PLAIN, CUT = RollBack(), RollBack(0.5, 0.5)
STOP = "stop"


def drive(escalation, events):
    """Responds to each anomaly; an int is a number of healthy steps, a stop becomes STOP."""
    given = []
    for event in events:
        if isinstance(event, int):
            for _ in range(event):
                escalation.healthy()
        else:
            response = escalation.respond(event)
            given.append(STOP if isinstance(response, Stop) else response)
    return given


@pytest.mark.parametrize(
    ("budget", "events", "responses"),
    [
        ({}, [BAD_BATCH], [SKIP]),
        ({}, [JUMP], [HOLD]),
        ({}, [DAMAGE], [PLAIN]),
        ({}, [DIVERGENCE], [CUT]),
        # The second anomaly within probation blames learning rate and clip, a later one does not.
        ({"probation": 50}, [DAMAGE, DAMAGE], [PLAIN, CUT]),
        ({"probation": 50}, [DAMAGE, 49, DAMAGE], [PLAIN, CUT]),
        ({"probation": 50}, [DAMAGE, 50, DAMAGE], [PLAIN, PLAIN]),
        # A burst of bad batches is skipped, then the state is suspected.
        ({"skips_in_a_row": 2}, [BAD_BATCH] * 4, [SKIP, SKIP, CUT, SKIP]),
        ({"skips_in_a_row": 2}, [BAD_BATCH, 1, BAD_BATCH, 1, BAD_BATCH], [SKIP, SKIP, SKIP]),
        # What has run out is replaced by the next heavier.
        ({"skips": 1, "refill_skips_every": 9}, [BAD_BATCH, 1, BAD_BATCH], [SKIP, CUT]),
        ({"skips": 1}, [BAD_BATCH, 1, BAD_BATCH, 1, BAD_BATCH], [SKIP] * 3),
        # Every batch fails, also after the rollback.
        ({"skips_in_a_row": 2}, [BAD_BATCH] * 6, [SKIP, SKIP, CUT, SKIP, SKIP, STOP]),
        ({"holds": 1}, [JUMP, JUMP, JUMP], [HOLD, SKIP, SKIP]),
        ({"holds": 1, "skips": 1, "rollbacks": 1}, [JUMP] * 5, [HOLD, SKIP, CUT, STOP, STOP]),
        ({"rollbacks": 2}, [DAMAGE] * 4, [PLAIN, CUT, STOP, STOP]),
        ({"rollbacks": 1}, [DAMAGE, BAD_BATCH, DAMAGE], [PLAIN, SKIP, STOP]),
        # Healthy steps give back one of each sort, no more than there were.
        ({"rollbacks": 1, "refill_every": 10}, [DAMAGE, 9, DAMAGE], [PLAIN, STOP]),
        ({"rollbacks": 1, "refill_every": 10}, [DAMAGE, 10, DAMAGE, DAMAGE], [PLAIN, CUT, STOP]),
        ({"rollbacks": 1, "refill_every": 10}, [500, DAMAGE, DAMAGE], [PLAIN, STOP]),
    ],
)
def test_escalation_of_a_stream_gives_the_smallest_response_in_budget(budget, events, responses):
    """K3."""
    assert drive(EscalationPolicy(Budget(**budget)), events) == responses


def test_escalation_of_a_jump_on_damaged_weights_rolls_back():
    escalation = EscalationPolicy()
    assert escalation.respond(JUMP, state_corrupted=True) == PLAIN
    assert escalation.respond(JUMP) == HOLD


def test_escalation_of_a_bad_batch_on_damaged_weights_rolls_back():
    assert EscalationPolicy().respond(BAD_BATCH, state_corrupted=True) == PLAIN


@pytest.mark.parametrize(
    ("excess", "factor"),
    [
        (1.0, 0.5),
        (2.0, 0.5),
        (8.0, 0.125),
        (300.0, 1 / 300),
        (1e9, 1e-3),
        (math.inf, 1e-3),
        (math.nan, 0.5),
        (0.0, 0.5),
    ],
)
def test_cut_is_sized_by_the_excess_and_never_to_nothing(excess, factor):
    """S12, S13."""
    assert EscalationPolicy().respond(DIVERGENCE, excess=excess) == RollBack(
        pytest.approx(factor), 0.5
    )


def test_stop_repeats_the_anomaly_and_the_number_of_rollbacks():
    """S13: no endless recovery."""
    escalation = EscalationPolicy(Budget(rollbacks=2))
    drive(escalation, [DAMAGE, DAMAGE])
    stop = escalation.respond(DAMAGE)
    assert describe(stop) == ("stopped: non-finite weight recurred after 2 rollbacks (9 against 1)")


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (SKIP, "step skipped"),
        (HOLD, "learning rate held, x0.1"),
        (PLAIN, "rolled back"),
        (CUT, "rolled back, learning rate x0.5, clip x0.5"),
        (RollBack(1 / 300, 1.0), "rolled back, learning rate x0.00333"),
        (AcceptNewRegime(), "accepted as the new normal"),
    ],
)
def test_describe_says_what_is_done(response, words):
    assert describe(response) == words


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("skips", 0),
        ("skips_in_a_row", 0),
        ("rollbacks", -1),
        ("holds", 0),
        ("refill_every", 0),
        ("probation", 0),
        ("lr_factor", 0.0),
        ("lr_factor", 1.0),
        ("clip_factor", 1.5),
        ("clip_factor", math.nan),
    ],
)
def test_budget_refuses_a_value_out_of_range_and_repeats_it(option, value):
    with pytest.raises(ValueError, match=rf"{option} must be .*, got {value!r}"):
        Budget(**{option: value})


SMALL = st.integers(1, 5)
BUDGETS = st.builds(
    Budget,
    skips_in_a_row=SMALL,
    skips=SMALL,
    rollbacks=SMALL,
    holds=SMALL,
    refill_skips_every=SMALL,
    refill_every=SMALL,
    probation=SMALL,
    lr_factor=st.floats(0.01, 0.99),
    clip_factor=st.floats(0.01, 0.99),
)
ANOMALIES = st.sampled_from([BAD_BATCH, JUMP, DAMAGE, DIVERGENCE])
STREAMS = st.lists(st.one_of(ANOMALIES, st.integers(1, 4)), max_size=80)


def full(budget):
    return budget.skips + budget.rollbacks + budget.holds


@given(BUDGETS, STREAMS)
def test_responses_to_any_stream_are_bounded(budget, events):
    """The budget, and what healthy steps give back."""
    escalation = EscalationPolicy(budget)
    healthy = spent = 0
    for event in events:
        if isinstance(event, int):
            drive(escalation, [event])
            healthy += event
        elif drive(escalation, [event]) == [STOP]:
            healthy = spent = 0
            # A stop with something left of another sort is a stop all the same.
        else:
            spent += 1
        assert spent <= full(budget) + (
            healthy // budget.refill_skips_every + 2 * (healthy // budget.refill_every)
        )


@pytest.mark.parametrize(
    ("events", "words"),
    [
        # (kind, step) of each anomaly; an int is a healthy step of that number.
        ([("bad", 7)], ["step retried"]),
        ([("bad", 7), ("bad", 7)], ["step retried", "step skipped"]),
        # The batch that replaces a skipped one is checked on its own.
        (
            [("bad", 7)] * 4,
            [
                "step retried",
                "step skipped",
                "step retried with new random numbers",
                "step skipped",
            ],
        ),
        ([("bad", 7), 7, ("bad", 8)], ["step retried"] * 2),
        ([("damage", 30)], ["rolled back and replayed"]),
        # What recurs within ten steps of where it was found is the same anomaly.
        (
            [("damage", 30), 29, ("damage", 30), 30, 39, ("damage", 40)],
            [
                "rolled back and replayed",
                "rolled back and replayed without the suspect",
                "rolled back further and replayed without the suspect",
            ],
        ),
        (
            [("damage", 30)] * 4,
            [
                "rolled back and replayed",
                "rolled back and replayed without the suspect",
                "rolled back further and replayed without the suspect",
                "rolled back further and replayed without the suspect, learning rate x0.5, "
                "clip x0.5",
            ],
        ),
        # A bad batch among the replayed steps is neither a recurrence of the damage nor its end.
        (
            [("damage", 30), ("bad", 25), 25, ("damage", 30)],
            [
                "rolled back and replayed",
                "step retried",
                "rolled back and replayed without the suspect",
            ],
        ),
        # Damage from outside that comes later blames nothing; a divergence that comes later does.
        ([("damage", 30), 40, ("damage", 41)], ["rolled back and replayed"] * 2),
        (
            [("divergence", 30), 40, ("divergence", 41)],
            [
                "rolled back and replayed",
                "rolled back and replayed, learning rate x0.5, clip x0.5",
            ],
        ),
    ],
)
def test_escalation_with_replay_blames_only_what_recurs(events, words):
    """S17: nothing is changed before the same steps have shown the trouble again."""
    kinds = {"bad": BAD_BATCH, "damage": DAMAGE, "divergence": DIVERGENCE}
    escalation, given = EscalationPolicy(), []
    for event in events:
        if isinstance(event, int):
            escalation.healthy(event)
        else:
            found = replace(kinds[event[0]], step=event[1])
            given.append(describe(escalation.respond(found, replay=True, older=True)))
    assert given == words


def test_escalation_without_an_older_snapshot_goes_to_the_next_level():
    escalation = EscalationPolicy()
    responses = [escalation.respond(DAMAGE, replay=True, older=False) for _ in range(3)]
    assert responses == [
        RollBack(replay=True),
        RollBack(replay=True, skip_suspect=True),
        RollBack(0.5, 0.5, replay=True, skip_suspect=True),
    ]


@pytest.mark.parametrize(
    ("found", "recommended_action", "replay", "expected"),
    [
        # A learning rate that is too high makes every batch look bad: nothing is tried twice.
        (BAD_BATCH, "lower", True, RollBack(0.5, 0.5, replay=True)),
        (DAMAGE, "lower", True, RollBack(0.5, 0.5, replay=True)),
        (DIVERGENCE, "lower", False, CUT),
        # What jumped is held, whatever else is thought of it.
        (JUMP, "lower", True, HOLD),
        (BAD_BATCH, "stop", True, Stop("zeroed gain (9 against 1)")),
        (BAD_BATCH, "usual", False, SKIP),
    ],
)
def test_cause_chooses_the_action(found, recommended_action, replay, expected):
    """S17: an architectural cause ends in a diagnosis, not in a loop of rollbacks."""
    escalation = EscalationPolicy()
    response = escalation.respond(
        found, replay=replay, recommended_action=recommended_action, cause="zeroed gain"
    )
    assert response == expected


def test_lowering_by_cause_is_sized_by_evidence_and_ends_with_the_budget():
    escalation = EscalationPolicy(Budget(rollbacks=2))
    cuts = [
        escalation.respond(DIVERGENCE, excess=20.0, recommended_action="lower") for _ in range(3)
    ]
    assert cuts[:2] == [RollBack(0.05, 0.5), RollBack(0.05, 0.5)]
    assert isinstance(cuts[2], Stop)


def test_learning_rate_is_lowered_no_further_where_that_has_led_to_the_same():
    """Half the rate and the same spike at the same step: the rate is not what makes it."""
    escalation = EscalationPolicy()
    spike = anomaly("loss spike", step=60, value=50.0)
    assert escalation.respond(spike, replay=True, recommended_action="lower") == RollBack(
        0.5, 0.5, replay=True
    )
    for step in range(40, 60):
        escalation.healthy(step)
    again = replace(spike, value=48.0)
    assert escalation.respond(again, replay=True, recommended_action="lower") == RetryStep()
    assert escalation.respond(again, replay=True, recommended_action="lower") == SkipStep()


@pytest.mark.parametrize(("step", "value"), [(60, 20.0), (55, 50.0), (61, 50.0)])
def test_learning_rate_is_lowered_further_where_that_has_made_a_difference(step, value):
    escalation = EscalationPolicy()
    spike = anomaly("loss spike", step=60, value=50.0)
    escalation.respond(spike, replay=True, recommended_action="lower")
    for taken in range(40, step):
        escalation.healthy(taken)
    again = replace(spike, step=step, value=value)
    assert escalation.respond(again, replay=True, recommended_action="lower") == RollBack(
        0.5, 0.5, replay=True
    )


def test_what_was_tried_on_a_change_of_regime_is_forgotten_and_what_it_cost_is_not():
    escalation = EscalationPolicy()
    escalation.respond(anomaly("loss spike", step=60, value=50.0), recommended_action="lower")
    left = escalation.left
    escalation.regime_change()
    assert (
        escalation.left == left == {**EscalationPolicy().left, "rollbacks": Budget().rollbacks - 1}
    )
    assert escalation.lowered is None
    assert escalation.respond(DAMAGE) == RollBack()  # as the first, without a cut


ACTIONS = st.sampled_from(["usual", "usual", "lower"])


@given(
    BUDGETS,
    st.lists(
        st.one_of(
            st.tuples(ANOMALIES, st.integers(0, 30), st.booleans(), st.booleans(), ACTIONS),
            st.integers(0, 30),
        ),
        max_size=80,
    ),
)
def test_responses_to_any_stream_are_bounded_with_replay_too(budget, events):
    escalation = EscalationPolicy(budget)
    check, healthy, spent, refunded = escalation.reproducibility, 0, 0, 0
    for event in events:
        if isinstance(event, int):
            found_by_rollbacks = check.active and check.stage == 1
            escalation.healthy(event)
            refunded += 2 * (found_by_rollbacks and not check.active)
            healthy += 1
            continue
        found, step, replay, older, recommended_action = event
        recurred, rolled_back = replace(found, step=step), check.active
        response = escalation.respond(
            recurred, replay=replay, older=older, recommended_action=recommended_action
        )
        if isinstance(response, Stop):
            healthy = spent = refunded = 0
        else:
            spent += 1
            # A rollback that has led to a batch that is left out.
            refunded += rolled_back and isinstance(response, SkipStep)
        refilled = healthy // budget.refill_skips_every + 2 * (healthy // budget.refill_every)
        assert spent <= full(budget) + refilled + refunded


@given(BUDGETS, st.lists(ANOMALIES, min_size=16, max_size=40))
def test_anomalies_without_a_healthy_step_end_in_a_stop(budget, events):
    """Fifteen is the largest budget drawn; what follows the last response is a stop for ever."""
    responses = drive(EscalationPolicy(budget), events)
    damage = [r for r, e in zip(responses, events, strict=True) if e.state_corrupted]
    assert sum(r != STOP for r in responses) <= full(budget)
    assert STOP in responses
    assert damage.count(STOP) == max(0, len(damage) - sum(isinstance(r, RollBack) for r in damage))


@given(BUDGETS, STREAMS, st.floats(allow_nan=True, allow_infinity=True))
def test_rollback_within_probation_strictly_lowers_lr_and_clip(budget, events, excess):
    escalation = EscalationPolicy(budget)
    since = None
    for event in events:
        if isinstance(event, int):
            drive(escalation, [event])
            since = None if since is None else since + event
            continue
        response = escalation.respond(event, excess=excess)
        if isinstance(response, RollBack):
            assert 0 < response.lr_factor <= 1
            assert 0 < response.clip_factor <= 1
            if since is not None and since < budget.probation:
                assert response.lr_factor <= budget.lr_factor < 1
                assert response.clip_factor <= budget.clip_factor < 1
            since = 0


@given(BUDGETS, STREAMS, STREAMS)
def test_state_saved_in_the_middle_of_a_stream_goes_on_the_same(budget, before, after):
    escalation = EscalationPolicy(budget)
    drive(escalation, before)
    twin = EscalationPolicy(budget)
    twin.load_state_dict(escalation.state_dict())
    assert twin.left == escalation.left
    assert drive(twin, after) == drive(escalation, after)
    assert twin.state_dict() == escalation.state_dict()


@settings(max_examples=20)
@given(BUDGETS, STREAMS)
def test_state_goes_through_a_checkpoint(budget, events):
    escalation = EscalationPolicy(budget)
    drive(escalation, events)
    file = io.BytesIO()
    torch.save(escalation.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == escalation.state_dict()


def test_state_of_a_larger_budget_is_cut_to_todays():
    twin = EscalationPolicy(Budget(rollbacks=2, skips=3, holds=1))
    twin.load_state_dict(EscalationPolicy().state_dict())
    assert twin.left == {"skips": 3, "rollbacks": 2, "holds": 1}


def test_state_of_a_spent_budget_stays_spent_under_a_larger_budget():
    escalation = EscalationPolicy(Budget(rollbacks=1))
    drive(escalation, [DAMAGE])
    twin = EscalationPolicy(Budget(rollbacks=5))
    twin.load_state_dict(escalation.state_dict())
    assert drive(twin, [DAMAGE]) == [STOP]


def test_suspected_batch_index_is_known_after_a_restart():
    escalation, twin = EscalationPolicy(), EscalationPolicy()
    escalation.suspects_index = True
    state = escalation.state_dict()
    twin.load_state_dict(state)
    assert twin.suspects_index
    del state["suspects_index"]  # as an earlier version wrote it
    twin.load_state_dict(state)
    assert not twin.suspects_index


def test_left_is_a_copy():
    escalation = EscalationPolicy()
    escalation.left["skips"] = 0
    assert drive(escalation, [BAD_BATCH]) == [SKIP]


CLIPPED = ClipStep()


@pytest.mark.parametrize("signal", ["loss", "gradient"])
def test_certain_cause_stops_when_three_batches_in_a_row_have_failed(signal):
    nan = replace(anomaly("non-finite loss", step=4), signal=signal)
    escalation = EscalationPolicy()
    responses = [escalation.respond(nan, recommended_action="stop", cause="c") for _ in range(4)]
    assert [type(r) for r in responses] == [SkipStep, SkipStep, SkipStep, Stop]


def test_rollback_that_leads_to_a_bad_batch_counts_towards_no_stop():
    """Damage found late: rolled back, replayed, and the batch of the damage is left out."""
    escalation = EscalationPolicy(Budget(rollbacks=2))
    for step in range(0, 400, 20):
        for _ in range(20):
            escalation.healthy(step)
        late = anomaly("non-finite buffer", state_corrupted=True, step=step + 9)
        now = anomaly("non-finite buffer", step=step + 2)
        words = [describe(escalation.respond(each, replay=True)) for each in (late, now, now)]
        assert words == ["rolled back and replayed", "step retried", "step skipped"]
    assert escalation.left["rollbacks"] == 2


@pytest.mark.parametrize(
    ("steps", "replay", "responses"),
    [
        ([10], True, [RetryStep()]),
        ([10, 10], True, [RetryStep(), CLIPPED]),
        # The rest of the burst is clipped without another retry, a later spike is not.
        ([10, 10, 11, 12, 40], True, [RetryStep(), CLIPPED, CLIPPED, CLIPPED, RetryStep()]),
        ([10, 11, 40], False, [CLIPPED, CLIPPED, CLIPPED]),
    ],
)
def test_large_gradient_is_clipped_if_it_recurs_and_costs_no_budget(steps, replay, responses):
    escalation = EscalationPolicy()
    spikes = [anomaly("gradient spike", step=step) for step in steps]
    assert [
        escalation.respond(spike, replay=replay, clippable=True) for spike in spikes
    ] == responses
    assert escalation.left["rollbacks"] == Budget().rollbacks


def test_endless_large_gradients_never_end_in_a_rollback_or_a_stop():
    escalation = EscalationPolicy()
    for step in range(1000):
        spike = anomaly("gradient spike", step=step, value=1e9)
        for recommended in ("usual", "lower"):
            assert isinstance(
                escalation.respond(
                    spike, replay=True, clippable=True, recommended_action=recommended
                ),
                RetryStep | ClipStep,
            )


def test_large_gradient_in_damaged_state_is_rolled_back():
    response = EscalationPolicy().respond(
        anomaly("gradient spike", step=3), state_corrupted=True, replay=True, clippable=True
    )
    assert isinstance(response, RollBack)


@pytest.mark.parametrize(
    ("recommended", "rose", "last"),
    [("lower", True, RollBack(0.5, 0.5)), ("lower", False, CLIPPED), ("usual", True, CLIPPED)],
)
def test_clipping_in_vain_is_followed_by_a_lower_learning_rate(recommended, rose, last):
    """A run that diverges from its first step on is clipped in each step and learns nothing."""
    policy = EscalationPolicy()
    options = {"clippable": True, "recommended_action": recommended, "loss_rose": rose}
    spikes = (anomaly("gradient spike", step=step) for step in range(3, 14))
    assert [policy.respond(each, **options) for each in spikes] == [*[CLIPPED] * 10, last]
