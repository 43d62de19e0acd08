"""Readings and losses in, objections out."""

import pytest

from lit_stability.detectors import AttentionLogits, default_detectors
from lit_stability.detectors.panel import Panel
from lit_stability.stats import ProbeReading, StepStats


def steps(logits, losses, entropies=None, every=10):
    """One step per loss; a reading of each column of the logits at every tenth."""
    for step, loss in enumerate(losses):
        readings = []
        if step % every == 0 and step // every < len(logits):
            row = logits[step // every]
            for i, logit in enumerate(row if isinstance(row, tuple) else (row,)):
                readings.append(ProbeReading("attention_logit", f"blocks.{i}", logit))
                if entropies is not None:
                    readings.append(ProbeReading("attention_entropy", f"blocks.{i}", entropies))
        yield StepStats(step=step, loss=loss, grad_norm=1.0, readings=tuple(readings))


def run(stream, detector=None):
    """What it says: step, kind and module."""
    detector = detector or AttentionLogits(window=10)
    said = []
    for stats in stream:
        anomaly = detector.check(stats)
        if anomaly is not None:
            said.append((anomaly.step, anomaly.kind, anomaly.layers[0][0]))
        if anomaly is None or anomaly.observe_only:
            detector.update(stats)
    return said


FALLING = [4.0 * 0.99**i for i in range(200)]
STUCK = [3.0] * 200
GROWING = [10.0 * 3**i for i in range(20)]
GROWTH, COLLAPSE = "attention-logit growth", "attention collapse"


@pytest.mark.parametrize(
    ("logits", "losses", "entropy", "said"),
    [
        (GROWING, FALLING, 0.0, [(50, GROWTH, "blocks.0")]),
        (GROWING, STUCK, 0.3, [(50, GROWTH, "blocks.0")]),
        (GROWING, STUCK, 0.0, [(50, GROWTH, "blocks.0"), (70, COLLAPSE, "blocks.0")]),
        (GROWING, STUCK, None, [(50, GROWTH, "blocks.0")]),
        ([900.0] * 20, STUCK, 0.0, []),
        ([2000.0 - i for i in range(20)], FALLING, 0.0, []),
        ([2000.0 - i for i in range(20)], STUCK, 0.0, [(30, COLLAPSE, "blocks.0")]),
        ([900.0, 2000.0, 900.0, 2000.0, 900.0], STUCK, 0.0, [(10, GROWTH, "blocks.0")]),
        ([(5.0, x) for x in GROWING], FALLING, 0.0, [(50, GROWTH, "blocks.1")]),
        ([float("nan")] * 20, STUCK, 0.0, []),
        ([10.0, float("inf")], FALLING, None, [(10, GROWTH, "blocks.0")]),
    ],
)
def test_attention_logits_stream(logits, losses, entropy, said):
    assert run(steps(logits, losses, entropy)) == said


def test_collapse_is_bad_state_and_names_module_logit_and_entropy():
    detector = AttentionLogits(window=10)
    found = [detector.check(s) or detector.update(s) for s in steps([2000.0] * 20, STUCK, 0.01)]
    (anomaly,) = filter(None, found)
    assert anomaly.state_is_bad
    assert not anomaly.observe_only
    assert "blocks.0 has collapsed: logits of 2000, entropy 1.0% of the largest" in anomaly.message


def test_nothing_is_read_and_nothing_is_said():
    """Without a probe the default set has nothing to judge."""
    assert run(steps([], STUCK)) == []
    assert "AttentionLogits" in [type(d).__name__ for d in default_detectors()]


def test_what_was_told_is_not_told_again_after_a_resume():
    first, second = AttentionLogits(window=10), AttentionLogits(window=10)
    stream = list(steps(GROWING, STUCK, 0.0))
    assert len(run(stream[:100], first)) == 2
    second.load_state_dict(first.state_dict())
    assert run(stream[100:], second) == []


def test_all_ranks_find_it_before_they_look_at_gradients():
    panel = Panel([AttentionLogits(window=10)], [0], print)
    said = []
    for stats in steps(GROWING, FALLING, 0.0):
        anomaly, shared = panel.verdict(stats, voting=True)
        said += [(anomaly.step, shared)] if anomaly else []
        panel.learn(stats)
    assert said == [(50, False)], "an observation is told of when all ranks have voted for the step"


@pytest.mark.parametrize(
    "options", [{"bound": 0.0}, {"share": 1.0}, {"persist": 0}, {"window": 0}, {"fall": 1.0}]
)
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        AttentionLogits(**options)
