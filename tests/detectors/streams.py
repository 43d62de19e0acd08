"""Rows in, objections out: how the tests of this folder drive a detector."""

import io

import torch

from lit_stability.measurement.step_stats import StepStats


def step(i, **fields):
    return StepStats(**({"step": i, "loss": 1.0, "grad_norm": 1.0} | fields))


def told(detector, rows, start=0):
    """The anomalies of a stream; what a detector only tells of is learnt, as the monitor does."""
    found = []
    for i, row in enumerate(rows, start):
        stats = row if isinstance(row, StepStats) else step(i, **row)
        anomaly = detector.check(stats)
        if anomaly is not None:
            found.append(anomaly)
        if anomaly is None or anomaly.warn_only:
            detector.update(stats)
    return found


def steps_of(anomalies):
    return [anomaly.step for anomaly in anomalies]


def through_a_checkpoint(state):
    """What a checkpoint makes of a state, read as Lightning reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def told_with_a_resume(make, rows, at):
    """As `told` of a fresh detector, which is replaced by another at a step."""
    first, second = make(), make()
    before = told(first, rows[:at])
    second.load_state_dict(through_a_checkpoint(first.state_dict()))
    return before + told(second, rows[at:], at)
