"""What ranks make of each other's numbers, in floats."""

import math

import pytest

from lit_stability.detectors import (
    Anomaly,
    DetectorSet,
    NonFinite,
    Replicas,
    Spike,
    Vote,
    disagreement,
    rates_differ,
)
from lit_stability.measurement.step_stats import StepStats

NAN, INF = math.nan, math.inf
KIND = "rank disagreement"


def step(i=7, **fields):
    return StepStats(**({"step": i, "loss": 1.0, "grad_norm": 1.0} | fields))


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ([(False, 1.0), (False, 1.0)], None),
        ([(False, 1.0), (False, 1.0005)], None),
        ([(True, NAN), (True, INF)], None),
        ([(False, INF), (False, INF)], None),
        ([(True, 900.0), (True, 900.0)], None),
        ([(True, 900.0), (False, 1.0)], "rank 0 rejects its gradients"),
        ([(False, 1.0), (True, NAN), (True, NAN)], "ranks 1, 2 reject their gradients"),
        ([(False, 1.0), (False, 1.002)], "the ranks' averaged gradients differ"),
        ([(False, 1.0), (False, NAN)], "norms by rank: 1, nan"),
    ],
)
def test_votes_disagree_when_some_object_or_norms_differ(votes, message):
    anomaly = disagreement(step(), [Vote(*v) for v in votes])
    assert (anomaly is None) == (message is None)
    if anomaly is not None:
        assert message in anomaly.message
        assert (anomaly.kind, anomaly.step, anomaly.state_corrupted) == (KIND, 7, True)
        assert anomaly.layers[1][0] == "rank 1"


def test_vote_survives_the_way_through_a_row_of_numbers():
    for vote in (Vote(True, INF, True), Vote(False, 0.25), Vote(False, 3.0, True)):
        assert Vote.from_row(vote.row()) == vote


def test_rates_are_compared_exactly():
    assert rates_differ(step(rank_rates=(1e-3, 1e-3))) is None
    assert rates_differ(step()) is None
    anomaly = rates_differ(step(rank_rates=(1e-3, 1.0000001e-3)))
    assert (anomaly.kind, anomaly.signal) == (KIND, "learning_rate")


@pytest.mark.parametrize(
    ("checksums", "flags", "given_up"),
    [
        ([(5, 5)] * 6, [], False),
        ([(5, 5), (6, 6), (7, 7), (8, 9), (4, 4)], [3], False),
        ([(5, 5), (5, 6), (7, 7), (7, 8)], [], True),
        ([(5, 6)] * 5, [], True),
    ],
)
def test_weights_that_were_equal_and_differ_are_flagged(checksums, flags, given_up):
    replicas = Replicas(trust=3)
    sums = [tuple(map(float, pair)) for pair in checksums]
    found = [i for i, s in enumerate(sums) if replicas.check(step(i, rank_weights=s)) is not None]
    assert (found, replicas.given_up) == (flags, given_up)


def test_rank_outside_the_majority_is_named():
    replicas = Replicas(trust=0)
    anomaly = replicas.check(step(rank_weights=(5.0, 5.0, 4.0)))
    assert "the weights of rank 2 differ from those of the others" in anomaly.message
    anomaly = replicas.check(step(rank_weights=(5.0, 4.0)))
    assert "the ranks' weights are no longer the same" in anomaly.message


def test_weights_that_differ_make_any_anomaly_one_of_bad_state():
    spike = Anomaly(kind="loss spike", step=7, value=9.0, message="high", signal="loss")
    replicas = Replicas(trust=0)
    assert replicas.explain(spike, step(rank_weights=(5.0, 5.0))) == spike
    worse = replicas.explain(spike, step(rank_weights=(5.0, 4.0)))
    assert (worse.kind, worse.state_corrupted) == ("loss spike", True)
    assert worse.message.startswith("high; the ranks' weights")


class Mine:
    """A detector of a user's, who knows nothing of ranks."""

    asked = 0

    def check(self, stats):
        self.asked += 1

    def update(self, stats):
        pass

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("fields", "kind", "shared"),
    [
        ({}, None, False),
        ({"loss": NAN}, "non-finite loss", True),
        ({"loss": NAN, "grad_norm": NAN}, "non-finite loss", True),
        ({"grad_norm": NAN}, "non-finite gradient", False),
        ({"grad_norm": 900.0}, "gradient spike", False),
        ({"bad_weights": ("w",), "grad_norm": NAN}, "non-finite weight", True),
        ({"rank_rates": (1.0, 2.0), "grad_norm": NAN}, KIND, True),
        ({"rank_weights": (1.0, 2.0), "grad_norm": NAN}, KIND, True),
        # Under a loss scaler the verdict on a bad loss depends on the gradients.
        ({"loss": INF, "grad_norm": NAN, "loss_scale": 8.0}, "non-finite loss", False),
        ({"loss": INF, "loss_scale": 8.0}, None, False),
    ],
)
def test_what_a_rank_alone_may_have_seen_is_never_called_shared(fields, kind, shared):
    """Invariant 5: a rank whose own gradients are bad as well finds the same shared anomaly."""
    detectors = DetectorSet([Spike(min_history=3), NonFinite(), Mine()], [0], print)
    for i in range(5):
        detectors.verdict(step(i, rank_weights=(1.0, 1.0)), voting=True)
        detectors.learn(step(i))
    anomaly, is_shared = detectors.verdict(step(**fields), voting=True)
    assert (anomaly and anomaly.kind, is_shared) == (kind, shared)


def test_detector_that_says_nothing_of_ranks_is_asked_once_and_not_before_the_shared_ones():
    detectors = DetectorSet([Mine()], [0], print)
    detectors.verdict(step(), voting=True)
    detectors.verdict(step(loss=NAN), voting=False)
    assert detectors.state_dict() == {"0": [["Mine 0", {"asked": 2}]]}
