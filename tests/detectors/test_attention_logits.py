"""Readings and losses in, objections out."""

import pytest

from lit_stability.detectors import AttentionLogits, default_detectors
from lit_stability.detectors.detector_set import DetectorSet
from lit_stability.measurement.step_stats import ProbeReading, StepStats


def steps(logits, losses, entropy=None, every=10, first_entropy=0.9):
    """One step per loss; a reading of each column of the logits at every tenth.

    The entropy is ``first_entropy`` at the first reading and ``entropy`` from then on.
    """
    for step, loss in enumerate(losses):
        readings = []
        if step % every == 0 and step // every < len(logits):
            row = logits[step // every]
            for i, logit in enumerate(row if isinstance(row, tuple) else (row,)):
                readings.append(ProbeReading("attention_logit", f"blocks.{i}", logit))
                if entropy is not None:
                    seen = entropy if step else first_entropy
                    readings.append(ProbeReading("attention_entropy", f"blocks.{i}", seen))
        yield StepStats(step=step, loss=loss, grad_norm=1.0, readings=tuple(readings))


def run(stream, detector=None):
    """Returns step, kind and module of each anomaly."""
    detector = detector or AttentionLogits(window=10)
    found = []
    for stats in stream:
        anomaly = detector.check(stats)
        if anomaly is not None:
            found.append((anomaly.step, anomaly.kind, anomaly.layers[0][0]))
        if anomaly is None or anomaly.warn_only:
            detector.update(stats)
    return found


FALLING = [4.0 * 0.99**i for i in range(200)]
STUCK = [3.0] * 200
GROWING = [10.0 * 3**i for i in range(20)]
FALLEN = [2000.0 - i for i in range(20)]
GROWTH, COLLAPSE = "attention-logit growth", "attention collapse"


@pytest.mark.parametrize(
    ("logits", "losses", "entropy", "expected"),
    [
        (GROWING, FALLING, 0.0, [(60, GROWTH, "blocks.0")]),
        (GROWING, STUCK, 0.3, [(60, GROWTH, "blocks.0")]),
        (GROWING, STUCK, 0.0, [(60, GROWTH, "blocks.0"), (70, COLLAPSE, "blocks.0")]),
        (GROWING, STUCK, None, [(60, GROWTH, "blocks.0")]),
        ([900.0] * 20, STUCK, 0.0, []),
        ([5.0, *FALLEN], FALLING, 0.0, []),
        ([5.0, *FALLEN], STUCK, 0.0, [(30, COLLAPSE, "blocks.0")]),
        # One batch alone, as of inputs that are a thousand times too large.
        ([5.0, 5.0, 2000.0, 5.0, 2000.0], FALLING, 0.0, []),
        ([5.0, 1500.0, 2000.0], FALLING, 0.0, [(20, GROWTH, "blocks.0")]),
        ([(5.0, x) for x in GROWING], FALLING, 0.0, [(60, GROWTH, "blocks.1")]),
        ([float("nan")] * 20, STUCK, 0.0, []),
        ([10.0, float("inf"), float("inf")], FALLING, None, []),
        ([10.0, 2000.0, float("inf")], FALLING, None, [(20, GROWTH, "blocks.0")]),
    ],
)
def test_attention_logits_stream(logits, losses, entropy, expected):
    assert run(steps(logits, losses, entropy)) == expected


NOISY = [1500.0 * (1 + 0.3 * (i % 3)) for i in range(20)]
"""As of a pretrained trunk with biases in the thousands, which differs from batch to batch."""


@pytest.mark.parametrize(
    ("logits", "first_entropy"),
    [(NOISY, 0.9), (NOISY, 0.01), ([5.0, *FALLEN], 0.04)],
)
def test_attention_that_was_so_from_the_start_is_ignored(logits, first_entropy):
    """A healthy run: frozen and pretrained trunks are fine-tuned until the loss stands."""
    assert run(steps(logits, STUCK, 0.01, first_entropy=first_entropy)) == []


def test_collapse_is_bad_state_and_names_module_logit_and_entropy():
    detector = AttentionLogits(window=10)
    found = [
        detector.check(s) or detector.update(s) for s in steps([5.0] + [2000.0] * 20, STUCK, 0.01)
    ]
    (anomaly,) = filter(None, found)
    assert anomaly.state_corrupted
    assert not anomaly.warn_only
    assert "blocks.0 has collapsed: logits of 2000, entropy 1.0% of the largest" in anomaly.message


def test_without_readings_nothing_is_flagged():
    """Without a probe the detector has no readings."""
    assert run(steps([], STUCK)) == []
    assert "AttentionLogits" in [type(d).__name__ for d in default_detectors()]


def test_warning_is_not_repeated_after_a_resume():
    first, second = AttentionLogits(window=10), AttentionLogits(window=10)
    stream = list(steps(GROWING, STUCK, 0.0))
    assert len(run(stream[:100], first)) == 2
    second.load_state_dict(first.state_dict())
    assert run(stream[100:], second) == []


def test_all_ranks_find_it_before_they_look_at_gradients():
    detectors = DetectorSet([AttentionLogits(window=10)], [0], print)
    found = []
    for stats in steps(GROWING, FALLING, 0.0):
        anomaly, shared = detectors.verdict(stats, voting=True)
        found += [(anomaly.step, shared)] if anomaly else []
        detectors.learn(stats)
    assert found == [(60, False)], "a warning is reported after all ranks have voted for the step"


@pytest.mark.parametrize(
    "options",
    [{"bound": 0.0}, {"share": 1.0}, {"persist": 0}, {"rise": 0.5}, {"window": 0}, {"fall": 1.0}],
)
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        AttentionLogits(**options)
